"""Log-probabilities under models that attend by blocks: SDAR's training loss and its gradients."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded_models import params_of
from safetensors.numpy import load_file

from dmpo_jax.hub.model_config import model_config_from_hf
from dmpo_jax.logprobs import make_score
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.structs import Prompts

FOLDER = pathlib.Path(__file__).parent / "goldens" / "blocks"
CASES = json.loads((FOLDER / "losses.json").read_text())
RECORDED = np.load(FOLDER / "losses.npz")
OURS = {  # path of a leaf, and its layer, of a tensor
  "model.layers.0.self_attn.k_proj.weight": ("k_proj", "kernel", 0),
  "model.layers.1.mlp.gate_proj.weight": ("ff_proj", "kernel", 1),
  "model.layers.0.self_attn.q_norm.weight": ("q_norm", "scale", 0),
}


def load(**changes):
  hf = json.loads((FOLDER / "sd_gqa" / "config.json").read_text()) | changes
  config = model_config_from_hf(hf)
  return Transformer(config), params_of(load_file(FOLDER / "sd_gqa" / "model.safetensors"), config, "sdar")


def log_probs(model, params, row, is_masked, num_prompt, padding=0):
  """Score one row, [prompt; completion], under its masks; [c]."""
  prompt = jnp.pad(row[None, :num_prompt], ((0, 0), (padding, 0)))
  is_valid = jnp.arange(prompt.shape[1])[None] >= padding
  prompts = Prompts(prompt, is_valid, jnp.zeros(1, jnp.uint32))
  score = make_score(model, {"params": params}, prompts, row[None, None, num_prompt:])
  return score(is_masked[None, None, None, num_prompt:]).log_prob[0, 0, 0]


@pytest.mark.parametrize("name", CASES)
def test_recorded_losses_and_gradients(name):
  """Each row is scored alone, one of them padded on the left; both copies of the reference's rows are one call here."""
  (model, params), case = load(), CASES[name]
  recorded = {key: jnp.asarray(RECORDED[f"{name}_{key}"]) for key in ("input_ids", "mask", "p_mask", "token_loss")}

  def compute(params):
    found = []
    for row, num_prompt in enumerate(case["prompt_lengths"]):
      own = (recorded[key][row] for key in ("input_ids", "mask"))
      log_prob = log_probs(model, params, *own, num_prompt, padding=3 * row)
      is_masked, p_mask = (recorded[key][row, num_prompt:] for key in ("mask", "p_mask"))
      found.append(jnp.where(is_masked, -log_prob / jnp.where(is_masked, p_mask, 1), 0))
    return sum(each.sum() for each in found) / RECORDED[f"{name}_answer_len"], found

  (loss, found), gradient = jax.jit(jax.value_and_grad(compute, has_aux=True))(params)
  np.testing.assert_allclose(loss, case["loss"], rtol=1e-4)
  for row, losses in enumerate(found):
    np.testing.assert_allclose(losses, recorded["token_loss"][row, -len(losses) :], rtol=1e-4, atol=1e-4)
  for number, tensor in enumerate(case["grads"]):
    if tensor == "lm_head.weight":
      own = gradient["head"].T
    else:
      module, leaf, layer = OURS[tensor]
      own = gradient["blocks"][module][leaf][layer].T
    wanted = RECORDED[f"{name}_grad_{number}"]
    np.testing.assert_allclose(own, wanted, rtol=2e-3, atol=1e-4 * np.abs(wanted).max())


def test_a_token_is_scored_given_its_own_block_and_clean_earlier_ones():
  """Other masks in later blocks, or in earlier ones, change nothing; in its own they do."""
  model, params = load()
  row, rng = RECORDED["prompt_no_multiple_input_ids"][0], np.random.default_rng(0)
  score = jax.jit(lambda is_masked: log_probs(model, params, jnp.asarray(row), is_masked, 6))
  first = rng.random(len(row)) < 0.5
  block = slice(8, 12)
  elsewhere = ~first
  elsewhere[block] = first[block]
  within = first.copy()
  within[8] = ~within[8]
  before, after, changed = (np.asarray(score(jnp.asarray(each)))[2:6] for each in (first, elsewhere, within))
  np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)
  assert (np.abs(changed - before)[1:] > 1e-4).all()


def test_masks_in_the_prompt_are_refused():
  model, params = load()
  prompts = Prompts(jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool), jnp.zeros(1, jnp.uint32))
  score = make_score(model, {"params": params}, prompts, jnp.zeros((1, 1, 4), jnp.int32))
  with pytest.raises(ValueError, match=r"objective.one_step.prompt_mask_ratio: must be 0"):
    score(jnp.ones((1, 1, 1, 4), bool), jnp.ones((1, 1, 1, 4), bool))
