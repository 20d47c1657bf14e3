"""Which masked positions are kept: recorded selections of the official code, and cases worked out by hand."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_denoiser import Fake, fixed, keys, run

from dmpo_jax.samplers import prediction, selection

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "samplers"
CASES = json.loads((GOLDENS / "selections.json").read_text())


ROWS, POSITIONS, IDS = 3, 13, 38  # of the largest recorded case; the others are filled up, to compile one program


def fill(array, value=0):
  widths = [(0, n - m) for n, m in zip((ROWS, POSITIONS, IDS), array.shape, strict=False)]
  return np.pad(array, widths, constant_values=value)


@jax.jit
def choose_tokens(logits, noise, temperature):
  """Tokens by the noisy logits, and their probabilities without noise."""
  denoiser = Fake(len, mask_token_id=-1)
  chosen = prediction.predict(denoiser, logits + temperature * noise, keys(ROWS), jnp.arange(POSITIONS), 0.0)
  return chosen.tokens, jnp.exp(prediction.log_probs(denoiser, logits, chosen.tokens))


@functools.partial(jax.jit, static_argnames=("rule", "bound"))
def select(rule, confidence, is_masked, count, bound):
  if rule == "count":
    return selection.select_count(confidence, is_masked, count)
  choose = selection.select_threshold if rule == "threshold" else selection.select_factor
  return choose(confidence, is_masked, bound)


@pytest.mark.parametrize("rule", ["count", "threshold", "factor"])
def test_selection_recorded_from_the_official_code(rule):
  """Tokens, and which are committed, from the recorded logits and uniform noise."""
  goldens = np.load(GOLDENS / "functions.npz")
  numbers = [i for i, case in enumerate(CASES) if case["rule"] == rule]
  assert len(numbers) >= 8
  for i in numbers:
    recorded = {key.split("_")[1]: goldens[key] for key in goldens if key.startswith(f"select{i}_")}
    b, s, _ = recorded["logits"].shape
    u = recorded.get("u", np.full_like(recorded["logits"], 0.5))
    noise = fill(-np.log(-np.log(u + 1e-10) + 1e-10).astype(np.float32))
    logits = fill(recorded["logits"], -np.inf)
    logits[b:], logits[:, s:] = 0, 0
    tokens, confidence = choose_tokens(logits, noise, CASES[i]["temperature"])
    count = fill(recorded.get("count", np.zeros(b, np.int32)))
    is_kept = select(rule, confidence, fill(recorded["mask"]), count, float(CASES[i]["bound"] or 0))
    np.testing.assert_array_equal(np.where(recorded["mask"], tokens[:b, :s], recorded["x"]), recorded["x0"])
    np.testing.assert_array_equal(is_kept[:b, :s], recorded["transfer"])


CONFIDENCE = jnp.array([[0.9, 0.4, 0.7, 0.2], [0.4, 0.4, 0.3, 0.2]])


@pytest.mark.parametrize(
  ("choose", "bound", "kept"),
  [
    (selection.select_threshold, 0.7, [[1, 0, 1, 0], [1, 0, 0, 0]]),  # the best always, the leftmost of equals
    (selection.select_factor, 1.0, [[1, 0, 1, 0], [1, 0, 0, 0]]),  # the second needs 2/3, the third 3/4
    (
      selection.select_factor,
      3.0,
      [[1, 1, 1, 1], [1, 1, 1, 1]],
    ),  # only the fourth fails (2/5)
    (selection.select_count, jnp.array([3, 0]), [[1, 1, 1, 0], [0, 0, 0, 0]]),
  ],
)
def test_selection_by_hand_row_by_row(choose, bound, kept):
  np.testing.assert_array_equal(choose(CONFIDENCE, jnp.ones((2, 4), bool), bound), np.array(kept, bool))
  # Positions that are decided are never kept and count in nothing; a row without masks keeps nothing.
  is_masked = jnp.array([[False] * 4, [True] * 4])
  some = choose(CONFIDENCE, is_masked, bound)
  np.testing.assert_array_equal(some, np.array(kept, bool) & np.array([[False], [True]]))


def test_entropy_is_of_the_whole_distribution():
  p = [[0.6, 0.2, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]]
  predicted = prediction.predict(Fake(len), jnp.log(jnp.array([p])), keys(1), jnp.arange(2), 0.0)
  np.testing.assert_allclose(predicted.entropy, [[-sum(q * np.log(q) for q in row) for row in p]], rtol=1e-6)


def test_a_threshold_that_all_reach_takes_one_call_a_block():
  certain = fixed([[0.6, 0.2, 0.1, 0.1]] * 6)
  rollouts = run("parallel", certain, keys(2), dict(threshold=0.5), completion_length=6, block_length=3)
  np.testing.assert_array_equal(rollouts.committed_at, [[0, 0, 0, 1, 1, 1]] * 2)
  np.testing.assert_array_equal(rollouts.num_calls, [2, 2])
