"""A bucket of Google Cloud Storage in the memory of this machine, for a rehearsal or a test.

    with bucket.running(("bucket",), folder) as emulator:
      subprocess.run(command, env=os.environ | emulator.environment)    # reads and writes gs://bucket/...

Environment variables lead each library to it: STORAGE_EMULATOR_HOST for google-cloud-storage and gcsfs,
TENSORSTORE_GCS_HTTP_URL for tensorstore. The address is built into TensorFlow's gfile, which therefore comes through
HTTPS_PROXY: this server is the proxy, ends TLS, and has a certificate that CURL_CA_BUNDLE names as trusted.
"""

import contextlib
import dataclasses
import datetime
import ipaddress
import pathlib
import re
import ssl
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from launch.rehearse.api import Answer, Api, Request
from launch.rehearse.objects import Buckets

HERE = "127.0.0.1"
HOSTS = ("*.googleapis.com", "localhost")
UNAVAILABLE = Answer(503, b'{"error": {"code": 503, "message": "backendError"}}')


@dataclasses.dataclass
class Fault:
  """A simulated fault: the next `times` requests whose "METHOD /path?query" matches the pattern fail.

  They are answered with `status`; for 0 the connection is closed without an answer.
  """

  pattern: str
  times: int
  status: int = 503


@dataclasses.dataclass
class Emulator:
  """A running bucket.

  Attributes:
    environment: the variables that lead each library to it.
    buckets: the objects.
    faults: simulated faults; may be changed at any time.
    unknown: unsupported requests; empty unless a library makes new ones.
  """

  environment: dict[str, str]
  buckets: Buckets
  faults: list[Fault]
  unknown: list[str]


@contextlib.contextmanager
def running(names: Sequence[str], folder: pathlib.Path) -> Iterator[Emulator]:
  """Serve empty buckets of these names on a free port of this machine.

  Args:
    folder: gets the certificate and the log of all requests (requests.log).
  """
  folder.mkdir(parents=True, exist_ok=True)
  certificate, key = write_certificate(folder)
  context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
  context.load_cert_chain(certificate, key)
  api = Api(Buckets(tuple(names)))
  with _Server(api, context, folder / "requests.log") as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
      environment = _environment(f"http://{HERE}:{server.server_port}", certificate, folder)
      yield Emulator(environment, api.buckets, server.faults, api.unknown)
    finally:
      server.shutdown()
      thread.join()


def _environment(url: str, certificate: pathlib.Path, folder: pathlib.Path) -> dict[str, str]:
  """Return the variables that lead each library to `url`, without credentials."""
  here = f"{HERE},localhost"  # otherwise jax.distributed would reach the coordinator through the proxy
  return {
    "STORAGE_EMULATOR_HOST": url,
    "TENSORSTORE_GCS_HTTP_URL": url,
    "TENSORSTORE_CA_BUNDLE": str(certificate),
    "CURL_CA_BUNDLE": str(certificate),
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "rehearsal",  # gfile and tensorstore look for no other then
    "NO_GCE_CHECK": "true",
    "GOOGLE_CLOUD_PROJECT": "rehearsal",
    "GOOGLE_APPLICATION_CREDENTIALS": "",
    "CLOUDSDK_CONFIG": str(folder / "no_credentials"),
  } | {
    name: value
    for lower, value in (("https_proxy", url), ("no_proxy", here), ("no_grpc_proxy", here))
    for name in (lower, lower.upper())
  }


class _Server(ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 256

  def __init__(self, api: Api, context: ssl.SSLContext, log: pathlib.Path):
    super().__init__((HERE, 0), _Handler)
    self.api, self.context, self.faults = api, context, []
    self.lock = threading.Lock()
    self._log = log.open("a", buffering=1)

  def answer(self, request: Request) -> Answer | None:
    """Return the answer to a request; None: close the connection."""
    with self.lock:
      fault = next((f for f in self.faults if f.times > 0 and re.search(f.pattern, _line(request))), None)
      if fault is None:
        answer = self.api.answer(request)
      else:
        fault.times -= 1
        answer = dataclasses.replace(UNAVAILABLE, status=fault.status) if fault.status else None
      self._log.write(f"{_line(request)} {answer.status if answer else 'closed'}\n")
    return answer

  def server_close(self) -> None:
    super().server_close()
    self._log.close()

  def handle_error(self, request: object, client_address: object) -> None:
    """Print nothing about clients that were killed during a request."""


def _line(request: Request) -> str:
  return f"{request.method} {request.target}"


class _Handler(BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  wbufsize = -1
  disable_nagle_algorithm = True
  scheme = "http"

  def do_CONNECT(self) -> None:
    """Accept TLS for any host, so that the requests inside reach this bucket."""
    self.send_response(200, "Connection established")
    self.end_headers()
    self.wfile.flush()
    assert isinstance(self.server, _Server)
    self.connection = self.server.context.wrap_socket(self.connection, server_side=True)
    self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb")
    self.scheme, self.close_connection = "https", False

  def _answer(self) -> None:
    origin = f"{self.scheme}://{self.headers.get('Host', HERE)}"
    headers = {name.lower(): value for name, value in self.headers.items()}
    assert isinstance(self.server, _Server)
    answer = self.server.answer(Request(self.command, self.path, headers, self._body(), origin))
    if answer is None:
      self.close_connection = True
      return
    self.send_response(answer.status)
    for name, value in answer.headers.items():
      self.send_header(name, value)
    has_body = answer.status not in (204, 304)
    if has_body:
      self.send_header("Content-Length", str(len(answer.body)))
    self.end_headers()
    if has_body and self.command != "HEAD":
      self.wfile.write(answer.body)
    self.wfile.flush()

  do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

  def _body(self) -> bytes:
    if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
      return self.rfile.read(int(self.headers.get("Content-Length") or 0))
    pieces = []
    while size := int(self.rfile.readline().split(b";")[0], 16):
      pieces.append(self.rfile.read(size))
      self.rfile.readline()
    while self.rfile.readline().strip():  # trailers
      pass
    return b"".join(pieces)

  def finish(self) -> None:
    with contextlib.suppress(OSError, ValueError):
      super().finish()
    self.connection.close()

  def log_message(self, *args: object) -> None:
    """Print nothing: requests have their own log."""


def write_certificate(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Write a self-signed certificate for Google's hosts, and its key; return both files."""
  key = ec.generate_private_key(ec.SECP256R1())
  name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bucket of a rehearsal")])
  now = datetime.datetime.now(datetime.UTC)
  names = [*map(x509.DNSName, HOSTS), x509.IPAddress(ipaddress.ip_address(HERE))]
  certificate = (
    x509.CertificateBuilder()
    .subject_name(name)
    .issuer_name(name)
    .public_key(key.public_key())
    .serial_number(x509.random_serial_number())
    .not_valid_before(now - datetime.timedelta(hours=1))
    .not_valid_after(now + datetime.timedelta(days=2))
    .add_extension(x509.SubjectAlternativeName(names), critical=False)
    .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    .sign(key, hashes.SHA256())
  )
  paths = folder / "certificate.pem", folder / "key.pem"
  paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
  private = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
  paths[1].touch(mode=0o600)
  paths[1].write_bytes(key.private_bytes(*private))
  return paths
