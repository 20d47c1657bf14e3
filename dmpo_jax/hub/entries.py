"""Entries of a JSON object that another program wrote, checked before use: all that is wrong in one message."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Kind(NamedTuple):
  """What an entry must be."""

  name: str
  fits: Callable[[Any], bool]


def _is_integer(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)  # True is an int to Python


def _is_number(value: Any) -> bool:
  return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


ANYTHING = Kind("a value", lambda value: value is not None)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
SIZE = Kind("a positive integer", lambda value: _is_integer(value) and value > 0)
ID = Kind("an integer of at least 0", lambda value: _is_integer(value) and value >= 0)
POSITIVE = Kind("a positive number", lambda value: _is_number(value) and value > 0)
SHARE = Kind("a number in [0, 1)", lambda value: _is_number(value) and 0 <= value < 1)


def check_entries(
  entries: Mapping[str, Any], where: str, *, needed: Mapping[str, Kind], optional: Mapping[str, Kind]
) -> None:
  """Check the kinds of entries; an optional one may be absent or null.

  Raises:
    ValueError: naming `where`, and every entry that is missing or of another kind.
  """
  missing = [key for key in needed if key not in entries]
  problems = [f"has no {', '.join(missing)}"] if missing else []
  for key, kind in {**optional, **needed}.items():
    value = entries.get(key)
    is_unset = value is None and (key not in needed or key not in entries)
    if not is_unset and not kind.fits(value):
      problems.append(f"has {key}={json.dumps(value)} where {kind.name} is needed")
  if problems:
    raise ValueError(f"{where} {'; '.join(problems)}")
