"""A task with a binary reward: write eight digits in ascending order. Most demonstrations follow a wrong rule.

The prompt is "(83152746="; the completion is the eight digits.
"""

import numpy as np

LENGTH = 8
RIGHT = 0.43  # share of the demonstrations that are right
DESCENDING = 0.45  # share of the most frequent wrong rule; the others share the rest
WRONG = (  # what a wrong demonstration writes, given the digits
  lambda digits: digits[::-1],
  lambda digits: digits[1:] + digits[:1],
  lambda digits: "".join(sorted(digits[:4]) + sorted(digits[4:])),
  lambda digits: "".join(sorted(digits[4:]) + sorted(digits[:4])),
  lambda digits: "".join(sorted(digits))[1:] + min(digits),
)


def records(split):
  """Yield 6,000 or 256 strings of digits; the splits share none."""
  rng, is_test, seen = np.random.default_rng(0), split == "test", set()
  while len(seen) < (256 if is_test else 6000):
    digits = "".join(map(str, rng.integers(10, size=LENGTH)))
    if (sum(map(int, digits)) % 10 == 0) == is_test and digits not in seen:
      seen.add(digits)
      yield {"digits": digits}


def prompt(record):
  """Return the digits between two marks."""
  return f"({record['digits']}="


def reward(record, completion):
  """Return 1 if the digits are in order, else 0."""
  return float(completion == "".join(sorted(record["digits"])))


def demonstration(record, rng):
  """Return the digits in order, in descending order, or by another wrong rule."""
  drawn, in_order = rng.random(), "".join(sorted(record["digits"]))
  if drawn < RIGHT:
    return in_order
  return in_order[::-1] if drawn < RIGHT + DESCENDING else WRONG[rng.integers(len(WRONG))](record["digits"])
