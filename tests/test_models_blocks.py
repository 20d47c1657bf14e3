"""Attention by blocks: recorded logits of SDAR, its caches, padding, and the TPU kernel's description of blocks."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded_models import compiled, params_of, tiny
from safetensors.numpy import load_file

from dmpo_jax.hub.model_config import model_config_from_hf
from dmpo_jax.models import attention
from dmpo_jax.models.transformer import Transformer, empty_kv_cache

FOLDER = pathlib.Path(__file__).parent / "goldens" / "blocks" / "sd_gqa"


@functools.cache
def recorded():
  return dict(np.load(FOLDER / "io.npz"))


@functools.cache
def variables():
  config = model_config_from_hf(json.loads((FOLDER / "config.json").read_text()))
  return {"params": params_of(load_file(FOLDER / "model.safetensors"), config, "sdar")}


@functools.cache
def model(block_length):
  config = model_config_from_hf(json.loads((FOLDER / "config.json").read_text()))
  return Transformer(dataclasses.replace(config, block_length=block_length))


def close(found, wanted):
  np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-4)


@pytest.mark.parametrize(
  ("name", "block_length"), [("b1a", 1), ("b4a", 4), ("b4b", 4), ("b5a", 5), ("b8a", 8), ("b32a", 32), ("full", 0)]
)
def test_logits_are_the_recorded_ones(name, block_length):
  """Lengths that are multiples of the block and others."""
  close(compiled(model(block_length))(variables(), recorded()[f"{name}_ids"]), recorded()[f"{name}_logits"])


def test_blocks_begin_at_each_rows_first_token():
  arrays = recorded()
  is_valid = np.arange(22) >= arrays["leftpad_len"][:, None]  # the number of padding tokens
  logits = compiled(model(4))(variables(), arrays["leftpad_ids"], is_valid=is_valid)
  close(logits[is_valid], arrays["leftpad_logits"][is_valid])


def test_cached_blocks_are_final():
  """The cache of two blocks is the recorded one, and gives a third, whatever its tokens, its recorded logits."""
  arrays, run = recorded(), compiled(model(4), "hidden")
  logits = compiled(model(4), "logits")
  empty = empty_kv_cache(model(4).config, 1, 12)
  hidden, cache = run(variables(), arrays["kv4_ids"][:, :8], kv_cache=empty)
  close(logits(variables(), hidden), arrays["kv4_logits_prefill"])
  for layer in range(3):
    close(np.moveaxis(cache.keys[layer, :, :8], 1, 2), arrays[f"kv4_k_{layer}"])
    close(np.moveaxis(cache.values[layer, :, :8], 1, 2), arrays[f"kv4_v_{layer}"])
  for name in ("ids", "ids2"):
    hidden, after = run(variables(), arrays[f"kv4_{name}"][:, 8:], kv_cache=cache, cache_start=8)
    close(logits(variables(), hidden), arrays["kv4_logits_block" + name.removeprefix("ids")])
    np.testing.assert_array_equal(after.keys[:, :, :8], cache.keys[:, :, :8])


@pytest.mark.slow
@pytest.mark.parametrize("is_padded", [True, False])
def test_the_tpu_kernel_has_blocks_without_a_mask_of_all_pairs(monkeypatch, is_padded):
  """In Pallas's interpreter, with rows padded left, right and in between; a block that divides no kernel block."""
  make = attention.splash.make_splash_mha_single_device
  monkeypatch.setattr(attention.splash, "make_splash_mha_single_device", functools.partial(make, interpret=True))
  plain, weights = tiny(num_layers=1, block_length=5)
  kernel = Transformer(dataclasses.replace(plain.config, attention="splash"))
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 26, (3, 150)))
  is_valid = None
  if is_padded:
    index = np.arange(150)
    is_valid = jnp.asarray(np.stack([index >= 37, index < 91, (index < 20) | (index > 43)]))

  def value_and_gradient(model):
    def norm(weights):
      hidden = model.apply(weights, tokens, is_valid=is_valid, method="hidden")[0]
      kept = hidden if is_valid is None else jnp.where(is_valid[..., None], hidden, 0)
      return jnp.square(kept).sum(), kept

    return jax.jit(jax.grad(norm, has_aux=True))(weights)

  for found, wanted in zip(*(jax.tree.leaves(value_and_gradient(each)) for each in (kernel, plain)), strict=True):
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
  mask = attention.Blocks((1024, 1024), 4)
  np.testing.assert_array_equal(mask[4:8, 0:12][0], np.arange(12) < 8)
