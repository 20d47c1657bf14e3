"""Google Cloud Storage: check access to buckets before work starts, and lock a workdir for one run at a time.

All other code uses gs:// paths like folders, through etils' epath and Orbax. Google's libraries are imported where they
are first needed.
"""

import concurrent.futures
import contextlib
import json
import logging
import os
import pathlib
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from dmpo_jax.config import ConfigError

logger = logging.getLogger(__name__)

PREFIX = "gs://"
CHECK_SECONDS = 10.0  # time limit for checking a bucket
REQUEST_SECONDS = 5.0
RETRY_SECONDS = 4.0  # how long a request is retried if the bucket is busy or the network fails
LEASE_SECONDS = 30.0  # a lock that was not renewed for this long belongs to a dead process


def is_in_bucket(path: epath.PathLike) -> bool:
  """Whether a path is in a bucket."""
  return os.fspath(path).startswith(PREFIX)


def check(read: Mapping[str, epath.PathLike], written: Mapping[str, epath.PathLike] | None = None) -> None:
  """Check access to every bucket among these paths; paths of folders pass.

  Args:
    read, written: paths by the option or key that gave them, for the message.

  Raises:
    ConfigError: a bucket does not exist, does not respond or denies access; the message says what to do.
  """
  checks: dict[str, tuple[str, str, bool]] = {}  # by bucket; writing needs reading too
  for paths, is_written in ((written or {}, True), (read, False)):
    for option, path in paths.items():
      path = os.fspath(path)
      if is_in_bucket(path):
        checks.setdefault(_split(path)[0], (option, path, is_written))
      elif "://" in path:
        raise ConfigError(f"{option}={path}: give a folder or a gs:// path")
  for arguments in checks.values():
    _check_in_time(*arguments)


def refuse(option: str, path: epath.PathLike) -> None:
  """Refuse a path in a bucket where a folder is needed.

  Raises:
    ConfigError: it is in a bucket.
  """
  if "://" in os.fspath(path):
    raise ConfigError(f"{option}={path}: this can only be a local folder; copy it to the bucket afterwards")


def _check_in_time(option: str, path: str, is_written: bool) -> None:
  """Check in a thread with a time limit: looking up credentials and addresses can take minutes."""
  result: concurrent.futures.Future[None] = concurrent.futures.Future()

  def run() -> None:
    try:
      _check_access(path, is_written)
      result.set_result(None)
    except Exception as error:
      result.set_exception(error)

  threading.Thread(target=run, daemon=True).start()
  try:
    result.result(timeout=CHECK_SECONDS)
  except ImportError as error:
    package = "google-cloud-storage-control" if "control" in str(error) else "google-cloud-storage"
    raise ConfigError(
      f"{option}={path}: {package} is not installed, and gs:// paths need it: pip install {package}"
    ) from error
  except TimeoutError as error:
    raise ConfigError(
      f"{option}={path}: no answer within {CHECK_SECONDS:.0f} s: can this machine reach "
      "storage.googleapis.com (or does it need a proxy in HTTPS_PROXY)?"
    ) from error
  except Exception as error:  # of Google's libraries or of the network
    raise ConfigError(f"{option}={path}: {_explain(error, _split(path)[0], is_written)}") from error


def _check_access(path: str, is_written: bool) -> None:
  """List an object. For writing, also make the request that Orbax makes first, and try a write that must fail."""
  from google.api_core import exceptions
  from google.cloud import storage

  name, prefix = _split(path)
  client, options = storage.Client(), _options()
  next(iter(client.list_blobs(name, prefix=prefix, max_results=1, **options)), None)
  if not is_written:
    return
  bucket = client.get_bucket(name, **options)
  if bucket.hierarchical_namespace_enabled:
    from google.cloud import storage_control_v2  # noqa: F401  Orbax removes folders with it
  # Every host writes its own object, as writes to one object are limited to one a second.
  blob = bucket.blob(f"{prefix.rstrip('/')}/.check-{uuid.uuid4().hex}")
  with contextlib.suppress(exceptions.PreconditionFailed):  # the write is allowed, but there is no generation 1
    blob.upload_from_string(b"", if_generation_match=1, **options)


def _options() -> dict[str, Any]:
  """Return the time limits of a request and of its retries."""
  from google.cloud.storage import retry

  return dict(timeout=REQUEST_SECONDS, retry=retry.DEFAULT_RETRY.with_timeout(RETRY_SECONDS))


def _explain(error: Exception, bucket: str, is_written: bool) -> str:
  from google.api_core import exceptions
  from google.auth import exceptions as auth

  if isinstance(error, exceptions.RetryError):
    error = error.cause or error
  message = (str(error).splitlines() or [type(error).__name__])[0][:300]
  if isinstance(error, exceptions.NotFound):
    return f"there is no bucket {bucket}: gcloud storage buckets create {PREFIX}{bucket}, or give another path"
  if isinstance(error, exceptions.Forbidden | exceptions.Unauthorized):
    roles = "roles/storage.objectViewer"
    if is_written:
      roles = (
        "roles/storage.objectUser and roles/storage.legacyBucketReader"  # the second for reading the bucket's metadata
      )
    return f"access is denied ({message}): grant {roles} to this machine's service account or your login"
  if isinstance(error, auth.DefaultCredentialsError):
    return "no credentials found: run gcloud auth application-default login, or give this machine a service account"
  return f"it cannot be reached ({type(error).__name__}: {message}): check this machine's network and credentials"


def _split(path: epath.PathLike) -> tuple[str, str]:
  """Split a path into its bucket and the rest."""
  bucket, _, rest = os.fspath(path).removeprefix(PREFIX).partition("/")
  return bucket, rest


class Held(RuntimeError):
  """Another run holds the lock; the message names it."""


class Lock:
  """A lock that is an object in a bucket: the first process to write it holds it, and renews it while alive.

  Every write names the generation of the object that it replaces. So only one of two runs can take over the lock of a
  dead one, and a holder whose lock was taken over finds out when it renews it.

  Args:
    path: of the object.
    on_lost: called from another thread with the name of the new holder once the lock has been taken over.
    lease_seconds: a lock that was not renewed for this long may be taken over.
  """

  def __init__(self, path: epath.PathLike, on_lost: Callable[[str], None], lease_seconds: float = LEASE_SECONDS):
    from google.cloud import storage

    name, key = _split(path)
    self._path, self._bucket, self._key = os.fspath(path), storage.Client().bucket(name), key
    self._on_lost, self._lease_seconds, self._options = on_lost, lease_seconds, _options()
    self._metadata = {"pid": os.getpid(), "host": platform.node(), "since": _now(), "token": uuid.uuid4().hex}
    self._metadata["machine"] = _machine()
    self._generation = 0
    self._is_ending = threading.Event()
    self._thread = threading.Thread(target=self._renew_until_released, daemon=True, name="lock")

  def acquire(self) -> None:
    """Take the lock. If another run seems to hold it, wait for a renewal first.

    Raises:
      Held: the other run renewed it.
    """
    while not self._write(0):
      found = self._read()
      if found is None:  # released just now
        continue
      generation, holder = found
      if not _has_died_here(holder):
        self._watch(generation, holder)
      if self._write(generation):
        break
    self._thread.start()

  def _watch(self, generation: int, holder: Mapping[str, Any]) -> None:
    """Wait until the lease has expired or the lock is gone; raise `Held` if it is renewed."""
    print(f"{self._path} is held by {_name(holder)}: waiting for a sign of life", file=sys.stderr, flush=True)
    deadline = time.monotonic() + 1.5 * self._lease_seconds
    while time.monotonic() < deadline:
      time.sleep(self._lease_seconds / 30)
      found = self._read()
      if found is None:
        return
      if found[0] != generation:
        raise Held(_name(found[1]))

  def release(self) -> None:
    """Release the lock, unless another run has taken it over."""
    from google.api_core import exceptions

    self._is_ending.set()
    self._thread.join()
    try:
      self._blob().delete(if_generation_match=self._generation, **self._options)
    except (exceptions.NotFound, exceptions.PreconditionFailed):
      pass  # another run holds it
    except Exception as error:  # of the network: the lease expires by itself
      logger.warning("%s could not be removed: %r", self._path, error)

  def _renew_until_released(self) -> None:
    renewed_at = time.monotonic()
    while not self._is_ending.wait(self._lease_seconds / 3):
      try:
        if not self._write(self._generation):
          found = self._read()
          self._on_lost(_name(found[1]) if found else "an unknown process, which removed it")
          return
        renewed_at = time.monotonic()
      except Exception as error:  # of the network: retried; another run may take the lock meanwhile
        silent = time.monotonic() - renewed_at
        if silent > self._lease_seconds:
          logger.warning("%s has not been renewed for %.0f s: %r", self._path, silent, error)

  def _write(self, generation: int) -> bool:
    """Replace this generation of the object (0: none); False: it is no longer the current one."""
    from google.api_core import exceptions

    blob, text = self._blob(), json.dumps(self._metadata | {"renewed": _now()}, indent=1) + "\n"
    try:
      blob.upload_from_string(text, if_generation_match=generation, **self._options)
    except exceptions.PreconditionFailed:
      found = self._read()  # perhaps an earlier write of ours, whose response was lost
      if found is None or found[1].get("token") != self._metadata["token"]:
        return False
      self._generation = found[0]
      return True
    self._generation = blob.generation
    return True

  def _read(self) -> tuple[int, dict[str, Any]] | None:
    """Read the object's generation and content; None if there is none."""
    from google.api_core import exceptions

    while (blob := self._bucket.get_blob(self._key, **self._options)) is not None:
      assert blob.generation is not None  # it is in the store
      try:
        text = blob.download_as_bytes(if_generation_match=blob.generation, **self._options)
        return blob.generation, dict(json.loads(text))
      except (exceptions.NotFound, exceptions.PreconditionFailed):  # renewed or removed since
        continue
      except (ValueError, TypeError):  # not a lock of ours: it is never renewed, so it is taken over
        return blob.generation, {}
    return None

  def _blob(self) -> Any:
    return self._bucket.blob(self._key)


def _has_died_here(holder: Mapping[str, Any]) -> bool:
  """Whether a holder was a process of this host that no longer exists."""
  is_here = holder.get("host") == platform.node() and holder.get("machine") == _machine()
  if not is_here or not isinstance(holder.get("pid"), int):
    return False
  try:
    os.kill(holder["pid"], 0)
  except ProcessLookupError:
    return True
  except PermissionError:
    pass
  return False


def _machine() -> str:
  """Tell machines and containers of one name apart, by boot and by namespace of process ids."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:  # not Linux
    return ""


def _name(holder: Mapping[str, Any]) -> str:
  return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')}"


def _now() -> str:
  return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
