"""SPG, sandwiched policy gradient: good rollouts by a lower bound of their likelihood, bad ones by an upper bound."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dmpo_jax.objectives.clipped import averaged, centred_advantage, estimate
from dmpo_jax.objectives.estimators import Eubo
from dmpo_jax.objectives.likelihood import Linear, Score
from dmpo_jax.objectives.weights import mean_kept
from dmpo_jax.structs import Experience


def loss(
  score: Score,
  experience: Experience,
  keys: Key[Array, "p g"],
  *,
  num_prompts: int,
  likelihood: Eubo,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Compute SPG's loss (arXiv 2510.09541), with its mixture.

  - (1 / num_prompts) sum_prompts mean_i A_i L(y_i) / n_i, A the reward minus the group's mean, L the ELBO where A is
  positive and the mixture of EUBO and ELBO where it is not, both on the same masks. Published: block-wise masks, 2
  replicates, beta 1.5 (1 for Sudoku), mixture 0.5, 4 updates a buffer, groups of 6, no clipping and no KL.

  Args:
    likelihood: must be `eubo`, whose mixture is what bad rollouts get.
  """
  if not isinstance(likelihood, Eubo):
    raise ValueError("objective.likelihood: must be 'eubo' for objective.name = 'spg', whose bad rollouts it is for")
  policy, is_kept = estimate(score, experience, keys, likelihood), experience.is_kept
  lower = Linear.tokens(likelihood, policy.log_prob, policy.views)
  advantage = centred_advantage(experience.reward, is_kept)
  log_p = jnp.where((advantage > 0)[:, :, None], lower, policy.tokens).sum(-1)
  log_p = jnp.where(is_kept, log_p, 0) / jnp.maximum(experience.is_counted.sum(-1), 1)
  metrics = {"loss_gap": mean_kept(jnp.where(is_kept, (policy.tokens - lower).sum(-1), 0), is_kept)}
  return averaged(-mean_kept(advantage * log_p, is_kept), metrics, policy.entropy, is_kept, num_prompts)
