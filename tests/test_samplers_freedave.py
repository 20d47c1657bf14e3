"""FreeDave decodes what LLaDA's sampler decodes, in fewer calls."""

import numpy as np
import pytest
from fake_denoiser import contextual, keys, run
from test_samplers_goldens import CASES, RECORDED, sample

from dmpo_jax.samplers import freedave


@pytest.mark.parametrize("name", ["llada_c", "llada_e_uneven"])
def test_final_tokens_are_the_official_ones_of_the_sequential_sampler(name):
  case = CASES[name] | dict(sampler="freedave", own=dict(draft_length=4))
  rollouts, _ = sample(case, RECORDED[f"{name}_prompt"])
  np.testing.assert_array_equal(rollouts.completion, RECORDED[f"{name}_states"][-1])
  assert (rollouts.num_calls <= case["num_calls"]).all()
  assert rollouts.num_calls.min() < case["num_calls"]


@pytest.mark.parametrize(
  ("remasking", "temperature", "steps", "draft_length"),
  [("low_confidence", 1.0, 8, 3), ("random", 0.5, 6, 2), ("random", 0.0, 12, 5)],
)
def test_row_by_row_the_tokens_are_those_of_the_sequential_sampler(remasking, temperature, steps, draft_length):
  # Weakly coupled positions, so that drafts often prove right.
  denoiser, own = contextual(c=8, scale=0.3), dict(remasking=remasking)
  settings = dict(completion_length=8, block_length=4, steps=steps, temperature=temperature)
  sequential = run("llada", denoiser, keys(64), own, **settings)
  drafted = run("freedave", denoiser, keys(64), own | dict(draft_length=draft_length), **settings)
  np.testing.assert_array_equal(drafted.completion, sequential.completion)
  np.testing.assert_allclose(drafted.confidence, sequential.confidence, rtol=1e-5)
  assert (drafted.num_calls <= sequential.num_calls).all()
  assert drafted.num_calls.mean() < 0.8 * sequential.num_calls.mean()
  # What one call decides, the sequential sampler decides in neighbouring calls.
  order = np.argsort(sequential.committed_at, axis=1, kind="stable")
  assert (np.diff(np.take_along_axis(drafted.committed_at, order, axis=1), axis=1) >= 0).all()


def test_no_state_to_run_is_refused():
  with pytest.raises(ValueError, match=r"^draft_length=0: must be 1 or more$"):
    freedave.Options(draft_length=0)
