"""GDPO: one clipped ratio a sequence, from an ELBO whose integral over mask ratios is a quadrature."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dmpo_jax.objectives.clipped import RatioObjective, averaged, centred_advantage, clipped_surrogate, estimate, k3
from dmpo_jax.objectives.objective import Loss
from dmpo_jax.objectives.weights import mean_kept
from dmpo_jax.structs import Experience, Score


@dataclasses.dataclass(frozen=True)
class Gdpo(RatioObjective):
  """GDPO (arXiv 2510.08554)."""

  def loss(self, score: Score, experience: Experience, keys: Key[Array, "p g"], num_prompts: int) -> Loss:
    """Compute GDPO's loss (arXiv 2510.08554).

    (1 / num_prompts) sum_prompts mean_i [- min(rho_i A_i, clip(rho_i, 1 - clip, 1 + clip) A_i) + kl_weight * k3_i],
    rho_i = exp((log p(y_i) - log p_old(y_i)) / n_i) over the n_i counted positions, A the reward minus the group's
    mean, k3 of the same length-normalised bounds to the reference policy. The length is inside the exponential, as in
    the published code. Published: likelihood elbo_quadrature with 2 points (3 in one of the Countdown scripts),
    kl_weight 0, 12 updates a buffer. There a point t masks exactly int(t n) positions; here each with probability t,
    which keeps the quadrature exact in expectation and adds the noise of their number.

    With a kl_weight of 0 the reference policy is not read.
    """
    assert self.likelihood is not None  # as `takes_likelihood` says
    assert experience.token_log_p_old is not None  # as `needs_token_log_probs` says
    policy = estimate(score, experience, keys, self.likelihood)
    is_kept, is_counted = experience.is_kept, experience.is_counted

    def per_token(tokens: Float[Array, "p g c"]) -> Float[Array, "p g"]:
      total = jnp.where(is_counted & is_kept[:, :, None], tokens, 0).sum(-1)
      return total / jnp.maximum(is_counted.sum(-1), 1)

    log_p = per_token(policy.tokens)
    advantage = centred_advantage(experience.reward, is_kept)
    surrogate, is_clipped = clipped_surrogate(log_p - per_token(experience.token_log_p_old), advantage, self.clip)
    losses = mean_kept(-surrogate, is_kept)
    metrics = {"loss_clipped": mean_kept(is_clipped.astype(jnp.float32), is_kept)}
    if experience.token_log_p_ref is not None:
      kl = mean_kept(k3(per_token(experience.token_log_p_ref), log_p), is_kept)
      losses, metrics = losses + self.kl_weight * kl, metrics | {"loss_kl": kl}
    return averaged(losses, metrics, policy.entropy, is_kept, num_prompts)
