"""SPG, sandwiched policy gradient: good rollouts by a lower bound of their likelihood, bad ones by an upper bound."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Key

from dmpo_jax.objectives.clipped import averaged, centred_advantage, estimate
from dmpo_jax.objectives.estimators import Eubo
from dmpo_jax.objectives.objective import Loss, Objective
from dmpo_jax.objectives.weights import mean_kept
from dmpo_jax.structs import Experience, Score


@dataclasses.dataclass(frozen=True)
class Spg(Objective):
  """SPG (arXiv 2510.09541). Its likelihood must be `eubo`, whose mixture is what bad rollouts get."""

  likelihood: Eubo

  likelihoods: ClassVar[tuple[str, ...]] = ("eubo",)
  takes_likelihood: ClassVar[bool] = True

  def loss(self, score: Score, experience: Experience, keys: Key[Array, "p g"], num_prompts: int) -> Loss:
    """Compute SPG's loss (arXiv 2510.09541), with its mixture.

    - (1 / num_prompts) sum_prompts mean_i A_i L(y_i), A the reward minus the group's mean, L the ELBO / n_i where A is
    positive, and where it is not mixture * EUBO / u_i + (1 - mixture) * ELBO / n_i on the same masks: n_i counted
    positions, of which u_i were masked by some mask sample. Published: block-wise masks, 2 mask samples, beta 1.5 (1
    for Sudoku), mixture 0.5, 4 updates a buffer, groups of 6, no clipping and no KL.

    The published code also masks prompt tokens with probability 0.15, draws the number of masked positions uniformly
    from 1 to n (here a ratio is drawn, and each position masked with it: a mask may be empty), takes the two mask
    samples from different blocks where there are as many, hides what follows the first EOS, and weighs rollouts by
    their length.
    """
    likelihood = self.likelihood
    policy, is_kept = estimate(score, experience, keys, likelihood), experience.is_kept
    num_read = (policy.views.share > 0).any(2).sum(-1)
    lower = likelihood.lower(policy.log_prob, policy.views).sum(-1) / jnp.maximum(experience.is_counted.sum(-1), 1)
    upper = likelihood.upper(policy.log_prob, policy.views).sum(-1) / jnp.maximum(num_read, 1)
    mixed = likelihood.mixture * upper + (1 - likelihood.mixture) * lower
    advantage = centred_advantage(experience.reward, is_kept)
    log_p = jnp.where(is_kept, jnp.where(advantage > 0, lower, mixed), 0)
    metrics = {"loss_gap": mean_kept(mixed - lower, is_kept)}
    return averaged(-mean_kept(advantage * log_p, is_kept), metrics, policy.entropy, is_kept, num_prompts)
