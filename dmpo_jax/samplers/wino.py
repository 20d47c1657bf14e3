"""WINO (wide in, narrow out): commit many tokens at once, and take back those that a second look does not confirm."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dmpo_jax.samplers import checks
from dmpo_jax.samplers.loop import Decision, Plan, Rule, View, decode
from dmpo_jax.samplers.prediction import log_probs, predict, rank
from dmpo_jax.samplers.selection import select_count
from dmpo_jax.structs import Denoiser, Rollouts

# Bounds of the authors' code: a call commits at most 70 % of the block's masked positions, but up to 5 always, and
# never more than 20.
MOST_ACCEPTED = 20
ALWAYS_ALLOWED = 5


@dataclasses.dataclass(frozen=True)
class Options:
  """When a token is committed, and when it stays.

  Args:
    threshold: probability above which a token is committed.
    threshold_back: probability below which the second look takes a token back.

  Raises:
    ValueError: a threshold is negative or not finite.
  """

  threshold: float = 0.6
  threshold_back: float = 0.9

  def __post_init__(self) -> None:
    checks.refuse(
      checks.from_zero("threshold", self.threshold),
      checks.from_zero("threshold_back", self.threshold_back),
    )


def sample(denoiser: Denoiser, keys: Key[Array, "b"], plan: Plan, options: Options) -> Rollouts:
  """Decode b completions with revocation (Hong et al., arXiv 2507.18578).

  Each call commits every masked position whose confidence exceeds `threshold`, within bounds, and at least the best.
  If it commits more than one, it masks again those tokens of the block that the shadow gives less than
  `threshold_back`: the least probable ones, fewer than the call before committed. So on the whole at least one
  position a call is gained, and `block_length` calls finish a block.
  """
  size, mask = plan.block_length, denoiser.mask_token_id

  def forward(view: View, state: Int[Array, "b"], kv_cache: None) -> Float[Array, "b _ d"]:
    return denoiser.shadowed(view.completion, view.start, size)

  def accept(
    view: View, hidden: Float[Array, "b _ d"], num_before: Int[Array, "b"]
  ) -> tuple[Decision, Int[Array, "b"]]:
    tokens, confidence, *_ = predict(denoiser, hidden[:, :size], view.keys, view.positions, plan.temperature)
    is_kept = select_wide(confidence, view.is_masked, options.threshold)
    num_accepted = is_kept.sum(1)
    second_look = jnp.exp(log_probs(denoiser, hidden[:, size:], view.tokens))
    # At a block's first call `num_before` is that of the block before. It does no harm: nothing is decided yet.
    is_back = select_narrow(second_look, view.tokens != mask, options.threshold_back, num_before)
    is_back &= (num_accepted > 1)[:, None]
    tokens = jnp.where(is_kept, tokens, jnp.where(is_back, mask, view.tokens))
    return Decision(tokens, jnp.where(is_back, 0.0, confidence)), num_accepted

  def none_before(num_rows: int) -> Int[Array, "b"]:
    return jnp.zeros(num_rows, jnp.int32)

  return decode(Rule(forward, accept, size, can_revoke=True, first_state=none_before), keys, plan, denoiser)[0]


def select_wide(confidence: Float[Array, "b s"], is_masked: Bool[Array, "b s"], threshold: float) -> Bool[Array, "b s"]:
  """Select the masked positions above the threshold, within the bounds above, and always the most confident one."""
  most = jnp.clip(7 * is_masked.sum(1) // 10, ALWAYS_ALLOWED, MOST_ACCEPTED)
  place = rank(confidence, is_masked)
  return is_masked & ((place == 0) | ((confidence > threshold) & (place < most[:, None])))


def select_narrow(
  second_look: Float[Array, "b s"], is_decided: Bool[Array, "b s"], threshold: float, num_before: Int[Array, "b"]
) -> Bool[Array, "b s"]:
  """Select decided tokens to take back: those below the threshold, the least probable first, under `num_before`."""
  return (second_look < threshold) & select_count(-second_look, is_decided, num_before - 1)
