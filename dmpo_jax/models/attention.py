"""Attention: plain JAX, or a fused kernel that never materialises the scores.

| `model.attention` | what runs |
|---|---|
| xla | plain JAX; float32 scores [b, n, l, m] exist within a layer |
| splash | Pallas's TPU kernel; plain JAX for masks over (query, key), and for fewer than MIN_QUERIES queries |
| cudnn | cuDNN's fused kernel on NVIDIA GPUs; plain JAX for masks over (query, key) |

A sampler's shadow block has a mask over (query, key), and so have models that attend by blocks where they fill a cache.
Only splash has descriptions of blocks, `Blocks` for whole rows without a cache and `NoisedCopies` for log-probs. Plain
JAX computes the latter in parts. The choice depends on shapes alone, so it is made when a program is compiled.

A kernel runs on every device with the device's own rows. If the devices do not divide the rows (one prompt on a slice,
the last batch), rows of zeros are added and dropped again.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Bool, Float, Float32, Int

from dmpo_jax.models.copies import Copies
from dmpo_jax.sharding import constrain, pad_rows, spec

ATTENTIONS = ("xla", "splash", "cudnn")
MIN_QUERIES = 128  # the splash kernel's smallest block; a sampler's block of 32 queries would be mostly padding
MAX_BLOCK = 512  # queries and keys of a kernel block, whose float32 scores fit a TPU core's VMEM
MIXED = "mixed"  # name of attention's result for rematerialisation policies; what cuDNN needs of it has none
LANES = 128  # the splash kernel's blocks and head widths are multiples of this


def choose_attention(asked: str, *, platform: str, head_dim: int, dtype: str) -> str:
  """Choose the attention for a platform (see `sharding.platform`): `auto` takes its kernel, if that can run the model.

  Raises:
    ValueError: the attention asked for cannot run this model on this platform.
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


class Blocks(splash.Mask):
  """Splash's description of attention by blocks of `size` tokens from the first column on.

  The kernel asks for its own blocks one by one: no mask over all queries and keys is made.
  """

  def __init__(self, shape: tuple[int, int], size: int):
    self._shape, self._size = shape, size

  @property
  def shape(self) -> tuple[int, int]:
    return self._shape

  def __getitem__(self, index: tuple[slice, slice]) -> Bool[np.ndarray, "l m"]:
    query, key = (np.arange(length)[part] // self._size for part, length in zip(index, self._shape, strict=True))
    return key <= query[:, None]

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Blocks) and (self._shape, self._size) == (other._shape, other._size)

  def __hash__(self) -> int:
    return hash((self._shape, self._size))


class NoisedCopies(splash.Mask):
  """Splash's description of rows with clean and noised copies."""

  def __init__(self, shape: tuple[int, int], copies: Copies):
    self._shape, self._copies = shape, copies

  @property
  def shape(self) -> tuple[int, int]:
    return self._shape

  def __getitem__(self, index: tuple[slice, slice]) -> Bool[np.ndarray, "l m"]:
    query, key = (np.arange(length)[part] for part, length in zip(index, self._shape, strict=True))
    return self._copies.may_see(query, key)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, NoisedCopies) and (self._shape, self._copies) == (other._shape, other._copies)

  def __hash__(self) -> int:
    return hash((self._shape, self._copies))


def describes_blocks(attention: str, num_queries: int) -> bool:
  """Whether what runs attends by blocks without a mask over (query, key)."""
  return attention == "splash" and num_queries >= MIN_QUERIES


def _description(block_length: int, copies: Copies | None) -> Callable[[tuple[int, int]], splash.Mask]:
  if copies is not None:
    return functools.partial(NoisedCopies, copies=copies)
  return functools.partial(Blocks, size=block_length) if block_length else splash.FullMask


def attend(
  query: Float[Array, "b l n h"],
  key: Float[Array, "b m k h"],
  value: Float[Array, "b m k h"],
  mask: Bool[Array, "b #l m"] | None,
  attention: str = "xla",
  block_length: int = 0,
  copies: Copies | None = None,
) -> Float[Array, "b l n*h"]:
  """Attend from l queries to m keys; n / k query heads share a key/value head. Scores and softmax are float32.

  Args:
    mask: True where a query may attend; None: everywhere. A query that may attend nowhere gets some average of the
      values.
    attention: one of ATTENTIONS.
    block_length: of a model that attends by blocks; 0: none. A mask over (query, key) has the blocks in it. A mask of
      keys has not: it is for what `describes_blocks`, and the blocks begin at the first column.
    copies: what the rows hold, if it is clean and noised copies; the mask is then of keys.
  """
  query = query * query.shape[-1] ** -0.5
  is_of_keys = mask is None or mask.shape[1] == 1
  has_kernel = is_of_keys and attention == "splash" and query.shape[1] >= MIN_QUERIES
  if has_kernel or (is_of_keys and attention == "cudnn" and copies is None):
    kernel = _attend_cudnn
    if has_kernel:
      kernel = functools.partial(_attend_splash, describe=_description(block_length, copies))
    arrays = jax.tree.map(pad_rows, (query, key, value, None if mask is None else mask[:, 0]))
    mixed = kernel(*arrays)[: query.shape[0]]
  elif copies is not None:
    assert mask is not None
    mixed = _attend_copies(query, key, value, mask[:, 0], copies)
  else:
    mixed = _attend_xla(query, key, value, mask)
  return constrain(mixed.reshape(*query.shape[:2], -1), "batch", None, "heads")


def _attend_xla(
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
  # Divide by the softmax's normalizer after the sum over keys: fewer numbers to divide.
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
  mixed = jnp.einsum("bkzm,bkmh->bkzh", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
  mixed = checkpoint_name(mixed, MIXED)
  mixed = (mixed / weights.sum(-1, keepdims=True)).astype(value.dtype).reshape(b, n, length, h)
  return jnp.moveaxis(mixed, 2, 1)


def _attend_copies(
  query: Float[Array, "b l n h"],
  key: Float[Array, "b l k h"],
  value: Float[Array, "b l k h"],
  is_key: Bool[Array, "b l"],
  copies: Copies,
) -> Float[Array, "b l n h"]:
  """Attend as `Copies.may_see` says, without scores between copies.

  A copy's queries have three parts of keys under one softmax: the prompt, the clean copy, and their own block.
  """
  (b, _, n, h), k, q = query.shape, key.shape[2], copies.prompt
  may_see = is_key[:, None, :q] & copies.may_see(np.arange(q), np.arange(q))
  of_prompt = _attend_xla(query[:, :q], key[:, :q], value[:, :q], may_see)

  def split(array: jax.Array) -> jax.Array:  # rows, kv heads, rollouts, copies, blocks, heads times tokens, h
    array = array[:, q:].reshape(b, *copies.shape, k, -1, h)
    return jnp.transpose(array, (0, 5, 1, 2, 3, 6, 4, 7)).reshape(b, k, *copies.shape[:3], -1, h)

  query, *own = map(split, (query, key, value))
  clean = [array[:, :, :, 0].reshape(b, k, copies.rollouts, -1, h) for array in own]
  prompt = [jnp.moveaxis(array[:, :q], 1, 2) for array in (key, value)]
  is_own = is_key[:, q:].reshape(b, 1, *copies.shape[:3], 1, -1)
  is_before = np.arange(copies.width) // copies.block < np.arange(copies.shape[2])[:, None, None]
  is_clean = is_own[:, :, :, 0].reshape(b, 1, copies.rollouts, 1, 1, 1, -1) & is_before
  is_prompt = is_key[:, :q].reshape(b, 1, 1, 1, 1, 1, -1)
  parts = list(zip((prompt, clean, own), (is_prompt, is_clean, is_own), strict=True))
  nowhere = jnp.finfo(jnp.float32).min
  scores = [jnp.where(mask, _multiply(query, keys.swapaxes(-1, -2)), nowhere) for (keys, _), mask in parts]
  most = functools.reduce(jnp.maximum, [each.max(-1, keepdims=True) for each in scores])
  weights = [jnp.exp(each - jax.lax.stop_gradient(most)) for each in scores]
  products = [_multiply(each.astype(value.dtype), own) for each, ((_, own), _) in zip(weights, parts, strict=True)]
  total = functools.reduce(jnp.add, [each.sum(-1, keepdims=True) for each in weights])
  mixed = (checkpoint_name(functools.reduce(jnp.add, products), MIXED) / total).astype(value.dtype)
  mixed = mixed.reshape(b, k, *copies.shape[:3], n // k, copies.block, h)
  mixed = jnp.transpose(mixed, (0, 2, 3, 4, 6, 1, 5, 7)).reshape(b, -1, n, h)
  return jnp.concatenate([of_prompt, mixed], axis=1)


def _multiply(
  left: Float[Array, "*t rows inner"], right: Float[Array, "*t1 inner columns"]
) -> Float32[Array, "*t rows columns"]:
  """Multiply with matrices that lack the last of the left's leading axes: one product has all entries along those."""
  flat = left.reshape(*right.shape[:-2], -1, left.shape[-1])
  product = jnp.matmul(flat, right, preferred_element_type=jnp.float32)
  return product.reshape(*left.shape[:-1], -1)


def _attend_cudnn(
  query: Float[Array, "b l n h"],
  key: Float[Array, "b m k h"],
  value: Float[Array, "b m k h"],
  is_key: Bool[Array, "b m"] | None,
) -> Float[Array, "b l n h"]:
  """Attend with cuDNN, which can skip the keys beyond a row's length, but would read a mask for every score.

  Attention does not depend on the order of keys, so the keys to attend to are moved to the front.
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
  describe: Callable[[tuple[int, int]], splash.Mask],
) -> Float[Array, "b l n h"]:
  """Attend with Pallas's TPU kernel, on every device with its own rows and heads."""
  attend_rows = functools.partial(_attend_splash_rows, describe=describe)
  if not jax.sharding.get_abstract_mesh().empty:
    queries, keys = spec("batch", None, "heads", None), spec("batch", None, "kv_heads", None)
    attend_rows = jax.shard_map(
      attend_rows,
      in_specs=(queries, keys, keys, spec("batch", None)),
      out_specs=queries,
      check_vma=False,  # the kernel does not declare over which axes its results vary
    )
  return attend_rows(query, key, value, is_key)


def _attend_splash_rows(
  query: Float[Array, "b l n h"],
  key: Float[Array, "b m k h"],
  value: Float[Array, "b m k h"],
  is_key: Bool[Array, "b m"] | None,
  describe: Callable[[tuple[int, int]], splash.Mask],
) -> Float[Array, "b l n h"]:
  (length, num_heads), num_keys = query.shape[1:3], key.shape[1]
  (rows, row_block), (columns, column_block) = _blocks(length), _blocks(num_keys)
  if is_key is None and columns > num_keys:
    is_key = jnp.ones(key.shape[:2], bool)
  segments = None
  if is_key is not None:  # queries and the keys to attend to are in segment 1
    is_key = jnp.pad(is_key, ((0, 0), (0, columns - num_keys)))
    segments = splash.SegmentIds(q=jnp.ones((key.shape[0], rows), jnp.int32), kv=is_key.astype(jnp.int32))
  is_one_block = columns == column_block  # then one kernel computes all gradients
  blocks = splash.BlockSizes(
    block_q=row_block,
    block_kv=column_block,
    block_q_dkv=row_block,
    block_kv_dkv=column_block,
    use_fused_bwd_kernel=is_one_block,
    block_q_dq=None if is_one_block else row_block,
    block_kv_dq=None if is_one_block else column_block,
  )
  mask = splash.MultiHeadMask([describe((rows, columns))] * num_heads)
  kernel = splash.make_splash_mha_single_device(mask, block_sizes=blocks, residual_checkpoint_name=MIXED)
  arrays = (_pad(query, rows), _pad(key, columns), _pad(value, columns))
  mixed = jax.vmap(kernel)(*(jnp.moveaxis(array, 1, 2) for array in arrays), segments)
  # the kernel returns no residuals beside its result
  return jnp.moveaxis(mixed, 1, 2)[:, :length]  # pyright: ignore[reportArgumentType]


def _pad(array: Float[Array, "b l n h"], length: int) -> Float[Array, "b m n h"]:
  return jnp.pad(array, ((0, 0), (0, length - array.shape[1]), (0, 0), (0, 0)))


@functools.cache
def _blocks(length: int) -> tuple[int, int]:
  """Return the padded length of an axis, and the block that divides it: the fewest blocks, then the least padding."""
  num_blocks = math.ceil(length / MAX_BLOCK)
  block = math.ceil(length / num_blocks / LANES) * LANES
  return num_blocks * block, block
