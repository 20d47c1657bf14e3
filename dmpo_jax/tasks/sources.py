"""Published data sets: one file per split, from a folder or the network, accepted only with the known checksum."""

import dataclasses
import gzip
import hashlib
import json
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

from etils import epath

from dmpo_jax.tasks.base import Record, Split, Task

T = TypeVar("T")  # what a row is read as: a record, or several

TIMEOUT = 30.0  # seconds without data until a download fails
_GZIP = b"\x1f\x8b"  # how such a file begins
MAX_LISTED = 50  # rows that one message describes; all are counted


@dataclasses.dataclass(frozen=True)
class Source:
  """One published file."""

  name: str  # name of the file in `task.data_dir`
  url: str
  sha256: tuple[str, ...]  # checksum of the file at the URL, then those of other known forms
  rows: tuple[int, int | None] = (0, None)  # the first row that belongs to the split, and that after the last
  label: str = ""  # tells the sources of a split apart, if a task has several


@runtime_checkable
class PublishedTask(Task, Protocol):
  """A task whose records are files that others have published."""

  def source(self, split: Split) -> Source:
    """Return the file of a split."""
    ...

  def read_row(self, row: dict[str, Any]) -> Record:
    """Make a record of a row.

    Raises:
      ValueError: the row cannot be used.
    """
    ...


def read_source(source: Source, data_dir: str, read_row: Callable[[dict[str, Any]], Record]) -> list[Record]:
  """Return the records of a published file, from the folder `data_dir` or, if that is "", from the network.

  Raises:
    ValueError: the file is absent, cannot be downloaded, or is partial or altered. The message says how to get it.
  """
  remedy = f"get {source.url} and put it into a folder as {source.name}, then set task.data_dir to that folder"
  if data_dir:
    path = epath.Path(data_dir) / source.name
    if not path.is_file():
      raise ValueError(f"task.data_dir={data_dir!r}: no {source.name} in it; {remedy}")
    where, content = str(path), path.read_bytes()
  else:
    where, content = source.url, _download(source, remedy)
  records, problems = read_rows(content, read_row)
  digest = hashlib.sha256(content).hexdigest()
  if digest not in source.sha256:
    rows = "".join(f"\n  {problem}" for problem in problems[:MAX_LISTED])
    raise ValueError(
      f"{where}: partial or altered, {len(content)} bytes with SHA-256 {digest}, not {source.sha256[0]}; {remedy}. "
      f"Data of your own is a task of its own: set task.name to a JSONL or Python file{rows}"
    )
  refuse_rows(where, problems)
  return records[slice(*source.rows)]


def _download(source: Source, remedy: str) -> bytes:
  try:
    with urllib.request.urlopen(source.url, timeout=TIMEOUT) as response:
      return response.read()
  except (OSError, urllib.error.URLError) as error:
    raise ValueError(f"could not download {source.url} ({error}): {remedy}") from error


def read_rows(content: bytes, read_row: Callable[[dict[str, Any]], T]) -> tuple[list[T], list[str]]:
  """Read JSON lines; return what they are read as, and one `row N: reason` for each row that cannot be used.

  Args:
    content: the file's, which may be compressed by gzip.
    read_row: makes a record from a row, or raises ValueError with the reason why it cannot.
  """
  records, problems = [], []
  if content.startswith(_GZIP):
    try:
      content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
      return [], [f"not a whole gzip file ({error})"]
  for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
    if not line.strip():
      continue
    try:
      row = json.loads(line.decode("utf-8"))
      if not isinstance(row, dict):
        raise ValueError("not an object with named fields")
      records.append(read_row(row))
    except UnicodeDecodeError as error:
      problems.append(f"row {number}: not UTF-8 ({error.reason} at byte {error.start})")
    except json.JSONDecodeError as error:
      problems.append(f"row {number}: not JSON ({error})")
    except ValueError as error:
      problems.append(f"row {number}: {error}")
  return records, problems


def text_field(row: dict[str, Any], name: str) -> str:
  """Return a field of a row that must be text.

  Raises:
    ValueError: it is missing, not text, or empty.
  """
  if name not in row:
    raise ValueError(f"no field {name!r}, only {', '.join(map(repr, row)) or 'none'}")
  value = row[name]
  if not isinstance(value, str):
    raise ValueError(f"field {name!r} is {value!r:.40}, not a text")
  if not value.strip():
    raise ValueError(f"field {name!r} is empty")
  return value


def refuse_rows(where: str, problems: list[str]) -> None:
  """Raise one ValueError that lists the rows that cannot be used, if there are any."""
  if problems:
    listed = "\n".join(f"  {problem}" for problem in problems[:MAX_LISTED])
    more = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    raise ValueError(f"{where}: {len(problems)} rows cannot be used\n{listed}{more}")


def read_file(path: epath.PathLike, read_row: Callable[[dict[str, Any]], T]) -> list[T]:
  """Read the file of JSON lines at `task.eval_path`.

  Raises:
    ValueError: the file is absent or empty, or rows cannot be used; all of them are listed.
  """
  where = f"task.eval_path={str(path)!r}"
  if not epath.Path(path).is_file():
    raise ValueError(f"{where}: no such file")
  records, problems = read_rows(epath.Path(path).read_bytes(), read_row)
  refuse_rows(where, problems)
  if not records:
    raise ValueError(f"{where}: nothing in it")
  return records
