"""The model as samplers and objectives use it: over parameters and prompts, from completions to hidden states."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from dmpo_jax.models.head import chunk_logits, split_vocabulary
from dmpo_jax.models.router import ROUTING
from dmpo_jax.models.transformer import KVCache, Transformer, empty_kv_cache
from dmpo_jax.sharding import constrain
from dmpo_jax.structs import VOCAB_TILE, Denoiser, Params, Routing


def make_denoiser(
  model: Transformer,
  variables: Params,
  prompt_tokens: Int[Array, "b q"],
  prompt_is_valid: Bool[Array, "b q"],
  *,
  guidance: float = 0.0,
  reference: Params | None = None,
) -> Denoiser:
  """Close over a policy (`variables`) and the prompts of b rows.

  `logits` are those of the distribution that `head` defines.

  Args:
    prompt_is_valid: False on padding.
    guidance: scale w of classifier-free guidance, logits = (1 + w) * with prompt - w * without (arXiv 2502.09992,
      appendix A.2, eq. 16, with w as in LLaDA's code). The rows without prompt have MASK in its place. 0: none.
    reference: variables of the reference policy, for `Denoiser.reference`; None: there is none.

  Raises:
    ValueError: guidance is negative or not finite, or the model attends by blocks, which is not guided yet.
  """
  if not 0 <= guidance < math.inf:
    raise ValueError(f"sampler.guidance={guidance}: must be a number from 0 (none) up")
  if guidance and model.config.block_length:
    raise ValueError(f"sampler.guidance={guidance}: must be 0, as model.block_length={model.config.block_length}")
  prompts = (prompt_tokens, prompt_is_valid)
  reference_denoiser = None if reference is None else _Prompted(model, reference, *prompts, guidance, None)
  return _Prompted(model, variables, *prompts, guidance, reference_denoiser)


class RowCache(NamedTuple):
  """What a pass over whole rows leaves to calls on a part of them."""

  kv_cache: KVCache
  predicting: Float[Array, "b c d"] | None  # with `shift_logits` the hidden states that predict the completion


class _Prompted:
  """The model on rows [prompt; completion], as a `structs.Denoiser`.

  With guidance every row has two sides, with and without its prompt. They are neighbouring rows of the model; outside,
  their hidden states lie side by side along d.
  """

  def __init__(
    self,
    model: Transformer,
    variables: Params,
    prompt_tokens: Int[Array, "b q"],
    prompt_is_valid: Bool[Array, "b q"],
    guidance: float,
    reference: "_Prompted | None",
  ):
    config = model.config
    self.mask_token_id, self.eos_token_id = config.mask_token_id, config.eos_token_id
    self.end_token_ids = config.end_token_ids or (config.eos_token_id,)
    self.shift_logits, self.block_length = config.shift_logits, config.block_length
    self.reference = reference
    self._model, self._variables, self._guidance = model, variables, guidance
    self._head = constrain(model.head_of(variables), None, "vocab")  # gathered once, not for every chunk of every call
    self._split = split_vocabulary(config.embedding_size, VOCAB_TILE, config.vocab_size)
    self.num_chunks = self._split.num_chunks
    sides = [prompt_tokens]
    if guidance > 0:
      sides.append(jnp.full_like(prompt_tokens, config.mask_token_id))
    self._num_sides = len(sides)
    self._num_rows, self._q = prompt_tokens.shape
    self._prompt = jnp.stack(sides, axis=1).reshape(-1, self._q)
    self._is_valid = jnp.repeat(prompt_is_valid, self._num_sides, axis=0)

  def hidden(self, completion: Int[Array, "z c"]) -> Float[Array, "z c d"]:
    copies = completion.shape[0] // self._num_rows
    prompt, is_valid = self._prompt, self._is_valid
    if copies > 1:
      prompt, is_valid = (
        jnp.repeat(x.reshape(self._num_rows, -1), copies, axis=0).reshape(-1, self._q) for x in (prompt, is_valid)
      )
    tokens = self._repeat_sides(completion)
    return self._join_sides(completion_hidden(self._model, self._variables, prompt, is_valid, tokens)[0])

  def prefill(self, completion: Int[Array, "b c"]) -> tuple[Float[Array, "b c d"], RowCache]:
    tokens = jnp.concatenate([self._prompt, self._repeat_sides(completion)], axis=1)
    kv_cache = empty_kv_cache(self._model.config, *tokens.shape)
    hidden, kv_cache = self._run(tokens, is_valid=self._extend_valid(completion.shape[1]), kv_cache=kv_cache)
    assert kv_cache is not None  # one goes in
    first = self._q - self.shift_logits
    predicting = self._join_sides(hidden[:, first : first + completion.shape[1]])
    return predicting, RowCache(kv_cache, predicting if self.shift_logits else None)

  def suffix(
    self, completion: Int[Array, "b c"], start: Int[Array, ""], kv_cache: RowCache, block_length: int
  ) -> Float[Array, "b s d"]:
    """Compute from `start` on. Every start is a branch of its own, so that all shapes are static."""

    def from_start(start: int) -> Callable[[Int[Array, "b c"], RowCache], Float[Array, "b s d"]]:
      def run(completion: Int[Array, "b c"], kv_cache: RowCache) -> Float[Array, "b s d"]:
        return self.block(completion[:, start:], start, kv_cache)[:, :block_length]

      return run

    branches = [from_start(start) for start in range(0, completion.shape[1], block_length)]
    return jax.lax.switch(start // block_length, branches, completion, kv_cache)

  def block(
    self, tokens: Int[Array, "b s"], start: Int[Array, "*b"] | int, kv_cache: RowCache
  ) -> Float[Array, "b s d"]:
    hidden, _ = self._run(self._repeat_sides(tokens), kv_cache=kv_cache.kv_cache, cache_start=self._q + start)
    hidden = self._join_sides(hidden)
    if kv_cache.predicting is None:
      return hidden
    before = jax.lax.dynamic_slice_in_dim(kv_cache.predicting, start, 1, axis=1)
    return jnp.concatenate([before, hidden[:, :-1]], axis=1)

  def remainder(self) -> tuple[Int[Array, "b s"], Int[Array, "b"]]:
    num = self._is_valid.sum(1) % self.block_length
    index = jnp.minimum(self._q - num[:, None] + jnp.arange(self.block_length), self._q - 1)
    return jnp.take_along_axis(self._prompt, index, axis=1), num

  def open(self, length: int) -> RowCache:
    is_whole = self._is_valid & (jnp.arange(self._q) < self._q - self.remainder()[1][:, None])
    kv_cache = empty_kv_cache(self._model.config, self._prompt.shape[0], self._q + length)
    _, kv_cache = self._run(self._prompt, is_valid=is_whole, kv_cache=kv_cache)
    assert kv_cache is not None  # one goes in
    return RowCache(kv_cache, None)

  def keep(
    self, tokens: Int[Array, "b s"], start: Int[Array, "*b"], kv_cache: RowCache
  ) -> tuple[Float[Array, "b s d"], RowCache]:
    hidden, kept = self._run(tokens, kv_cache=kv_cache.kv_cache, cache_start=self._q + start)
    assert kept is not None  # one goes in
    return hidden, RowCache(kept, None)

  def shadowed(self, completion: Int[Array, "b c"], start: Int[Array, ""], block_length: int) -> Float[Array, "b _ d"]:
    shadow = jnp.full((completion.shape[0], block_length), self.mask_token_id, completion.dtype)
    with_shadow = self._repeat_sides(jnp.concatenate([completion, shadow], axis=1))
    tokens = jnp.concatenate([self._prompt, with_shadow], axis=1)
    is_valid = self._extend_valid(completion.shape[1] + block_length)
    length = tokens.shape[1] - block_length
    index = jnp.arange(tokens.shape[1])
    is_shadow = index >= length
    first = self._q + start - self.shift_logits  # slot of the hidden state that predicts the block's first token
    slot = jnp.where(is_shadow, index - length + first, index)  # of itself, or of what it shadows
    may_see = ~is_shadow | (is_shadow[:, None] & is_shadow)
    may_see &= ~(is_shadow[:, None] & ~is_shadow & (slot[:, None] + self.shift_logits == slot))
    positions = jnp.maximum(jnp.cumsum(is_valid, axis=1) - 1, 0)
    hidden, _ = self._run(
      tokens,
      is_valid=is_valid,
      positions=positions[:, slot],
      attention_mask=jnp.broadcast_to(may_see, (tokens.shape[0], *may_see.shape)),
    )
    block = jax.lax.dynamic_slice_in_dim(hidden, first, block_length, axis=1)
    return self._join_sides(jnp.concatenate([block, hidden[:, length:]], axis=1))

  def logits(
    self, hidden: Float[Array, "z s d"], number: Int[Array, ""] | int = 0
  ) -> tuple[Float32[Array, "z s n w"], Int[Array, "n w"]]:
    sides = jnp.split(hidden, self._num_sides, axis=-1)
    logits = [chunk_logits(side, self._head, self._split, number) for side in sides]
    ids, is_own = self._split.ids(number)
    w = self._guidance
    guided = logits[0] if self._num_sides == 1 else logits[1] + (w + 1) * (logits[0] - logits[1])
    return jnp.where(is_own, guided, -jnp.inf), ids

  def _run(
    self, tokens: Int[Array, "z_sides l"], **arguments: Any
  ) -> tuple[Float[Array, "z_sides l d"], KVCache | None]:
    tokens = constrain(tokens, "batch", None)
    # `apply` returns variables too, but only where they may change
    return self._model.apply(self._variables, tokens, method="hidden", **arguments)  # pyright: ignore[reportReturnType]

  def _repeat_sides(self, completion: Int[Array, "z c"]) -> Int[Array, "z_sides c"]:
    return jnp.repeat(completion, self._num_sides, axis=0) if self._num_sides > 1 else completion

  def _join_sides(self, hidden: Float[Array, "z_sides s d"]) -> Float[Array, "z s d_sides"]:
    """Put the sides of a row side by side along d."""
    if self._num_sides == 1:
      return hidden
    sides = hidden.reshape(-1, self._num_sides, *hidden.shape[1:])
    return jnp.moveaxis(sides, 1, 2).reshape(sides.shape[0], hidden.shape[1], -1)

  def _extend_valid(self, length: int) -> Bool[Array, "z_sides l"]:
    return jnp.concatenate([self._is_valid, jnp.ones((self._is_valid.shape[0], length), bool)], axis=1)


def completion_hidden(
  model: Transformer,
  variables: Params,
  prompt_tokens: Int[Array, "b q"],
  prompt_is_valid: Bool[Array, "b q"],
  completion: Int[Array, "b c"],
  dropout_keys: Key[Array, "b"] | None = None,
) -> tuple[Float[Array, "b c d"], Routing | None]:
  """Run rows [prompt; completion] and return the hidden states that predict the completion's positions.

  Where the model has experts, also say what its routers did with each row's tokens, padding left out.

  Args:
    dropout_keys: the rows' keys of the adapters' dropout; None: no dropout.
  """
  rows = constrain(jnp.concatenate([prompt_tokens, completion], axis=1), "batch", None)
  is_valid = jnp.concatenate([prompt_is_valid, jnp.ones(completion.shape, bool)], axis=1)
  hidden, routing = run_routed(model, variables, rows, is_valid=is_valid, dropout_keys=dropout_keys)
  first = prompt_tokens.shape[1] - model.config.shift_logits  # its logits predict the completion's first token
  return hidden[:, first : first + completion.shape[1]], routing


def run_routed(
  model: Transformer, variables: Params, rows: Int[Array, "b l"], **arguments: Any
) -> tuple[Float[Array, "b l d"], Routing | None]:
  """Run whole rows, and take what the layers with experts have left in `ROUTING`."""
  (hidden, _), left = model.apply(variables, rows, method="hidden", mutable=[ROUTING], **arguments)
  of_runs = [left[ROUTING][run.name]["rows"] for run in model.config.runs if run.has_experts]
  return hidden, jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *of_runs) if of_runs else None
