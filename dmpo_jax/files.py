"""Files and folders that stand whole or not at all, in local folders and in gs:// buckets."""

import contextlib
import os
from collections.abc import Iterator

from etils import epath


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


def write_whole(path: epath.PathLike, text: str) -> None:
  """Write a text file so that whoever reads it, at any time, finds the old or the new text and never a part."""
  path = epath.Path(path)
  if "://" in os.fspath(path):  # an object in a bucket is replaced at once, and has no folder
    path.write_text(text)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.parent / f".{path.name}.unfinished"
  unfinished.write_text(text)
  unfinished.replace(path)
