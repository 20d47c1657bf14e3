"""Small text files that stand whole or not at all, in local folders and in gs:// buckets."""

from etils import epath


def write_whole(path: epath.PathLike, text: str) -> None:
  """Write a text file so that whoever reads it, at any time, finds the old or the new text and never a part."""
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.parent / f".{path.name}.unfinished"
  unfinished.write_text(text)
  unfinished.replace(path)
