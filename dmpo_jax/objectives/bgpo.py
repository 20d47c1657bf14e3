"""BGPO: a ratio for each mask sample, linear where the advantage is positive, so that draws need not share memory."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from dmpo_jax.objectives.clipped import RatioObjective, averaged, bounded_exp, estimate, k2
from dmpo_jax.objectives.objective import Loss
from dmpo_jax.objectives.weights import mean_kept, standardise
from dmpo_jax.ranges import Range, number
from dmpo_jax.structs import Experience, Score


@dataclasses.dataclass(frozen=True)
class Bgpo(RatioObjective):
  """Boundary-guided policy optimisation (arXiv 2510.11683; github.com/yjyddq/DARE).

  Args:
    most: c, the ratio from which on a negative advantage has no gradient.
  """

  most: float

  ranges: ClassVar[Mapping[str, Range]] = {**RatioObjective.ranges, "most": number("(1, inf)")}
  reads_tokens: ClassVar[bool] = False

  def loss(self, score: Score, experience: Experience, keys: Key[Array, "p g"], num_prompts: int) -> Loss:
    """Compute BGPO's loss (arXiv 2510.11683).

    (1 / num_prompts) sum_prompts mean_i mean_k [- min(rho_ik A_i, clip(rho_ik, 1 - clip, 1 + clip) A_i), at most
    - most * A_i for a negative A_i, + kl_weight * (log p_k(y_i) - log p_ref,k(y_i))^2 / (2 n_i)],

    d_ik = (log p_k(y_i) - log p_old,k(y_i)) / n_i over n_i counted positions, of independent draw k; rho_ik = 1 + d_ik
    where A_i is positive and exp(d_ik) where it is not: bounds of exp of the mean over draws, whose gradients add up. A
    is the reward standardised within the group.

    Published: likelihood elbo with 16 mask samples, clip 0.2, most 3 and no KL. In DARE's recipes a rollout counts by
    its length (token-mean); here all count alike. There 1 + d is the exponential of its own logarithm, NaN from d = -1
    on; here it is linear throughout.
    """
    assert self.likelihood is not None  # as `takes_likelihood` says
    policy = estimate(score, experience, keys, self.likelihood)
    log_p = self.likelihood.estimates(policy.log_prob, policy.views)
    advantage = standardise(experience.reward, experience.is_kept)
    losses, metrics = self.group_loss(log_p, advantage, experience)
    return averaged(losses, metrics, policy.entropy, experience.is_kept, num_prompts)

  def group_loss(
    self, log_p: Float[Array, "p g n"], advantage: Float[Array, "p g"], experience: Experience
  ) -> tuple[Float[Array, "p"], dict[str, Float[Array, "p"]]]:
    """Compute each prompt's loss of estimates of log p(y | x), one a draw, nats; a dropped rollout is not read."""
    is_kept = experience.is_kept[..., None]
    length = jnp.maximum(experience.is_counted.sum(-1), 1)[..., None]
    log_p = jnp.where(is_kept, log_p, 0)
    assert experience.token_log_p_old is not None  # as `needs_token_log_probs` says
    log_ratio = (log_p - jnp.where(is_kept, experience.token_log_p_old, 0)) / length
    losses, is_clipped = self.surrogate(log_ratio, advantage[..., None])
    metrics = {"loss_clipped": mean_kept(is_clipped.mean(-1), experience.is_kept)}
    total = mean_kept(losses.mean(-1), experience.is_kept)
    if experience.token_log_p_ref is None:
      return total, metrics
    kl = k2(jnp.where(is_kept, experience.token_log_p_ref, 0), log_p) / length
    kl = mean_kept(kl.mean(-1), experience.is_kept)
    return total + self.kl_weight * kl, metrics | {"loss_kl": kl}

  def surrogate(
    self, log_ratio: Float[Array, "*g n"], advantage: Float[Array, "*g #n"]
  ) -> tuple[Float[Array, "*g n"], Bool[Array, "*g n"]]:
    """Compute the loss of each draw, and where the clip at 1 - clip, 1 + clip acts."""
    ratio = jnp.where(advantage > 0, 1 + log_ratio, bounded_exp(log_ratio))
    plain, clipped = -advantage * ratio, -advantage * jnp.clip(ratio, 1 - self.clip, 1 + self.clip)
    losses = jnp.maximum(plain, clipped)
    return jnp.where(advantage < 0, jnp.minimum(losses, -advantage * self.most), losses), clipped > plain
