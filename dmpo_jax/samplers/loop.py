"""The loop that every sampler shares: all MASK -> block after block, model call after model call -> Rollouts.

A sampler brings one function, `visit`: it looks at the current block, calls the model and says what the block holds
next. How the model is called (whole rows, with a cache, guided), and what is accepted, is the sampler's own; walking
the blocks, keeping the record and giving every row its own noise is done here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num

from dmpo_jax.sharding import constrain
from dmpo_jax.structs import Rollouts


@runtime_checkable
class Denoiser(Protocol):
  """The model as a sampler sees it: functions closed over parameters and prompts.

  `hidden` runs the whole row [prompt; completion] and returns the completion's positions. It may hold several parts
  side by side along d (say, with and without the prompt): samplers only slice it by position and hand it to `logits`.
  """

  mask_token_id: int

  def hidden(self, completion: Int[Array, "b c"]) -> Float[Array, "b c d"]: ...

  def logits(self, hidden: Float[Array, "b s d"]) -> Float[Array, "b s v"]: ...


class View(NamedTuple):
  """What a visit sees: the rows as they are, and the current block of s positions."""

  completion: Int[Array, "b c"]
  start: Int[Array, ""]  # position of the block's first token in the completion
  step: Int[Array, ""]  # model calls made in this block so far
  tokens: Int[Array, "b s"]  # the block
  is_masked: Bool[Array, "b s"]  # the block
  keys: Key[Array, "b"]  # the rows' keys for this call; `prediction` folds positions in


class Decision(NamedTuple):
  """What the block holds after a visit. A position put back to MASK is taken back and will be decided again."""

  tokens: Int[Array, "b s"]
  confidence: Float[Array, "b s"]  # probability of the tokens, read where they changed


class Carry(NamedTuple):
  """What one model call hands to the next."""

  completion: Int[Array, "b c"]
  committed_at: Int[Array, "b c"]
  confidence: Float[Array, "b c"]
  num_calls: Int[Array, "b"]
  state: Any  # the sampler's own


Visit = Callable[[View, Any], tuple[Decision, Any]]


def decode(
  visit: Visit,
  state: Any,
  keys: Key[Array, "b"],
  *,
  mask_token_id: int,
  completion_length: int,
  block_length: int,
  steps: int,
) -> tuple[Rollouts, Any]:
  """Decode b rows from all MASK, blocks left to right, `steps` model calls in equal shares over the blocks.

  Args:
    visit: one model call: `visit(view, state) -> (decision, state)`. `view.step` is 0 at a block's first call.
    state: the sampler's own arrays at the first call (a cache, counters); `()` if it has none.
    keys: the rows' keys. The call number is folded in here, positions by whoever draws: a row's noise depends on
      nothing else, so its result is what it would be alone.

  Returns:
    The rollouts, and the sampler's state after the last call.
  """
  validate_schedule(completion_length, block_length, steps)
  num_rows, num_blocks = keys.shape[0], completion_length // block_length
  steps_per_block = steps // num_blocks

  def call(carry: Carry, start: Int[Array, ""], step: Int[Array, ""]) -> Carry:
    number = start // block_length * steps_per_block + step
    tokens = take_block(carry.completion, start, block_length)
    view = View(
      completion=carry.completion,
      start=start,
      step=step,
      tokens=tokens,
      is_masked=tokens == mask_token_id,
      keys=jax.vmap(jax.random.fold_in, (0, None))(keys, number),
    )
    decision, state = visit(view, carry.state)
    return record(carry, view, decision, state)

  def block(carry: Carry, start: Int[Array, ""]) -> tuple[Carry, None]:
    carry, _ = jax.lax.scan(lambda carry, step: (call(carry, start, step), None), carry, jnp.arange(steps_per_block))
    return carry, None

  carry = Carry(
    completion=jnp.full((num_rows, completion_length), mask_token_id, jnp.int32),
    committed_at=jnp.zeros((num_rows, completion_length), jnp.int32),
    confidence=jnp.zeros((num_rows, completion_length), jnp.float32),
    num_calls=jnp.zeros(num_rows, jnp.int32),
    state=state,
  )
  carry, _ = jax.lax.scan(block, carry, jnp.arange(num_blocks) * block_length)
  return Rollouts(carry.completion, carry.committed_at, carry.confidence, carry.num_calls), carry.state


def record(carry: Carry, view: View, decision: Decision, state: Any) -> Carry:
  """Write a decision into the rows; a position belongs to the call that changed it last."""
  is_changed = decision.tokens != view.tokens

  def write(rows: Num[Array, "b c"], new: Num[Array, "b s"]) -> Num[Array, "b c"]:
    block = jnp.where(is_changed, new.astype(rows.dtype), take_block(rows, view.start, is_changed.shape[1]))
    return constrain(jax.lax.dynamic_update_slice_in_dim(rows, block, view.start, axis=1), "rows", None)

  return Carry(
    completion=write(carry.completion, decision.tokens),
    committed_at=write(carry.committed_at, jnp.broadcast_to(carry.num_calls[:, None], is_changed.shape)),
    confidence=write(carry.confidence, decision.confidence),
    num_calls=carry.num_calls + 1,
    state=state,
  )


def take_block(array: Num[Array, "b c *d"], start: Int[Array, ""], length: int) -> Num[Array, "b s *d"]:
  """Cut `length` positions from `start` on."""
  return jax.lax.dynamic_slice_in_dim(array, start, length, axis=1)


def validate_schedule(completion_length: int, block_length: int, steps: int) -> None:
  """Check that blocks divide the completion and the model calls.

  Raises:
    ValueError: they do not; the message names the nearest values that would do.
  """
  given = f"sampler.completion_length={completion_length}, sampler.block_length={block_length}, sampler.steps={steps}"
  if min(completion_length, block_length, steps) < 1:
    raise ValueError(f"{given}: all three must be at least 1")
  if completion_length % block_length:
    divisors = [n for n in range(1, completion_length + 1) if completion_length % n == 0]
    raise ValueError(f"{given}: sampler.block_length must divide sampler.completion_length, as {divisors} do")
  num_blocks = completion_length // block_length
  if steps % num_blocks:
    below, above = steps // num_blocks * num_blocks, (steps // num_blocks + 1) * num_blocks
    near = f"{below} or {above}" if below else f"{above}"
    raise ValueError(f"{given}: sampler.steps must be a multiple of the {num_blocks} blocks, such as {near}")
