"""The loop that all samplers share: from all MASK, block after block, model call after model call, to `Rollouts`.

A sampler brings a `Rule`: `forward` calls the model, `accept` decides what the block holds next. The loop walks the
blocks, leaves finished rows alone, ends rows at EOS, keeps the record and gives every row its own noise.

With a model that attends by blocks the loop calls it on the current block alone. The prompt's whole blocks are run
once, and a finished block once more: its keys and values are then final, so nothing is approximated. See `canvas.py`.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Num, PyTree

from dmpo_jax.samplers.canvas import Canvas, make_canvas
from dmpo_jax.sharding import constrain
from dmpo_jax.spans import put_span, take_span
from dmpo_jax.structs import Denoiser, Rollouts


@dataclasses.dataclass(frozen=True)
class Plan:
  """Settings that all samplers share.

  Args:
    completion_length, block_length: positions; blocks are decoded left to right.
    steps: model calls for the whole completion, for rules with a schedule; a multiple of the number of blocks.
    temperature: of the tokens, at least 0; 0 is greedy. Either one number, which is compiled in, or one for each row.
    early_exit: a row is finished once an EOS, or another token that ends completions, and all positions before it are
      decided. At the end, EOS fills its rest.
    on_call: called on the host after every model call with the call's number in the batch (from 0), the completions
      [b, c], the number of model calls of each row [b] and the tokens' probabilities [b, c]. Calls may arrive out of
      order.

  Raises:
    ValueError: a setting is wrong; the message has its config path and what would do.
  """

  completion_length: int
  block_length: int
  steps: int
  temperature: float | Float[Array, "b"] = 0.0
  early_exit: bool = False
  on_call: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None] | None = None

  def __post_init__(self) -> None:
    validate_schedule(self.completion_length, self.block_length, self.steps)
    if not isinstance(self.temperature, jax.Array) and not 0 <= self.temperature < math.inf:
      raise ValueError(f"sampler.temperature={self.temperature}: must be a number from 0 (greedy) up")

  @property
  def is_greedy(self) -> bool:
    """Whether no row needs noise, as known when compiling."""
    return not isinstance(self.temperature, jax.Array) and self.temperature == 0

  @property
  def num_blocks(self) -> int:
    return self.completion_length // self.block_length

  @property
  def steps_per_block(self) -> int:
    return self.steps // self.num_blocks


class View(NamedTuple):
  """The rows at a model call, and their current block of s positions.

  Positions are those of the canvas, which with full attention is the completion. The fields without rows have them
  where every row is in a block of its own (`slots.py`).
  """

  completion: Int[Array, "b c"]
  start: Int[Array, "*b"]  # position of the block's first token
  positions: Int[Array, "*b s"]  # of the block
  step: Int[Array, "*b"]  # model calls made in this block so far
  tokens: Int[Array, "b s"]  # of the block
  is_masked: Bool[Array, "b s"]  # of the block; False everywhere in rows that have ended
  is_open: Bool[Array, "b s"]  # of the block; False for the prompt's tokens, and behind the completion's last block
  row_keys: Key[Array, "b"]
  number: Int[Array, "*b"]  # of this call among all that a row may make: block * most calls in a block + step

  @property
  def keys(self) -> Key[Array, "b"]:
    """The rows' keys for this call; `prediction` folds in positions."""
    return fold_calls(self.row_keys, self.number)


class Decision(NamedTuple):
  """The block's tokens after a call. A position set back to MASK is decided again later."""

  tokens: Int[Array, "b s"]
  confidence: Float[Array, "b s"]  # probability of the tokens; only read where they changed


class Carry(NamedTuple):
  """The state of the rows between model calls."""

  completion: Int[Array, "b c"]
  committed_at: Int[Array, "b c"]
  confidence: Float[Array, "b c"]
  num_calls: Int[Array, "b"]
  num_saved: Int[Array, "b"]
  is_ended: Bool[Array, "b"]  # by EOS
  batch_calls: Int[Array, ""]
  state: PyTree  # the sampler's own


Forward = Callable[[View, PyTree, PyTree], PyTree]  # (view, state, kv_cache) -> hidden
Prefill = Callable[[View], tuple[PyTree, PyTree]]  # (view) -> (hidden, kv_cache)
Leave = Callable[[Int[Array, "b s"], Int[Array, ""], PyTree], PyTree]  # (tokens, start, kv_cache) -> kv_cache
Accept = Callable[[View, PyTree, PyTree], tuple[Decision, PyTree]]  # (view, hidden, state) -> (decision, state)


@dataclasses.dataclass(frozen=True)
class Rule:
  """A decoding rule.

  Args:
    forward: one model call: `forward(view, state, kv_cache) -> hidden`. Only `accept` reads the hidden states.
    accept: what follows from it: `accept(view, hidden, state) -> (decision, state)`. The state is the sampler's own;
      `view.step` is 0 at a block's first call.
    most_calls: bound on the calls in a block.
    prefill: a block's first call, if it differs: `prefill(view) -> (hidden, kv_cache)`. The cache goes to the block's
      other calls.
    is_fixed: every row makes all `most_calls` calls, whether it needs them or not.
    can_revoke: decided positions of the block may change.
    goes_on: says which rows need another call on their block although it has no MASK: `goes_on(state) -> [b]`. No row
      does at a block's first call, or after `most_calls`. None: none ever.
    leave: adds a finished block to the cache that goes from block to block:
      `leave(tokens, start, kv_cache) -> kv_cache`. Not called behind the last block that some row needs.
    first_state: the sampler's own state of so many rows before the first call.
  """

  forward: Forward
  accept: Accept
  most_calls: int
  prefill: Prefill | None = None
  is_fixed: bool = False
  can_revoke: bool = False
  goes_on: Callable[[PyTree], Bool[Array, "b"]] | None = None
  leave: Leave | None = None
  first_state: Callable[[int], PyTree] = lambda num_rows: ()

  @property
  def ends_between_blocks(self) -> bool:
    """Whether a row goes on to the end of the block that has its EOS: the block may change, or is whole."""
    return self.can_revoke or self.leave is not None


def decode(rule: Rule, keys: Key[Array, "b"], plan: Plan, denoiser: Denoiser) -> tuple[Rollouts, PyTree]:
  """Decode b rows from all MASK, blocks left to right, until no block has a MASK.

  A block goes on while one of its rows has a MASK or `rule.goes_on`, for at most `rule.most_calls` calls. Rows without
  a MASK are left as they are, and their calls are not counted.

  Args:
    keys: the rows' keys. The loop folds in the call's number within the row, and whoever draws folds in positions. A
      row's noise depends on nothing else, so a row decoded alone gives the same result.

  Returns:
    The rollouts, and the sampler's state after the last call.

  Raises:
    ValueError: the blocks are not those of the model.
  """
  canvas, kv_cache = make_canvas(denoiser, keys.shape[0], plan.completion_length), None
  if denoiser.block_length:
    rule = in_blocks(rule, plan, denoiser)
    kv_cache = denoiser.open(canvas.tokens.shape[1])
  loop = Loop(rule, keys, plan, denoiser, canvas)
  first = first_carry(canvas, rule.first_state(keys.shape[0]))
  starts = jnp.arange(0, canvas.tokens.shape[1], plan.block_length)
  (carry, _), _ = jax.lax.scan(loop.visit_block, (first, kv_cache), starts)
  return loop.finish(carry), carry.state


def in_blocks(rule: Rule, plan: Plan, denoiser: Denoiser) -> Rule:
  """Have a rule call a model that attends by blocks on the current block, with the ones before it cached."""
  if plan.block_length != denoiser.block_length:
    raise ValueError(
      f"sampler.block_length={plan.block_length}: must be model.block_length={denoiser.block_length}, as the model "
      "attends by blocks"
    )

  def forward(view: View, state: PyTree, kv_cache: PyTree) -> Float[Array, "b s d"]:
    return denoiser.block(view.tokens, view.start, kv_cache)

  assert rule.prefill is None  # samplers with a cache of their own are refused for such models
  return dataclasses.replace(rule, forward=forward, leave=lambda *block: denoiser.keep(*block)[1])


class Loop(NamedTuple):
  """The steps of `decode`, some of which `slots.py` shares."""

  rule: Rule
  keys: Key[Array, "b"]
  plan: Plan
  denoiser: Denoiser
  canvas: Canvas

  def visit_block(self, state: tuple[Carry, PyTree], start: Int[Array, ""]) -> tuple[tuple[Carry, PyTree], None]:
    carry, kv_cache = state
    if self.rule.prefill is None or not self.plan.early_exit:
      carry = self.decode_block(carry, start, kv_cache)
    else:  # Once all rows have ended, the loop makes no call, but the prefill would still be made.
      carry = jax.lax.cond(carry.is_ended.all(), lambda carry, *_: carry, self.decode_block, carry, start, kv_cache)
    return (carry, self.leave_block(carry, start, kv_cache)), None

  def leave_block(self, carry: Carry, start: Int[Array, ""], kv_cache: PyTree) -> PyTree:
    """Keep the block that was finished, if a row has another one."""
    if self.rule.leave is None:
      return kv_cache
    is_behind = jnp.arange(carry.completion.shape[1]) >= start + self.plan.block_length
    goes_on = (self.canvas.open_only(is_behind & ~carry.is_ended[:, None])).any()
    tokens = take_span(carry.completion, start, self.plan.block_length)
    return jax.lax.cond(goes_on, self.rule.leave, lambda tokens, start, kv_cache: kv_cache, tokens, start, kv_cache)

  def decode_block(self, carry: Carry, start: Int[Array, ""], kv_cache: PyTree) -> Carry:
    loop = carry, jnp.int32(0)
    if self.rule.prefill is not None:
      view = self.view_block(carry, start, jnp.int32(0))
      hidden, kv_cache = self.rule.prefill(view)
      loop = self.settle(carry, view, hidden), jnp.int32(1)

    def is_going(loop: tuple[Carry, Int[Array, ""]]) -> Bool[Array, ""]:
      carry, step = loop
      return (step < self.rule.most_calls) & self.find_live(carry, start).any()

    def call(loop: tuple[Carry, Int[Array, ""]]) -> tuple[Carry, Int[Array, ""]]:
      carry, step = loop
      view = self.view_block(carry, start, step)
      return self.settle(carry, view, self.rule.forward(view, carry.state, kv_cache)), step + 1

    carry, step = jax.lax.while_loop(is_going, call, loop)
    if self.plan.early_exit and self.rule.ends_between_blocks:
      # where rows are done with a block at different steps, the batch's last one is none of a row's business
      is_own = self.rule.leave is not None or self.rule.goes_on is not None
      last = jnp.int32(self.rule.most_calls) if is_own else step
      carry = self.end_rows(carry, self.number(start, last - 1))
    return carry

  def view_block(self, carry: Carry, start: Int[Array, "*b"], step: Int[Array, "*b"]) -> View:
    size = self.plan.block_length
    return View(
      completion=carry.completion,
      start=start,
      positions=start[..., None] + jnp.arange(size),
      step=step,
      tokens=take_span(carry.completion, start, size),
      is_masked=take_span(self.find_masked(carry), start, size) & ~carry.is_ended[:, None],
      is_open=take_span(self.canvas.open_only(jnp.ones_like(carry.completion, bool)), start, size),
      row_keys=self.keys,
      number=self.number(start, step),
    )

  def number(self, start: Int[Array, "*b"], step: Int[Array, "*b"]) -> Int[Array, "*b"]:
    """Number the call among all that a row may make."""
    return start // self.plan.block_length * self.rule.most_calls + step

  def find_masked(self, carry: Carry) -> Bool[Array, "b c"]:
    return self.canvas.open_only(carry.completion == self.denoiser.mask_token_id)

  def find_live(self, carry: Carry, start: Int[Array, "*b"]) -> Bool[Array, "b"]:
    is_live = take_span(self.find_masked(carry), start, self.plan.block_length).any(1) | self.rule.is_fixed
    if self.rule.goes_on is not None:
      is_live |= self.rule.goes_on(carry.state)
    return ~carry.is_ended & is_live

  def settle(self, carry: Carry, view: View, hidden: PyTree) -> Carry:
    """Apply what follows from a model call."""
    decision, state = self.rule.accept(view, hidden, carry.state)
    carry = _record(carry, view, decision, state, self.find_live(carry, view.start))
    if self.plan.early_exit and not self.rule.ends_between_blocks:
      carry = self.end_rows(carry, view.number)
    if self.plan.on_call is not None:
      own = self.cut(carry)
      shown = _filled(own, self.denoiser)[0], own.num_calls, own.confidence
      jax.debug.callback(self.plan.on_call, carry.batch_calls - 1, *shown)
    return carry

  def end_rows(self, carry: Carry, number: Int[Array, "*b"], may_end: Bool[Array, "b"] | bool = True) -> Carry:
    """End the rows in which an EOS and all positions before it are decided: these tokens are final.

    What stands behind the EOS stays until the last block is done, since the model saw it.

    Args:
      number: of the call that has been made.
      may_end: rows to look at.
    """
    is_decided = jnp.cumsum(self.find_masked(carry), axis=1) == 0
    is_end = self.canvas.open_only(_find_ends(carry.completion, self.denoiser))
    is_ending = (is_decided & is_end).any(1) & ~carry.is_ended & may_end
    num_blocks = self.plan.num_blocks
    if self.canvas.num_given is not None:
      num_blocks += self.canvas.num_given > 0  # the prompt's remainder makes it a block more
    calls_left = num_blocks * self.rule.most_calls - 1 - number
    return carry._replace(
      num_saved=jnp.where(is_ending, calls_left, carry.num_saved),
      is_ended=carry.is_ended | is_ending,
    )

  def cut(self, carry: Carry) -> Carry:
    """Take the completions out of the canvas."""
    if self.canvas.num_given is None:
      return carry
    names = ("completion", "committed_at", "confidence")
    return carry._replace(
      **{name: self.canvas.cut(getattr(carry, name), self.plan.completion_length) for name in names}
    )

  def finish(self, carry: Carry) -> Rollouts:
    return _finish(self.cut(carry), self.denoiser)


def first_carry(canvas: Canvas, state: PyTree) -> Carry:
  b, c = canvas.tokens.shape
  return Carry(
    completion=canvas.tokens,
    committed_at=jnp.zeros((b, c), jnp.int32),
    confidence=jnp.zeros((b, c), jnp.float32),
    num_calls=jnp.zeros(b, jnp.int32),
    num_saved=jnp.zeros(b, jnp.int32),
    is_ended=jnp.zeros(b, bool),
    batch_calls=jnp.int32(0),
    state=state,
  )


def _record(carry: Carry, view: View, decision: Decision, state: PyTree, is_live: Bool[Array, "b"]) -> Carry:
  """Write a decision into the live rows. A position is committed by the call that changed it last."""
  is_changed = (decision.tokens != view.tokens) & is_live[:, None]

  def write(rows: Num[Array, "b c"], new: Num[Array, "b s"]) -> Num[Array, "b c"]:
    block = jnp.where(is_changed, new.astype(rows.dtype), take_span(rows, view.start, is_changed.shape[1]))
    return constrain(put_span(rows, block, view.start), "batch", None)

  return carry._replace(
    completion=write(carry.completion, decision.tokens),
    committed_at=write(carry.committed_at, jnp.broadcast_to(carry.num_calls[:, None], is_changed.shape)),
    confidence=write(carry.confidence, decision.confidence),
    num_calls=carry.num_calls + is_live,
    batch_calls=carry.batch_calls + 1,
    state=state,
  )


def _find_ends(completion: Int[Array, "b c"], denoiser: Denoiser) -> Bool[Array, "b c"]:
  return functools.reduce(operator.or_, (completion == token for token in denoiser.end_token_ids))


def _filled(carry: Carry, denoiser: Denoiser) -> tuple[Int[Array, "b c"], Bool[Array, "b c"]]:
  """Fill ended rows with EOS behind the first token that ends them; also return where."""
  is_end = _find_ends(carry.completion, denoiser)
  is_filled = (jnp.cumsum(is_end, axis=1) - is_end > 0) & carry.is_ended[:, None]
  return constrain(jnp.where(is_filled, denoiser.eos_token_id, carry.completion), "batch", None), is_filled


def _finish(carry: Carry, denoiser: Denoiser) -> Rollouts:
  completion, is_filled = _filled(carry, denoiser)
  num_calls = carry.num_calls[:, None]
  return Rollouts(
    completion=completion,
    committed_at=jnp.where(is_filled, num_calls, carry.committed_at),
    confidence=jnp.where(is_filled, 0.0, carry.confidence),
    num_calls=carry.num_calls,
    num_tokens=(~is_filled).sum(1).astype(jnp.int32),
    num_saved=carry.num_saved,
    seen=carry.completion,
    seen_at=jnp.where(carry.completion == denoiser.mask_token_id, num_calls, carry.committed_at),
  )


def fold_calls(keys: Key[Array, "b"], number: Int[Array, "*b"]) -> Key[Array, "b"]:
  """Derive the rows' keys for a model call from its number: one for all rows, or one for each."""
  return jax.vmap(jax.random.fold_in, (0, 0 if number.ndim else None))(keys, number)


def validate_schedule(completion_length: int, block_length: int, steps: int) -> None:
  """Check that block_length divides completion_length, and the number of blocks divides steps.

  Raises:
    ValueError: they do not; the message has the nearest values that would do.
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
