"""Attention: its definition in plain JAX, and kernels that keep no array of scores, each for the devices it is of.

| `model.attention` | what runs |
|---|---|
| xla | the definition; scores [b, n, l, m] in float32 exist, at least within a layer |
| splash | Pallas's TPU kernel; the definition for masks of query and key, and for fewer than MIN_QUERIES queries |
| cudnn | cuDNN's fused kernel of NVIDIA GPUs; the definition for masks of query and key |

Masks of query and key are those of a sampler's shadow block alone; the training step has none. All conditions are of
shapes, so a program has one way and never changes it.

A kernel runs on every device with its own rows. Where the devices do not divide the rows (one prompt on a slice, the
last batch), rows of zeros fill them up and are dropped after it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Bool, Float, Int

from dmpo_jax.sharding import constrain, pad_rows, spec

ATTENTIONS = ("xla", "splash", "cudnn")
MIN_QUERIES = (
  128  # the splash kernel's smallest block; a sampler's block of 32 has few scores and would be mostly padding
)
MAX_BLOCK = 512  # queries and keys whose float32 scores lie in a TPU core's own memory at one time
LANES = 128  # the splash kernel's blocks and head widths come in this many


def choose_attention(asked: str, *, platform: str, head_dim: int, dtype: str) -> str:
  """Choose the attention for a platform (see `sharding.platform`): `auto` is its kernel, if the model suits that.

  Raises:
    ValueError: the attention that is asked for cannot run this model there.
  """
  obstacles = {
    "splash": _splash_obstacle(platform, head_dim),
    "cudnn": _cudnn_obstacle(platform, head_dim, dtype),
    "xla": None,
  }
  if asked == "auto":
    return next(name for name, obstacle in obstacles.items() if obstacle is None)
  if obstacles[asked]:
    raise ValueError(f"model.attention={asked!r} needs {obstacles[asked]}; auto chooses what can run")
  return asked


def _splash_obstacle(platform: str, head_dim: int) -> str | None:
  if platform != "tpu":
    return f"a TPU, not {platform}"
  return f"heads of a multiple of {LANES}, not {head_dim}" if head_dim % LANES else None


def _cudnn_obstacle(platform: str, head_dim: int, dtype: str) -> str | None:
  if platform != "cuda":
    return f"an NVIDIA GPU, not {platform}"
  if dtype != "bfloat16":
    return f"model.dtype='bfloat16', not {dtype!r}"
  return f"heads of a multiple of 8 up to 128, not {head_dim}" if head_dim % 8 or head_dim > 128 else None


def attend(
  query: Float[Array, "b l n h"],
  key: Float[Array, "b m k h"],
  value: Float[Array, "b m k h"],
  mask: Bool[Array, "b #l m"] | None,
  attention: str = "xla",
) -> Float[Array, "b l n*h"]:
  """Attend from l queries to m keys, n / k query heads sharing a key/value head; scores and softmax in float32.

  Args:
    mask: True where a query may attend; None: everywhere. A query that may attend nowhere gets an average of values,
      of which nothing else is promised.
    attention: one of ATTENTIONS.
  """
  query = query * query.shape[-1] ** -0.5
  is_of_keys = mask is None or mask.shape[1] == 1
  if is_of_keys and (attention == "cudnn" or (attention == "splash" and query.shape[1] >= MIN_QUERIES)):
    kernel = _attend_splash if attention == "splash" else _attend_cudnn
    arrays = jax.tree.map(pad_rows, (query, key, value, None if mask is None else mask[:, 0]))
    mixed = kernel(*arrays)[: query.shape[0]]
  else:
    mixed = _attend_plainly(query, key, value, mask)
  return constrain(mixed.reshape(*query.shape[:2], -1), "batch", None, "heads")


def _attend_plainly(
  query: Float[Array, "b l n h"],
  key: Float[Array, "b m k h"],
  value: Float[Array, "b m k h"],
  mask: Bool[Array, "b #l m"] | None,
) -> Float[Array, "b l n h"]:
  b, length, n, h = query.shape
  k = key.shape[2]
  query = jnp.moveaxis(query.reshape(b, length, k, n // k, h), 1, 3).reshape(b, k, -1, h)
  key, value = jnp.moveaxis(key, 1, 2), jnp.moveaxis(value, 1, 2)
  scores = jnp.einsum("bkzh,bkmh->bkzm", query, key, preferred_element_type=jnp.float32)  # z: n / k times l
  if mask is not None:
    mask = mask if mask.shape[1] == 1 else jnp.tile(mask, (1, n // k, 1))
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
  # The softmax's normalizer divides after the sum over keys, where there are fewer numbers to divide.
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
  mixed = jnp.einsum("bkzm,bkmh->bkzh", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
  mixed = (mixed / weights.sum(-1, keepdims=True)).astype(value.dtype).reshape(b, n, length, h)
  return jnp.moveaxis(mixed, 2, 1)


def _attend_cudnn(
  query: Float[Array, "b l n h"],
  key: Float[Array, "b m k h"],
  value: Float[Array, "b m k h"],
  is_key: Bool[Array, "b m"] | None,
) -> Float[Array, "b l n h"]:
  """Attend by cuDNN, which skips keys past a row's number of them but would read a mask at every score.

  The order of keys means nothing to attention, so the ones to attend to come first.
  """
  num_keys = None
  if is_key is not None:
    order = jnp.argsort(~is_key, axis=1, stable=True)
    key, value = (_reorder(array, order) for array in (key, value))
    num_keys = is_key.sum(1, dtype=jnp.int32)
  return jax.nn.dot_product_attention(
    query, key, value, scale=1.0, key_value_seq_lengths=num_keys, implementation="cudnn"
  )


def _reorder(array: Float[Array, "b m k h"], order: Int[Array, "b m"]) -> Float[Array, "b m k h"]:
  return jax.vmap(lambda row, order: row.at[order].get(unique_indices=True, mode="promise_in_bounds"))(array, order)


def _attend_splash(
  query: Float[Array, "b l n h"],
  key: Float[Array, "b m k h"],
  value: Float[Array, "b m k h"],
  is_key: Bool[Array, "b m"] | None,
) -> Float[Array, "b l n h"]:
  """Attend by Pallas's TPU kernel, on every device with its own rows and heads."""
  attend_rows = _attend_splash_rows
  if not jax.sharding.get_abstract_mesh().empty:
    queries, keys = spec("batch", None, "heads", None), spec("batch", None, "kv_heads", None)
    attend_rows = jax.shard_map(
      attend_rows,
      in_specs=(queries, keys, keys, spec("batch", None)),
      out_specs=queries,
      check_vma=False,  # the kernel does not say over which axes its results vary
    )
  return attend_rows(query, key, value, is_key)


def _attend_splash_rows(
  query: Float[Array, "b l n h"],
  key: Float[Array, "b m k h"],
  value: Float[Array, "b m k h"],
  is_key: Bool[Array, "b m"] | None,
) -> Float[Array, "b l n h"]:
  (length, num_heads), num_keys = query.shape[1:3], key.shape[1]
  (rows, row_block), (columns, column_block) = _blocks(length), _blocks(num_keys)
  if is_key is None and columns > num_keys:
    is_key = jnp.ones(key.shape[:2], bool)
  segments = None
  if is_key is not None:  # queries are of segment 1, as are the keys to attend to
    is_key = jnp.pad(is_key, ((0, 0), (0, columns - num_keys)))
    segments = splash.SegmentIds(q=jnp.ones((key.shape[0], rows), jnp.int32), kv=is_key.astype(jnp.int32))
  is_one_block = columns == column_block  # then the gradient of queries needs no kernel of its own, nor a sum
  blocks = splash.BlockSizes(
    block_q=row_block,
    block_kv=column_block,
    block_q_dkv=row_block,
    block_kv_dkv=column_block,
    use_fused_bwd_kernel=is_one_block,
    block_q_dq=None if is_one_block else row_block,
    block_kv_dq=None if is_one_block else column_block,
  )
  everywhere = splash.MultiHeadMask([splash.FullMask((rows, columns))] * num_heads)
  kernel = splash.make_splash_mha_single_device(everywhere, block_sizes=blocks)
  arrays = (_pad(query, rows), _pad(key, columns), _pad(value, columns))
  mixed = jax.vmap(kernel)(*(jnp.moveaxis(array, 1, 2) for array in arrays), segments)
  return jnp.moveaxis(mixed, 1, 2)[:, :length]


def _pad(array: Float[Array, "b l n h"], length: int) -> Float[Array, "b m n h"]:
  return jnp.pad(array, ((0, 0), (0, length - array.shape[1]), (0, 0), (0, 0)))


@functools.cache
def _blocks(length: int) -> tuple[int, int]:
  """Give the padded length of an axis and the block that divides it: as few as MAX_BLOCK allows, with least padding."""
  num_blocks = math.ceil(length / MAX_BLOCK)
  block = math.ceil(length / num_blocks / LANES) * LANES
  return num_blocks * block, block
