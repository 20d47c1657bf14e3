"""LLaDA's decoding against cases worked out by hand and recorded ones."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_denoiser import MASK, Fake, fixed, keys, run

from dmpo_jax.samplers import llada, prediction, selection

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "samplers"
PROBABILITIES = [[0.6, 0.2, 0.1, 0.1], [0.1, 0.1, 0.75, 0.05], [0.1, 0.5, 0.3, 0.1], [0.05, 0.9, 0.05, 0.0]]


@pytest.mark.parametrize(
  ("block_length", "steps", "committed_at"),
  [
    (4, 4, [2, 1, 3, 0]),  # one a call, the most confident first
    (4, 2, [1, 0, 1, 0]),  # two a call
    (4, 3, [1, 0, 2, 0]),  # 2, 1, 1: the remainder goes to the first call
    (2, 4, [1, 0, 3, 2]),  # the left block first
    (4, 6, [2, 1, 3, 0]),  # the last two calls keep nothing
    (1, 4, [0, 1, 2, 3]),
  ],
)
def test_greedy_order_by_hand(block_length, steps, committed_at):
  rollouts = run("llada", fixed(PROBABILITIES), keys(2), completion_length=4, block_length=block_length, steps=steps)
  for row in range(2):
    np.testing.assert_array_equal(rollouts.completion[row], [0, 2, 1, 1])
    np.testing.assert_array_equal(rollouts.committed_at[row], committed_at)
    np.testing.assert_allclose(rollouts.confidence[row], [0.6, 0.75, 0.5, 0.9], rtol=1e-6)
  np.testing.assert_array_equal(rollouts.num_calls, [steps, steps])
  np.testing.assert_array_equal(rollouts.num_tokens, [4, 4])
  np.testing.assert_allclose(rollouts.tokens_per_call, 4 / steps)
  np.testing.assert_allclose(rollouts.mean_confidence, 0.6875, rtol=1e-6)
  assert rollouts.completion.dtype == rollouts.committed_at.dtype == rollouts.num_calls.dtype == np.int32


def test_predictions_follow_what_was_committed():
  # Position 1 is sure of 2 at first. Position 0 copies position 1, and prefers 0 as long as it sees a mask there.
  def hidden(completion):
    right = completion[:, 1]
    first = jnp.where((right == MASK)[:, None], jnp.array([1.0, 0, 0, 0]), 2.0 * jax.nn.one_hot(right, 4))
    return jnp.stack([first, jnp.broadcast_to(jnp.array([0.0, 0, 3, 0]), first.shape)], axis=1)

  rollouts = run("llada", Fake(hidden), keys(1), completion_length=2)
  np.testing.assert_array_equal(rollouts.completion, [[2, 2]])
  np.testing.assert_array_equal(rollouts.committed_at, [[1, 0]])
  np.testing.assert_allclose(
    rollouts.confidence, [[np.exp(2) / (np.exp(2) + 3), np.exp(3) / (np.exp(3) + 3)]], rtol=1e-6
  )


def test_ties_go_to_the_lowest_token_and_the_leftmost_position():
  rollouts = run("llada", fixed([[0.25, 0.35, 0.35, 0.05]] * 5), keys(1), completion_length=5, steps=3)
  np.testing.assert_array_equal(rollouts.completion, [[1] * 5])
  np.testing.assert_array_equal(rollouts.committed_at, [[0, 0, 1, 1, 2]])


def test_transfer_counts_recorded_from_the_official_code():
  goldens = np.load(GOLDENS / "functions.npz")
  for i in range(4):
    num_masked = jnp.asarray(goldens[f"ntt_mask_{i}"].sum(1))
    counts = selection.num_transfer_tokens(num_masked, int(goldens[f"ntt_steps_{i}"]))
    np.testing.assert_array_equal(counts, goldens[f"ntt_out_{i}"])
  assert selection.num_transfer_tokens(jnp.int32(5), 3).tolist() == [2, 2, 1]


@pytest.mark.parametrize("form", ["llada", "fast"])
def test_gumbel_argmax_recorded_from_the_official_code(monkeypatch, form):
  """Ours chooses as both official forms do: exp(logits) / (-log u)^T and logits - T log(-log u)."""
  goldens = np.load(GOLDENS / "functions.npz")
  noise = jnp.asarray(-np.log(-np.log(goldens["gumbel_u"])), jnp.float32)
  monkeypatch.setattr(prediction, "gumbel_noise", lambda *_: noise)
  for j, temperature in enumerate(goldens["gumbel_temps"].tolist()):
    tokens = prediction.predict(
      Fake(len, mask_token_id=-1), jnp.asarray(goldens["gumbel_logits"]), keys(2), jnp.arange(5), temperature
    ).tokens
    np.testing.assert_array_equal(tokens, goldens[f"gumbel_{form}_{j}_argmax"])


def test_an_unknown_remasking_is_refused():
  with pytest.raises(ValueError, match=r"^remasking='low_confidense': .*did you mean 'low_confidence'"):
    llada.Options(remasking="low_confidense")
