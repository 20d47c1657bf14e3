"""The loop that every sampler shares: all MASK -> block after block, model call after model call -> Rollouts.

A sampler brings two functions: `look` calls the model, `accept` says what the block holds next. Walking the blocks,
leaving finished rows alone, ending rows at EOS, keeping the record and giving every row its own noise is done here.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num

from dmpo_jax.sharding import constrain
from dmpo_jax.structs import Rollouts


@runtime_checkable
class Denoiser(Protocol):
  """The model as a sampler sees it: functions closed over parameters and the prompts of b rows.

  `hidden` runs whole rows [prompt; completion] and returns the completion's positions. It may hold several things side
  by side along d (say, with and without the prompt): samplers only slice it by position and hand it to `logits`, which
  gives part `number` of the vocabulary's `num_parts`, as n runs of w neighbouring ids, and the ids. Of several
  parts each run begins at a multiple of VOCAB_GROUP, none divides such a group, and ids of other parts are -inf.
  """

  mask_token_id: int
  eos_token_id: int
  num_chunks: int

  def hidden(self, completion: Int[Array, "z c"]) -> Float[Array, "z c d"]: ...

  def logits(
    self, hidden: Float[Array, "z s d"], number: Int[Array, ""] | int
  ) -> tuple[Float[Array, "z s n w"], Int[Array, "n w"]]: ...


@dataclasses.dataclass(frozen=True)
class Plan:
  """What every sampler is told.

  Args:
    completion_length, block_length: positions; blocks are decoded left to right.
    steps: model calls for the whole completion where the rule has a schedule, a multiple of the number of blocks.
    temperature: of the tokens, at least 0; 0 is greedy. One number, which is compiled in, or each row's [b].
    early_exit: a row is finished once an EOS and all before it are decided; EOS fills the rest in the end.
    on_call: called on the host after every model call with the batch's number of that call (from 0), the completions
      [b, c], the model calls [b] that each row has made and the tokens' probabilities [b, c]. Calls may come out of
      order.

  Raises:
    ValueError: the first argument that is wrong, with the configuration's name for it and what would do.
  """

  completion_length: int
  block_length: int
  steps: int
  temperature: float | Float[Array, "b"] = 0.0
  early_exit: bool = False
  on_call: Callable[[Any, Any, Any, Any], None] | None = None

  def __post_init__(self) -> None:
    validate_schedule(self.completion_length, self.block_length, self.steps)
    if not isinstance(self.temperature, jax.Array) and not 0 <= self.temperature < math.inf:
      raise ValueError(f"sampler.temperature={self.temperature}: must be a number from 0 (greedy) up")

  @property
  def is_greedy(self) -> bool:
    """Whether it is known that no row needs noise."""
    return not isinstance(self.temperature, jax.Array) and self.temperature == 0

  @property
  def num_blocks(self) -> int:
    return self.completion_length // self.block_length

  @property
  def steps_per_block(self) -> int:
    return self.steps // self.num_blocks


class View(NamedTuple):
  """What a sampler sees at a model call: the rows as they are, and the current block of s positions."""

  completion: Int[Array, "b c"]
  start: Int[Array, ""]  # position of the block's first token in the completion
  positions: Int[Array, "s"]  # of the block
  step: Int[Array, ""]  # model calls made in this block so far
  tokens: Int[Array, "b s"]  # the block
  is_masked: Bool[Array, "b s"]  # the block; nowhere in a row that is finished with it
  row_keys: Key[Array, "b"]  # the rows' keys
  number: Int[Array, ""]  # of this call among all that a row may make: block * most calls in a block + step

  @property
  def keys(self) -> Key[Array, "b"]:
    """The rows' keys for this call; `prediction` folds positions in."""
    return fold_calls(self.row_keys, self.number)


class Decision(NamedTuple):
  """What the block holds after a call. A position put back to MASK is taken back and will be decided again."""

  tokens: Int[Array, "b s"]
  confidence: Float[Array, "b s"]  # probability of the tokens, read where they changed


class Carry(NamedTuple):
  """What one model call hands to the next."""

  completion: Int[Array, "b c"]
  committed_at: Int[Array, "b c"]
  confidence: Float[Array, "b c"]
  num_calls: Int[Array, "b"]
  num_saved: Int[Array, "b"]
  is_ended: Bool[Array, "b"]  # by EOS
  batch_calls: Int[Array, ""]
  state: Any  # the sampler's own


Look = Callable[[View, Any, Any], Any]
Enter = Callable[[View], tuple[Any, Any]]
Accept = Callable[[View, Any, Any], tuple[Decision, Any]]


def decode(
  look: Look,
  accept: Accept,
  state: Any,
  keys: Key[Array, "b"],
  plan: Plan,
  denoiser: Denoiser,
  *,
  most_calls: int,
  enter: Enter | None = None,
  is_fixed: bool = False,
  can_revoke: bool = False,
) -> tuple[Rollouts, Any]:
  """Decode b rows from all MASK, blocks left to right, until no block has a MASK.

  A block goes on while one of its rows has a MASK, at most `most_calls` calls; rows without are left as they are and
  their calls are not counted.

  Args:
    look: one model call: `look(view, state, memory) -> seen`.
    accept: what follows from it: `accept(view, seen, state) -> (decision, state)`. `view.step` is 0 at a block's first
      call.
    state: the sampler's own arrays at the first call; `()` if it has none.
    keys: the rows' keys. The call's number within the row is folded in here, positions by whoever draws: a row's noise
      depends on nothing else, so its result is what it would be alone.
    most_calls: bound of the calls in a block.
    enter: a block's first call where it differs: `enter(view) -> (seen, memory)`; the memory (a cache) goes to the
      block's other calls.
    is_fixed: every row makes all `most_calls` calls, needed or not.
    can_revoke: decided positions of the block may be taken back, so that a row ends between blocks only.

  Returns:
    The rollouts, and the sampler's state after the last call.
  """
  mask, size = denoiser.mask_token_id, plan.block_length

  def view_block(carry: Carry, start: Int[Array, ""], step: Int[Array, ""]) -> View:
    tokens = take_block(carry.completion, start, size)
    number = start // size * most_calls + step
    is_masked = (tokens == mask) & ~carry.is_ended[:, None]
    return View(
      carry.completion, start, start + jnp.arange(size), step, tokens, is_masked, row_keys=keys, number=number
    )

  def find_live(carry: Carry, start: Int[Array, ""]) -> Bool[Array, "b"]:
    has_masks = (take_block(carry.completion, start, size) == mask).any(1)
    return ~carry.is_ended & (has_masks | is_fixed)

  def settle(carry: Carry, view: View, seen: Any) -> Carry:
    decision, state = accept(view, seen, carry.state)
    carry = record(carry, view, decision, state, find_live(carry, view.start))
    if plan.early_exit and not can_revoke:
      carry = end_rows(carry, view, denoiser, most_calls, plan)
    if plan.on_call is not None:
      shown = _filled(carry, denoiser.eos_token_id)[0], carry.num_calls, carry.confidence
      jax.debug.callback(plan.on_call, carry.batch_calls - 1, *shown)
    return carry

  def decode_block(carry: Carry, start: Int[Array, ""]) -> Carry:
    loop, kv_cache = (carry, jnp.int32(0)), None
    if enter is not None:
      view = view_block(carry, start, jnp.int32(0))
      seen, kv_cache = enter(view)
      loop = settle(carry, view, seen), jnp.int32(1)

    def is_going(loop: tuple[Carry, Any]) -> Bool[Array, ""]:
      return (loop[1] < most_calls) & find_live(loop[0], start).any()

    def call(loop: tuple[Carry, Any]) -> tuple[Carry, Any]:
      view = view_block(loop[0], start, loop[1])
      return settle(loop[0], view, look(view, loop[0].state, kv_cache)), loop[1] + 1

    carry, step = jax.lax.while_loop(is_going, call, loop)
    if plan.early_exit and can_revoke:
      carry = end_rows(carry, view_block(carry, start, step - 1), denoiser, most_calls, plan)
    return carry

  def visit(carry: Carry, start: Int[Array, ""]) -> tuple[Carry, None]:
    if enter is None or not plan.early_exit:
      return decode_block(carry, start), None
    # The loop makes no call where all rows have ended, but a first call of its own would be made.
    return jax.lax.cond(carry.is_ended.all(), lambda carry, _: carry, decode_block, carry, start), None

  carry, _ = jax.lax.scan(visit, _first_carry(keys, plan, mask, state), jnp.arange(plan.num_blocks) * size)
  return _finish(carry, mask, denoiser.eos_token_id), carry.state


def _first_carry(keys: Key[Array, "b"], plan: Plan, mask_token_id: int, state: Any) -> Carry:
  b, c = keys.shape[0], plan.completion_length
  return Carry(
    completion=jnp.full((b, c), mask_token_id, jnp.int32),
    committed_at=jnp.zeros((b, c), jnp.int32),
    confidence=jnp.zeros((b, c), jnp.float32),
    num_calls=jnp.zeros(b, jnp.int32),
    num_saved=jnp.zeros(b, jnp.int32),
    is_ended=jnp.zeros(b, bool),
    batch_calls=jnp.int32(0),
    state=state,
  )


def record(carry: Carry, view: View, decision: Decision, state: Any, is_live: Bool[Array, "b"]) -> Carry:
  """Write a decision into the rows; a position belongs to the call that changed it last."""
  is_changed = (decision.tokens != view.tokens) & is_live[:, None]

  def write(rows: Num[Array, "b c"], new: Num[Array, "b s"]) -> Num[Array, "b c"]:
    block = jnp.where(is_changed, new.astype(rows.dtype), take_block(rows, view.start, is_changed.shape[1]))
    return constrain(jax.lax.dynamic_update_slice_in_dim(rows, block, view.start, axis=1), "batch", None)

  return carry._replace(
    completion=write(carry.completion, decision.tokens),
    committed_at=write(carry.committed_at, jnp.broadcast_to(carry.num_calls[:, None], is_changed.shape)),
    confidence=write(carry.confidence, decision.confidence),
    num_calls=carry.num_calls + is_live,
    batch_calls=carry.batch_calls + 1,
    state=state,
  )


def end_rows(carry: Carry, view: View, denoiser: Denoiser, most_calls: int, plan: Plan) -> Carry:
  """End the rows in which an EOS and all before it are decided; the tokens up to it are final, as decided ones stay.

  What stands behind the EOS stays as it is until the last block is done: the model saw it.
  """
  is_decided = jnp.cumsum(carry.completion == denoiser.mask_token_id, axis=1) == 0
  is_ending = (is_decided & (carry.completion == denoiser.eos_token_id)).any(1) & ~carry.is_ended
  calls_left = (plan.num_blocks * most_calls) - 1 - view.number
  return carry._replace(
    num_saved=jnp.where(is_ending, calls_left, carry.num_saved),
    is_ended=carry.is_ended | is_ending,
  )


def _filled(carry: Carry, eos_token_id: int) -> tuple[Int[Array, "b c"], Bool[Array, "b c"]]:
  """Fill rows that have ended with EOS behind their first one; also say where."""
  is_eos = carry.completion == eos_token_id
  is_filled = (jnp.cumsum(is_eos, axis=1) - is_eos > 0) & carry.is_ended[:, None]
  return constrain(jnp.where(is_filled, eos_token_id, carry.completion), "batch", None), is_filled


def _finish(carry: Carry, mask_token_id: int, eos_token_id: int) -> Rollouts:
  completion, is_filled = _filled(carry, eos_token_id)
  num_calls = carry.num_calls[:, None]
  return Rollouts(
    completion=completion,
    committed_at=jnp.where(is_filled, num_calls, carry.committed_at),
    confidence=jnp.where(is_filled, 0.0, carry.confidence),
    num_calls=carry.num_calls,
    num_tokens=(~is_filled).sum(1).astype(jnp.int32),
    num_saved=carry.num_saved,
    seen=carry.completion,
    seen_at=jnp.where(carry.completion == mask_token_id, num_calls, carry.committed_at),
  )


def fold_calls(keys: Key[Array, "b"], number: Int[Array, "*b"]) -> Key[Array, "b"]:
  """Derive the rows' keys for a model call, by one number for all rows or one for each."""
  return jax.vmap(jax.random.fold_in, (0, 0 if number.ndim else None))(keys, number)


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
