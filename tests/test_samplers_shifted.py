"""Samplers of models whose positions predict the next token, against Dream's official code and row by row."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_denoiser import contextual, run
from recorded_models import params_of
from safetensors.numpy import load_file

from dmpo_jax.hub.model_config import model_config_from_hf
from dmpo_jax.models.denoiser import make_denoiser
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.samplers import SAMPLERS, Plan, make_options, selection

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "dream"
CASES = json.loads((GOLDENS / "trajectories.json").read_text())
RECORDED = np.load(GOLDENS / "trajectories.npz")


@functools.cache
def load(checkpoint):
  """Give (model, variables)."""
  config = model_config_from_hf(json.loads((GOLDENS / checkpoint / "config.json").read_text()))
  return Transformer(config), {
    "params": params_of(load_file(GOLDENS / checkpoint / "model.safetensors"), config, "dream")
  }


def sample(case, prompt, lengths, temperature=0.0, first_key=0, guidance=0.0):
  """Decode left-padded prompts. Gives the rollouts and the completions after each model call, in order."""
  model, variables = load(case["checkpoint"])
  states = {}
  plan = Plan(
    **{name: case[name] for name in ("completion_length", "block_length", "steps")},
    temperature=temperature,
    on_call=lambda number, *state: states.update({int(number): np.array(state[0])}),
  )
  is_valid = np.arange(prompt.shape[1]) >= prompt.shape[1] - np.asarray(lengths)[:, None]

  @jax.jit
  def decode(variables, tokens, is_valid, keys):
    denoiser = make_denoiser(model, variables, tokens, is_valid, guidance=guidance)
    return SAMPLERS[case["sampler"]].sample(denoiser, keys, plan, make_options(case["sampler"], case["own"]))

  keys = jax.random.wrap_key_data(jnp.asarray([[0, first_key + row] for row in range(len(prompt))], jnp.uint32))
  rollouts = jax.tree.map(np.asarray, decode(variables, jnp.asarray(prompt), jnp.asarray(is_valid), keys))
  jax.effects_barrier()
  return rollouts, [states[number] for number in range(len(states))]


@pytest.mark.parametrize("name", CASES)
def test_every_call_sees_what_the_official_one_sees(name):
  case = CASES[name]
  of = {
    key: RECORDED[f"{name}/{key}"] for key in ("prompt", "prompt_len", "final", "call_ids", "call_start", "call_len")
  }
  rollouts, states = sample(case, of["prompt"], of["prompt_len"])
  assert len(states) == case["num_calls"]
  mask = load(case["checkpoint"])[0].config.mask_token_id
  before = np.full_like(states[0], mask)
  for after, ids, start, length in zip(states, of["call_ids"], of["call_start"], of["call_len"], strict=True):
    rows = np.concatenate([of["prompt"], before], axis=1)
    np.testing.assert_array_equal(rows[:, start : start + length], ids[:, :length])
    before = after
  np.testing.assert_array_equal(rollouts.completion, of["final"][:, of["prompt"].shape[1] :])


@pytest.mark.parametrize(
  ("name", "own"),
  [
    ("prefix_cache", dict(rule="threshold", threshold=0.4)),
    ("dual_cache", dict(rule="entropy")),
    ("wino", dict(threshold=0.3, threshold_back=0.6)),
  ],
)
def test_rows_of_different_prompts_are_what_they_are_alone(name, own):
  case = dict(sampler=name, checkpoint="d_sharp", completion_length=16, block_length=8, steps=8, own=own)
  prompt, lengths = np.random.default_rng(0).integers(0, 180, (3, 9), np.int32), [9, 3, 6]
  together, _ = sample(case, prompt, lengths, temperature=1.0, guidance=0.5)
  alone, _ = sample(case, prompt[1:2, 6:], lengths[1:2], temperature=1.0, first_key=1, guidance=0.5)
  for field in ("completion", "committed_at", "num_calls"):
    np.testing.assert_array_equal(getattr(alone, field)[0], getattr(together, field)[1], err_msg=field)


@pytest.mark.parametrize(
  ("own", "counts"),
  [
    (dict(rule="count"), [1, 3, 2, 2]),
    (dict(rule="entropy"), [1, 2, 2, 3]),
    (dict(rule="threshold", threshold=0.0), [1, 7]),
    (dict(rule="factor", factor=9.0), [1, 7]),
  ],
)
def test_a_first_call_with_a_cache_commits_the_first_token_alone(own, counts):
  for name in ("prefix_cache", "dual_cache"):
    rollouts = run(name, contextual(c=8, shift_logits=True), _keys(2), own, completion_length=8, steps=4)
    for calls in rollouts.committed_at:
      assert calls[0] == 0
      np.testing.assert_array_equal(np.bincount(calls), counts)


def test_with_one_call_a_block_it_takes_everything():
  """The official code leaves all but the first token masked."""
  for own in (dict(rule="entropy"), dict(rule="count")):
    denoiser = contextual(c=4, shift_logits=True)
    rollouts = run("prefix_cache", denoiser, _keys(1), own, completion_length=4, block_length=2, steps=2)
    np.testing.assert_array_equal(rollouts.committed_at, [[0, 0, 1, 1]])


def _keys(number):
  return jax.random.wrap_key_data(jnp.arange(2 * number, dtype=jnp.uint32).reshape(number, 2))


@pytest.mark.parametrize(
  ("steps", "size", "counts"),  # recorded from the official code, after a block's first token
  [
    (4, 8, [2, 2, 3]),
    (8, 8, [0, 1, 1, 1, 1, 1, 2]),
    (3, 8, [3, 4]),
    (16, 16, [0, *[1] * 13, 2]),
    (5, 32, [7, 7, 8, 9]),
    (2, 4, [3]),
  ],
)
def test_shares_are_the_official_ones(steps, size, counts):
  shares, left, found = selection.certain_shares(steps), size - 1, []
  for share in shares[1:]:
    is_kept = selection.select_share(jnp.zeros((1, size)), jnp.arange(size)[None] < left, jnp.float32(share))
    found.append(int(is_kept.sum()))
    left -= found[-1]
  assert found == counts


def test_a_row_with_fewer_masks_takes_its_own_share():
  is_masked = jnp.array([[True] * 4, [True, True, False, False], [False] * 4])
  is_kept = selection.select_share(jnp.arange(12.0).reshape(3, 4), is_masked, jnp.float32(0.5))
  np.testing.assert_array_equal(is_kept, [[0, 0, 1, 1], [0, 1, 0, 0], [0] * 4])
