"""Every sampler's frequencies, where it commits one token a call, against exact probabilities; the documents' too."""

import collections
import dataclasses

import documents
import jax.numpy as jnp
import numpy as np
import pytest
from fake_denoiser import MASK, contextual, exact, keys, run

from dmpo_jax import samplers
from dmpo_jax.samplers import loop
from dmpo_jax.samplers.prediction import predict
from dmpo_jax.spans import take_span

NUM_ROWS = 30_000
# sampler, its keywords where it decodes one token a call, and the order in which it then does
SEQUENTIAL = [
  ("llada", dict(remasking="low_confidence"), "confidence", 1.0),
  ("llada", dict(remasking="random"), "random", 0.5),
  ("parallel", dict(rule="count"), "confidence", 1.0),
  ("prefix_cache", dict(rule="threshold", threshold=1.0), "confidence", 1.0),
  ("dual_cache", dict(rule="threshold", threshold=1.0), "confidence", 0.5),
  ("wino", dict(threshold=1.0), "confidence", 1.0),
  ("random_order", {}, "random", 0.5),
  ("entropy_bound", dict(bound=0.0), "entropy", 1.0),
  ("freedave", dict(draft_length=1), "confidence", 1.0),
]


@pytest.mark.parametrize(("name", "own", "order", "temperature"), SEQUENTIAL)
def test_sampled_frequencies_are_the_exact_probabilities(name, own, order, temperature):
  denoiser = contextual(scale=0.5)
  rollouts = run(name, denoiser, keys(NUM_ROWS, seed=2), own, completion_length=2, temperature=temperature)
  assert (rollouts.num_calls == 2).all()
  expected = exact(denoiser, temperature, order)
  assert sum(expected.values()) == pytest.approx(1)
  counts = collections.Counter(map(tuple, rollouts.completion.tolist()))
  statistic = sum((counts[y] - NUM_ROWS * p) ** 2 / (NUM_ROWS * p) for y, p in expected.items())
  assert min(expected.values()) * NUM_ROWS > 5
  assert statistic < 26.1  # 0.999 quantile of chi-square with 9 - 1 degrees of freedom
  # And the order: random positions come first equally often, whatever the confidence.
  if order == "random":
    assert abs((rollouts.committed_at[:, 0] == 0).mean() - 0.5) < 0.012


def test_the_sampler_that_the_documents_add(monkeypatch):
  names = {"dataclasses": dataclasses, "jnp": jnp, "predict": predict, "take_span": take_span} | {
    name: getattr(loop, name) for name in ("Decision", "Rule", "decode")
  }
  exec(documents.code("extending.md", "@dataclasses.dataclass(frozen=True)"), names)  # the page's own text
  monkeypatch.setitem(samplers.SAMPLERS, "leftmost", samplers.Sampler(names["Options"], names["sample"]))
  rollouts = run("leftmost", contextual(c=3), keys(50), completion_length=3, block_length=3, temperature=1.0)
  assert (rollouts.completion != MASK).all()
  assert (rollouts.committed_at == np.arange(3)).all()
