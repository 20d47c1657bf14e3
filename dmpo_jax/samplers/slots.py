"""Continuous batching: a fixed number of slots, each with a row of its own, which may be in any of its blocks.

A model that attends by blocks is called on every slot's current block at once. Where the block holds a MASK, the rule
decides what it holds next. Where it holds none, the call has put its final keys and values into the row's cache, and
the row goes on to its next block. So rows do not wait for each other at the end of a block, and keeping a block is no
call of its own. A row that is done makes room for another one.

A row gets what `loop.decode` would give it: the same rule, calls, noise and cache. The loop's own steps do the work.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped

from dmpo_jax.samplers.canvas import make_canvas
from dmpo_jax.samplers.loop import Carry, Loop, Plan, Rule, first_carry, in_blocks
from dmpo_jax.sharding import constrain, num_shares
from dmpo_jax.structs import Denoiser, Rollouts


class Rows(NamedTuple):
  """What rows are decoded from."""

  prompt: Int[Array, "b q"]  # padded on the left
  prompt_is_valid: Bool[Array, "b q"]
  keys: Key[Array, "b"]
  temperature: Float[Array, "b"]


class Slots(NamedTuple):
  """The rows in the slots, and how far they are."""

  rows: Rows
  carry: Carry
  start: Int[Array, "b"]  # of each row's current block in its canvas
  step: Int[Array, "b"]  # calls that decided something in it
  kv_cache: PyTree  # its arrays are [b, ...], or [layers, b, ...] if they have five axes


def begin(rule: Rule, plan: Plan, denoiser: Denoiser, rows: Rows) -> Slots:
  """Run the whole blocks of the rows' prompts, which the denoiser has too; nothing is decided yet."""
  num_rows = rows.prompt.shape[0]
  canvas = make_canvas(denoiser, num_rows, plan.completion_length)
  none = jnp.zeros(num_rows, jnp.int32)
  return Slots(rows, first_carry(canvas, rule.first_state(num_rows)), none, none, denoiser.open(canvas.tokens.shape[1]))


def empty(slots: Slots, num: int, key: Key[Array, ""]) -> Slots:
  """Make so many slots with nothing in them.

  Args:
    slots: any number of rows that have begun, as arrays or as their shapes.
    key: any.
  """

  def make(array: jax.ShapeDtypeStruct) -> Shaped[Array, "..."]:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
      return constrain(jnp.broadcast_to(key, num), "batch")
    if array.ndim == 0:
      return jnp.zeros((), array.dtype)
    shape = list(array.shape)
    shape[_axis(array)] = num
    axes = (None, "batch", None, "kv_heads", None) if array.ndim == 5 else ("batch", *(None,) * (array.ndim - 1))
    return constrain(jnp.zeros(shape, array.dtype), *axes)

  return jax.tree.map(make, slots)


def _axis(array: Shaped[Array, "..."] | jax.ShapeDtypeStruct) -> int:
  """Return the axis of the rows: that of a cache's arrays comes after the layers."""
  return 1 if array.ndim == 5 else 0


def place(slots: Slots, new: Slots, index: Int[Array, "z"]) -> Slots:
  """Put rows that have begun into slots.

  Args:
    new: equally many rows for the slots of each device.
    index: of the slots among those of their device; as many as it has: nowhere.
  """
  shares = num_shares("batch")

  def put(old: Shaped[Array, "..."], new: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    if old.ndim == 0:  # the number of calls of the whole batch
      return old
    axis = _axis(old)

    def by_device(array: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
      return array.reshape(*array.shape[:axis], shares, -1, *array.shape[axis + 1 :])

    def put_rows(old: Shaped[Array, "..."], new: Shaped[Array, "..."], index: Int[Array, "j"]) -> Shaped[Array, "..."]:
      return old.at[(slice(None),) * axis + (index,)].set(new, mode="drop")

    placed = jax.vmap(put_rows, (axis, axis, 0), axis)(by_device(old), by_device(new), index.reshape(shares, -1))
    return placed.reshape(old.shape)

  return jax.tree.map(put, slots, new)


def advance(
  rule: Rule,
  plan: Plan,
  denoiser: Denoiser,
  slots: Slots,
  is_held: Bool[Array, "b"],
  num_done: Int[Array, ""],
  most_calls: Int[Array, ""],
) -> tuple[Slots, Rollouts, Bool[Array, "b"]]:
  """Make model calls until so many slots hold no row that goes on, but at most `most_calls`.

  Args:
    rule: of a sampler with `has_blocks`, made from the same denoiser and plan.
    is_held: False where a slot holds nothing that is wanted.

  Returns:
    The slots; their rows so far; and whether each is done.
  """
  canvas = make_canvas(denoiser, slots.start.shape[0], plan.completion_length)
  loop = Loop(in_blocks(rule, plan, denoiser), slots.rows.keys, plan, denoiser, canvas)

  def find_done(slots: Slots) -> Bool[Array, "b"]:
    goes_on = loop.find_masked(slots.carry).any(1) | loop.find_live(slots.carry, slots.start)
    return slots.carry.is_ended | ~goes_on | ~is_held

  def is_going(state: tuple[Slots, Int[Array, ""]]) -> Bool[Array, ""]:
    slots, calls = state
    return (calls < most_calls) & (find_done(slots).sum() < num_done)

  def call(state: tuple[Slots, Int[Array, ""]]) -> tuple[Slots, Int[Array, ""]]:
    slots, calls = state
    return _call(loop, slots, ~find_done(slots)), calls + 1

  slots, _ = jax.lax.while_loop(is_going, call, (slots, jnp.int32(0)))
  return slots, loop.finish(slots.carry), find_done(slots)


def _call(loop: Loop, slots: Slots, goes_on: Bool[Array, "b"]) -> Slots:
  """Call the model on every row's block, and write it into the cache, for as long as nothing else is written there."""
  carry, start, step = slots.carry, slots.start, slots.step

  def is_live(carry: Carry, step: Int[Array, "b"]) -> Bool[Array, "b"]:
    return goes_on & loop.find_live(carry, start) & (step < loop.rule.most_calls)

  was_live = is_live(carry, step)
  view = loop.view_block(carry, start, step)
  hidden, kv_cache = loop.denoiser.keep(view.tokens, start, slots.kv_cache)
  carry, step = loop.settle(carry, view, hidden), step + was_live
  if loop.plan.early_exit:
    is_whole = was_live & ~is_live(carry, step)
    carry = loop.end_rows(carry, loop.number(start, jnp.full_like(step, loop.rule.most_calls - 1)), is_whole)
  is_kept = goes_on & ~was_live
  return slots._replace(
    carry=carry,
    start=jnp.where(is_kept, start + loop.plan.block_length, start),
    step=jnp.where(is_kept, 0, step),
    kv_cache=kv_cache,
  )
