"""FreeDave: LLaDA's decoding in fewer calls, by drafting its next states and checking them all in one call."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num

from dmpo_jax.samplers.llada import REMASKING
from dmpo_jax.samplers.loop import Decision, Denoiser, Plan, View, decode, take_block
from dmpo_jax.samplers.prediction import predict, uniform_noise
from dmpo_jax.samplers.selection import check_choice, num_transfer_tokens, select_count
from dmpo_jax.structs import Rollouts


class State(NamedTuple):
  """What a call leaves to the next of the block."""

  num_done: Int[Array, "b"]  # steps of LLaDA's schedule in this block
  drafts: Int[Array, "b k s"]  # the block as it might be 1, 2, ... steps later


def sample(
  denoiser: Denoiser,
  keys: Key[Array, "b"],
  plan: Plan,
  *,
  remasking: str = "low_confidence",
  draft_length: int = 4,
) -> Rollouts:
  """Decode what `llada.sample` decodes, token for token, in as many model calls or fewer (Wu and Zhang, 2510.00294).

  The prediction that decided one step also tells what the next ones would be, were it still right then. The next call
  runs the model on the true state and on these drafts, `draft_length` rows for each: the true state gives the true
  next one; if that is the first draft, the draft's row gives the one after it, and so on. So every call decides a step
  of the schedule, and one more for each draft that proves right. A step's noise belongs to its number in the schedule,
  which makes this hold at every temperature.

  Args:
    remasking: as for `llada.sample`.
    draft_length: states that one call runs, the true one among them; at least 1.

  Raises:
    ValueError: an unknown `remasking`, or no state to run.
  """
  check_choice("sampler.freedave.remasking", remasking, REMASKING)
  if draft_length < 1:
    raise ValueError(f"sampler.freedave.draft_length={draft_length}: must be at least 1, the true state")
  steps = plan.steps_per_block
  schedule = num_transfer_tokens(jnp.int32(plan.block_length), steps)

  def look(view: View, state: State, kv_cache: None) -> Float[Array, "b k s d"]:
    blocks = _candidates(view, state)
    b, k, _ = blocks.shape
    rows = jnp.broadcast_to(view.completion[:, None], (b, k, view.completion.shape[1]))
    rows = jax.lax.dynamic_update_slice_in_dim(rows, blocks, view.start, axis=2)
    hidden = take_block(denoiser.hidden(rows.reshape(b * k, -1)), view.start, plan.block_length)
    return hidden.reshape(b, k, *hidden.shape[1:])

  def choose(view: View, hidden: Float[Array, "b k s d"], number: Int[Array, "b k"]) -> "Choice":
    """Predict with the noise of each state's own step."""
    b, k = number.shape
    folded = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(view.row_keys, view.number - view.step + number)
    folded = folded.reshape(-1)
    temperature = plan.temperature
    if isinstance(temperature, jax.Array):
      temperature = jnp.repeat(temperature, k)
    chosen = predict(denoiser, hidden.reshape(b * k, *hidden.shape[2:]), folded, view.positions, temperature)
    score = chosen.confidence if remasking == "low_confidence" else uniform_noise(folded, view.positions)
    return Choice(*(array.reshape(b, k, -1) for array in (chosen.tokens, chosen.confidence, score)))

  def select(tokens: Int[Array, "b s"], score: Float[Array, "b s"], number: Int[Array, "b"]) -> Bool[Array, "b s"]:
    count = jnp.where(number < steps, schedule[jnp.minimum(number, steps - 1)], 0)
    return select_count(score, tokens == denoiser.mask_token_id, count)

  def accept(view: View, seen: Float[Array, "b k s d"], state: State) -> tuple[Decision, State]:
    num_done = jnp.where(view.step == 0, 0, state.num_done)
    blocks = _candidates(view, state)
    number = num_done[:, None] + jnp.arange(draft_length)
    choice = choose(view, seen, number)
    is_kept = jax.vmap(select, 1, 1)(blocks, choice.score, number)
    following = jnp.where(is_kept, choice.tokens, blocks)
    is_right = (following[:, :-1] == blocks[:, 1:]).all(-1)
    last = jnp.cumprod(is_right, axis=1).sum(1)  # the last state that is known to be true
    is_true = jnp.arange(draft_length) <= last[:, None]
    confidence = jnp.where(is_kept & is_true[..., None], choice.confidence, 0.0).sum(1)
    tokens, num_done = _pick(following, last), num_done + last + 1

    def draft(tokens: Int[Array, "b s"], ahead: Int[Array, ""]) -> tuple[Int[Array, "b s"], Int[Array, "b s"]]:
      number = num_done + ahead
      if not plan.is_greedy or remasking == "random":
        new, _, score = (x[:, 0] for x in choose(view, _pick(seen, last)[:, None], number[:, None]))
      else:
        new, score = _pick(choice.tokens, last), _pick(choice.score, last)
      tokens = jnp.where(select(tokens, score, number), new, tokens)
      return tokens, tokens

    _, drafts = jax.lax.scan(draft, tokens, jnp.arange(draft_length - 1))
    return Decision(tokens, confidence), State(num_done, jnp.moveaxis(drafts, 0, 1))

  b = keys.shape[0]
  first = State(jnp.zeros(b, jnp.int32), jnp.zeros((b, draft_length - 1, plan.block_length), jnp.int32))
  rollouts, _ = decode(look, accept, first, keys, plan, denoiser, most_calls=steps)
  return rollouts


class Choice(NamedTuple):
  """What each position of each state would take, and what goes first."""

  tokens: Int[Array, "b k s"]
  confidence: Float[Array, "b k s"]
  score: Float[Array, "b k s"]


def _candidates(view: View, state: State) -> Int[Array, "b k s"]:
  """The states to run. A block's first call has no drafts: the state itself, which never follows from itself."""
  tokens = view.tokens[:, None]
  return jnp.concatenate([tokens, jnp.where(view.step == 0, tokens, state.drafts)], axis=1)


def _pick(array: Num[Array, "b k *s"], index: Int[Array, "b"]) -> Num[Array, "b *s"]:
  """Take one of the k of each row, by comparison rather than by index, so that it is computed where the rows are."""
  is_it = (jnp.arange(array.shape[1]) == index[:, None]).reshape(*array.shape[:2], *[1] * (array.ndim - 2))
  return jnp.where(is_it, array, 0).sum(1, dtype=array.dtype)
