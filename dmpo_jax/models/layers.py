"""The parts of a transformer block: RMS norm, projections with optional adapters, rotary positions.

Frozen projections may be int8, with one scale for each output.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, Int8, Key, Num

from dmpo_jax.models.lora import ALL_TARGETS, LoraConfig
from dmpo_jax.sharding import constrain

INT8_MAX = 127  # a symmetric range
SCALE = "_scale"  # ends the name of the parameter beside an int8 kernel
KERNEL_SCALE = f"kernel{SCALE}"
# Names of what rematerialisation policies may keep, beside the projections, which have their own.
PROJECTION = "projection"  # products of experts
ADAPTED = "adapted"  # the narrow side of an adapter


def with_axes(init: Callable[..., Any], axes: tuple[str | None, ...]) -> Callable[..., Any]:
  """Name the logical axes of a parameter where it is drawn.

  Flax types the result as the box that holds the names, but `param` and `variable` give the module the array inside.
  """
  return nn.with_logical_partitioning(init, axes)


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) in float32, back to the input's dtype, times a learned scale."""

  eps: float
  param_dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    init = with_axes(nn.initializers.ones, (None,))
    scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


class Dense(nn.Module):
  """A projection, plus its low-rank adapter if the "lora" collection is given.

  Args:
    features: output width.
    axes: logical axes of the kernel [in, out].
    gain: the initial weights have standard deviation gain / sqrt(in).
    has_bias: add a learned bias, initially 0.
    is_quantized: the kernel is int8, its columns scaled by `kernel_scale` [out] float32; it cannot be trained.
    lora: the adapters' settings; None: this projection has no adapter.
  """

  features: int
  axes: tuple[str, str]
  param_dtype: str
  gain: float = 1.0
  has_bias: bool = False
  is_quantized: bool = False
  lora: LoraConfig | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "b l d"], dropout_keys: Key[Array, "b l"] | None = None) -> Float[Array, "b l f"]:
    y = self._project(x)
    if self.has_bias:
      init = with_axes(nn.initializers.zeros, self.axes[1:])
      y = y + self.param("bias", init, (self.features,), self.param_dtype).astype(y.dtype)
    if self.lora is not None and (self.is_initializing() or self.has_variable("lora", "A")):
      y = y + self._adapt(x, self.lora, dropout_keys)
    return checkpoint_name(y, self.name or PROJECTION)

  def _project(self, x: Float[Array, "b l d"]) -> Float[Array, "b l f"]:
    init = nn.initializers.variance_scaling(self.gain**2, "fan_in", "truncated_normal")
    shape = (x.shape[-1], self.features)
    if not self.is_quantized:
      return project(x, self.param("kernel", with_axes(init, self.axes), shape, self.param_dtype))
    kernel = self.param("kernel", with_axes(as_int8(init), self.axes), shape)
    init = with_axes(scales_of(self.gain, shape[0]), self.axes[1:])
    scale = self.param(KERNEL_SCALE, init, shape[1:], jnp.float32)
    # All-gather it as int8: converted first, it would be twice the bytes.
    kernel = constrain(kernel, *gathered_axes(self.axes))
    return (project(x, kernel) * scale).astype(x.dtype)

  def _adapt(
    self, x: Float[Array, "b l d"], lora: LoraConfig, dropout_keys: Key[Array, "b l"] | None
  ) -> Float[Array, "b l f"]:
    uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(-1, 1) / sqrt(in)
    ranks = ["rank" if axis != "embed" else None for axis in self.axes]  # shard each adapter over fsdp exactly once
    a = self._adapter("A", uniform, (x.shape[-1], lora.rank), (self.axes[0], ranks[0]))
    b = self._adapter("B", nn.initializers.zeros, (lora.rank, self.features), (ranks[1], self.axes[1]))
    if dropout_keys is not None and lora.dropout > 0:
      x = drop(x, fold_all(dropout_keys, ALL_TARGETS.index(self.name)), lora.dropout)
    return project_adapter(checkpoint_name(project_adapter(x, a), ADAPTED), b) * lora.scale

  def _adapter(
    self, name: str, init: Initializer, shape: tuple[int, int], axes: tuple[str | None, str | None]
  ) -> Float32[Array, "_ _"]:
    draw = with_axes(init, axes)
    return self.variable("lora", name, lambda: draw(self.make_rng("params"), shape, jnp.float32)).value


def quantize(
  kernel: Float[Array | np.ndarray, "*y d f"],
) -> tuple[Int8[Array | np.ndarray, "*y d f"], Float32[Array | np.ndarray, "*y f"]]:
  """Round a kernel to int8 and one scale for each column; a NumPy kernel is quantized on the host.

  The scale is the column's largest magnitude / 127. An entry's error is at most half its column's scale.
  """
  kernel = kernel.astype(jnp.float32)
  scale = abs(kernel).max(-2) / INT8_MAX
  steps = (kernel / (scale + (scale == 0))[..., None, :]).round().clip(-INT8_MAX, INT8_MAX)
  return steps.astype(jnp.int8), scale


def as_int8(init: Initializer) -> Callable[[Key[Array, ""], tuple[int, ...]], Int8[Array | np.ndarray, "..."]]:
  """Quantize what an initialiser draws."""
  return lambda key, shape: quantize(init(key, shape, jnp.float32))[0]


def scales_of(gain: float, width: int) -> Initializer:
  """Return the scale of columns that are drawn with standard deviation gain / sqrt(width), truncated at two of them."""
  reach = 2 / 0.88 * gain * width**-0.5  # truncated so, a normal keeps 0.88 of its standard deviation
  return nn.initializers.constant(reach / INT8_MAX)


def gathered_axes(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
  """Return the axes of weights as products read them: gathered along d; heads and feed-forward may stay sharded."""
  return tuple(axis if axis != "embed" else None for axis in axes)


def project(
  x: Float[Array, "*b d"], kernel: Num[Array, "d f"], output_dtype: DTypeLike | None = None
) -> Float[Array, "*b f"]:
  """Multiply by a kernel, in the input's dtype.

  Args:
    output_dtype: of the sums and the result; None: the input's.
  """
  # Flatten rows and positions: with two axes, XLA's CPU backend transposes whole activations for the gradient.
  flat = x.reshape(-1, x.shape[-1])
  y = jnp.matmul(flat, kernel.astype(x.dtype), preferred_element_type=output_dtype)
  return y.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def project_adapter(x: Float[Array, "b l d"], kernel: Float32[Array, "d f"]) -> Float[Array, "b l f"]:
  """Multiply by an adapter like `project`, but sum the kernel's gradient in float32, over devices too."""
  return project(x, kernel)


def _project_adapter_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return project(x, kernel), (x, kernel)


def _project_adapter_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, kernel = saved
  flat_x, flat_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
  return project(dy, kernel.T), jnp.matmul(flat_x.T, flat_dy, preferred_element_type=jnp.float32)


project_adapter.defvjp(_project_adapter_forward, _project_adapter_backward)


def drop(x: Float[Array, "b l d"], keys: Key[Array, "b l"], rate: float) -> Float[Array, "b l d"]:
  """Apply dropout; each position of each row draws from its own key.

  An entry takes 16 random bits, half the work of drawing floats, so the rate is rounded to 16 bits.
  """
  width, limit = x.shape[-1], min(round(rate * 2**16), 2**16 - 1)

  def draw(key: Key[Array, ""]) -> Bool[Array, "d"]:
    words = jax.random.bits(key, (-(-width // 2),))
    return jnp.concatenate([words >> 16, words & 0xFFFF])[:width] >= limit

  return jnp.where(jax.vmap(jax.vmap(draw))(keys), x / (1 - limit / 2**16), 0)


def fold_all(keys: Key[Array, "b l"], number: Int[Array, ""] | int) -> Key[Array, "b l"]:
  """Fold the same number into every key."""
  return jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, number)


def rotary_frequencies(width: int, theta: float, scaling: tuple[float, ...] = ()) -> Float32[Array, "w"]:
  """Compute the angle per position of each pair, theta^(-2i / width) for i < w = width / 2 (arXiv 2104.09864).

  Args:
    width: entries of a head that are rotated.
    scaling: () or Llama 3.1's (factor, low, high, length): frequencies of which fewer than `low` waves fit into the
      length are divided by the factor, those of more than `high` waves kept, and the others interpolated.
  """
  frequency = theta ** -(jnp.arange(0, width, 2, dtype=jnp.float32) / width)
  if not scaling:
    return frequency
  factor, low, high, length = scaling
  kept = jnp.clip((length * frequency / (2 * math.pi) - low) / (high - low), 0, 1)
  return frequency * (kept + (1 - kept) / factor)


def rotary_table(
  positions: Int[Array, "b l"], frequency: Float32[Array, "w"]
) -> tuple[Float32[Array, "b l w"], Float32[Array, "b l w"]]:
  """Compute cos and sin of the positions' angles."""
  angle = positions[..., None].astype(jnp.float32) * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rotate(
  x: Float[Array, "b l n h"], table: tuple[Float32[Array, "b l w"], Float32[Array, "b l w"]]
) -> Float[Array, "b l n h"]:
  """Rotate each head's pairs (x_i, x_{i + w}), i < w, by the position's angles, in float32; the rest stays."""
  cos, sin = table[0][:, :, None], table[1][:, :, None]
  width = cos.shape[-1]
  first, second, rest = jnp.split(x.astype(jnp.float32), [width, 2 * width], axis=-1)
  rotated = (first * cos - second * sin, second * cos + first * sin, rest)
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
