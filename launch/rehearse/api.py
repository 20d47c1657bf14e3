"""Serves requests to Google Cloud Storage from buckets in memory.

It knows the JSON API as google-cloud-storage, tensorstore and gcsfs use it, and the reads by object name (XML API) of
TensorFlow's gfile. Other requests get status 501 and are recorded in `unknown`.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from launch.rehearse.objects import Buckets, Object, Refused

BUCKET = "(?:/storage/v1)?/b/([^/]+)"
CONDITIONS = re.compile("if(?:Source)?(?:Meta)?[gG]eneration(?:Not)?Match|generation|sourceGeneration")
HEADERS = {  # conditions of the XML API
  "x-goog-if-generation-match": "ifGenerationMatch",
  "x-goog-if-metageneration-match": "ifMetagenerationMatch",
}


@dataclasses.dataclass(frozen=True)
class Request:
  """An HTTP request.

  Attributes:
    target: the path with its query, quoted.
    headers: by names in lower case.
    origin: scheme and host of the URL.
  """

  method: str
  target: str
  headers: Mapping[str, str]
  body: bytes = b""
  origin: str = ""

  @property
  def path(self) -> str:
    """Return the target without its query, quoted."""
    return urlsplit(self.target).path

  @property
  def query(self) -> dict[str, str]:
    """Return the parameters of the target."""
    return dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))


@dataclasses.dataclass(frozen=True)
class Answer:
  """An HTTP response."""

  status: int
  body: bytes = b""
  headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Upload:
  """A resumable upload, with the data received so far."""

  bucket: str
  name: str
  conditions: Mapping[str, str]
  about: Mapping[str, Any]
  data: bytes = b""


class Api:
  """Answers requests one at a time."""

  def __init__(self, buckets: Buckets):
    self.buckets = buckets
    self.unknown: list[str] = []  # unsupported requests
    self._uploads: dict[str, Upload] = {}
    self._numbers = map(str, itertools.count(1))
    objects = f"{BUCKET}/o"
    one = f"{objects}/(.+)"
    self._routes: list[tuple[str, str, Callable[..., Answer]]] = [
      ("POST", "/batch(?:/storage/v1)?", self._batch),
      ("POST", "(?:/storage/v1)?/b", self._create_bucket),
      ("GET", BUCKET, self._bucket),
      ("GET", f"{BUCKET}/storageLayout", self._layout),
      ("POST|PUT|DELETE", "(?:/resumable)?/upload(?:/storage/v1)?/b/([^/]+)/o", self._upload),
      ("GET", objects, self._list),
      ("POST", f"{one}/(?:rewriteTo|copyTo)/b/([^/]+)/o/(.+)", self._copy),
      ("POST", f"{one}/moveTo/o/(.+)", self._move),
      ("POST|PUT", f"{one}/compose", self._compose),
      ("GET", f"(?:/download)?{one}", self._object),
      ("PATCH|PUT", one, self._patch),
      ("DELETE", one, self._delete),
      ("GET|HEAD", r"/(?!storage/|b/|download/|upload/)([^/]+)/(.+)", self._read_by_name),
    ]

  def answer(self, request: Request) -> Answer:
    """Serve a request; errors are answers too."""
    try:
      for methods, path, handle in self._routes:
        match = re.fullmatch(path, request.path)
        if match and request.method in methods.split("|"):
          return handle(request, *map(unquote, match.groups()))
      self.unknown.append(f"{request.method} {request.target}")
      raise Refused(501, f"the bucket of the rehearsal does not support {request.method} {request.path}")
    except Refused as refused:
      if refused.status == 304 and request.method not in ("GET", "HEAD"):
        refused = Refused(412, "conditionNotMet")
      error = {"code": refused.status, "message": refused.reason, "errors": [{"reason": refused.reason}]}
      return _json({"error": error}, refused.status)

  def _batch(self, request: Request) -> Answer:
    """Answer a batch of requests, by which google-cloud-storage and gcsfs delete."""
    parts = []
    for headers, inner in _parts(request):
      line, _, rest = inner.partition(b"\n")
      method, target = line.decode().split()[:2]
      body = re.split(rb"\r?\n\r?\n", rest, maxsplit=1)[-1]
      answer = self.answer(Request(method, target, {}, body, request.origin))
      status = (
        f"HTTP/1.1 {answer.status} -\r\nContent-Type: application/json\r\nContent-Length: {len(answer.body)}\r\n\r\n"
      )
      number = headers.get("content-id", "").strip("<>")
      head = f"--batch\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n"
      parts.append(f"{head}{status}".encode() + answer.body + b"\r\n")
    return Answer(200, b"".join(parts) + b"--batch--\r\n", {"Content-Type": "multipart/mixed; boundary=batch"})

  def _create_bucket(self, request: Request) -> Answer:
    name = json.loads(request.body)["name"]
    self.buckets.create(name)
    return self._bucket(request, name)

  def _bucket(self, request: Request, bucket: str) -> Answer:
    self.buckets.objects(bucket)
    place = {"location": "US-CENTRAL1", "locationType": "region", "storageClass": "STANDARD"}
    return _json({"kind": "storage#bucket", "id": bucket, "name": bucket, **place})

  def _layout(self, request: Request, bucket: str) -> Answer:
    self.buckets.objects(bucket)
    return _json({"kind": "storage#storageLayout", "bucket": bucket, "location": "US-CENTRAL1"})

  def _list(self, request: Request, bucket: str) -> Answer:
    return _json(self.buckets.listing(bucket, request.query))

  def _upload(self, request: Request, bucket: str) -> Answer:
    query = request.query
    if "upload_id" in query:
      return self._continue_upload(request, query["upload_id"])
    kind, conditions = query.get("uploadType", "media"), _conditions(request)
    if kind == "media":
      return self._store(bucket, query["name"], request.body, conditions, {})
    if kind == "multipart":
      (_, about), (_, data) = _parts(request)
      about = json.loads(about)
      return self._store(bucket, query.get("name") or about["name"], data, conditions, about)
    about = json.loads(request.body or b"{}")
    name = query.get("name") or about["name"]
    self.buckets.check(bucket, name, conditions)
    number = next(self._numbers)
    self._uploads[number] = Upload(bucket, name, conditions, about)
    place = f"{request.origin}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
    return Answer(200, headers={"Location": place, "X-GUploader-UploadID": number})

  def _continue_upload(self, request: Request, number: str) -> Answer:
    """Take a piece of a resumable upload, and return how much has been received."""
    upload = self._uploads.get(number)
    if upload is None:
      raise Refused(404, f"no upload {number}")
    if request.method == "DELETE":
      del self._uploads[number]
      return Answer(499)
    piece = re.fullmatch(r"bytes (?:(\*)|(\d+)-\d+)/(\*|\d+)", request.headers.get("content-range", "bytes 0-0/0"))
    if piece is None:
      raise Refused(400, f"content-range: {request.headers['content-range']}")
    if not piece[1]:
      upload.data = upload.data[: int(piece[2])] + request.body
    if piece[3] != "*" and len(upload.data) >= int(piece[3]):
      del self._uploads[number]
      return self._store(upload.bucket, upload.name, upload.data, upload.conditions, upload.about)
    received = {"Range": f"bytes=0-{len(upload.data) - 1}"} if upload.data else {}
    return Answer(308, headers=received)

  def _store(
    self, bucket: str, name: str, data: bytes, conditions: Mapping[str, str], about: Mapping[str, Any]
  ) -> Answer:
    kind = about.get("contentType") or "application/octet-stream"
    made = self.buckets.put(bucket, name, data, conditions, content_type=kind, metadata=about.get("metadata") or {})
    return _json(made.describe(bucket, name))

  def _copy(self, request: Request, bucket: str, name: str, to_bucket: str, to_name: str) -> Answer:
    made = self._copied(request, bucket, name, to_bucket, to_name)
    resource, size = made.describe(to_bucket, to_name), str(len(made.data))
    if "/copyTo/" in request.path:
      return _json(resource)
    done = {"done": True, "totalBytesRewritten": size, "objectSize": size, "resource": resource}
    return _json({"kind": "storage#rewriteResponse", **done})

  def _move(self, request: Request, bucket: str, name: str, to_name: str) -> Answer:
    made = self._copied(request, bucket, name, bucket, to_name)
    self.buckets.delete(bucket, name, {})
    return _json(made.describe(bucket, to_name))

  def _copied(self, request: Request, bucket: str, name: str, to_bucket: str, to_name: str) -> Object:
    conditions = _conditions(request)
    of_source = {key: value for key, value in conditions.items() if "ource" in key}
    renamed = {key.replace("ifSource", "if").replace("sourceG", "g"): value for key, value in of_source.items()}
    old = self.buckets.get(bucket, name, renamed)
    rest = {key: value for key, value in conditions.items() if key not in of_source}
    return self.buckets.put(to_bucket, to_name, old.data, rest, content_type=old.content_type, metadata=old.metadata)

  def _compose(self, request: Request, bucket: str, name: str) -> Answer:
    order = json.loads(request.body)
    sources = [
      self.buckets.get(bucket, part["name"], part.get("objectPreconditions", {})) for part in order["sourceObjects"]
    ]
    data = b"".join(source.data for source in sources)
    return self._store(bucket, name, data, _conditions(request), order.get("destination") or {})

  def _object(self, request: Request, bucket: str, name: str) -> Answer:
    if request.query.get("alt") == "media":
      return self._read_by_name(request, bucket, name)
    return _json(self.buckets.get(bucket, name, _conditions(request)).describe(bucket, name))

  def _patch(self, request: Request, bucket: str, name: str) -> Answer:
    changed = self.buckets.patch(bucket, name, json.loads(request.body), _conditions(request))
    return _json(changed.describe(bucket, name))

  def _delete(self, request: Request, bucket: str, name: str) -> Answer:
    self.buckets.delete(bucket, name, _conditions(request))
    return Answer(204)

  def _read_by_name(self, request: Request, bucket: str, name: str) -> Answer:
    """Return the bytes of an object, or the requested range of them."""
    found = self.buckets.get(bucket, name, _conditions(request))
    size, resource = len(found.data), found.describe(bucket, name)
    headers = {
      "Content-Type": found.content_type,
      "ETag": f'"{found.generation}"',
      "X-Goog-Generation": str(found.generation),
      "X-Goog-Metageneration": str(found.metageneration),
      "X-Goog-Stored-Content-Length": str(size),
      "X-Goog-Hash": f"crc32c={resource['crc32c']},md5={resource['md5Hash']}",
    }
    span = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if span is None:
      return Answer(200, found.data, headers)
    first = int(span[1]) if span[1] else max(0, size - int(span[2]))
    end = min(size, int(span[2]) + 1) if span[1] and span[2] else size
    if first >= size:
      return Answer(416, headers={"Content-Range": f"bytes */{size}"})
    return Answer(206, found.data[first:end], headers | {"Content-Range": f"bytes {first}-{end - 1}/{size}"})


def _json(content: object, status: int = 200) -> Answer:
  return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json; charset=UTF-8"})


def _conditions(request: Request) -> dict[str, str]:
  """Return the preconditions of a request, from its query or its headers."""
  found = {key: value for key, value in request.query.items() if CONDITIONS.fullmatch(key)}
  return found | {name: request.headers[header] for header, name in HEADERS.items() if header in request.headers}


def _parts(request: Request) -> list[tuple[dict[str, str], bytes]]:
  """Split a multipart body into the headers, in lower case, and the content of each part."""
  boundary = re.search(r'boundary="?([^";]+)"?', request.headers["content-type"])
  assert boundary is not None  # in every multipart request
  delimiter = b"--" + boundary[1].strip("'").encode()
  newline = b"\r\n" if delimiter + b"\r\n" in request.body else b"\n"  # gcsfs writes \n
  found = []
  for part in (newline + request.body).split(newline + delimiter)[1:-1]:
    head, content = part.removeprefix(newline).split(newline + newline, 1)
    lines = (line.partition(":") for line in head.decode().splitlines())
    found.append(({name.strip().lower(): value.strip() for name, _, value in lines}, content))
  return found
