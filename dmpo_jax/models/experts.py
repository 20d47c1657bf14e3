"""Feed-forward layers of experts: a router sends every token to a few of them, and no token is dropped.

Tokens are sorted by expert, and each expert multiplies its own: `jax.lax.ragged_dot`. Every device routes its own rows
through all experts, of which it has a part of the width (the tensor axis).
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Num

from dmpo_jax.models.config import ModelConfig
from dmpo_jax.models.layers import KERNEL_SCALE, PROJECTION, as_int8, gathered_axes, scales_of, with_axes
from dmpo_jax.models.router import ROUTERS, Choice, Router, Share
from dmpo_jax.sharding import LOGICAL_AXES, constrain, pad_rows, spec

KERNELS = {  # of the experts: the logical axes [expert, in, out]
  "ff_proj": ("expert", None, "ffn"),
  "up_proj": ("expert", None, "ffn"),
  "ff_out": ("expert", "ffn", None),
}


class Weights(NamedTuple):
  """Kernels of all experts; int8 ones have a scale for each output (`layers.quantize`)."""

  kernel: Num[Array, "e d f"]
  scale: Float32[Array, "e f"] | None = None


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
      # In float32 whatever the other parameters are, as it decides between experts that are almost equal.
      bias = jax.lax.stop_gradient(self.param("bias", with_axes(nn.initializers.zeros, (None,)), (e,), jnp.float32))
    weights = [
      self._weights("ff_proj", (e, d, f)),
      self._weights("up_proj", (e, d, f)),
      self._weights("ff_out", (e, f, d), (2 * c.num_layers) ** -0.5),  # additions to the stream start small
    ]
    gate = constrain(gate, *gathered_axes(("embed", None)))
    # of the gate and of the sum over experts, as in each family's code
    dtype = jnp.float32 if c.router == "sigmoid" else x.dtype
    return _on_every_device(x, gate, bias, *weights, router=ROUTERS[c.router], share=c.expert_share, dtype=dtype)

  def _weights(self, name: str, shape: tuple[int, int, int], gain: float = 1.0) -> Weights:
    """Declare a kernel of all experts and gather it, an int8 one as such."""
    c, axes = self.config, KERNELS[name]
    init = nn.initializers.variance_scaling(gain**2, "fan_in", "truncated_normal", batch_axis=(0,))
    if c.quantization == "none":
      kernel = self.param(f"{name}_kernel", with_axes(init, axes), shape, c.param_dtype)
      return Weights(constrain(kernel.astype(c.dtype), *_gathered(axes)))
    kernel = self.param(f"{name}_kernel", with_axes(as_int8(init), axes), shape)
    init = with_axes(scales_of(gain, shape[1]), _of_scale(axes))
    scale = self.param(f"{name}_{KERNEL_SCALE}", init, (shape[0], shape[2]), jnp.float32)
    return Weights(constrain(kernel, *_gathered(axes)), constrain(scale, *_gathered(_of_scale(axes))))


def gather(name: str, array: jax.Array) -> jax.Array:
  """All-gather a parameter of the experts as products read it; its width may stay sharded."""
  if name == "router":
    return constrain(array, None, None)
  if name == "bias":
    return array
  kernel = name.removesuffix(f"_{KERNEL_SCALE}").removesuffix("_kernel")
  axes = _of_scale(KERNELS[kernel]) if name.endswith(KERNEL_SCALE) else KERNELS[kernel]
  return constrain(array, *_gathered(axes))


def _gathered(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
  return tuple(None if axis == "expert" else axis for axis in axes)


def _of_scale(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
  return axes[0], axes[2]


def _on_every_device(
  x: Float[Array, "b l d"],
  gate: Float[Array, "d e"],
  bias: Float32[Array, "e"] | None,
  *weights: Weights,
  router: Router,
  share: Share,
  dtype: DTypeLike,
) -> tuple[Float[Array, "b l d"], Choice]:
  """Run each device's rows through all experts, and add up the parts of their width."""
  own = functools.partial(mix, router=router, share=share, dtype=dtype)
  if jax.sharding.get_abstract_mesh().empty:
    return own(x, gate, bias, *weights)

  def run(x: jax.Array, gate: jax.Array, bias: jax.Array | None, *weights: Weights) -> tuple[jax.Array, Choice]:
    mixed, choice = own(x, gate, bias, *weights)
    return jax.lax.psum(mixed, LOGICAL_AXES["ffn"]), choice

  def layout(*axes: str | None) -> Any:  # of an array, where its type is the array's
    return spec(*axes)

  rows, whole = layout("batch", None, None), layout()
  of_weights = (Weights(layout(*_gathered(axes)), layout(*_gathered(_of_scale(axes)))) for axes in KERNELS.values())
  found = (rows, Choice(rows, layout("batch", None)))
  program = jax.shard_map(run, in_specs=(rows, whole, whole, *of_weights), out_specs=found)
  return jax.tree.map(lambda array: array[: x.shape[0]], program(pad_rows(x), gate, bias, *weights))


def mix(
  x: Float[Array, "b l d"],
  gate: Float[Array, "d e"],
  bias: Float32[Array, "e"] | None,
  *weights: Weights,
  router: Router,
  share: Share,
  dtype: DTypeLike,
) -> tuple[Float[Array, "b l d"], Choice]:
  """Route tokens and compute their experts, sorted by expert; also say what the router did.

  Args:
    weights: of each entry of KERNELS.
    dtype: of the router's inputs, and of the sum over a token's experts.
  """
  flat = x.reshape(-1, x.shape[-1])
  logits = jnp.matmul(flat.astype(dtype), gate.astype(dtype), precision="highest", preferred_element_type=jnp.float32)
  chosen, shares = router(logits, bias, share)
  order = jnp.argsort(chosen.reshape(-1), stable=True)
  sizes = jnp.bincount(chosen.reshape(-1), length=gate.shape[-1]).astype(jnp.int32)
  rows, experts = flat[order // share.number], chosen.reshape(-1)[order]
  ff_proj, up_proj, ff_out = weights
  gated, up = (_product(rows, each, sizes, experts) for each in (ff_proj, up_proj))
  found = _product(nn.silu(gated) * up, ff_out, sizes, experts)
  # back in the tokens' order, so that a token's sum does not depend on the others
  apart = found[jnp.argsort(order)].reshape(*chosen.shape, -1)
  mixed = (apart * shares.astype(dtype)[..., None]).sum(1).astype(x.dtype).reshape(x.shape)
  entropy = jax.scipy.special.entr(jax.nn.softmax(jax.lax.stop_gradient(logits))).sum(-1)
  return mixed, Choice(chosen.reshape(*x.shape[:-1], share.number), entropy.reshape(x.shape[:-1]))


def _product(
  rows: Float[Array, "t d"], weights: Weights, sizes: Int[Array, "e"], experts: Int[Array, "t"]
) -> Float[Array, "t f"]:
  product = jax.lax.ragged_dot(rows, weights.kernel.astype(rows.dtype), sizes)
  if weights.scale is not None:
    product = (product * weights.scale[experts]).astype(rows.dtype)
  return checkpoint_name(product, PROJECTION)
