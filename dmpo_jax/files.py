"""Read and write files, local and in gs:// buckets: writes are atomic, and errors in reading say what is damaged."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath


class Unreadable(ValueError):
  """A file is damaged or not what it should be; the message says which, what is wrong with it, and what to do."""


@contextlib.contextmanager
def new_folder(path: epath.PathLike, option: str) -> Iterator[None]:
  """Make a folder, and remove it if the body of the `with` statement fails.

  Args:
    option: the flag that names the folder, for the message.

  Raises:
    ValueError: the folder exists and is not empty.
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
  """Write a file atomically: a reader finds the old or the new content, never a part."""
  path = epath.Path(path)
  content = content.encode() if isinstance(content, str) else content
  if "://" in os.fspath(path):  # writing an object is atomic, and it needs no folder
    path.write_bytes(content)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.parent / f".{path.name}.unfinished"
  unfinished.write_bytes(content)
  unfinished.replace(path)


def to_json(value: Any, **layout: Any) -> str:
  """Write a value as JSON, with null for numbers that are not finite.

  Args:
    value: may contain scalars and arrays of numpy and JAX.
    layout: arguments of `json.dumps`.
  """
  return json.dumps(finite(value), allow_nan=False, **layout)


def finite(value: Any) -> Any:
  """Replace numbers that are not finite by None, and numpy and JAX scalars and arrays by Python's numbers and lists."""
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
    remedy: what to do if it is damaged, for the message.

  Raises:
    FileNotFoundError: it does not exist.
    Unreadable: it is not JSON, such as empty, cut off or not UTF-8.
  """
  content = epath.Path(path).read_bytes()
  try:
    return json.loads(content.decode())
  except (ValueError, RecursionError) as error:
    raise Unreadable(f"{path} cannot be read ({_describe_damage(content, error)}){remedy and f': {remedy}'}") from error


def read_object(path: epath.PathLike, remedy: str = "") -> dict[str, Any]:
  """Read a JSON file that holds one object; see `read_json`."""
  value = read_json(path, remedy)
  if not isinstance(value, dict):
    raise Unreadable(f"{path} is not a JSON object{remedy and f': {remedy}'}")
  return value


class Lines(NamedTuple):
  """A file of JSON objects, one a line."""

  rows: list[dict[str, Any]]
  damaged: list[int]  # numbers of damaged lines, from 1
  num: int  # number of lines
  is_cut: bool  # the last line is incomplete, as left by a process that was killed while writing

  @property
  def problem(self) -> str:
    """What is damaged; "" if nothing is."""
    if not self.damaged:
      return ""
    if self.damaged == [self.num]:
      return "the last line cannot be read"
    return f"{len(self.damaged)} line(s) cannot be read, first line {self.damaged[0]}"


def read_lines(path: epath.PathLike) -> Lines:
  """Read a file of one JSON object a line; damaged lines are listed and the others returned.

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
  """Return an unused path beside a damaged file or folder, to rename it to."""
  path = epath.Path(path)
  names = (f"{path.name}.damaged{count}" for count in ("", *(f"-{i}" for i in range(2, 100))))
  return next(path.parent / name for name in names if not (path.parent / name).exists())


def _describe_damage(content: bytes, error: Exception) -> str:
  if not content.strip():
    return "it is empty"
  if b"\0" in content:
    return f"it has NUL bytes, the first at byte {content.index(0)}"
  if isinstance(error, UnicodeDecodeError):
    return f"it is not UTF-8 at byte {error.start}"
  return str(error) or type(error).__name__
