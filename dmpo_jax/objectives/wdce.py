"""DMPO's loss, weighted denoising cross-entropy: a group's rollouts, predicted from their masked selves, by weight."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from dmpo_jax.objectives.likelihood import Score, elbo, masked_mean
from dmpo_jax.objectives.masking import draw_masks
from dmpo_jax.objectives.weights import baseline as compute_baseline
from dmpo_jax.structs import Experience


def loss(
  score: Score,
  experience: Experience,
  keys: Key[Array, "p g"],
  *,
  num_prompts: int,
  baseline: str,
  baseline_strength: float,
  num_replicates: int,
  antithetic: bool,
  min_mask_ratio: float,
  max_mask_ratio: float,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Compute the cross-entropy of the policy to the target, on fresh masks of the buffer's rollouts.

  (1 / num_prompts) sum_prompts sum_g (w_i - s * b_i) * mean_replicates[(1/m) sum_{l in M} -log p_theta(y_il | ...)]
  (DMPO, arXiv 2510.08233); w the importance weights, b the baseline (`weights.baseline`), m = max(|M|, 1).

  Args:
    score: the policy under update, differentiable (see `likelihood.Scores`).
    keys: the rollouts' keys for this step.
    num_prompts: what the sum over prompts is divided by: prompts of the whole buffer.
    baseline: b, a name in `weights.BASELINES`; baseline_strength: s.
    num_replicates, antithetic, min_mask_ratio, max_mask_ratio: see `masking.draw_masks`.

  Returns:
    The loss, and of the kept rollouts: `loss_cross_entropy` and `loss_entropy` (nats a masked token),
    `loss_coefficient` (sum_g |w - s b|: 0 when the signal cancels, 2 when weight and baseline pick different rollouts)
    and `loss_log_ratio` (log p_theta - log p_old, nats: how far the policy went since it drew the rollouts).
  """
  is_masked, _ = draw_masks(
    keys,
    experience.is_counted,
    num_replicates=num_replicates,
    antithetic=antithetic,
    min_ratio=min_mask_ratio,
    max_ratio=max_mask_ratio,
  )
  scores = score(is_masked)
  is_kept, log_p_old = experience.is_kept, experience.log_p_old
  log_p_theta = elbo(scores.log_prob, is_masked, experience.is_counted).mean(-1)
  share = coefficients(
    experience.weight,
    compute_baseline(
      baseline,
      negative_weight=experience.negative_weight,
      log_p_theta=log_p_theta,
      log_p_old=log_p_old,
      is_kept=is_kept,
    ),
    is_kept,
    strength=baseline_strength,
  )
  rollout_loss = cross_entropy(scores.log_prob, is_masked)
  metrics = {
    "loss_cross_entropy": _mean_kept(rollout_loss, is_kept),
    "loss_entropy": _mean_kept(masked_mean(scores.entropy, is_masked).mean(-1), is_kept),
    "loss_coefficient": jnp.abs(share).sum(-1),
    "loss_log_ratio": _mean_kept(log_p_theta - log_p_old, is_kept),
  }
  total = weighted_sum(share, rollout_loss, is_kept).sum() / num_prompts
  return total, {name: value.sum() / num_prompts for name, value in metrics.items()}


def cross_entropy(token_log_prob: Float[Array, "p g r c"], is_masked: Bool[Array, "p g r c"]) -> Float[Array, "p g"]:
  """Average -log p over each replicate's masked tokens, then over the replicates (an empty one counts as 0)."""
  return -masked_mean(token_log_prob, is_masked).mean(-1)


def coefficients(
  weight: Float[Array, "p g"], baseline: Float[Array, "p g"], is_kept: Bool[Array, "p g"], *, strength: float
) -> Float[Array, "p g"]:
  """Subtract the baseline: weight - strength * baseline, 0 for dropped rollouts."""
  return jnp.where(is_kept, weight - strength * baseline, 0)


def weighted_sum(
  coefficient: Float[Array, "p g"], rollout_loss: Float[Array, "p g"], is_kept: Bool[Array, "p g"]
) -> Float[Array, "p"]:
  """Sum a group's rollout losses by coefficient; a dropped rollout adds nothing, NaN or not."""
  return (coefficient * jnp.where(is_kept, rollout_loss, 0)).sum(-1)


def _mean_kept(values: Float[Array, "p g"], is_kept: Bool[Array, "p g"]) -> Float[Array, "p"]:
  return jnp.where(is_kept, values, 0).sum(-1) / jnp.maximum(is_kept.sum(-1), 1)
