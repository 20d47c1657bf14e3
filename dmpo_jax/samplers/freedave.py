"""FreeDave: LLaDA's decoding in fewer calls. Each call checks the drafts of the call before and drafts anew."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num

from dmpo_jax.samplers import checks
from dmpo_jax.samplers.llada import REMASKING
from dmpo_jax.samplers.loop import Decision, Plan, Rule, View, decode
from dmpo_jax.samplers.prediction import predict, uniform_noise
from dmpo_jax.samplers.selection import num_transfer_tokens, select_count
from dmpo_jax.spans import take_span
from dmpo_jax.structs import Denoiser, Rollouts


@dataclasses.dataclass(frozen=True)
class Options:
  """What is committed first, and how many states a call runs.

  Args:
    remasking: as for LLaDA's sampler.
    draft_length: states that one call runs for a row, the true state included; at least 1.

  Raises:
    ValueError: an unknown `remasking`, or no state to run.
  """

  remasking: str = "low_confidence"
  draft_length: int = 4

  def __post_init__(self) -> None:
    checks.refuse(
      checks.one_of("remasking", self.remasking, REMASKING),
      checks.at_least("draft_length", self.draft_length, 1),
    )


class State(NamedTuple):
  """What one call of a block hands to the next."""

  num_done: Int[Array, "b"]  # steps of LLaDA's schedule done in this block
  drafts: Int[Array, "b j s"]  # the block as drafted 1, 2, ... steps ahead


class Choice(NamedTuple):
  """The token that each position of each state would take, and the score that orders the positions."""

  tokens: Int[Array, "b j s"]
  confidence: Float[Array, "b j s"]
  score: Float[Array, "b j s"]


def sample(denoiser: Denoiser, keys: Key[Array, "b"], plan: Plan, options: Options) -> Rollouts:
  """Decode the same tokens as `llada.sample`, in as many model calls or fewer (Wu and Zhang, arXiv 2510.00294).

  The prediction that decides one step also drafts the following ones, as if it stayed right. The next call runs the
  model on the true state and on these drafts, `draft_length` rows for each row. The true state gives the true next
  state; if that equals the first draft, the draft's row gives the state after it, and so on. So every call does one
  step of the schedule, and one more for each draft that proves right. A step's noise belongs to its number in the
  schedule, so the tokens are the same at every temperature.
  """
  draft_length, steps = options.draft_length, plan.steps_per_block
  schedule = num_transfer_tokens(jnp.int32(plan.block_length), steps)

  def forward(view: View, state: State, kv_cache: None) -> Float[Array, "b j s d"]:
    return _run_states(denoiser, view, _candidates(view, state))

  def choose(view: View, hidden: Float[Array, "b j s d"], number: Int[Array, "b j"]) -> Choice:
    return _choose(denoiser, view, hidden, number, plan, options)

  def select(tokens: Int[Array, "b s"], score: Float[Array, "b s"], number: Int[Array, "b"]) -> Bool[Array, "b s"]:
    count = jnp.where(number < steps, schedule[jnp.minimum(number, steps - 1)], 0)
    return select_count(score, tokens == denoiser.mask_token_id, count)

  def accept(view: View, hidden: Float[Array, "b j s d"], state: State) -> tuple[Decision, State]:
    num_done = jnp.where(view.step == 0, 0, state.num_done)
    blocks = _candidates(view, state)
    number = num_done[:, None] + jnp.arange(draft_length)
    choice = choose(view, hidden, number)
    is_kept = jax.vmap(select, 1, 1)(blocks, choice.score, number)
    following = jnp.where(is_kept, choice.tokens, blocks)
    is_right = (following[:, :-1] == blocks[:, 1:]).all(-1)
    last = jnp.cumprod(is_right, axis=1).sum(1)  # index of the last state that is known to be true
    is_true = jnp.arange(draft_length) <= last[:, None]
    confidence = jnp.where(is_kept & is_true[..., None], choice.confidence, 0.0).sum(1)
    tokens, num_done = _pick(following, last), num_done + last + 1

    def draft(tokens: Int[Array, "b s"], ahead: Int[Array, ""]) -> tuple[Int[Array, "b s"], Int[Array, "b s"]]:
      number = num_done + ahead
      if not plan.is_greedy or options.remasking == "random":  # a step's own noise decides
        new, _, score = (x[:, 0] for x in choose(view, _pick(hidden, last)[:, None], number[:, None]))
      else:
        new, score = _pick(choice.tokens, last), _pick(choice.score, last)
      tokens = jnp.where(select(tokens, score, number), new, tokens)
      return tokens, tokens

    _, drafts = jax.lax.scan(draft, tokens, jnp.arange(draft_length - 1))
    return Decision(tokens, confidence), State(num_done, jnp.moveaxis(drafts, 0, 1))

  def first_state(b: int) -> State:
    return State(jnp.zeros(b, jnp.int32), jnp.zeros((b, draft_length - 1, plan.block_length), jnp.int32))

  return decode(Rule(forward, accept, steps, first_state=first_state), keys, plan, denoiser)[0]


def _run_states(denoiser: Denoiser, view: View, blocks: Int[Array, "b j s"]) -> Float[Array, "b j s d"]:
  """Run the rows with each of j states of the block."""
  b, j, size = blocks.shape
  rows = jnp.broadcast_to(view.completion[:, None], (b, j, view.completion.shape[1]))
  rows = jax.lax.dynamic_update_slice_in_dim(rows, blocks, view.start, axis=2)
  hidden = take_span(denoiser.hidden(rows.reshape(b * j, -1)), view.start, size)
  return hidden.reshape(b, j, *hidden.shape[1:])


def _choose(
  denoiser: Denoiser,
  view: View,
  hidden: Float[Array, "b j s d"],
  number: Int[Array, "b j"],
  plan: Plan,
  options: Options,
) -> Choice:
  """Predict every state's tokens, each with the noise of its own step (`number`)."""
  b, j = number.shape
  folded = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(view.row_keys, view.number - view.step + number)
  folded = folded.reshape(-1)
  temperature = plan.temperature
  if isinstance(temperature, jax.Array):
    temperature = jnp.repeat(temperature, j)
  chosen = predict(denoiser, hidden.reshape(b * j, *hidden.shape[2:]), folded, view.positions, temperature)
  score = uniform_noise(folded, view.positions) if options.remasking == "random" else chosen.confidence
  return Choice(*(array.reshape(b, j, -1) for array in (chosen.tokens, chosen.confidence, score)))


def _candidates(view: View, state: State) -> Int[Array, "b j s"]:
  """Give the states to run: the true one, then the drafts.

  A block's first call has no drafts and repeats the true state, which never follows from itself.
  """
  tokens = view.tokens[:, None]
  return jnp.concatenate([tokens, jnp.where(view.step == 0, tokens, state.drafts)], axis=1)


def _pick(array: Num[Array, "b j *s"], index: Int[Array, "b"]) -> Num[Array, "b *s"]:
  """Take one of j for each row, by comparison rather than by index, so that it is computed where the rows are."""
  is_it = (jnp.arange(array.shape[1]) == index[:, None]).reshape(*array.shape[:2], *[1] * (array.ndim - 2))
  return jnp.where(is_it, array, 0).sum(1, dtype=array.dtype)
