"""The code that stands in the documents, to be run as it stands there."""

import pathlib
import textwrap

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"


def code(page: str, begin: str) -> str:
  """The indented block of a page (from docs/) whose first line begins with `begin`."""
  lines = (DOCS / page).read_text().splitlines()
  start = next(number for number, line in enumerate(lines) if line.startswith(f"    {begin}"))
  block = lines[start:]
  end = next((number for number, line in enumerate(block) if line and not line.startswith("    ")), len(block))
  return textwrap.dedent("\n".join(block[:end]))
