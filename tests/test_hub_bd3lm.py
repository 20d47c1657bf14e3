"""dllm's block models: their config.json says nothing of blocks, conversion is told, and exports say it."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from recorded_models import load_converted
from safetensors.numpy import load_file

from dmpo_jax.hub import convert, pretrained
from dmpo_jax.hub.adapt import Adaptation
from dmpo_jax.hub.export import ModelExport
from dmpo_jax.models.denoiser import make_denoiser
from dmpo_jax.samplers import SAMPLERS, Plan, make_options
from launch import export_hf

FOLDER = pathlib.Path(__file__).parent / "goldens" / "blocks"
MASK = 190


def checkpoint(tmp_path, **changes):
  source = tmp_path / "hf"
  shutil.copytree(FOLDER / "a2d_sharp", source)
  config = json.loads((source / "config.json").read_text()) | {"mask_token_id": MASK} | changes
  (source / "config.json").write_text(json.dumps(config))
  return epath.Path(source)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  folder = tmp_path_factory.mktemp("bd3lm")
  convert.convert_model(checkpoint(folder), epath.Path(folder / "out"), asked=Adaptation(block_length=8))
  return epath.Path(folder / "out")


@pytest.mark.slow
def test_every_call_is_the_recorded_one(converted):
  """Of dllm's BD3LMSampler, for prompts of whole blocks: its grid begins at the prompt's end, ours at its start."""
  model, variables = load_converted(converted)
  recorded = np.load(FOLDER / "a2d_sampled.npz")
  prompt, states = jnp.asarray(recorded["prompt"]), {}
  plan = Plan(
    completion_length=16,
    block_length=8,
    steps=8,
    on_call=lambda number, completion, *_: states.update({int(number): completion}),
  )
  keys = jax.random.split(jax.random.key(0), len(prompt))

  @jax.jit
  def decode(variables):
    denoiser = make_denoiser(model, variables, prompt, jnp.ones(prompt.shape, bool))
    return SAMPLERS["parallel"].sample(denoiser, keys, plan, make_options("parallel", {"rule": "count"})).seen

  decode(variables).block_until_ready()
  jax.effects_barrier()
  wanted = recorded["trajectory"][1:]  # the first is what stands there before any call
  assert len(states) == len(wanted)
  for number, state in enumerate(wanted):
    own, behind = state[:, prompt.shape[1] :], states[number]
    is_there = own >= 0  # dllm's canvas grows block by block
    np.testing.assert_array_equal(np.where(is_there, behind, -1), own)


def test_the_blocks_are_stated_in_what_is_written(converted, tmp_path):
  assert pretrained.read_model(converted).fields["block_length"] == 8
  back = epath.Path(tmp_path / "back")
  ModelExport(export_hf.find_model(converted), "same").write(back, 10**9)
  about = json.loads((back / "config.json").read_text())
  assert (about["model_type"], about["block_size"]) == ("a2d-qwen3", 8)
  stored, written = load_file(FOLDER / "a2d_sharp" / "model.safetensors"), load_file(back / "model.safetensors")
  assert written.keys() == stored.keys()
  for name, array in stored.items():
    np.testing.assert_array_equal(written[name], array)
  again = epath.Path(tmp_path / "again")
  convert.convert_model(back, again)  # nothing has to be said now
  assert pretrained.read_model(again).fields == pretrained.read_model(converted).fields


def test_blocks_and_shifted_logits_do_not_go_together(tmp_path):
  asked = Adaptation(block_length=8, shift_logits=True)
  with pytest.raises(ValueError, match=r"model.block_length=8: must be .* 0 with model.shift_logits=True"):
    convert.convert_model(checkpoint(tmp_path), epath.Path(tmp_path / "out"), asked=asked)
