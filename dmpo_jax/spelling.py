"""The end of an error message about an unknown name: the known name that is nearest to it."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str]) -> str:
  """Return `; did you mean 'NEAREST'?`, or "" where no known name is near."""
  near = difflib.get_close_matches(str(name), list(known), n=1)
  return f"; did you mean {near[0]!r}?" if near else ""
