"""Attention's kernels against its definition: values and gradients, padding, grouped heads, devices; and who runs what.

The TPU kernel runs here in Pallas's interpreter. cuDNN's needs its GPU: what is given to it is tried on the
reference of `jax.nn.dot_product_attention`, which has the same arguments.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny as tiny_configs
from jax.extend.core import ClosedJaxpr, Jaxpr
from recorded_models import tiny

from dmpo_jax import build, sharding
from dmpo_jax.models import attention
from dmpo_jax.models.lora import LoraConfig
from dmpo_jax.models.transformer import Transformer, empty_kv_cache


@pytest.fixture(autouse=True)
def kernels_without_their_devices(monkeypatch):
  make, reference = attention.splash.make_splash_mha_single_device, jax.nn.dot_product_attention

  def dot_product_attention(*arrays, implementation, **keywords):
    assert implementation == "cudnn"
    return reference(*arrays, implementation="xla", **keywords)

  monkeypatch.setattr(attention.splash, "make_splash_mha_single_device", functools.partial(make, interpret=True))
  monkeypatch.setattr(jax.nn, "dot_product_attention", dot_product_attention)


def inputs(dtype=jnp.float32, b=2, l=130, m=130, n=4, k=2, h=8):
  draw = np.random.default_rng(0).normal
  shapes = (b, l, n, h), (b, m, k, h), (b, m, k, h), (b, l, n * h)
  return [jnp.asarray(draw(size=shape), dtype) for shape in shapes]


def value_and_gradient(kernel, arrays, is_key):
  """Attention's value, and the gradient of its product with the last of the arrays."""
  mask = None if is_key is None else is_key[:, None]

  @jax.jit
  def run(query, key, value, direction):
    mixed, back = jax.vjp(lambda *own: attention.attend(*own, mask, kernel), query, key, value)
    return mixed, *back(direction)

  return run(*arrays)


def agree(kernel, arrays, is_key, tolerance):
  wanted, found = (value_and_gradient(name, arrays, is_key) for name in ("xla", kernel))
  for actual, exact in zip(found, wanted, strict=True):
    assert actual.dtype == exact.dtype
    np.testing.assert_allclose(np.float32(actual), np.float32(exact), rtol=tolerance, atol=tolerance)


LEFT = np.arange(130) >= np.array([[0], [37]])
RIGHT = np.arange(130) < np.array([[130], [60]])


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
@pytest.mark.parametrize(
  ("is_key", "dtype", "tolerance"), [(LEFT, jnp.float32, 2e-6), (RIGHT, jnp.bfloat16, 2e-2), (None, jnp.float32, 2e-6)]
)
def test_a_kernel_is_the_definition(kernel, is_key, dtype, tolerance):
  """Padded rows of 130 positions: no multiple of any block; two query heads share one of keys."""
  agree(kernel, inputs(dtype), None if is_key is None else jnp.asarray(is_key), tolerance)


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
@pytest.mark.parametrize(("rows", "is_padded"), [(1, True), (6, True), (6, False)])
def test_rows_that_devices_do_not_divide_are_the_definitions_too(kernel, rows, is_padded):
  """One prompt, or an odd last batch, on four devices."""
  arrays = inputs(b=rows)
  is_key = jnp.asarray(np.arange(130) < 130 - 20 * np.arange(rows)[:, None]) if is_padded else None
  wanted = value_and_gradient("xla", arrays, is_key)
  with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])):
    found = value_and_gradient(kernel, arrays, is_key)
  for actual, exact in zip(found, wanted, strict=True):
    np.testing.assert_allclose(actual, exact, rtol=2e-6, atol=2e-6)


def test_many_keys_are_several_blocks():
  """A gradient of queries over several blocks of keys, of which one is all padding."""
  is_key = jnp.asarray(np.arange(1100) < np.array([[700], [1100]]))
  agree("splash", inputs(m=1100, n=2, k=1), is_key, 2e-6)
  assert [attention._blocks(length) for length in (1, 128, 456, 512, 513, 1224)] == [
    (128, 128),
    (128, 128),
    (512, 512),
    (512, 512),
    (768, 384),
    (1536, 512),
  ]


def jaxprs(jaxpr):
  """A program and all that it calls, but for what runs inside a kernel."""
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  yield jaxpr
  for eqn in jaxpr.eqns:
    if eqn.primitive.name != "pallas_call":
      for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)):
        if isinstance(inner, ClosedJaxpr | Jaxpr):
          yield from jaxprs(inner)


def shapes_and_kernels(run, *args):
  parts = list(jaxprs(jax.make_jaxpr(run)(*args)))
  shapes = {getattr(variable.aval, "shape", ()) for part in parts for eqn in part.eqns for variable in eqn.outvars}
  read = {id(variable) for part in parts for eqn in part.eqns for variable in eqn.invars}
  read |= {id(variable) for part in parts for variable in part.outvars}
  kernels = [eqn for part in parts for eqn in part.eqns if eqn.primitive.name == "pallas_call"]
  return shapes, sum(any(id(result) in read for result in eqn.outvars) for eqn in kernels)


def test_a_training_step_has_no_scores_outside_the_kernel():
  """Whole models under nn.scan, recomputation, adapters and a mesh; the definition beside it, which has them."""
  length, (model, variables) = 150, tiny(lora=LoraConfig(2, 4.0, 0.0, ("q_proj",)))
  tokens, is_valid = jnp.zeros((4, length), jnp.int32), jnp.ones((4, length), bool)

  def with_scores(name, remat):
    own = Transformer(dataclasses.replace(model.config, attention=name, remat=remat))

    def loss(lora):
      return own.apply({**variables, "lora": lora}, tokens, is_valid=is_valid).sum()

    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
      shapes, num_kernels = shapes_and_kernels(jax.grad(loss), variables["lora"])
    return any(sum(size >= length for size in shape) >= 2 for shape in shapes), num_kernels

  assert with_scores("xla", "full") == (True, 0)
  assert with_scores("splash", "full") == (False, 3)  # forward, forward again, and one for all three gradients
  assert with_scores("splash", "products") == with_scores("splash", "attention") == (False, 2)


@pytest.mark.slow
def test_a_model_on_eight_devices_is_the_model_with_the_definition():
  """Rows over data and fsdp, heads over tensor; logits and the gradient of the parameters."""
  model, variables = tiny(remat="full", num_layers=2)
  tokens = jax.random.randint(jax.random.key(1), (4, 130), 0, model.config.vocab_size)
  is_valid = jnp.arange(130) >= jnp.arange(4)[:, None]

  def run(name):
    own = Transformer(dataclasses.replace(model.config, attention=name))

    def loss(params, tokens):
      logits = own.apply({"params": params}, tokens, is_valid=is_valid)
      return (jax.nn.log_softmax(logits)[..., 3] * is_valid).mean(), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))

  wanted = run("xla")(variables["params"], tokens)
  mesh = sharding.make_mesh(2, 2, 2)
  boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  split = jax.device_put(variables, sharding.layout(boxed, mesh))
  with jax.set_mesh(mesh):
    found = run("splash")(split["params"], tokens)
  logits, wanted_logits = found[0][1], wanted[0][1]
  np.testing.assert_allclose(logits[is_valid], wanted_logits[is_valid], atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found[1], wanted[1])


@pytest.mark.parametrize(("queries", "num_kernels"), [(32, 0), (127, 0), (128, 1), (224, 1)])
def test_a_cached_call_uses_the_kernel_if_it_has_queries_enough(queries, num_kernels):
  """One kernel stands in the program once, whatever the number of layers."""
  model, variables = tiny(attention="splash")
  tokens = jnp.zeros((2, queries), jnp.int32)

  def run(variables, kv_cache):
    return model.apply(variables, tokens, kv_cache=kv_cache, cache_start=300 - queries, method="hidden")

  assert shapes_and_kernels(run, variables, empty_kv_cache(model.config, 2, 300))[1] == num_kernels


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_a_mask_of_query_and_key_is_the_definitions(kernel):
  arrays = inputs(b=1)[:3]
  mask = jnp.asarray(np.random.default_rng(1).random((1, 130, 130)) < 0.7)
  _, num_kernels = shapes_and_kernels(functools.partial(attention.attend, mask=mask, attention=kernel), *arrays)
  assert num_kernels == 0
  run = jax.jit(attention.attend, static_argnums=4)
  np.testing.assert_array_equal(run(*arrays, mask, kernel), run(*arrays, mask, "xla"))


@pytest.mark.parametrize(
  ("platform", "head_dim", "dtype", "wanted"),
  [
    ("tpu", 128, "float32", "splash"),
    ("tpu", 64, "bfloat16", "xla"),
    ("cuda", 128, "bfloat16", "cudnn"),
    ("cuda", 128, "float32", "xla"),
    ("cuda", 256, "bfloat16", "xla"),
    ("rocm", 128, "bfloat16", "xla"),
    ("cpu", 128, "bfloat16", "xla"),
  ],
)
def test_auto_is_the_platforms_kernel_if_the_model_suits_it(platform, head_dim, dtype, wanted):
  about = dict(platform=platform, head_dim=head_dim, dtype=dtype)
  assert attention.choose_attention("auto", **about) == attention.choose_attention(wanted, **about) == wanted
  assert attention.choose_attention("xla", **about) == "xla"


@pytest.mark.parametrize(
  ("asked", "platform", "head_dim", "dtype", "message"),
  [
    ("splash", "cpu", 128, "bfloat16", "model.attention='splash' needs a TPU, not cpu"),
    ("splash", "tpu", 96, "bfloat16", "model.attention='splash' needs heads of a multiple of 128, not 96"),
    ("cudnn", "rocm", 128, "bfloat16", "model.attention='cudnn' needs an NVIDIA GPU, not rocm"),
    ("cudnn", "cuda", 128, "float32", "model.attention='cudnn' needs model.dtype='bfloat16', not 'float32'"),
    ("cudnn", "cuda", 12, "bfloat16", "model.attention='cudnn' needs heads of a multiple of 8 up to 128, not 12"),
  ],
)
def test_a_kernel_that_cannot_run_is_refused(asked, platform, head_dim, dtype, message):
  with pytest.raises(ValueError, match=message):
    attention.choose_attention(asked, platform=platform, head_dim=head_dim, dtype=dtype)


def test_a_placed_model_has_its_devices_attention():
  model, mesh = tiny(attention="splash")[0], sharding.make_mesh(2, 2, 2)
  assert build.place_model(model, tiny_configs.config(), mesh, mesh).config.attention == "xla"
  with pytest.raises(ValueError, match="needs a TPU, not cpu"):
    build.place_model(model, tiny_configs.config(model__attention="splash"), mesh, mesh)
