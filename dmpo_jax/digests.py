"""Digests of saved files: written with a checkpoint and compared before it is loaded, so that damage is noticed.

Orbax commits a checkpoint once every process has written and process 0 has finalized it. The digests are written before
that, so a checkpoint has all of them or does not exist. Each process digests what it has written itself; when a
checkpoint is loaded, the processes that see the same files share the reading.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import xxhash
from etils import epath

from dmpo_jax import files
from dmpo_jax.files import Unreadable
from dmpo_jax.processes import gather_texts

DIGESTS = "digests.json"
ALGORITHM = "xxh3_128"
_METADATA = "_CHECKPOINT_METADATA"  # Orbax's description of a checkpoint, its last file; it keeps what `mark` returns
_KEY = "digests"
_PIECE = 16 * 2**20  # bytes read at a time
_THREADS = 8

Entries = dict[str, tuple[int, str]]  # bytes and digest of files, by their paths in the folder


def with_digests(handler: Any) -> Any:
  """Make an Orbax handler write digests of what it saves; it is changed and returned.

  Orbax finds a handler's arguments by its exact class, so a subclass would need arguments of its own.
  """
  async_save, finalize = handler.async_save, handler.finalize

  async def async_save_digested(directory: epath.Path, *args: Any, **keywords: Any) -> list[Any]:
    return [_Saving(await async_save(directory, *args, **keywords) or [], directory)]

  def finalize_digested(directory: epath.Path) -> None:
    finalize(directory)
    write(directory)

  handler.async_save, handler.finalize = async_save_digested, finalize_digested
  return handler


def mark(items: Sequence[str] = (".",), metadata: Mapping[str, object] | None = None) -> dict[str, Any]:
  """Return Orbax's `custom_metadata`, which lists the folders that have digests, so that lost digests are noticed.

  Args:
    metadata: further metadata; `read_metadata` returns it.
  """
  metadata = dict(metadata or {})
  return {**metadata, _KEY: {"items": list(items), "about": _digest_of(metadata)}}


def read_metadata(folder: epath.Path) -> dict[str, Any]:
  """Return the metadata that `mark` was given; {} if there was none.

  Raises:
    Unreadable: it is damaged.
  """
  return _read_marked(folder)[1]


class _Saving:
  """The futures of a save; with several processes, each digests the files that it has written."""

  def __init__(self, futures: Sequence[Any], directory: epath.Path):
    self._futures, self._directory = futures, directory

  def result(self, timeout: float | None = None) -> None:
    for future in self._futures:
      future.result(timeout=timeout)
    own = self._directory / f"ocdbt.process_{jax.process_index()}"
    if jax.process_count() > 1 and own.is_dir():
      entries = _digest(self._directory, _files(self._directory, own.name))
      _write_entries(self._directory / _part(own.name), entries)

  def cancel(self) -> None:
    for future in self._futures:
      future.cancel()


def write(folder: epath.Path) -> None:
  """Write the digests of all files of a folder and its subfolders, and collect those that processes have written.

  Orbax's own metadata is left out: it records when the checkpoint was committed, and no array depends on it.
  """
  entries: Entries = {}
  parts = [path for path in folder.iterdir() if path.name.endswith(_part(""))]
  for path in parts:
    entries |= _read_entries(path)
  others = {*entries, _METADATA, *(path.name for path in parts)}
  _write_entries(folder / DIGESTS, entries | _digest(folder, [name for name in _files(folder) if name not in others]))
  for path in parts:
    path.unlink()


def check(folder: epath.Path) -> None:
  """Compare the files of a checkpoint, or of any folder with digests, with their digests.

  Every process calls this. Folders of versions that wrote no digests pass.

  Raises:
    Unreadable: in every process, naming a file that is missing or has changed since it was written.
  """
  entries, problems, stamp = {}, [], ""
  try:
    entries, stamp = _entries(folder), _stamp(folder)
  except (OSError, Unreadable) as error:
    problems = [str(error)]
  mine = _share(entries, gather_texts([stamp], "looking at digests"))
  problems += [f"{folder / name} {problem}" for name, problem in _compare(folder, mine).items()]
  problems = list(dict.fromkeys(gather_texts(problems, "comparing digests")))
  if problems:
    more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
    raise Unreadable(f"{problems[0]}{more}")


def identity(folder: epath.Path) -> str:
  """Identify a folder by its digests; "" if it has none."""
  path = folder / DIGESTS
  return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else ""


def _read_marked(folder: epath.Path) -> tuple[list[str], dict[str, Any]]:
  """Return which folders of a checkpoint have digests, and the metadata that `mark` was given."""
  path = folder / _METADATA
  custom = files.read_object(path).get("custom_metadata") if path.exists() else None
  metadata = dict(custom) if isinstance(custom, dict) else {}
  marked = metadata.pop(_KEY, None)
  if marked is None:
    return [], metadata
  if (
    not isinstance(marked, dict)
    or marked.get("about") != _digest_of(metadata)
    or not isinstance(marked.get("items"), list)
  ):
    raise Unreadable(f"{path} has changed since it was written")
  return marked["items"], metadata


def _entries(folder: epath.Path) -> Entries:
  """Read the digests of a checkpoint, whose items may have their own."""
  items, _ = _read_marked(folder)
  if not items and (folder / DIGESTS).exists():
    items = ["."]
  found: Entries = {}
  for item in items:
    path = folder / item / DIGESTS
    if not path.exists():
      raise Unreadable(f"{path} is missing")
    prefix = "" if item == "." else f"{item}/"
    found |= {prefix + name: entry for name, entry in _read_entries(path).items()}
  return found


def _read_entries(path: epath.Path) -> Entries:
  content = files.read_object(path)
  try:
    if content["algorithm"] != ALGORITHM:
      raise Unreadable(f"{path} has digests by {content['algorithm']!r}, this version knows {ALGORITHM} only")
    return {name: (entry["bytes"], entry["digest"]) for name, entry in content["files"].items()}
  except (KeyError, TypeError, AttributeError) as error:
    raise Unreadable(f"{path} has no digests ({error!r})") from error


def _write_entries(path: epath.Path, entries: Entries) -> None:
  listed = {name: {"bytes": size, "digest": digest} for name, (size, digest) in sorted(entries.items())}
  files.write_whole(path, json.dumps({"algorithm": ALGORITHM, "files": listed}, indent=1) + "\n")


def _compare(folder: epath.Path, entries: Entries) -> dict[str, str]:
  """Return what is wrong with each damaged file."""

  def problem(name: str) -> str:
    try:
      return "" if _digest_file(folder / name) == entries[name] else "has changed since it was written"
    except FileNotFoundError:
      return "is missing"
    except OSError as error:
      return f"cannot be read ({error})"

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return {name: found for name, found in zip(entries, pool.map(problem, entries), strict=True) if found}


def _digest(folder: epath.Path, names: Sequence[str]) -> Entries:
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return dict(zip(names, pool.map(lambda name: _digest_file(folder / name), names), strict=True))


def _digest_file(path: epath.Path) -> tuple[int, str]:
  digest, size = xxhash.xxh3_128(), 0
  with path.open("rb") as file:
    while piece := file.read(_PIECE):
      digest.update(piece)
      size += len(piece)
  return size, digest.hexdigest()


def _digest_of(metadata: Mapping[str, object]) -> str:
  return xxhash.xxh3_128(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def _files(folder: epath.Path, inside: str = "") -> list[str]:
  """List the files under a folder, or under one of its subfolders, as paths in the folder."""
  names = []
  for path in sorted((folder / inside).iterdir()):
    name = f"{inside}/{path.name}" if inside else path.name
    names += _files(folder, name) if path.is_dir() else [name]
  return names


def _part(name: str) -> str:
  return f"{name}.{DIGESTS}"


def _stamp(folder: epath.Path) -> str:
  """Identify a folder: processes that see the same one get the same stamp, processes with copies do not."""
  own = next((folder / name for name in (_METADATA, DIGESTS) if (folder / name).exists()), None)
  if "://" in os.fspath(folder) or own is None:
    return os.fspath(folder)
  status = os.stat(own)
  return f"{status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns}"


def _share(entries: Mapping[str, tuple[int, str]], stamps: Sequence[str]) -> Entries:
  """Return the files that this process compares: largest first, each goes to the process with the fewest bytes."""
  own = stamps[jax.process_index()]
  loads = {process: 0 for process, stamp in enumerate(stamps) if stamp == own}
  mine: Entries = {}
  for name, entry in sorted(entries.items(), key=lambda item: (-item[1][0], item[0])):
    process = min(loads, key=lambda process: (loads[process], process))
    loads[process] += entry[0]
    if process == jax.process_index():
      mine[name] = entry
  return mine
