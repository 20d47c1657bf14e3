"""Check the entries of a JSON object that another program wrote; all problems are listed in one message."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Kind(NamedTuple):
  """What an entry must be."""

  name: str
  fits: Callable[[object], bool]


def _is_integer(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)  # in Python True is an int


def _is_number(value: object) -> bool:
  return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


ANYTHING = Kind("a value", lambda value: value is not None)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
FLAGS = Kind("a list of 0 and 1", lambda value: isinstance(value, list) and set(value) <= {0, 1})
SIZE = Kind("a positive integer", lambda value: _is_integer(value) and value > 0)
ID = WHOLE = Kind("an integer of at least 0", lambda value: _is_integer(value) and value >= 0)
IDS = Kind("a list of integers of at least 0", lambda value: isinstance(value, list) and all(map(ID.fits, value)))
POSITIVE = Kind("a positive number", lambda value: _is_number(value) and value > 0)
SHARE = Kind("a number in [0, 1)", lambda value: _is_number(value) and 0 <= value < 1)


def check_entries(
  entries: Mapping[str, Any], where: str, *, needed: Mapping[str, Kind], optional: Mapping[str, Kind]
) -> None:
  """Check the kinds of entries; optional ones may be absent or null.

  Args:
    where: name of the object, for the message.

  Raises:
    ValueError: entries are missing or of the wrong kind.
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
