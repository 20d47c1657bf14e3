"""The model as samplers and objectives see it: closures over parameters and prompts, and rows of completions."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dmpo_jax.models.head import chunk_logits, split_vocabulary
from dmpo_jax.models.transformer import KVCache, empty_kv_cache
from dmpo_jax.sharding import constrain
from dmpo_jax.structs import VOCAB_TILE


class Denoiser(NamedTuple):
  """A policy with the prompts of b rows: what a sampler calls.

  Completions may also have k * b rows, k for each prompt, one after the other. Hidden states are those of the
  completion's positions, with the prompt hidden beside them where there is guidance.
  """

  hidden: Callable[..., Any]  # (completion [k * b, c]) -> [k * b, c, d]; whole rows [prompt; completion]
  prefill: Callable[..., Any]  # (completion [b, c]) -> (hidden, Cache)
  suffix: Callable[..., Any]  # (completion, start, cache, block_length) -> [b, s, d]; from start on, the rest cached
  block: Callable[..., Any]  # (tokens [b, s], start, cache) -> [b, s, d]; the block alone, the rest cached
  shadowed: Callable[..., Any]  # (completion, start, block_length) -> [b, 2 * s, d]; see `make_denoiser`
  logits: Callable[..., Any]  # (hidden [z, s, d], number) -> (float32 [z, s, n, w], ids [n, w]); see `make_denoiser`
  num_chunks: int  # of the vocabulary
  mask_token_id: int
  eos_token_id: int
  reference: Any = None  # a Denoiser of the reference policy with the same prompts; None: there is none


def make_denoiser(
  model: nn.Module,
  variables: Mapping[str, Any],
  prompt_tokens: Int[Array, "b q"],
  prompt_is_valid: Bool[Array, "b q"],
  *,
  guidance: float = 0.0,
  reference: Mapping[str, Any] | None = None,
) -> Denoiser:
  """Close over a policy (`variables`) and the prompts of b rows, padding marked by `prompt_is_valid`.

  `logits` are those of the distribution that `head` defines: -inf for rows of the table that are no ids. `shadowed`
  gives the block, then its shadow: a second copy of the block's positions, all MASK, that sees everything but the token
  of its own position and that the row does not see (WINO, arXiv 2507.18578).

  Args:
    guidance: w of classifier-free guidance, logits = (1 + w) * with prompt - w * without (arXiv 2502.09992, appendix
      A.2, eq. 16; w is the scale of LLaDA's code); the prompt's tokens are MASK in the rows without, computed beside
      the others. 0: none.
    reference: variables of the reference policy.

  Raises:
    ValueError: guidance is negative or not finite.
  """
  if not 0 <= guidance < math.inf:
    raise ValueError(f"sampler.guidance={guidance}: must be a number from 0 (none) up")
  config = model.config
  head = constrain(model.head_of(variables), None, "vocab")  # gathered once, not for every part in every call
  rows = _Rows(model, variables, prompt_tokens, prompt_is_valid, is_guided=guidance > 0)
  split, num_chunks = split_vocabulary(config.embedding_size, VOCAB_TILE, config.vocab_size)

  def logits(hidden: Float[Array, "z s d"], number: Int[Array, ""] | int = 0) -> tuple[jax.Array, jax.Array]:
    sides = [chunk_logits(side, head, split, number) for side in jnp.split(hidden, rows.num_sides, axis=-1)]
    ids, is_own = split.ids(number)
    joined = sides[0] if guidance == 0 else sides[1] + (guidance + 1) * (sides[0] - sides[1])
    return jnp.where(is_own, joined, -jnp.inf), ids

  return Denoiser(
    hidden=rows.hidden,
    prefill=rows.prefill,
    suffix=rows.suffix,
    block=rows.block,
    shadowed=rows.shadowed,
    logits=logits,
    num_chunks=num_chunks,
    mask_token_id=config.mask_token_id,
    eos_token_id=config.eos_token_id,
    reference=None
    if reference is None
    else make_denoiser(model, reference, prompt_tokens, prompt_is_valid, guidance=guidance),
  )


class _Rows:
  """The model run on rows [prompt; completion], in the ways that samplers need."""

  def __init__(
    self,
    model: nn.Module,
    variables: Mapping[str, Any],
    prompt_tokens: Int[Array, "b q"],
    prompt_is_valid: Bool[Array, "b q"],
    *,
    is_guided: bool,
  ):
    self._model, self._variables = model, variables
    hidden_prompt = jnp.full_like(prompt_tokens, model.config.mask_token_id)
    sides = [prompt_tokens, hidden_prompt] if is_guided else [prompt_tokens]
    self.num_sides = len(sides)  # a row's sides are neighbours
    self._prompt = jnp.stack(sides, axis=1).reshape(-1, prompt_tokens.shape[1])
    self._is_valid = jnp.repeat(prompt_is_valid, self.num_sides, axis=0)
    self._num_rows, self._q = prompt_tokens.shape

  def hidden(self, completion: Int[Array, "z c"]) -> Float[Array, "z c d"]:
    copies = completion.shape[0] // self._num_rows
    prompt, is_valid = self._prompt, self._is_valid
    if copies > 1:
      prompt, is_valid = (
        jnp.repeat(x.reshape(self._num_rows, -1), copies, axis=0).reshape(-1, self._q) for x in (prompt, is_valid)
      )
    tokens = self._spread(completion)
    return self._gather(completion_hidden(self._model, self._variables, prompt, is_valid, tokens))

  def prefill(self, completion: Int[Array, "b c"]) -> tuple[Float[Array, "b c d"], KVCache]:
    tokens = jnp.concatenate([self._prompt, self._spread(completion)], axis=1)
    kv_cache = empty_kv_cache(self._model.config, *tokens.shape)
    hidden, kv_cache = self._run(tokens, is_valid=self._join_valid(completion.shape[1]), kv_cache=kv_cache)
    return self._gather(hidden[:, self._q :]), kv_cache

  def suffix(
    self, completion: Int[Array, "b c"], start: Int[Array, ""], kv_cache: KVCache, block_length: int
  ) -> Float[Array, "b s d"]:
    """One branch for every start, so that only what follows it is computed and all shapes are known."""

    def from_start(start: int) -> Callable[..., jax.Array]:
      def run(completion: Int[Array, "b c"], kv_cache: KVCache) -> Float[Array, "b s d"]:
        return self.block(completion[:, start:], start, kv_cache)[:, :block_length]

      return run

    branches = [from_start(start) for start in range(0, completion.shape[1], block_length)]
    return jax.lax.switch(start // block_length, branches, completion, kv_cache)

  def block(self, tokens: Int[Array, "b s"], start: Int[Array, ""] | int, kv_cache: KVCache) -> Float[Array, "b s d"]:
    hidden, _ = self._run(self._spread(tokens), kv_cache=kv_cache, cache_start=self._q + start)
    return self._gather(hidden)

  def shadowed(self, completion: Int[Array, "b c"], start: Int[Array, ""], block_length: int) -> Float[Array, "b t d"]:
    shadow = jnp.full((completion.shape[0], block_length), self._model.config.mask_token_id, completion.dtype)
    tokens = jnp.concatenate([self._prompt, self._spread(jnp.concatenate([completion, shadow], axis=1))], axis=1)
    is_valid = self._join_valid(completion.shape[1] + block_length)
    length = tokens.shape[1] - block_length
    index = jnp.arange(tokens.shape[1])
    is_shadow = index >= length
    place = jnp.where(is_shadow, index - length + self._q + start, index)  # of which slot it is, or is the copy
    may_see = ~is_shadow | (is_shadow[:, None] & is_shadow)
    may_see &= ~(is_shadow[:, None] & ~is_shadow & (place[:, None] == place))
    numbers = jnp.maximum(jnp.cumsum(is_valid, axis=1) - 1, 0)
    hidden, _ = self._run(
      tokens,
      is_valid=is_valid,
      positions=numbers[:, place],
      attention_mask=jnp.broadcast_to(may_see, (tokens.shape[0], *may_see.shape)),
    )
    block = jax.lax.dynamic_slice_in_dim(hidden, self._q + start, block_length, axis=1)
    return self._gather(jnp.concatenate([block, hidden[:, length:]], axis=1))

  def _run(self, tokens: Int[Array, "z l"], **keywords: Any) -> tuple[jax.Array, KVCache | None]:
    if self._model.config.shift_logits:  # a part of a row lacks the position that predicts its first token
      raise ValueError(
        "model.shift_logits=True: samplers with a cache or a shadow block (prefix_cache, dual_cache, wino) read each "
        "position from itself; choose a sampler.name that runs whole rows, such as llada or parallel"
      )
    return self._model.apply(self._variables, constrain(tokens, "batch", None), method="hidden", **keywords)

  def _spread(self, completion: Int[Array, "z c"]) -> Int[Array, "y c"]:
    return jnp.repeat(completion, self.num_sides, axis=0) if self.num_sides > 1 else completion

  def _gather(self, hidden: Float[Array, "y s d"]) -> Float[Array, "z s e"]:
    """Put a row's sides side by side along d."""
    if self.num_sides == 1:
      return hidden
    sides = hidden.reshape(-1, self.num_sides, *hidden.shape[1:])
    return jnp.moveaxis(sides, 1, 2).reshape(sides.shape[0], hidden.shape[1], -1)

  def _join_valid(self, length: int) -> Bool[Array, "y l"]:
    return jnp.concatenate([self._is_valid, jnp.ones((self._is_valid.shape[0], length), bool)], axis=1)


def completion_hidden(
  model: nn.Module,
  variables: Mapping[str, Any],
  prompt_tokens: Int[Array, "b q"],
  prompt_is_valid: Bool[Array, "b q"],
  completion: Int[Array, "b c"],
  dropout_keys: Key[Array, "b"] | None = None,
) -> Float[Array, "b c d"]:
  """Run rows [prompt; completion] and give the hidden states that predict the completion's positions.

  Args:
    dropout_keys: the rows' keys of the adapters' dropout; None: no dropout.
  """
  rows = constrain(jnp.concatenate([prompt_tokens, completion], axis=1), "batch", None)
  is_valid = jnp.concatenate([prompt_is_valid, jnp.ones(completion.shape, bool)], axis=1)
  hidden, _ = model.apply(variables, rows, is_valid=is_valid, dropout_keys=dropout_keys, method="hidden")
  first = prompt_tokens.shape[1] - model.config.shift_logits  # whose logits predict the completion's first token
  return hidden[:, first : first + completion.shape[1]]
