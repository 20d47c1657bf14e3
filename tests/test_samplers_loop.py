"""What all samplers have from their loop: rows that stay alone, the record, early exit, the plan's errors."""

import jax.numpy as jnp
import numpy as np
import pytest
from fake_denoiser import MASK, contextual, keys

from dmpo_jax import samplers
from dmpo_jax.samplers.loop import Decision, decode


def test_the_loop_lets_a_sampler_take_tokens_back_and_keep_a_state():
  # Calls 0 and 1 of each block commit its two positions, call 2 takes the left one back, call 3 decides it anew.
  def accept(view, seen, state):
    written = jnp.array([[0, MASK], [0, 1], [MASK, 1], [2, 1]])[view.step]
    return Decision(jnp.broadcast_to(written, view.tokens.shape), jnp.full(view.tokens.shape, state / 8)), state + 1

  plan = samplers.Plan(completion_length=4, block_length=2, steps=8)
  rollouts, state = decode(
    lambda view, memory: None,
    accept,
    jnp.float32(0),
    keys(2),
    plan,
    contextual(c=4),
    most_calls=4,
    is_fixed=True,
    can_revoke=True,
  )
  assert state == 8
  np.testing.assert_array_equal(rollouts.completion, [[2, 1, 2, 1]] * 2)
  np.testing.assert_array_equal(rollouts.committed_at, [[3, 1, 7, 5]] * 2)
  np.testing.assert_array_equal(rollouts.confidence, [[3 / 8, 1 / 8, 7 / 8, 5 / 8]] * 2)
  np.testing.assert_array_equal(rollouts.num_calls, [8, 8])


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (dict(block_length=3), ["sampler.block_length=3", "divide", "[1, 2, 4, 8]"]),
    (dict(block_length=16), ["sampler.block_length=16", "divide"]),
    (dict(steps=5), ["sampler.steps=5", "multiple of the 2 blocks", "4 or 6"]),
    (dict(steps=1), ["sampler.steps=1", "such as 2"]),
    (dict(steps=0), ["sampler.steps=0", "at least 1"]),
    (dict(completion_length=0), ["sampler.completion_length=0"]),
    (dict(temperature=-0.1), ["sampler.temperature=-0.1", "0 (greedy)"]),
    (dict(temperature=float("nan")), ["sampler.temperature=nan"]),
  ],
)
def test_a_bad_plan_is_refused(change, words):
  with pytest.raises(ValueError, match="sampler") as error:
    samplers.Plan(**(dict(completion_length=8, block_length=4, steps=4, temperature=0.0) | change))
  for word in words:
    assert word in str(error.value)
