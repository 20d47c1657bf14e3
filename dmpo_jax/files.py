"""Files and folders, local and in gs:// buckets: written whole or not at all, and read with what is wrong with them."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath


class Unreadable(ValueError):
  """A file is not what was written there; the message says which one, what is wrong with it, and what would do."""


@contextlib.contextmanager
def new_folder(path: epath.PathLike, option: str) -> Iterator[None]:
  """Make a folder; if what is done with it fails, there is none afterwards.

  Args:
    option: what names the folder, for the message.

  Raises:
    ValueError: it is there already, with something in it.
  """
  path = epath.Path(path)
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise ValueError(f"{option}={path} exists already: give a new folder, or remove it")
  path.mkdir(parents=True, exist_ok=True)
  try:
    yield
  except BaseException:
    path.rmtree(missing_ok=True)
    raise


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
  """Write a file so that whoever reads it, at any time, finds the old or the new content and never a part."""
  path = epath.Path(path)
  content = content.encode() if isinstance(content, str) else content
  if "://" in os.fspath(path):  # an object in a bucket is replaced at once, and has no folder
    path.write_bytes(content)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.parent / f".{path.name}.unfinished"
  unfinished.write_bytes(content)
  unfinished.replace(path)


def to_json(value: Any, **layout: Any) -> str:
  """Write a value as JSON; null where a number is not finite, which JSON cannot say.

  Args:
    value: may hold scalars and arrays of numpy and JAX.
    layout: of `json.dumps`.
  """
  return json.dumps(finite(value), allow_nan=False, **layout)


def finite(value: Any) -> Any:
  """Replace numbers that are not finite by None, and the scalars and arrays of numpy and JAX by Python's."""
  if isinstance(value, Mapping):
    return {str(key): finite(item) for key, item in value.items()}
  if isinstance(value, tuple | list):
    return [finite(item) for item in value]
  if hasattr(value, "tolist"):
    return finite(value.tolist())
  return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: epath.PathLike, remedy: str = "") -> Any:
  """Read a JSON file.

  Args:
    remedy: what would do if it cannot be read, for the message.

  Raises:
    FileNotFoundError: it is not there.
    Unreadable: it is empty, cut, not UTF-8 or otherwise no JSON.
  """
  content = epath.Path(path).read_bytes()
  try:
    return json.loads(content.decode())
  except (ValueError, RecursionError) as error:
    raise Unreadable(f"{path} cannot be read ({_what_is_wrong(content, error)}){remedy and f': {remedy}'}") from error


def read_object(path: epath.PathLike, remedy: str = "") -> dict[str, Any]:
  """Read a JSON file that holds one object; see `read_json`."""
  value = read_json(path, remedy)
  if not isinstance(value, dict):
    raise Unreadable(f"{path} is not a JSON object{remedy and f': {remedy}'}")
  return value


class Lines(NamedTuple):
  """The lines of a file of JSON objects."""

  rows: list[dict[str, Any]]
  damaged: list[int]  # numbers of the lines that cannot be read, from 1
  num: int  # of all lines
  is_cut: bool  # the last line has no end, as a process leaves it that was killed while it wrote

  @property
  def problem(self) -> str:
    """What is wrong; "" if nothing is."""
    if not self.damaged:
      return ""
    if self.damaged == [self.num]:
      return "the last line cannot be read"
    return f"{len(self.damaged)} line(s) cannot be read, first line {self.damaged[0]}"


def read_lines(path: epath.PathLike) -> Lines:
  """Read a file of one JSON object a line; lines that are none are counted and the others kept.

  Raises:
    OSError: the file cannot be read.
  """
  rows, damaged, content = [], [], epath.Path(path).read_bytes()
  lines = content.removesuffix(b"\n").split(b"\n") if content else []
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line.decode())
    except (ValueError, RecursionError):
      row = None
    if isinstance(row, dict):
      rows.append(row)
    else:
      damaged.append(number)
  is_cut = bool(damaged) and damaged[-1] == len(lines) and not content.endswith(b"\n")
  return Lines(rows, damaged, len(lines), is_cut)


def name_aside(path: epath.PathLike) -> epath.Path:
  """Return a free path beside a damaged file or folder, to which it can be renamed so that nothing of it is lost."""
  path = epath.Path(path)
  names = (f"{path.name}.damaged{count}" for count in ("", *(f"-{i}" for i in range(2, 100))))
  return next(path.parent / name for name in names if not (path.parent / name).exists())


def _what_is_wrong(content: bytes, error: Exception) -> str:
  if not content.strip():
    return "it is empty"
  if b"\0" in content:
    return f"it has NUL bytes, the first of them at byte {content.index(0)}"
  if isinstance(error, UnicodeDecodeError):
    return f"it is not UTF-8 from byte {error.start} on"
  return str(error) or type(error).__name__
