"""LLaDA's decoding on small real checkpoints against trajectories recorded from the official PyTorch code."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dmpo_jax.models import convert
from dmpo_jax.models.denoiser import make_denoiser
from dmpo_jax.models.llada import LLaDA
from dmpo_jax.samplers import SAMPLERS

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "samplers"
CASES = json.loads((GOLDENS / "llada.json").read_text())
RECORDED = np.load(GOLDENS / "llada.npz")


@functools.cache
def load(checkpoint):
  """Give (model, variables). The official code also samples ids beyond vocab_size, so here they count as tokens."""
  folder = GOLDENS / checkpoint
  config = convert.model_config_from_hf(json.loads((folder / "config.json").read_text()))
  config = dataclasses.replace(config, vocab_size=config.embedding_size)
  params = convert.params_from_hf(load_file(folder / "model.safetensors"), config)
  return LLaDA(config), {"params": jax.tree.map(jnp.asarray, params)}


def sample(case, prompt, padding=0, temperature=0.0, first_key=0, **own):
  """Decode the prompts, left-padded by `padding` tokens, with the settings of a recorded case."""
  model, variables = load(case["checkpoint"])
  settings = {name: case[name] for name in ("completion_length", "block_length", "steps")}
  tokens = jnp.pad(jnp.asarray(prompt, jnp.int32), ((0, 0), (padding, 0)), constant_values=model.config.eos_token_id)
  is_valid = jnp.broadcast_to(jnp.arange(tokens.shape[1]) >= padding, tokens.shape)

  @jax.jit
  def decode(variables, tokens, is_valid, keys):
    denoiser = make_denoiser(model, variables, tokens, is_valid)
    return SAMPLERS["llada"](denoiser, keys, temperature=temperature, **settings, **own)

  data = [[0, first_key + row] for row in range(len(prompt))]
  keys = jax.random.wrap_key_data(jnp.asarray(data, jnp.uint32))
  return model.config.mask_token_id, jax.tree.map(np.asarray, decode(variables, tokens, is_valid, keys))


@pytest.mark.parametrize("name", CASES)
def test_every_state_and_the_number_of_calls_are_the_official_ones(name):
  case, states = CASES[name], RECORDED[f"{name}_states"]
  mask_token_id, rollouts = sample(case, RECORDED[f"{name}_prompt"])
  assert (rollouts.num_calls == case["num_calls"]).all()
  assert len(states) == case["num_calls"] + 1
  for call, state in enumerate(states):
    np.testing.assert_array_equal(np.where(rollouts.committed_at < call, rollouts.completion, mask_token_id), state)
  assert ((rollouts.confidence > 0) & (rollouts.confidence <= 1)).all()


def test_a_sampled_row_depends_neither_on_padding_nor_on_its_batch():
  name = "llada_e_uneven"
  prompt = RECORDED[f"{name}_prompt"]
  _, together = sample(CASES[name], prompt, temperature=1.0)
  _, padded = sample(CASES[name], prompt[1:2], padding=5, temperature=1.0, first_key=1)
  for field in ("completion", "committed_at", "num_calls"):
    np.testing.assert_array_equal(getattr(padded, field)[0], getattr(together, field)[1])
  np.testing.assert_allclose(padded.confidence[0], together.confidence[1], atol=1e-5)
