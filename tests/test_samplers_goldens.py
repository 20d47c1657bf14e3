"""Samplers on small real checkpoints against trajectories recorded from the official PyTorch code."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded_models import params_of
from safetensors.numpy import load_file

from dmpo_jax.hub.model_config import model_config_from_hf
from dmpo_jax.models.denoiser import make_denoiser
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.samplers import SAMPLERS, Plan, make_options

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "samplers"
CASES = json.loads((GOLDENS / "trajectories.json").read_text())
RECORDED = np.load(GOLDENS / "trajectories.npz")
FUSED = {"xla_cpu_use_fusion_emitters": True}  # as users compile: with guidance, rounding decides between two positions


@functools.cache
def load(checkpoint):
  """Give (model, variables). The official code also samples ids beyond vocab_size, so here they count as tokens."""
  folder = GOLDENS / checkpoint
  config = model_config_from_hf(json.loads((folder / "config.json").read_text()))
  config = dataclasses.replace(config, vocab_size=config.embedding_size)
  return Transformer(config), {"params": params_of(load_file(folder / "model.safetensors"), config)}


def sample(case, prompt, padding=0, temperature=0.0, first_key=0):
  """Decode the prompts, left-padded by `padding` tokens, with the settings of a recorded case.

  Gives the rollouts and, in order, what stood after each model call: (completions, calls of each row).
  """
  model, variables = load(case["checkpoint"])
  states = {}
  plan = Plan(
    **{name: case[name] for name in ("completion_length", "block_length", "steps")},
    temperature=temperature,
    on_call=lambda number, *state: states.update({int(number): jax.tree.map(np.array, state)}),
  )
  tokens = jnp.pad(jnp.asarray(prompt, jnp.int32), ((0, 0), (padding, 0)), constant_values=model.config.eos_token_id)
  is_valid = jnp.broadcast_to(jnp.arange(tokens.shape[1]) >= padding, tokens.shape)

  @functools.partial(jax.jit, compiler_options=FUSED)
  def decode(variables, tokens, is_valid, keys):
    denoiser = make_denoiser(model, variables, tokens, is_valid, guidance=case["guidance"])
    return SAMPLERS[case["sampler"]].sample(denoiser, keys, plan, make_options(case["sampler"], case["own"]))

  data = [[0, first_key + row] for row in range(len(prompt))]
  keys = jax.random.wrap_key_data(jnp.asarray(data, jnp.uint32))
  rollouts = jax.tree.map(np.asarray, decode(variables, tokens, is_valid, keys))
  jax.effects_barrier()
  return rollouts, [states[number] for number in range(len(states))]


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["sampler"] != "wino"])
def test_every_state_and_the_number_of_calls_are_the_official_ones(name):
  case, recorded = CASES[name], RECORDED[f"{name}_states"]
  rollouts, states = sample(case, RECORDED[f"{name}_prompt"])
  assert len(states) == case["num_calls"]
  for (completion, *_), expected in zip(states, recorded[1:], strict=True):
    np.testing.assert_array_equal(completion, expected)
  np.testing.assert_array_equal(rollouts.completion, recorded[-1])
  assert ((rollouts.confidence > 0) & (rollouts.confidence <= 1)).all()


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["sampler"] == "wino"])
def test_with_revocation_too_though_its_rows_were_recorded_one_by_one(name):
  case = CASES[name]
  rollouts, states = sample(case, RECORDED[f"{name}_prompt"])
  np.testing.assert_array_equal(rollouts.completion, RECORDED[f"{name}_final"])
  np.testing.assert_array_equal(rollouts.num_calls, case["num_calls"])
  for row in range(len(rollouts.completion)):
    own = {int(calls[row]): completion[row] for completion, calls, _ in states}
    np.testing.assert_array_equal([own[call] for call in sorted(own)], RECORDED[f"{name}_row{row}"][1:])
