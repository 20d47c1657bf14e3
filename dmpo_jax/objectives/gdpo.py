"""GDPO: one clipped ratio a sequence, from an ELBO whose integral over mask ratios is a quadrature."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dmpo_jax.objectives.clipped import averaged, centred_advantage, clipped_surrogate, estimate, k3
from dmpo_jax.objectives.likelihood import Estimator, Score
from dmpo_jax.objectives.weights import mean_kept
from dmpo_jax.structs import Experience


def loss(
  score: Score,
  experience: Experience,
  keys: Key[Array, "p g"],
  *,
  num_prompts: int,
  likelihood: Estimator,
  clip: float,
  kl_weight: float,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Compute GDPO's loss (arXiv 2510.08554).

  (1 / num_prompts) sum_prompts mean_i [- min(rho_i A_i, clip(rho_i, 1 - clip, 1 + clip) A_i) + kl_weight * k3_i],
  rho_i = exp((log p(y_i) - log p_old(y_i)) / n_i) over the n_i counted positions, A the reward minus the group's mean,
  k3 of the same length-normalised bounds to the reference policy. Published: likelihood elbo_quadrature with 2 or 3
  points.

  Args:
    experience, likelihood: as in `diffu_grpo.loss`.
  """
  policy, is_kept, is_counted = estimate(score, experience, keys, likelihood), experience.is_kept, experience.is_counted

  def per_token(tokens: Float[Array, "p g c"]) -> Float[Array, "p g"]:
    total = jnp.where(is_counted & is_kept[:, :, None], tokens, 0).sum(-1)
    return total / jnp.maximum(is_counted.sum(-1), 1)

  log_p = per_token(policy.tokens)
  advantage = centred_advantage(experience.reward, is_kept)
  surrogate, is_clipped = clipped_surrogate(log_p - per_token(experience.token_log_p_old), advantage, clip)
  kl = k3(per_token(experience.token_log_p_ref), log_p)
  metrics = {
    "loss_clipped": mean_kept(is_clipped.astype(jnp.float32), is_kept),
    "loss_kl": mean_kept(kl, is_kept),
  }
  return averaged(mean_kept(kl_weight * kl - surrogate, is_kept), metrics, policy.entropy, is_kept, num_prompts)
