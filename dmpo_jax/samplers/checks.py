"""Checks of a sampler's options. Each returns what is wrong with one option ("": nothing); `refuse` raises them all."""

import math
from collections.abc import Sequence

from dmpo_jax.spelling import did_you_mean


def refuse(*problems: str) -> None:
  """Raise what the checks found.

  Raises:
    ValueError: there is a problem; one line for each, `option=value: what would do`.
  """
  found = [problem for problem in problems if problem]
  if found:
    raise ValueError("\n".join(found))


def one_of(option: str, value: str, choices: Sequence[str]) -> str:
  """Check that a value is one of the choices; the message names them and the nearest."""
  if value in choices:
    return ""
  return f"{option}={value!r}: must be one of {', '.join(choices)}{did_you_mean(value, choices)}"


def from_zero(option: str, value: float) -> str:
  """Check that a number is finite and at least 0."""
  return "" if 0 <= value < math.inf else f"{option}={value!r}: must be a number from 0 up"


def at_least(option: str, value: int, low: int) -> str:
  """Check that a number is at least `low`."""
  return "" if value >= low else f"{option}={value!r}: must be {low} or more"
