"""The values that a setting may have, stated once, for the object that holds it and for the configuration's key."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from dmpo_jax.spelling import did_you_mean

MOST = 2**31 - 1  # what the arrays' int32 can count


@dataclasses.dataclass(frozen=True)
class Range:
  """The values that one setting may have.

  Args:
    allowed: what they are, as an error says it.
    names: for a did-you-mean, where they are names.
  """

  allowed: str
  holds: Callable[[Any], bool]
  names: Collection[str] = ()

  def problem(self, value: Any) -> str:
    """Return what would do instead of a value, and the names that are near it; "" where the value does."""
    if self.holds(value):
      return ""
    unknown = [name for name in (value if isinstance(value, tuple | list) else [value]) if name not in self.names]
    return self.allowed + "".join(did_you_mean(name, self.names) for name in unknown)


def check(settings: object, ranges: Mapping[str, Range]) -> None:
  """Check the fields of an object.

  Raises:
    ValueError: listing every field out of range, one a line.
  """
  values = {name: getattr(settings, name) for name in ranges}
  problems = {name: ranges[name].problem(value) for name, value in values.items()}
  found = [f"{type(settings).__name__}.{name} = {values[name]!r}: {wrong}" for name, wrong in problems.items() if wrong]
  if found:
    raise ValueError("\n".join(found))


def whole(low: int, high: int = MOST) -> Range:
  """Allow whole numbers from `low` to `high`."""
  allowed = f"a whole number, {low} or more, below 2**31" if high == MOST else f"a whole number from {low} to {high}"
  return Range(allowed, lambda value: type(value) is int and low <= value <= high)


def number(interval: str) -> Range:
  """Allow the finite numbers of an interval such as "[0, 1)"."""
  low, high = map(float, interval[1:-1].split(","))

  def holds(value: Any) -> bool:
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
      return False
    return (value > low or interval[0] == "[") and (value < high or interval[-1] == "]")

  return Range(f"a number in {interval}", holds)


def numbers() -> Range:
  """Allow a sequence of finite numbers, or none."""
  own = number("(-inf, inf)")
  return Range(
    "a tuple of numbers, or ()",
    lambda value: isinstance(value, tuple | list) and all(own.holds(each) for each in value),
  )


def one_of(*names: str) -> Range:
  """Allow one of these names."""
  return Range(f"one of {', '.join(names)}", lambda value: value in names, names)


POSITIVE, FROM_ZERO, SHARE = number("(0, inf)"), number("[0, inf)"), number("[0, 1]")
