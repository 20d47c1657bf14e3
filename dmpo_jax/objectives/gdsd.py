"""GDSD: the log-ratio to the policy that drew the rollouts is regressed on their advantages."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dmpo_jax.objectives.clipped import RatioObjective, averaged, estimate, k2, leave_one_out_advantage
from dmpo_jax.objectives.objective import Loss
from dmpo_jax.objectives.weights import mean_kept
from dmpo_jax.ranges import POSITIVE, Range, number
from dmpo_jax.structs import Experience, Score


@dataclasses.dataclass(frozen=True)
class Gdsd(RatioObjective):
  """Guided denoiser self-distillation (arXiv 2605.29398).

  Args:
    guidance: psi: nats a token that an advantage of 1 asks for.
  """

  guidance: float

  # the clip is of a log-ratio, from log(1 - clip) on
  ranges: ClassVar[Mapping[str, Range]] = {**RatioObjective.ranges, "clip": number("(0, 1)"), "guidance": POSITIVE}
  reads_tokens: ClassVar[bool] = False

  def loss(self, score: Score, experience: Experience, keys: Key[Array, "p g"], num_prompts: int) -> Loss:
    """Compute GDSD's loss (arXiv 2605.29398).

    (1 / num_prompts) sum_prompts mean_i [sum_k (d_ik / n_i - guidance * A_i)^2 + kl_weight * mean_k (log p_k(y_i) -
    log p_ref,k(y_i))^2 / (2 n_i)], d_ik = log p_k(y_i) - log p_old,k(y_i) clipped to [log(1 - clip), log(1 + clip)],
    each estimated from independent draw k, over n_i counted positions, A the reward minus the mean of the group's other
    rewards. The square is a sum over draws, the KL a mean, as published. Where the clip acts, it has no gradient.

    Published: likelihood unweighted with one complementary pair (2 mask samples; 4 for Countdown), guidance 1 (10 for
    GSM8K), clip 0.0004, kl_weight 0.001 (0.003 for Countdown), 8 updates a buffer, groups of 6. The clip is in nats of
    a whole completion: after the first update of a buffer most rollouts are beyond it, and only the KL moves them.

    Its variant TLC is likelihood elbo: its centred logits (each minus the mean over the vocabulary, without a gradient)
    leave the cross-entropy and its gradient as they are, so what differs there is the weight (n + 1) / m, here n / m.
    The setting reduce_var of the published code is read by neither.
    """
    assert self.likelihood is not None  # as `takes_likelihood` says
    policy = estimate(score, experience, keys, self.likelihood)
    log_p = self.likelihood.estimates(policy.log_prob, policy.views)
    advantage = leave_one_out_advantage(experience.reward, experience.is_kept)
    losses, metrics = self.group_loss(log_p, advantage, experience)
    return averaged(losses, metrics, policy.entropy, experience.is_kept, num_prompts)

  def group_loss(
    self, log_p: Float[Array, "p g n"], advantage: Float[Array, "p g"], experience: Experience
  ) -> tuple[Float[Array, "p"], dict[str, Float[Array, "p"]]]:
    """Compute each prompt's loss of estimates of log p(y | x), one a draw, nats; a dropped rollout is not read."""
    is_kept = experience.is_kept
    length = jnp.maximum(experience.is_counted.sum(-1), 1)
    log_p = jnp.where(is_kept[..., None], log_p, 0)
    assert experience.token_log_p_old is not None  # as `needs_token_log_probs` says
    log_ratio = log_p - jnp.where(is_kept[..., None], experience.token_log_p_old, 0)
    low, high = np.log1p(-self.clip), np.log1p(self.clip)
    distance = jnp.clip(log_ratio, low, high) / length[..., None] - self.guidance * advantage[..., None]
    losses = mean_kept((distance**2).sum(-1), is_kept)
    is_clipped = (log_ratio < low) | (log_ratio > high)
    metrics = {"loss_clipped": mean_kept(is_clipped.mean(-1), is_kept)}
    if experience.token_log_p_ref is None:
      return losses, metrics
    kl = mean_kept(k2(jnp.where(is_kept[..., None], experience.token_log_p_ref, 0), log_p).mean(-1) / length, is_kept)
    return losses + self.kl_weight * kl, metrics | {"loss_kl": kl}
