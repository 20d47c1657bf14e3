"""Routers: the recorded choices and weights of three families, and groups against a plain loop."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dmpo_jax.hub.model_config import model_config_from_hf
from dmpo_jax.models.router import ROUTERS, Share

FOLDER = pathlib.Path(__file__).parent / "goldens" / "blocks"


def check(router, logits, bias, share, experts, weights):
  found, shares = ROUTERS[router](jnp.asarray(logits), None if bias is None else jnp.asarray(bias), share)
  order, wanted = np.argsort(found, axis=-1), np.argsort(experts, axis=-1)  # theirs are not sorted by weight
  np.testing.assert_array_equal(np.take_along_axis(np.asarray(found), order, -1), np.sort(experts, -1))
  found, wanted = np.take_along_axis(np.asarray(shares), order, -1), np.take_along_axis(weights, wanted, -1)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["sm_sharp", "sm_top4_dense", "l2_sharp", "l2_shared2_bias"])
def test_choices_and_weights_are_the_recorded_ones(name):
  arrays, stored = np.load(FOLDER / name / "io.npz"), load_file(FOLDER / name / "model.safetensors")
  config = model_config_from_hf(json.loads((FOLDER / name / "config.json").read_text()))
  layers = [layer for layer in range(config.num_layers) if f"router_logits_1_{layer}" in arrays]
  assert layers == [
    layer for run in config.runs if run.has_experts for layer in range(run.first, run.first + run.length)
  ]
  for layer in layers:
    logits, experts, weights = (arrays[f"router_{what}_1_{layer}"] for what in ("logits", "experts", "weights"))
    bias = stored.get(f"model.layers.{layer}.mlp.gate.expert_bias")
    check(config.router, logits, bias, config.expert_share, experts, weights)


@pytest.mark.parametrize(("number", "share"), [(0, Share(8, 8, 4, 2.5)), (1, Share(4, 1, 1, 2.5))])
def test_the_gate_of_the_published_size_and_one_without_groups(number, share):
  arrays = np.load(FOLDER / "gate.npz")
  names = ("logits", "expert_bias", "experts", "weights")
  logits, bias, experts, weights = (arrays[f"gate_{number}_{name}"] for name in names)
  check("sigmoid", logits, bias, share, experts, weights)


@pytest.mark.parametrize("share", [Share(1, 3, 2, 0.5), Share(3, 3, 1), Share(3, 9, 4), Share(2)])
def test_groups_are_chosen_by_their_two_best_experts(share):
  rng = np.random.default_rng(0)
  logits, bias = rng.normal(size=(20, 9)).astype(np.float32), rng.normal(size=9).astype(np.float32)
  chosen, weights = ROUTERS["sigmoid"](jnp.asarray(logits), jnp.asarray(bias), share)
  for row, experts, shares in zip(1 / (1 + np.exp(-logits)), np.asarray(chosen), np.asarray(weights), strict=True):
    groups = np.arange(9).reshape(share.num_groups, -1)
    best = sorted(groups, key=lambda group: -np.sort((row + bias)[group])[-2:].sum())[: share.groups_per_token]
    wanted = sorted(np.concatenate(best), key=lambda expert: -(row + bias)[expert])[: share.number]
    np.testing.assert_array_equal(experts, wanted)
    total = row[wanted].sum() if share.number > 1 else 1.0  # the weight of a single expert is not divided by itself
    np.testing.assert_allclose(shares, share.scale * row[wanted] / total, rtol=1e-5)


def test_normalised_weights_add_up_to_one_and_are_those_of_the_same_experts():
  logits = jnp.asarray(np.random.default_rng(1).normal(size=(7, 6)), jnp.float32)
  plain, normalised = (ROUTERS[name](logits, None, Share(3)) for name in ("softmax", "softmax_normalised"))
  np.testing.assert_array_equal(plain[0], normalised[0])
  np.testing.assert_allclose(normalised[1].sum(-1), 1, rtol=1e-6)
  np.testing.assert_allclose(normalised[1], plain[1] / plain[1].sum(-1, keepdims=True), rtol=1e-6)
