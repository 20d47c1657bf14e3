"""One bidirectional transformer that predicts all masked tokens of a row at once (LLaDA, arXiv 2502.09992).

With `block_length` it is bidirectional within blocks of the row and causal between them (SDAR, arXiv 2510.06303).

`ModelConfig` describes it, which makes it the model of any family (LLaDA, Dream, Qwen3, Llama). Samplers and objectives
use it through `denoiser.py`.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from dmpo_jax import sharding
from dmpo_jax.models import experts
from dmpo_jax.models.attention import attend, describes_blocks
from dmpo_jax.models.config import REMAT_POLICIES, ModelConfig
from dmpo_jax.models.copies import Copies
from dmpo_jax.models.layers import (
  KERNEL_SCALE,
  Dense,
  RMSNorm,
  fold_all,
  gathered_axes,
  project,
  rotary_frequencies,
  rotary_table,
  rotate,
  with_axes,
)
from dmpo_jax.models.router import ROUTING, Choice, tally
from dmpo_jax.sharding import constrain
from dmpo_jax.spans import put_span, take_span
from dmpo_jax.structs import Params


class KVCache(NamedTuple):
  """Keys (rotated) and values of m slots of every row, for each layer, and which slots hold a token."""

  keys: Float[Array, "y b m k h"]
  values: Float[Array, "y b m k h"]
  is_valid: Bool[Array, "b m"]


def empty_kv_cache(config: ModelConfig, num_rows: int, length: int) -> KVCache:
  """Make a cache of `length` empty slots."""
  shape = (config.num_layers, num_rows, length, config.num_kv_heads, config.head_dim)
  zeros = constrain(jnp.zeros(shape, config.dtype), "layers", "batch", None, "kv_heads", None)
  return KVCache(zeros, zeros, jnp.zeros((num_rows, length), bool))


class Context(NamedTuple):
  """Inputs that are the same for every layer."""

  rotary: tuple[Float32[Array, "b l w"], Float32[Array, "b l w"]]  # cos and sin of the tokens' positions
  mask: Bool[Array, "b #l m"] | None
  cache_start: Int[Array, "*b"] | None  # slot of the first token, of all rows or of each; None: no cache
  dropout_keys: Key[Array, "b l"] | None
  is_routed: Bool[Array, "b l"] | None  # tokens that count in `Routing`; None: with a cache or without experts
  copies: Copies | None


class LayerInput(NamedTuple):
  """Inputs that differ from layer to layer."""

  layer: Int[Array, ""]
  cached: tuple[Float[Array, "b m k h"], Float[Array, "b m k h"]] | None


KeysValues = tuple[Float[Array, "b l k h"], Float[Array, "b l k h"]]
OfLayers = tuple[Float[Array, "y b _ k h"], Float[Array, "y b _ k h"]]

PROJECTIONS = {  # of a layer: the logical axes of the kernel [in, out]
  "q_proj": ("embed", "heads"),
  "k_proj": ("embed", "kv_heads"),
  "v_proj": ("embed", "kv_heads"),
  "attn_out": ("heads", "embed"),
  "ff_proj": ("embed", "ffn"),
  "up_proj": ("embed", "ffn"),
  "ff_out": ("ffn", "embed"),
  "shared_ff_proj": ("embed", "ffn"),
  "shared_up_proj": ("embed", "ffn"),
  "shared_ff_out": ("ffn", "embed"),
}


class Block(nn.Module):
  """A layer: x += attention(norm(x)); x += SwiGLU(norm(x)). With a cache also returns the tokens' keys and values.

  With experts SwiGLU is theirs, plus that of a shared expert if there is one.
  """

  config: ModelConfig
  has_experts: bool = False

  def setup(self) -> None:
    c = self.config
    residual = (2 * c.num_layers) ** -0.5  # additions to the residual stream start small
    self.attn_norm = RMSNorm(c.rms_norm_eps, c.param_dtype)
    self.q_proj = self._dense("q_proj", c.num_heads * c.head_dim, has_bias=c.qkv_bias)
    self.k_proj = self._dense("k_proj", c.num_kv_heads * c.head_dim, has_bias=c.qkv_bias)
    self.v_proj = self._dense("v_proj", c.num_kv_heads * c.head_dim, has_bias=c.qkv_bias)
    if c.qk_norm:
      self.q_norm = RMSNorm(c.rms_norm_eps, c.param_dtype)
      self.k_norm = RMSNorm(c.rms_norm_eps, c.param_dtype)
    self.attn_out = self._dense("attn_out", c.d_model, gain=residual, has_bias=c.out_bias)
    self.ff_norm = RMSNorm(c.rms_norm_eps, c.param_dtype)
    if not self.has_experts:
      self.ff_proj = self._dense("ff_proj", c.mlp_hidden_size)
      self.up_proj = self._dense("up_proj", c.mlp_hidden_size)
      self.ff_out = self._dense("ff_out", c.d_model, gain=residual)
      return
    self.experts = experts.Experts(c)
    if c.shared_expert_size:
      self.shared_ff_proj = self._dense("shared_ff_proj", c.shared_expert_size)
      self.shared_up_proj = self._dense("shared_up_proj", c.shared_expert_size)
      self.shared_ff_out = self._dense("shared_ff_out", c.d_model, gain=residual)

  def _dense(self, name: str, features: int, gain: float = 1.0, has_bias: bool = False) -> Dense:
    adapters = self.config.lora if self.config.lora is not None and name in self.config.lora.targets else None
    is_quantized = self.config.quantization == "int8"
    return Dense(features, PROJECTIONS[name], self.config.param_dtype, gain, has_bias, is_quantized, adapters)

  def __call__(
    self, x: Float[Array, "b l d"], inputs: LayerInput, context: Context
  ) -> tuple[Float[Array, "b l d"], KeysValues | None]:
    if context.dropout_keys is not None:
      context = context._replace(dropout_keys=fold_all(context.dropout_keys, inputs.layer))
    layer_rows = self.config.layer_rows
    num_chunks = count_chunks(x.shape[0], layer_rows if context.copies is None else context.copies.rows(layer_rows))
    if num_chunks > 1 and inputs.cached is None and not self.is_initializing():
      return self._run_chunks(num_chunks, x, context), None
    return self._run(x, inputs, context)

  def _run_chunks(self, num_chunks: int, x: Float[Array, "b l d"], context: Context) -> Float[Array, "b l d"]:
    """Compute chunks of rows one after the other, so that a layer's activations for the gradient are those of a chunk.

    The weights are gathered once for all chunks.
    """
    layer, variables = Block(self.config, self.has_experts, parent=None), _gather_layer(self.variables)
    # If the kernels are trained: so that the gradients of the chunks are summed in float32.
    if self.config.lora is None and self.config.quantization == "none":
      variables = jax.tree.map(lambda array: array.astype(jnp.float32), variables)

    mutable = [ROUTING] if self.is_mutable_collection(ROUTING) else []

    def run(x: jax.Array, context: Context) -> tuple[jax.Array, Params]:
      return layer.apply(variables, x, context, method="run_rows", mutable=mutable)

    if self.config.remat != "none":
      run = jax.checkpoint(run, prevent_cse=False, policy=REMAT_POLICIES[self.config.remat])
    x = sharding.split_rows(x, num_chunks, None, "act_embed")
    context = jax.tree.map(lambda array: sharding.split_rows(array, num_chunks), context)
    x, left = jax.lax.map(lambda chunk: run(*chunk), (x, context))
    for name, of_chunks in left.get(ROUTING, {}).items():
      self.put_variable(ROUTING, name, jax.tree.map(sharding.join_rows, of_chunks))
    return sharding.join_rows(x, None, "act_embed")

  def run_rows(self, x: Float[Array, "b l d"], context: Context) -> Float[Array, "b l d"]:
    """Run the layer on rows without a cache; the dropout keys are already this layer's."""
    return self._run(x, LayerInput(jnp.int32(0), None), context)[0]

  def _run(
    self, x: Float[Array, "b l d"], inputs: LayerInput, context: Context
  ) -> tuple[Float[Array, "b l d"], KeysValues | None]:
    mixed, keys_values = self._attention(_gather_embed(self.attn_norm(x)), inputs, context)
    x = _add_residual(x, mixed)
    mixed = self._mlp(_gather_embed(self.ff_norm(x)), context)
    return _add_residual(x, mixed), keys_values

  def _attention(
    self, x: Float[Array, "b l d"], inputs: LayerInput, context: Context
  ) -> tuple[Float[Array, "b l d"], KeysValues | None]:
    c, dropout_keys = self.config, context.dropout_keys

    def heads(projection: Dense, axis: str) -> Float[Array, "b l n h"]:
      y = projection(x, dropout_keys)
      return constrain(y.reshape(*y.shape[:2], -1, c.head_dim), "batch", None, axis, None)

    query, key, value = heads(self.q_proj, "heads"), heads(self.k_proj, "kv_heads"), heads(self.v_proj, "kv_heads")
    if c.qk_norm:
      query, key = self.q_norm(query), self.k_norm(key)
    if c.clip_qkv:
      query, key, value = (jnp.clip(array, -c.clip_qkv, c.clip_qkv) for array in (query, key, value))
    query, new = rotate(query, context.rotary), (rotate(key, context.rotary), value)
    keys, values = new
    if inputs.cached is not None:
      assert context.cache_start is not None  # it comes with the cache
      start = context.cache_start
      keys, values = jax.tree.map(lambda old, now: put_span(old, now, start), inputs.cached, new)
    mixed = attend(query, keys, values, context.mask, c.attention, c.block_length, context.copies)
    return self.attn_out(mixed, dropout_keys), None if inputs.cached is None else new

  def _mlp(self, x: Float[Array, "b l d"], context: Context) -> Float[Array, "b l d"]:
    dropout_keys = context.dropout_keys

    def swiglu(ff_proj: Dense, up_proj: Dense, ff_out: Dense) -> Float[Array, "b l d"]:
      gate, up = ff_proj(x, dropout_keys), up_proj(x, dropout_keys)
      return ff_out(constrain(nn.silu(gate) * up, "batch", None, "ffn"), dropout_keys)

    if not self.has_experts:
      return swiglu(self.ff_proj, self.up_proj, self.ff_out)
    mixed, choice = self.experts(x)
    self._leave_routing(choice, context.is_routed)
    if self.config.shared_expert_size:
      mixed += swiglu(self.shared_ff_proj, self.shared_up_proj, self.shared_ff_out)
    return mixed

  def _leave_routing(self, choice: Choice, is_routed: Bool[Array, "b l"] | None) -> None:
    if is_routed is not None and self.is_mutable_collection(ROUTING) and not self.is_initializing():
      self.put_variable(ROUTING, "rows", tally(choice, is_routed, self.config.num_experts))


def count_chunks(num_rows: int, layer_rows: int) -> int:
  """Count the equal chunks in which a layer computes its rows: at most `layer_rows` rows of each device in a chunk.

  One chunk if `layer_rows` is 0, or if the devices do not divide the rows.
  """
  rows_per_device, left = divmod(num_rows, sharding.num_shares("batch"))
  if left:
    return 1
  most = layer_rows or rows_per_device
  return next(n for n in range(1, rows_per_device + 1) if rows_per_device % n == 0 and rows_per_device // n <= most)


def _add_residual(x: Float[Array, "b l d"], y: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
  """Add to the residual stream, sharded along d over the tensor axis.

  So the tensor-parallel sum is a reduce-scatter, and only normed activations are all-gathered. Korthikanti et al.
  (arXiv 2205.05198) shard the length; d can be sharded for any number of tokens.
  """
  return constrain(x + y, "batch", None, "act_embed")


def _gather_embed(x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
  return constrain(x, "batch", None, None)


def _gather_layer(variables: Params) -> Params:
  """All-gather a layer's weights along d, as its products read them (see `gathered_axes`)."""

  def gather(path: KeyPath, array: jax.Array) -> jax.Array:
    projection, kind = path[-2].key, path[-1].key
    if projection == "experts":
      return experts.gather(kind, array)
    if projection not in PROJECTIONS or kind == "bias":
      return array
    first, last = gathered_axes(PROJECTIONS[projection])
    axes = {"kernel": (first, last), KERNEL_SCALE: (last,), "A": (first, None), "B": (None, last)}
    return constrain(array, *axes[kind])

  return jax.tree_util.tree_map_with_path(gather, variables)


class Transformer(nn.Module):
  """The model: parameters in `param_dtype`, activations in `dtype`; norms, softmax, positions and logits in float32."""

  config: ModelConfig

  def setup(self) -> None:
    c = self.config
    init = with_axes(nn.initializers.normal(c.d_model**-0.5), ("vocab", "embed"))
    self.embedding = self.param("embedding", init, (c.embedding_size, c.d_model), c.param_dtype)
    block = Block
    if c.remat != "none":
      block = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[c.remat])
    for run in c.runs:
      layers = nn.scan(
        block,
        variable_axes={"params": 0, "lora": 0, "intermediates": 0, ROUTING: 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]  # Flax says int, and documents tuples
        length=run.length,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )
      setattr(self, run.name, layers(c, run.has_experts))
    self.final_norm = RMSNorm(c.rms_norm_eps, c.param_dtype)
    if not c.weight_tying:
      init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
      init = with_axes(init, ("embed", "vocab"))
      self.head = self.param("head", init, (c.d_model, c.embedding_size), c.param_dtype)

  def __call__(self, tokens: Int[Array, "b l"], **arguments: Any) -> Float32[Array, "b l v"]:
    """Compute the logits of every position; arguments as for `hidden`."""
    return self.logits(self.hidden(tokens, **arguments)[0])

  def hidden(
    self,
    tokens: Int[Array, "b l"],
    *,
    is_valid: Bool[Array, "b l"] | None = None,
    positions: Int[Array, "b l"] | None = None,
    attention_mask: Bool[Array, "b l m"] | None = None,
    kv_cache: KVCache | None = None,
    cache_start: Int[Array, "*b"] | int = 0,
    dropout_keys: Key[Array, "b *l"] | None = None,
    copies: Copies | None = None,
  ) -> tuple[Float[Array, "b l d"], KVCache | None]:
    """Run the layers and the final norm.

    Args:
      is_valid: False on padding. No query attends to it, so a row's result does not depend on it. None: no padding.
      positions: rotary positions; they may repeat. None: a token's index among the row's valid tokens.
      attention_mask: True where query l may attend to key m, in addition to `is_valid`. None: everywhere or, in a model
        of blocks, to the query's own block and earlier ones; blocks are counted along the row's valid tokens.
      kv_cache: the tokens overwrite its slots [cache_start, cache_start + l) and attend to all slots that hold a token;
        m is the number of slots. None: the tokens attend to each other.
      cache_start: slot of the first token: one for all rows, or one for each.
      dropout_keys: the rows' keys of the adapters' dropout, or the tokens'; None: no dropout. Each row, layer,
        projection and position draws for itself.
      copies: what the rows hold, if it is clean and noised copies of completions (`noised.py`); with the positions.

    Returns:
      The final norm's output, and the updated cache (None without one).
    """
    start = None
    if kv_cache is not None:
      start = jnp.asarray(cache_start, jnp.int32)
      is_new_valid = jnp.ones(tokens.shape, bool) if is_valid is None else is_valid
      is_valid = put_span(kv_cache.is_valid, is_new_valid, start)
    c, way_back, counted = self.config, None, _count_positions(tokens, is_valid, start)
    positions = counted if positions is None else positions
    if c.block_length and attention_mask is None and copies is None:
      if kv_cache is not None or not describes_blocks(c.attention, tokens.shape[1]):
        attention_mask = _block_mask(counted, is_valid, c.block_length)
      elif is_valid is not None:
        (tokens, positions, is_valid), way_back = _padding_last(is_valid, tokens, positions)
    context = Context(
      rotary=rotary_table(positions, rotary_frequencies(c.rotary_width, c.rope_theta, c.rope_scaling)),
      mask=_join_masks(is_valid, attention_mask),
      cache_start=start,
      dropout_keys=None if dropout_keys is None else _fold_positions(dropout_keys, positions),
      is_routed=_routed(tokens, is_valid) if c.num_experts and kv_cache is None else None,
      copies=copies,
    )
    cached = None if kv_cache is None else (kv_cache.keys, kv_cache.values)
    x, new = self._run_layers(self._embed(tokens), cached, context)
    if cached is not None:
      assert start is not None
      assert is_valid is not None
      keys, values = jax.tree.map(lambda old, now: put_span(old, now, start, axis=2), cached, new)
      kv_cache = KVCache(keys, values, is_valid)
    x = _gather_embed(self.final_norm(x))
    return x if way_back is None else jnp.take_along_axis(x, way_back[..., None], axis=1), kv_cache

  def _run_layers(
    self, x: Float[Array, "b l d"], cached: OfLayers | None, context: Context
  ) -> tuple[Float[Array, "b l d"], OfLayers | None]:
    """Run the layers, one kind after the other; with a cache also returns all layers' new keys and values."""
    if len(self.config.runs) == 1:
      return self.blocks(x, LayerInput(jnp.arange(self.config.num_layers), cached), context)
    found = []
    for run in self.config.runs:
      own = slice(run.first, run.first + run.length)
      layers = LayerInput(jnp.arange(own.start, own.stop), jax.tree.map(lambda array, own=own: array[own], cached))
      x, new = getattr(self, run.name)(x, layers, context)
      found.append(new)
    return x, None if cached is None else jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *found)

  def _embed(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
    # Each fsdp shard looks up its part of d for all rows; then the rows are sharded. No device gathers the whole table.
    x = jnp.take(self.embedding, constrain(tokens, "gathered_batch", None), axis=0).astype(self.config.dtype)
    return constrain(constrain(x, "gathered_batch", None, "embed"), "batch", None, "act_embed")

  def logits(self, hidden: Float[Array, "b s d"]) -> Float32[Array, "b s v"]:
    """Compute float32 logits over the whole table, unused rows and MASK included; `head.py` computes them in chunks."""
    head = self.embedding.T if self.config.weight_tying else self.head
    return constrain(project(hidden, head, jnp.float32), "batch", None, "vocab")

  def head_of(self, variables: Params) -> Float[Array, "d v"]:
    """Return the matrix that maps hidden states to logits."""
    params = variables["params"]
    return params["embedding"].T.astype(self.config.dtype) if self.config.weight_tying else params["head"]


def _count_positions(
  tokens: Int[Array, "b l"], is_valid: Bool[Array, "b m"] | None, start: Int[Array, "*b"] | None
) -> Int[Array, "b l"]:
  """Count each row's valid tokens from 0; padding takes the number before it (at least 0)."""
  if is_valid is None:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  positions = jnp.maximum(jnp.cumsum(is_valid, axis=1) - 1, 0)
  return positions if start is None else take_span(positions, start, tokens.shape[1])


def _routed(tokens: Int[Array, "b l"], is_valid: Bool[Array, "b l"] | None) -> Bool[Array, "b l"]:
  return jnp.ones(tokens.shape, bool) if is_valid is None else is_valid


def _block_mask(
  query: Int[Array, "b l"], is_valid: Bool[Array, "b m"] | None, block_length: int
) -> Bool[Array, "b l m"]:
  """Let queries, numbered along their row, attend to the keys of their own block and of earlier ones."""
  key = query if is_valid is None else jnp.cumsum(is_valid, axis=1) - 1
  return (key // block_length)[:, None] <= (query // block_length)[:, :, None]


def _padding_last(
  is_valid: Bool[Array, "b l"], *arrays: Int[Array, "b l"]
) -> tuple[list[Int[Array, "b l"] | Bool[Array, "b l"]], Int[Array, "b l"]]:
  """Move padding behind each row's tokens, so that every row's blocks begin at the first column; also say the way back.

  `is_valid` itself is moved last.
  """
  order = jnp.argsort(~is_valid, axis=1, stable=True)
  moved = [jnp.take_along_axis(array, order, axis=1) for array in (*arrays, is_valid)]
  return moved, jnp.argsort(order, axis=1)


def _join_masks(
  is_valid: Bool[Array, "b m"] | None, attention_mask: Bool[Array, "b l m"] | None
) -> Bool[Array, "b _ m"] | None:
  if is_valid is None:
    return attention_mask
  return is_valid[:, None] if attention_mask is None else attention_mask & is_valid[:, None]


def _fold_positions(keys: Key[Array, "b *l"], positions: Int[Array, "b l"]) -> Key[Array, "b l"]:
  return jax.vmap(jax.vmap(jax.random.fold_in, (None if keys.ndim == 1 else 0, 0)))(keys, positions)
