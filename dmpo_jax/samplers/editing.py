"""LLaDA2.1's decoding: confident tokens are committed, and those of the current block may still be replaced."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dmpo_jax.samplers import checks
from dmpo_jax.samplers.loop import Decision, Plan, Rule, View, decode
from dmpo_jax.samplers.prediction import Prediction, predict
from dmpo_jax.samplers.selection import select_dynamic
from dmpo_jax.spans import take_span
from dmpo_jax.structs import Denoiser, Rollouts


@dataclasses.dataclass(frozen=True)
class Options:
  """When a token is committed, and when it is replaced.

  Args:
    threshold: probability above which a token is committed.
    edit_threshold: probability above which another token replaces a committed one.
    min_tokens: tokens that a call commits at least, if the model predicts any but MASK.
    max_checks: calls on a block without a MASK, at most.

  Raises:
    ValueError: an option has a wrong value.
  """

  threshold: float = 0.95
  edit_threshold: float = 0.9
  min_tokens: int = 1
  max_checks: int = 16

  def __post_init__(self) -> None:
    checks.refuse(
      checks.from_zero("threshold", self.threshold),
      checks.from_zero("edit_threshold", self.edit_threshold),
      checks.at_least("min_tokens", self.min_tokens, 1),
      checks.at_least("max_checks", self.max_checks, 0),
    )


class Checked(NamedTuple):
  """How far a row's current block is beyond its last MASK."""

  goes_on: Bool[Array, "b"]  # it is called again
  num_checks: Int[Array, "b"]  # calls on it without a MASK so far


def make_rule(denoiser: Denoiser, plan: Plan, options: Options) -> Rule:
  """Build the rule with editing (LLaDA2.1, as in dllm's code; `plan.steps` is not used).

  Each call commits every masked position whose confidence exceeds `threshold`, or the best `min_tokens` if fewer do.
  In the same call it replaces decided tokens of the block, but not the prompt's, where it predicts another with more
  than `edit_threshold`. Once the block has no MASK, calls go on until one replaces nothing, `max_checks` at most.
  Earlier blocks stay as they are.

  As in that code, MASK may be the most probable token at temperature 0: a masked position then stays as it is, and a
  decided one is masked again. But a call decides something where the block has a MASK, and after `4 * block_length`
  calls on a block MASK is not an option any more, so that every block ends.
  """
  size, most_with_mask = plan.block_length, 4 * plan.block_length
  may_be_greedy = plan.is_greedy or isinstance(plan.temperature, jax.Array)

  def forward(view: View, state: Checked, kv_cache: None) -> Float[Array, "b s d"]:
    return take_span(denoiser.hidden(view.completion), view.start, size)

  def accept(view: View, hidden: Float[Array, "b s d"], before: Checked) -> tuple[Decision, Checked]:
    chosen = predict(denoiser, hidden, view.keys, view.positions, plan.temperature, with_mask=may_be_greedy)
    is_mask = rather_mask(view, chosen)
    tokens = jnp.where(is_mask, denoiser.mask_token_id, chosen.tokens)
    confidence = chosen.confidence
    if chosen.mask_log_prob is not None:
      confidence = jnp.where(is_mask, jnp.exp(chosen.mask_log_prob), confidence)
    is_decided = view.is_open & (view.tokens != denoiser.mask_token_id)
    is_edited = is_decided & (tokens != view.tokens) & (confidence > options.edit_threshold)
    is_kept = select(confidence, view) & ~is_mask
    is_stuck = ~(is_kept | is_edited).any(1, keepdims=True)
    is_kept = jnp.where(is_stuck, select(chosen.confidence, view), is_kept)
    decided = jnp.where(is_kept, chosen.tokens, jnp.where(is_edited, tokens, view.tokens))
    has_masks = view.is_masked.any(1)
    num_checks = jnp.where(view.step == 0, 0, before.num_checks) + ~has_masks
    goes_on = (has_masks | (before.goes_on & is_edited.any(1))) & (num_checks < options.max_checks)
    return Decision(decided, chosen.confidence), Checked(goes_on, num_checks)

  def rather_mask(view: View, chosen: Prediction) -> Bool[Array, "b s"]:
    """Say where MASK is more probable than the most probable token."""
    if chosen.mask_log_prob is None:
      return jnp.zeros_like(view.is_masked)
    is_greedy = jnp.asarray(plan.temperature == 0)[..., None]
    is_early = jnp.asarray(view.step < most_with_mask)[..., None]
    return is_greedy & is_early & (chosen.mask_log_prob > chosen.log_prob)

  def select(confidence: Float[Array, "b s"], view: View) -> Bool[Array, "b s"]:
    return select_dynamic(confidence, view.is_masked, jnp.int32(options.min_tokens), options.threshold)

  def first_state(num_rows: int) -> Checked:
    return Checked(jnp.zeros(num_rows, bool), jnp.zeros(num_rows, jnp.int32))

  most_calls = most_with_mask + -(-size // options.min_tokens) + options.max_checks
  return Rule(
    forward, accept, most_calls, can_revoke=True, goes_on=lambda state: state.goes_on, first_state=first_state
  )


def sample(denoiser: Denoiser, keys: Key[Array, "b"], plan: Plan, options: Options) -> Rollouts:
  """Decode b completions by that rule."""
  return decode(make_rule(denoiser, plan, options), keys, plan, denoiser)[0]
