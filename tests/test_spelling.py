"""The nearest known name in error messages."""

from dmpo_jax.spelling import did_you_mean


def test_the_nearest_name_is_named_and_nothing_else():
  assert did_you_mean("negatve", ("none", "negative")) == "; did you mean 'negative'?"
  assert did_you_mean("xyz", ("none", "negative")) == ""
  assert did_you_mean(3, {"none": 1}) == ""
