"""Noised completions behind one clean copy: the plain way computes the same, gradients too, with more operations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded_models import tiny

from dmpo_jax import sharding
from dmpo_jax.models import attention
from dmpo_jax.models.copies import Copies
from dmpo_jax.models.lora import TARGETS, LoraConfig
from dmpo_jax.models.noised import count_parts, noised_hidden
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.structs import Prompts
from launch.bench.blocks import plain_hidden
from launch.bench.costs import count_flops

LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.0, targets=TARGETS)


def inputs(p=2, g=2, r=3, q=7, c=8):
  """Prompts of different lengths, one of whole blocks of 4 and one not, and completions with masks."""
  rng = np.random.default_rng(0)
  is_valid = np.arange(q) >= np.array([3, 1])[np.arange(p) % 2, None]
  prompts = Prompts(rng.integers(0, 26, (p, q)), is_valid, np.arange(p, dtype=np.uint32))
  clean = rng.integers(0, 26, (p, g, c))
  noised = np.where(rng.random((p, g, r, c)) < 0.5, 28, clean[:, :, None])
  return jax.tree.map(jnp.asarray, (prompts, clean, noised))


def value_and_gradient(hidden_of, model, variables, given):
  def loss(variables):
    hidden, _ = hidden_of(model, variables, *given)
    return (hidden * jnp.cos(jnp.arange(hidden.size)).reshape(hidden.shape)).sum(), hidden

  return jax.grad(loss, has_aux=True)(variables)


def agree(found, wanted):
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=3e-5 * max(np.abs(theirs).max(), 1))


@functools.cache
def plain():
  model, variables = tiny(num_layers=2, block_length=4, qk_norm=True, lora=LORA)
  return model, variables, jax.jit(functools.partial(value_and_gradient, plain_hidden, model))(variables, inputs())


@pytest.mark.parametrize(
  ("changes", "mesh"),
  [({}, None), (dict(remat="full", layer_rows=3), (1, 1, 1)), (dict(remat="dots"), (2, 2, 2))],
)
def test_the_plain_way_computes_the_same(changes, mesh):
  """Hidden states, and gradients of parameters and adapters; on a mesh, a group's rollouts in one row or in several."""
  model, variables, wanted = plain()
  model = Transformer(dataclasses.replace(model.config, **changes))
  run = jax.jit(functools.partial(value_and_gradient, noised_hidden, model))
  if mesh is None:
    return agree(run(variables, inputs()), wanted)
  with jax.set_mesh(sharding.make_mesh(*mesh, devices=jax.devices()[: np.prod(mesh)])):
    agree(run(variables, inputs()), wanted)
  return None


def test_the_clean_completion_runs_once_for_all_noised_ones():
  """Counted operations of a pass and its gradient, for the width of real models: products with weights, mostly."""
  model, variables = tiny(num_layers=2, block_length=4, d_model=256, mlp_hidden_size=768)
  q, c = 32, 32
  for r in (1, 4):
    given = inputs(2, 2, r, q, c)
    ours, theirs = (
      count_flops(jax.make_jaxpr(functools.partial(value_and_gradient, run, model))(variables, given))
      for run in (noised_hidden, plain_hidden)
    )
    tokens = 2 * q + 4 * (1 + r) * (c + 4), 4 * r * (q + 2 * c + 3)
    np.testing.assert_allclose(theirs / ours, tokens[1] / tokens[0], rtol=0.05)


@pytest.mark.parametrize(
  ("sizes", "shares", "parts"),
  [((8, 4, 2, 0), 8, 1), ((4, 4, 2, 0), 8, 2), ((1, 8, 2, 0), 8, 8), ((3, 4, 2, 0), 8, 4), ((8, 8, 2, 4), 8, 4)],
)
def test_a_prompt_stands_once_for_the_rollouts_of_a_device(monkeypatch, sizes, shares, parts):
  """Unless a layer computes fewer rows at a time; where rows do not divide, each rollout has the prompt for itself."""
  monkeypatch.setattr(sharding, "num_shares", lambda axis: shares)
  assert count_parts(*sizes) == parts


def test_routers_count_every_token_once():
  """A prompt's whole blocks, and its rest with each copy; what fills a row up is left out."""
  experts = dict(router="softmax", num_experts=4, experts_per_token=2, expert_size=8)
  model, variables = tiny(num_layers=1, block_length=4, **experts)
  given = inputs(p=2, g=2, r=3, q=7, c=8)
  _, routing = jax.jit(functools.partial(noised_hidden, model))(variables, *given)
  assert routing.load.shape == (1, 2, 2, 4)
  rest, whole = np.array([0, 2]), 4  # prompts of 4 and 6 tokens
  np.testing.assert_allclose(routing.load.sum((0, 2, 3)), 2 * (whole + 2 * (1 + 3) * (rest + 8)))


def test_who_sees_whom():
  """Of a prompt of one block behind padding, two rollouts, a clean copy and a noised one of two blocks each."""
  copies = Copies(prompt=3, rollouts=2, noised=1, width=4, block=2)
  sees = copies.may_see(np.arange(19), np.arange(19))
  first, second = [0, 1, 2], [3, 4]
  wanted = {0: [0], 1: first, 2: first, 3: first + second, 4: first + second, 5: [*first, *second, 5, 6]}
  wanted |= {7: [*first, 7, 8], 9: [*first, *second, 9, 10], 11: [*first, 11, 12], 17: [*first, 11, 12, 17, 18]}
  for query, keys in wanted.items():
    np.testing.assert_array_equal(np.flatnonzero(sees[query]), keys, err_msg=str(query))


@pytest.mark.slow
def test_the_tpu_kernel_knows_the_copies(monkeypatch):
  """In Pallas's interpreter."""
  make = attention.splash.make_splash_mha_single_device
  monkeypatch.setattr(attention.splash, "make_splash_mha_single_device", functools.partial(make, interpret=True))
  model, variables = tiny(num_layers=1, block_length=5)
  kernel = Transformer(dataclasses.replace(model.config, attention="splash"))
  given = inputs(2, 2, 2, 12, 20)
  found, wanted = (
    jax.jit(functools.partial(value_and_gradient, noised_hidden, each))(variables, given) for each in (kernel, model)
  )
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())


def test_dropout_belongs_to_the_rollout_and_its_copy():
  """Whatever rollouts share a row; a mask sample more changes nothing for the others."""
  model, variables = tiny(num_layers=1, block_length=4, lora=dataclasses.replace(LORA, dropout=0.3))
  prompts, clean, noised = inputs()
  keys = jax.random.split(jax.random.key(0), (2, 2))

  @functools.partial(jax.jit, static_argnames="layer_rows")
  def run(noised, layer_rows=0, keys=keys):
    own = Transformer(dataclasses.replace(model.config, layer_rows=layer_rows))
    return noised_hidden(own, variables, prompts, clean, noised, keys)[0]

  whole = run(noised)
  np.testing.assert_allclose(run(noised, layer_rows=3), whole, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(run(noised[:, :, :2]), whole[:, :, :2], rtol=1e-4, atol=1e-4)
  assert np.abs(run(noised, keys=keys[::-1]) - whole).max() > 0.1
