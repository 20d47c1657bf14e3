"""ESPO: one clipped ratio a sequence, of ELBOs under complementary masks, and a quadratic KL of the same ELBOs."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dmpo_jax.objectives.clipped import (
  RatioObjective,
  averaged,
  clipped_surrogate,
  estimate,
  k2,
  leave_one_out_advantage,
)
from dmpo_jax.objectives.objective import Loss
from dmpo_jax.objectives.weights import mean_kept
from dmpo_jax.structs import Experience, Score


@dataclasses.dataclass(frozen=True)
class Espo(RatioObjective):
  """ESPO (arXiv 2512.03759)."""

  reads_tokens: ClassVar[bool] = False

  def loss(self, score: Score, experience: Experience, keys: Key[Array, "p g"], num_prompts: int) -> Loss:
    """Compute ESPO's loss (arXiv 2512.03759).

    (1 / num_prompts) sum_prompts mean_i [- min(rho_i A_i, clip(rho_i, 1 - clip, 1 + clip) A_i) + kl_weight *
    (log p(y_i) - log p_ref(y_i))^2 / (2 n_i)], rho_i = exp((log p(y_i) - log p_old(y_i)) / n_i) over the n_i counted
    positions, A the reward minus the mean of the group's other rewards. The ratio's bounds are divided by the length,
    those of the KL are not, as in the published code.

    Published: likelihood elbo with 2 complementary pairs (4 mask samples), the numbers of masked positions evenly
    spread over the rows of a batch (objective.masks = stratified, over a group's), clip 0.2, kl_weight 0.01 for Sudoku
    and 0.003 for Countdown (with a clip of 0 there), 8 updates a buffer, groups of 6. There (n + 1) / m takes the place
    of the weight n / m: an empty mask does not shrink the estimate.
    """
    assert self.likelihood is not None  # as `takes_likelihood` says
    policy = estimate(score, experience, keys, self.likelihood)
    log_p = self.likelihood.estimates(policy.log_prob, policy.views)
    advantage = leave_one_out_advantage(experience.reward, experience.is_kept)
    losses, metrics = self.group_loss(log_p.mean(-1), advantage, experience)
    return averaged(losses, metrics, policy.entropy, experience.is_kept, num_prompts)

  def group_loss(
    self, log_p: Float[Array, "p g"], advantage: Float[Array, "p g"], experience: Experience
  ) -> tuple[Float[Array, "p"], dict[str, Float[Array, "p"]]]:
    """Compute each prompt's loss of estimates of log p(y | x), nats; a dropped rollout is not read."""
    is_kept = experience.is_kept
    length = jnp.maximum(experience.is_counted.sum(-1), 1)
    log_p = jnp.where(is_kept, log_p, 0)

    def of_update(measured: Float[Array, "p g n"]) -> Float[Array, "p g"]:
      return jnp.where(is_kept, measured.mean(-1), 0)

    assert experience.token_log_p_old is not None  # as `needs_token_log_probs` says
    log_ratio = (log_p - of_update(experience.token_log_p_old)) / length
    surrogate, is_clipped = clipped_surrogate(log_ratio, advantage, self.clip)
    losses = mean_kept(-surrogate, is_kept)
    metrics = {"loss_clipped": mean_kept(is_clipped.astype(jnp.float32), is_kept)}
    if experience.token_log_p_ref is None:
      return losses, metrics
    kl = mean_kept(k2(of_update(experience.token_log_p_ref), log_p) / length, is_kept)
    return losses + self.kl_weight * kl, metrics | {"loss_kl": kl}
