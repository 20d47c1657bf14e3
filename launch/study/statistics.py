"""How sure a difference is: intervals by bootstrap over bases, exact sign-flip tests, and Holm's correction."""

import itertools
from collections.abc import Sequence

import numpy as np

DRAWS = 10_000  # of a bootstrap
MOST_FLIPPED = 16  # values whose signs are all tried


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
  """Return the percentile interval of the mean by bootstrap, the same for the same values.

  Args:
    values: one for each base; runs of one base are averaged before.
  """
  given = np.asarray(values, float)
  drawn = np.random.default_rng(0).integers(len(given), size=(DRAWS, len(given)))
  low, high = np.quantile(given[drawn].mean(1), [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def sign_flip(values: Sequence[float]) -> float:
  """Return the two-sided p-value of a mean of 0: the share of all choices of signs whose mean is as far from 0.

  The smallest possible value is 2 / 2^n for n values.

  Raises:
    ValueError: there are none, or more than MOST_FLIPPED.
  """
  given = np.asarray(values, float)
  if not 0 < len(given) <= MOST_FLIPPED:
    raise ValueError(f"{len(given)} values, must be 1 to {MOST_FLIPPED}")
  signs = np.array(list(itertools.product((1, -1), repeat=len(given))))
  sums = np.abs(signs @ given)
  return float(np.mean(sums >= abs(given.sum()) * (1 - 1e-12)))


def holm(p_values: Sequence[float]) -> list[float]:
  """Return p-values adjusted for several tests (Holm, Scandinavian Journal of Statistics 6, 1979), in their order."""
  order = np.argsort(p_values, kind="stable")
  adjusted, highest = [0.0] * len(p_values), 0.0
  for rank, index in enumerate(order.tolist()):
    highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
    adjusted[index] = highest
  return adjusted
