"""DMPO's loss, weighted denoising cross-entropy: a group's rollouts, predicted from their masked selves, by weight."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from dmpo_jax.objectives import weights
from dmpo_jax.objectives.likelihood import elbo, masked_mean
from dmpo_jax.objectives.masking import complementary_pairs, draw_masks
from dmpo_jax.objectives.weights import mean_kept
from dmpo_jax.structs import Experience, Score, Scores


def loss(
  score: Score,
  experience: Experience,
  keys: Key[Array, "p g"],
  *,
  num_prompts: int,
  baseline: str,
  baseline_strength: float,
  unlearning: str,
  min_log_ratio: float,
  num_mask_samples: int,
  antithetic: bool,
  min_mask_ratio: float,
  max_mask_ratio: float,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Compute the cross-entropy of the policy to the target, on fresh masks of the buffer's rollouts.

  (1 / num_prompts) sum_prompts sum_g (w_i - s * b_i) * mean_r[(1/m) sum_{l in M} -log p_theta(y_il | ...)]
  (DMPO, arXiv 2510.08233); w the importance weights, b the baseline (`weights.baseline`), m = max(|M|, 1).

  Args:
    score: the policy under update, differentiable (see `structs.Scores`).
    keys: the rollouts' keys for this step.
    num_prompts: what the sum over prompts is divided by: prompts of the whole buffer.
    baseline: b, a name in `weights.BASELINES`; baseline_strength: s.
    unlearning: `unbounded`, or `bounded`: a rollout with a negative coefficient stops counting once
      log p_theta - log p_old (each on its own masks) is below min_log_ratio, in nats.
    num_mask_samples, antithetic, min_mask_ratio, max_mask_ratio: see `masking.draw_masks`.

  Returns:
    The loss, and of the kept rollouts, averaged over prompts: `loss_cross_entropy` and `loss_entropy` (nats a masked
    token), `loss_coefficient` (sum_g |w - s * b|; at s = 1 from 0, where the signal cancels, to 2, where weights and
    baseline pick different rollouts) and `loss_log_ratio` (log p_theta - log p_old in nats, each on its own masks: how
    far the policy went since it drew the rollouts), and where unlearning is bounded `loss_stopped`, the share of the
    rollouts that no longer count.
  """
  is_masked, _ = draw_masks(
    keys,
    experience.is_counted,
    num_mask_samples=num_mask_samples,
    antithetic=antithetic,
    min_ratio=min_mask_ratio,
    max_ratio=max_mask_ratio,
  )
  losses, metrics = group_loss(
    score(is_masked, pairs=complementary_pairs(num_mask_samples, antithetic)),
    is_masked,
    experience,
    baseline=baseline,
    baseline_strength=baseline_strength,
    unlearning=unlearning,
    min_log_ratio=min_log_ratio,
  )
  return losses.sum() / num_prompts, {name: value.sum() / num_prompts for name, value in metrics.items()}


def group_loss(
  scores: Scores,
  is_masked: Bool[Array, "p g r c"],
  experience: Experience,
  *,
  baseline: str,
  baseline_strength: float,
  unlearning: str = "unbounded",
  min_log_ratio: float = 0.0,
) -> tuple[Float[Array, "p"], dict[str, Float[Array, "p"]]]:
  """Compute each prompt's part of `loss`, before the mean over prompts, from scores under given masks.

  A dropped rollout adds nothing to a loss or metric, whatever its values are, NaN included.
  """
  is_kept, log_p_old = experience.is_kept, experience.log_p_old
  rollout_loss = cross_entropy(scores.log_prob, is_masked)
  log_p_theta = elbo(scores.log_prob, is_masked, experience.is_counted).mean(-1)
  subtracted = weights.baseline(
    baseline,
    weight=experience.weight,
    negative_weight=experience.negative_weight,
    log_p_theta=log_p_theta,
    log_p_old=log_p_old,
    is_kept=is_kept,
  )
  coefficient = jnp.where(is_kept, experience.weight - baseline_strength * subtracted, 0)
  is_stopped = jnp.zeros_like(is_kept)
  if unlearning == "bounded":
    is_stopped = is_kept & (coefficient < 0) & (log_p_theta - log_p_old < min_log_ratio)
    coefficient = jnp.where(is_stopped, 0, coefficient)
  metrics = {
    "loss_cross_entropy": mean_kept(rollout_loss, is_kept),
    "loss_entropy": mean_kept(masked_mean(scores.entropy, is_masked).mean(-1), is_kept),
    "loss_coefficient": jnp.abs(coefficient).sum(-1),
    "loss_log_ratio": mean_kept(log_p_theta - log_p_old, is_kept),
  }
  if unlearning == "bounded":
    metrics["loss_stopped"] = mean_kept(is_stopped.astype(jnp.float32), is_kept)
  return (coefficient * jnp.where(is_kept, rollout_loss, 0)).sum(-1), metrics


def cross_entropy(token_log_prob: Float[Array, "p g r c"], is_masked: Bool[Array, "p g r c"]) -> Float[Array, "p g"]:
  """Average -log p over each mask sample's masked tokens, then over the mask samples (an empty one counts as 0)."""
  return -masked_mean(token_log_prob, is_masked).mean(-1)
