"""The values that settings may have."""

import dataclasses

import pytest

from dmpo_jax import ranges


@pytest.mark.parametrize(
  ("own", "allowed", "refused"),
  [
    (ranges.number("(0, 1]"), (0.5, 1, 1.0), (0, 0.0, 1.5, float("nan"), True, "1", None)),
    (ranges.number("(-inf, 0]"), (-1e9, 0), (1, float("-inf"))),
    (ranges.whole(1, 4), (1, 4), (0, 5, 1.0, True)),
    (ranges.numbers(), ((), (1, 2.5), [1]), ((1, "2"), 1, None)),
    (ranges.one_of("tilt", "softmax"), ("tilt",), ("tlit", 1, None)),
  ],
)
def test_a_range_holds_what_it_says(own, allowed, refused):
  assert not any(own.problem(value) for value in allowed)
  assert all(own.problem(value).startswith(own.allowed) for value in refused)


def test_a_name_that_is_near_is_offered():
  assert ranges.one_of("tilt", "softmax").problem("tlit") == "one of tilt, softmax; did you mean 'tilt'?"


def test_all_fields_out_of_range_are_listed():
  kind = dataclasses.make_dataclass("Own", ["rate", "name"])
  own = {"rate": ranges.POSITIVE, "name": ranges.one_of("a")}
  ranges.check(kind(1.0, "a"), own)
  with pytest.raises(ValueError, match=r"^Own.rate = 0: a number in \(0, inf\)\nOwn.name = 'b': one of a$"):
    ranges.check(kind(0, "b"), own)
