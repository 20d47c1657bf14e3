"""WINO, wide in, narrow out: accept many tokens at once, and take back those that a second look does not confirm."""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dmpo_jax.samplers.loop import Decision, Denoiser, Plan, View, decode
from dmpo_jax.samplers.prediction import log_probs, predict, rank
from dmpo_jax.samplers.selection import check_number, select_count
from dmpo_jax.structs import Rollouts

MOST_ACCEPTED = 20  # the bounds of the authors' code: at most 70 % of the masked positions of the block in one call,
ALWAYS_ALLOWED = 5  # but 5 or fewer always, and more than 20 never


@runtime_checkable
class ShadowDenoiser(Denoiser, Protocol):
  """A denoiser that computes a block together with its shadow, [b, 2 * s, d].

  The shadow is a second copy of the block's positions, all MASK. It sees the whole row except the token of its own
  position, and the row does not see it: it tells what the model would say of a decided token, were it not there.
  """

  def shadowed(
    self, completion: Int[Array, "b c"], start: Int[Array, ""], block_length: int
  ) -> Float[Array, "b t d"]: ...


def sample(
  denoiser: ShadowDenoiser,
  keys: Key[Array, "b"],
  plan: Plan,
  *,
  threshold: float = 0.6,
  threshold_back: float = 0.9,
) -> Rollouts:
  """Decode b completions with revocation (Hong et al., arXiv 2507.18578).

  Each call accepts every masked position whose confidence exceeds `threshold`, within bounds, and at least the best.
  If it accepts more than one, decided tokens of the block that the shadow gives less than `threshold_back` are masked
  again: fewer than the call before accepted, the least probable of them. So the decided positions grow by one a call
  or more on the whole, and `block_length` calls decide a block.

  Args:
    threshold, threshold_back: probabilities.

  Raises:
    ValueError: a threshold is negative or not finite.
  """
  check_number("sampler.wino.threshold", threshold)
  check_number("sampler.wino.threshold_back", threshold_back)
  size = plan.block_length

  def look(view: View, state: Int[Array, "b"], kv_cache: None) -> Float[Array, "b t d"]:
    return denoiser.shadowed(view.completion, view.start, size)

  def accept(view: View, seen: Float[Array, "b t d"], num_before: Int[Array, "b"]) -> tuple[Decision, Int[Array, "b"]]:
    tokens, confidence, *_ = predict(denoiser, seen[:, :size], view.keys, view.positions, plan.temperature)
    is_kept = select_wide(confidence, view.is_masked, threshold)
    num_accepted = is_kept.sum(1)
    second_look = jnp.exp(log_probs(denoiser, seen[:, size:], view.tokens))
    # at a block's first call nothing is decided yet, so what the block before it accepted does not matter
    is_back = select_narrow(second_look, view.tokens != denoiser.mask_token_id, threshold_back, num_before)
    is_back &= (num_accepted > 1)[:, None]
    tokens = jnp.where(is_kept, tokens, jnp.where(is_back, denoiser.mask_token_id, view.tokens))
    return Decision(tokens, jnp.where(is_back, 0.0, confidence)), num_accepted

  rollouts, _ = decode(
    look, accept, jnp.zeros(keys.shape[0], jnp.int32), keys, plan, denoiser, most_calls=size, can_revoke=True
  )
  return rollouts


def select_wide(confidence: Float[Array, "b s"], is_masked: Bool[Array, "b s"], threshold: float) -> Bool[Array, "b s"]:
  """Accept what exceeds the threshold, at most MOST_ACCEPTED and the like, and at least the best."""
  most = jnp.clip(7 * is_masked.sum(1) // 10, ALWAYS_ALLOWED, MOST_ACCEPTED)
  place = rank(confidence, is_masked)
  return is_masked & ((place == 0) | ((confidence > threshold) & (place < most[:, None])))


def select_narrow(
  second_look: Float[Array, "b s"], is_decided: Bool[Array, "b s"], threshold: float, num_before: Int[Array, "b"]
) -> Bool[Array, "b s"]:
  """Take back decided tokens that are less probable than the threshold, the least probable ones, under `num_before`."""
  return (second_look < threshold) & select_count(-second_look, is_decided, num_before - 1)
