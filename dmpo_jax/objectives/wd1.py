"""wd1: weighted log-likelihood without ratios, the softmax of the advantages up and that of their opposites down."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dmpo_jax.objectives.clipped import averaged, centred_advantage, estimate
from dmpo_jax.objectives.likelihood import Estimator
from dmpo_jax.objectives.weights import softmax_kept
from dmpo_jax.structs import Experience, Score


def loss(
  score: Score,
  experience: Experience,
  keys: Key[Array, "p g"],
  *,
  num_prompts: int,
  likelihood: Estimator,
  sharpness: float,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Compute wd1's loss (arXiv 2507.08838).

  (1 / num_prompts) sum_prompts sum_i - (w_i^+ - w_i^-) log p(y_i), w^+- = softmax_g(+- sharpness * A), A the reward
  minus the group's mean. Published: likelihood one_step with prompt_mask_ratio 0.15, sharpness 1, no reference policy,
  12 updates a buffer (8 for Sudoku), groups of 6.

  Args:
    likelihood: the estimator of log p, on views from `keys`; its sum over tokens counts.
    sharpness: psi of the paper.
  """
  policy, is_kept = estimate(score, experience, keys, likelihood), experience.is_kept
  advantage = sharpness * centred_advantage(experience.reward, is_kept)
  coefficient = softmax_kept(advantage, is_kept) - softmax_kept(-advantage, is_kept)
  log_p = jnp.where(is_kept, policy.tokens.sum(-1), 0)
  metrics = {"loss_coefficient": jnp.abs(coefficient).sum(-1)}
  return averaged(-(coefficient * log_p).sum(-1), metrics, policy.entropy, is_kept, num_prompts)
