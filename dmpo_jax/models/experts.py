"""Feed-forward layers of experts: a router sends every token to a few of them, and no token is dropped.

Tokens are sorted by expert, and each expert multiplies its own: `jax.lax.ragged_dot`. Every device routes its own rows
through all experts, of which it has a part of the width (the tensor axis).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int

from dmpo_jax.models.config import ModelConfig
from dmpo_jax.models.layers import PROJECTION, gathered_axes, project, with_axes
from dmpo_jax.models.router import ROUTERS, Choice, Router
from dmpo_jax.sharding import LOGICAL_AXES, constrain, pad_rows, spec

KERNELS = {  # of the experts: the logical axes [expert, in, out]
  "ff_proj": ("expert", None, "ffn"),
  "up_proj": ("expert", None, "ffn"),
  "ff_out": ("expert", "ffn", None),
}


class Experts(nn.Module):
  """Sum over a token's experts of weight * SwiGLU(x)."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: Float[Array, "b l d"]) -> tuple[Float[Array, "b l d"], Choice]:
    c = self.config
    d, e, f = c.d_model, c.num_experts, c.expert_size
    init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
    gate = self.param("router", with_axes(init, ("embed", None)), (d, e), c.param_dtype)
    bias = None
    if c.expert_bias:
      # A buffer in the authors' code: nothing trains it here either.
      drawn = self.param("bias", with_axes(nn.initializers.zeros, (None,)), (e,), c.param_dtype)
      bias = jax.lax.stop_gradient(drawn).astype(jnp.float32)
    shapes = {"ff_proj": (e, d, f), "up_proj": (e, d, f), "ff_out": (e, f, d)}
    kernels = []
    for name, axes in KERNELS.items():
      gain = (2 * c.num_layers) ** -1.0 if name == "ff_out" else 1.0  # a variance; additions to the stream start small
      init = nn.initializers.variance_scaling(gain, "fan_in", "truncated_normal", batch_axis=(0,))
      kernel = self.param(f"{name}_kernel", with_axes(init, axes), shapes[name], c.param_dtype)
      kernels.append(constrain(kernel.astype(x.dtype), *_gathered(axes)))
    gate = constrain(gate, *gathered_axes(("embed", None)))
    return _on_every_device(x, gate, bias, *kernels, router=ROUTERS[c.router], number=c.experts_per_token)


def gather(name: str, array: jax.Array) -> jax.Array:
  """All-gather a parameter of the experts as products read it; its width may stay sharded."""
  if name == "router":
    return constrain(array, None, None)
  axes = KERNELS.get(name.removesuffix("_kernel"))
  return array if axes is None else constrain(array, *_gathered(axes))


def _gathered(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
  return tuple(None if axis == "expert" else axis for axis in axes)


def _on_every_device(
  x: Float[Array, "b l d"],
  gate: Float[Array, "d e"],
  bias: Float32[Array, "e"] | None,
  *kernels: Float[Array, "e _ _"],
  router: Router,
  number: int,
) -> tuple[Float[Array, "b l d"], Choice]:
  """Run each device's rows through all experts, and add up the parts of their width."""
  own = functools.partial(mix, router=router, number=number)
  if jax.sharding.get_abstract_mesh().empty:
    return own(x, gate, bias, *kernels)

  def run(x: jax.Array, gate: jax.Array, bias: jax.Array | None, *kernels: jax.Array) -> tuple[jax.Array, Choice]:
    mixed, choice = own(x, gate, bias, *kernels)
    return jax.lax.psum(mixed, LOGICAL_AXES["ffn"]), choice

  rows = spec("batch", None, None)
  of_kernels = (spec(*_gathered(axes)) for axes in KERNELS.values())
  whole = spec()
  found = (rows, Choice(rows, spec("batch", None)))
  program = jax.shard_map(run, in_specs=(rows, whole, whole, *of_kernels), out_specs=found)
  return jax.tree.map(lambda array: array[: x.shape[0]], program(pad_rows(x), gate, bias, *kernels))


def mix(
  x: Float[Array, "b l d"],
  gate: Float[Array, "d e"],
  bias: Float32[Array, "e"] | None,
  ff_proj: Float[Array, "e d f"],
  up_proj: Float[Array, "e d f"],
  ff_out: Float[Array, "e f d"],
  *,
  router: Router,
  number: int,
) -> tuple[Float[Array, "b l d"], Choice]:
  """Route tokens and compute their experts, sorted by expert; also say what the router did."""
  flat = x.reshape(-1, x.shape[-1])
  logits = project(flat, gate, jnp.float32)
  chosen, weights = router(logits, bias, number)
  order = jnp.argsort(chosen.reshape(-1), stable=True)
  sizes = jnp.bincount(chosen.reshape(-1), length=gate.shape[-1]).astype(jnp.int32)
  rows = flat[order // number]
  gated, up = (_product(rows, kernel, sizes) for kernel in (ff_proj, up_proj))
  found = _product(nn.silu(gated) * up, ff_out, sizes)
  # back in the tokens' order, so that a token's sum does not depend on the others
  apart = found[jnp.argsort(order)].reshape(*chosen.shape, -1)
  mixed = (apart * weights.astype(x.dtype)[..., None]).sum(1).reshape(x.shape)
  entropy = jax.scipy.special.entr(jax.nn.softmax(jax.lax.stop_gradient(logits))).sum(-1)
  return mixed, Choice(chosen.reshape(*x.shape[:-1], number), entropy.reshape(x.shape[:-1]))


def _product(rows: Float[Array, "t d"], kernels: Float[Array, "e d f"], sizes: Int[Array, "e"]) -> Float[Array, "t f"]:
  return checkpoint_name(jax.lax.ragged_dot(rows, kernels, sizes), PROJECTION)
