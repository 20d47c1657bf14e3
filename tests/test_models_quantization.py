"""Projections in int8: how they are rounded, what the model computes with them, and what goes over the links."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded_models import TINY, compiled, tiny

from dmpo_jax import policy, sharding
from dmpo_jax.models.layers import quantize
from dmpo_jax.models.lora import LoraConfig
from dmpo_jax.models.transformer import Transformer

ADAPTERS = LoraConfig(4, 4.0, 0.0, ("q_proj", "ff_out"))
EXPERTS = dict(  # in the second of two layers
  router="softmax",
  num_experts=4,
  experts_per_token=2,
  expert_size=8,
  shared_expert_size=8,
  expert_layers=(0.0, 1.0),
  expert_bias=True,
)


def rows(seed, b, l):
  return jnp.asarray(np.random.default_rng(seed).integers(0, TINY.vocab_size, (b, l)))


@functools.cache
def both(**changes):
  """Give an int8 model with its variables, and its plain twin: the same kernels, multiplied out."""
  plain, variables = tiny(lora=ADAPTERS, qkv_bias=True, qk_norm=True, **changes)
  model = Transformer(dataclasses.replace(plain.config, quantization="int8"))
  own, of_twin = ({**variables, "params": dict(variables["params"])} for _ in range(2))
  for run in (run.name for run in plain.config.runs):
    for tree, is_twin in ((own, False), (of_twin, True)):
      tree["params"][run] = {name: rounded(leaves, is_twin) for name, leaves in variables["params"][run].items()}
  return model, own, plain, of_twin


def rounded(leaves, is_twin):
  """A module's parameters with int8 kernels and their scales or, for the twin, with kernels multiplied out."""
  found = dict(leaves)
  for name in (name for name in leaves if name.endswith("kernel")):
    kernel, scale = quantize(leaves[name])
    found |= {name: kernel * scale[..., None, :]} if is_twin else {name: kernel, f"{name}_scale": scale}
  return found


def test_columns_are_rounded_in_127_steps_of_their_own():
  kernel = np.array([[1.27, -3.0, 0.0], [-0.5, 1.5, 0.0]], np.float32)
  values, scale = quantize(kernel)
  assert isinstance(values, np.ndarray)
  assert (values.dtype, scale.dtype) == (np.int8, np.float32)
  np.testing.assert_array_equal(values, [[127, -127, 0], [-50, 64, 0]])  # 63.5 to the even neighbour
  np.testing.assert_allclose(scale, [0.01, 3 / 127, 0.0], rtol=1e-6)
  many = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64, 8)), jnp.bfloat16)
  values, scale = quantize(many)
  error = jnp.abs(values * scale[:, None] - many.astype(jnp.float32))
  assert (error <= scale[:, None] * 0.5001).all()
  assert (jnp.abs(values).max(1) == 127).all()


@pytest.mark.slow
@pytest.mark.parametrize(("layer_rows", "has_experts"), [(0, False), (1, False), (1, True)])
def test_int8_kernels_are_their_plain_twin(layer_rows, has_experts):
  """Logits and adapters' gradients, on one device and on eight."""
  experts = EXPERTS if has_experts else {}
  model, variables, plain, of_twin = both(remat="full", num_layers=2, layer_rows=layer_rows, **experts)
  tokens = rows(0, 8, 6)

  def run(model, lora, params):
    def loss(lora):
      logits = model.apply({"params": params, "lora": lora}, tokens)
      return jax.nn.log_softmax(logits)[..., 3].mean(), logits

    return jax.value_and_grad(loss, has_aux=True)(lora)

  wanted = jax.jit(functools.partial(run, plain))(of_twin["lora"], of_twin["params"])
  program = jax.jit(functools.partial(run, model))
  found = [program(variables["lora"], variables["params"])]
  mesh = sharding.make_mesh(2, 2, 2)
  split = jax.device_put(variables, sharding.layout(jax.eval_shape(model.init, jax.random.key(0), tokens), mesh))
  with jax.set_mesh(mesh):
    found.append(program(split["lora"], split["params"]))
  for each in found:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), each, wanted)


@pytest.mark.slow
def test_int8_is_what_is_gathered():
  """Of the layers' kernels nothing wider goes over the links, with layers in chunks of rows or not."""
  for layer_rows in (0, 1):
    model, _, _, _ = both(remat="full", num_layers=5, layer_rows=layer_rows)
    mesh = sharding.make_mesh(1, 4, 1, devices=jax.devices()[:4])
    given = {name: policy.abstract_collection(model, mesh, name) for name in ("params", "lora")}
    with jax.set_mesh(mesh):
      run = jax.jit(lambda given, model=model: model.apply(given, rows(0, 8, 6), method="hidden")[0])
      program = run.lower(given).compile().as_text()
    gathered = re.findall(r"= (\w+)\[(?:1,)?(16,16|16,8|16,24|24,16)\]\S* all-gather", program)
    assert {dtype for dtype, _ in gathered} == {"s8"}
    assert {shape for _, shape in gathered} == {"16,16", "16,8", "16,24", "24,16"}


@pytest.mark.slow
def test_a_new_model_has_columns_of_the_usual_size():
  """Random int8 parameters, as plans and benchmarks have, are of the size of others."""
  experts = EXPERTS | dict(expert_size=64, expert_layers=(0.0, 1.0, 1.0))
  model = Transformer(dataclasses.replace(TINY, d_model=64, head_dim=16, quantization="int8", **experts))
  params = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
  dense, experts, small = params["blocks_0"], params["blocks_1"]["experts"], (2 * TINY.num_layers) ** -0.5
  drawn = [(dense["up_proj"], "kernel", 1.0), (dense["attn_out"], "kernel", small)]
  drawn += [(experts, "up_proj_kernel", 1.0), (experts, "ff_out_kernel", small)]
  for leaves, name, gain in drawn:
    assert leaves[name].dtype == jnp.int8
    kernel = leaves[name] * leaves[f"{name}_scale"][..., None, :]
    np.testing.assert_allclose(kernel.std(), gain / 8, rtol=0.1)


@pytest.mark.parametrize("experts", [{}, EXPERTS], ids=["dense", "experts"])
def test_without_adapters_it_still_runs(experts):
  model, variables, plain, of_twin = both(num_layers=2, **experts)
  found = compiled(model)({"params": variables["params"]}, rows(1, 2, 5))
  np.testing.assert_allclose(found, compiled(plain)({"params": of_twin["params"]}, rows(1, 2, 5)), rtol=1e-4, atol=1e-5)


def test_an_unknown_quantization_is_refused():
  with pytest.raises(ValueError, match=r"model.quantization='nf4': must be one of none, int8"):
    dataclasses.replace(TINY, quantization="nf4")
