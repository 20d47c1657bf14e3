"""Buckets of Google Cloud Storage: whether they can be used, before work starts, and a lock for one run at a time.

Everything else reads and writes gs:// paths as it does folders, by etils' epath and by Orbax. Google's libraries are
imported where they are first needed.
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
CHECK_SECONDS = 10.0  # that a bucket's answer may take
REQUEST_SECONDS = 5.0
RETRY_SECONDS = 4.0  # that a request is repeated for where the bucket is busy or the network stumbles
LEASE_SECONDS = 30.0  # a lock that was not renewed for so long has lost its process


def is_in_bucket(path: epath.PathLike) -> bool:
  """Return whether a path is one of a bucket."""
  return os.fspath(path).startswith(PREFIX)


def check(read: Mapping[str, epath.PathLike], written: Mapping[str, epath.PathLike] | None = None) -> None:
  """Ask every bucket among these paths once, before work starts; paths of folders pass.

  Args:
    read, written: paths by the option or key that gave them, for the message.

  Raises:
    ConfigError: a bucket does not answer, does not exist or may not be used; the message says what would do.
  """
  questions: dict[str, tuple[str, str, bool]] = {}  # by bucket; one that is written to is read from as well
  for paths, is_written in ((written or {}, True), (read, False)):
    for option, path in paths.items():
      path = os.fspath(path)
      if is_in_bucket(path):
        questions.setdefault(_split(path)[0], (option, path, is_written))
      elif "://" in path:
        raise ConfigError(f"{option}={path}: of paths with :// only gs:// can be used, or give a folder")
  for question in questions.values():
    _ask_in_time(*question)


def refuse(option: str, path: epath.PathLike) -> None:
  """Refuse a path of a bucket where only a folder will do.

  Raises:
    ConfigError: it is one.
  """
  if "://" in os.fspath(path):
    raise ConfigError(f"{option}={path}: this is written to a folder of this machine alone; copy it from there")


def _ask_in_time(option: str, path: str, is_written: bool) -> None:
  """Ask in a thread: looking for credentials and for addresses has time limits of its own, and long ones."""
  answer: concurrent.futures.Future[None] = concurrent.futures.Future()

  def ask() -> None:
    try:
      _ask(path, is_written)
      answer.set_result(None)
    except Exception as error:
      answer.set_exception(error)

  threading.Thread(target=ask, daemon=True).start()
  try:
    answer.result(timeout=CHECK_SECONDS)
  except ImportError as error:
    package = "google-cloud-storage-control" if "control" in str(error) else "google-cloud-storage"
    raise ConfigError(
      f"{option}={path}: {package} is not installed, and gs:// paths need it: pip install {package}"
    ) from error
  except TimeoutError as error:
    raise ConfigError(
      f"{option}={path}: no answer within {CHECK_SECONDS:.0f} s: is there a way from this machine to "
      "storage.googleapis.com (or a proxy in HTTPS_PROXY)?"
    ) from error
  except Exception as error:  # of Google's libraries, or of the network's below them
    raise ConfigError(f"{option}={path}: {_explain(error, _split(path)[0], is_written)}") from error


def _ask(path: str, is_written: bool) -> None:
  """List an object; where there will be writing, also what Orbax asks first, and a write that cannot take place."""
  from google.api_core import exceptions
  from google.cloud import storage

  name, prefix = _split(path)
  client, options = storage.Client(), _options()
  next(iter(client.list_blobs(name, prefix=prefix, max_results=1, **options)), None)
  if not is_written:
    return
  bucket = client.get_bucket(name, **options)
  if bucket.hierarchical_namespace_enabled:
    from google.cloud import storage_control_v2  # noqa: F401  Orbax removes folders by it
  # Every host asks for an object of its own: writes to one object are limited to one a second.
  blob = bucket.blob(f"{prefix.rstrip('/')}/.check-{uuid.uuid4().hex}")
  with contextlib.suppress(exceptions.PreconditionFailed):  # of a write that was allowed: there is no generation 1
    blob.upload_from_string(b"", if_generation_match=1, **options)


def _options() -> dict[str, Any]:
  """Return how long a request may take, and be repeated."""
  from google.cloud.storage import retry

  return dict(timeout=REQUEST_SECONDS, retry=retry.DEFAULT_RETRY.with_timeout(RETRY_SECONDS))


def _explain(error: Exception, bucket: str, is_written: bool) -> str:
  from google.api_core import exceptions
  from google.auth import exceptions as auth

  if isinstance(error, exceptions.RetryError):
    error = error.cause or error
  said = (str(error).splitlines() or [type(error).__name__])[0][:300]
  if isinstance(error, exceptions.NotFound):
    return f"there is no bucket {bucket}: gcloud storage buckets create {PREFIX}{bucket}, or give another path"
  if isinstance(error, exceptions.Forbidden | exceptions.Unauthorized):
    roles = "roles/storage.objectViewer"
    if is_written:
      roles = "roles/storage.objectUser and roles/storage.legacyBucketReader"  # the second to look at the bucket itself
    return f"the bucket does not allow it ({said}): grant {roles} to this machine's service account or to your login"
  if isinstance(error, auth.DefaultCredentialsError):
    return "no credentials were found: gcloud auth application-default login, or a service account of the machine"
  return f"it cannot be reached ({type(error).__name__}: {said}): see to this machine's network and credentials"


def _split(path: epath.PathLike) -> tuple[str, str]:
  """Return a path's bucket and what follows it."""
  bucket, _, rest = os.fspath(path).removeprefix(PREFIX).partition("/")
  return bucket, rest


class Held(RuntimeError):
  """Another run holds the lock; the message says which."""


class Lock:
  """A lock that is an object in a bucket: whoever writes it first has it, and renews it while he lives.

  Every write names the generation of the object that it replaces, so of two runs that take over the lock of a dead one
  only one succeeds, and a holder whose lock was taken over learns of it when he renews it.

  Args:
    path: of the object. lease_seconds: after which a lock that is not renewed may be taken over.
    on_lost: called from another thread, with the new holder's name, when the lock has been taken over.
  """

  def __init__(self, path: epath.PathLike, on_lost: Callable[[str], None], lease_seconds: float = LEASE_SECONDS):
    from google.cloud import storage

    name, key = _split(path)
    self._path, self._bucket, self._key = os.fspath(path), storage.Client().bucket(name), key
    self._on_lost, self._lease_seconds, self._options = on_lost, lease_seconds, _options()
    self._about = {"pid": os.getpid(), "host": platform.node(), "since": _now(), "token": uuid.uuid4().hex}
    self._about["machine"] = _machine()
    self._generation = 0
    self._is_ending = threading.Event()
    self._thread = threading.Thread(target=self._renew_until_released, daemon=True, name="lock")

  def acquire(self) -> None:
    """Take the lock, waiting for a sign of life where another run seems to hold it.

    Raises:
      Held: it gave one.
    """
    while not self._write(0):
      there = self._read()
      if there is None:  # released just now
        continue
      generation, about = there
      if not _has_died_here(about):
        self._watch(generation, about)
      if self._write(generation):
        break
    self._thread.start()

  def _watch(self, generation: int, about: Mapping[str, Any]) -> None:
    """Return when the lock's lease is over, or the lock is gone; raise `Held` when it is renewed."""
    print(f"{self._path} is held by {_name(about)}: looking for a sign of life", file=sys.stderr, flush=True)
    deadline = time.monotonic() + 1.5 * self._lease_seconds
    while time.monotonic() < deadline:
      time.sleep(self._lease_seconds / 30)
      there = self._read()
      if there is None:
        return
      if there[0] != generation:
        raise Held(_name(there[1]))

  def release(self) -> None:
    """Give the lock up; one that was lost is left to its new holder."""
    from google.api_core import exceptions

    self._is_ending.set()
    self._thread.join()
    try:
      self._blob().delete(if_generation_match=self._generation, **self._options)
    except (exceptions.NotFound, exceptions.PreconditionFailed):
      pass  # it is another's
    except Exception as error:  # the network's: its lease ends by itself
      logger.warning("%s could not be removed: %r", self._path, error)

  def _renew_until_released(self) -> None:
    renewed_at = time.monotonic()
    while not self._is_ending.wait(self._lease_seconds / 3):
      try:
        if not self._write(self._generation):
          there = self._read()
          self._on_lost(_name(there[1]) if there else "someone who has removed it")
          return
        renewed_at = time.monotonic()
      except Exception as error:  # the network's: tried again, and another run may take the lock meanwhile
        silent = time.monotonic() - renewed_at
        if silent > self._lease_seconds:
          logger.warning("%s has not been renewed for %.0f s: %r", self._path, silent, error)

  def _write(self, generation: int) -> bool:
    """Write the object in place of this generation of it (0: where there is none); False: there is another."""
    from google.api_core import exceptions

    blob, text = self._blob(), json.dumps(self._about | {"renewed": _now()}, indent=1) + "\n"
    try:
      blob.upload_from_string(text, if_generation_match=generation, **self._options)
    except exceptions.PreconditionFailed:
      there = self._read()  # an earlier write of ours, whose answer was lost?
      if there is None or there[1].get("token") != self._about["token"]:
        return False
      self._generation = there[0]
      return True
    self._generation = blob.generation
    return True

  def _read(self) -> tuple[int, dict[str, Any]] | None:
    """Read the object's generation and what it says; None if there is none."""
    from google.api_core import exceptions

    while (blob := self._bucket.get_blob(self._key, **self._options)) is not None:
      try:
        text = blob.download_as_bytes(if_generation_match=blob.generation, **self._options)
        return blob.generation, dict(json.loads(text))
      except (exceptions.NotFound, exceptions.PreconditionFailed):  # renewed or removed since
        continue
      except (ValueError, TypeError):  # no lock of ours; it is never renewed, and taken over
        return blob.generation, {}
    return None

  def _blob(self) -> Any:
    return self._bucket.blob(self._key)


def _has_died_here(about: Mapping[str, Any]) -> bool:
  """Whether a holder was a process of this host and is no more."""
  is_here = about.get("host") == platform.node() and about.get("machine") == _machine()
  if not is_here or not isinstance(about.get("pid"), int):
    return False
  try:
    os.kill(about["pid"], 0)
  except ProcessLookupError:
    return True
  except PermissionError:
    pass
  return False


def _machine() -> str:
  """Tell machines and containers apart that have one name: the boot, and the space that process ids are of."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:  # no Linux
    return ""


def _name(about: Mapping[str, Any]) -> str:
  return f"process {about.get('pid', '?')} on {about.get('host', '?')}, since {about.get('since', '?')}"


def _now() -> str:
  return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
