"""Options of samplers: what is refused, all of it at once, and by which name."""

import pytest

from dmpo_jax import samplers
from dmpo_jax.samplers import parallel, wino


def test_options_are_built_from_a_section_and_the_rest_are_defaults():
  assert samplers.make_options("dual_cache", dict(rule="count")) == parallel.Options("count", 0.9, 1.0)
  assert samplers.make_options("wino", {}) == wino.Options(0.6, 0.9)


@pytest.mark.parametrize(
  ("name", "section", "lines"),
  [
    (
      "prefix_cache",
      dict(rule="treshold", threshold=-0.1, factor=float("nan")),
      [
        "sampler.prefix_cache.rule='treshold': must be one of count, threshold, factor, entropy, dynamic, sequential; "
        "did you mean 'threshold'?",
        "sampler.prefix_cache.threshold=-0.1: must be a number from 0 up",
        "sampler.prefix_cache.factor=nan: must be a number from 0 up",
      ],
    ),
    ("wino", dict(treshold=0.5), ["sampler.wino.treshold=0.5: no such option; did you mean 'threshold'?"]),
    ("wino", dict(threshold="0.5"), ["sampler.wino.threshold='0.5': must be a number"]),
    ("wino", dict(threshold=True), ["sampler.wino.threshold=True: must be a number"]),
    ("freedave", dict(draft_length=2.0), ["sampler.freedave.draft_length=2.0: must be a whole number"]),
    ("entropy_bound", dict(bound=float("inf")), ["sampler.entropy_bound.bound=inf: must be a number from 0 up"]),
    ("random_order", dict(remasking="random"), ["sampler.random_order.remasking='random': no such option"]),
  ],
)
def test_wrong_options_are_refused_together(name, section, lines):
  with pytest.raises(ValueError, match="sampler") as error:
    samplers.make_options(name, section)
  assert str(error.value).splitlines() == lines
