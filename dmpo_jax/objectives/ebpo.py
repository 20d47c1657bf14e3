"""EBPO: one clipped ratio a completion, of block-wise ELBOs, not divided by the length."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dmpo_jax.objectives.clipped import RatioObjective, averaged, bounded_exp, estimate, k2
from dmpo_jax.objectives.objective import Loss
from dmpo_jax.objectives.weights import mean_kept, standardise
from dmpo_jax.ranges import POSITIVE, Range, number
from dmpo_jax.structs import Experience, Score


@dataclasses.dataclass(frozen=True)
class Ebpo(RatioObjective):
  """ELBO-based block-level policy optimisation (the report of LLaDA2.1; github.com/yjyddq/DARE).

  Args:
    clip_high: ratios are clipped to 1 - clip, 1 + clip_high.
  """

  clip_high: float

  ranges: ClassVar[Mapping[str, Range]] = {**RatioObjective.ranges, "clip": number("(0, 1)"), "clip_high": POSITIVE}
  reads_tokens: ClassVar[bool] = False

  def loss(self, score: Score, experience: Experience, keys: Key[Array, "p g"], num_prompts: int) -> Loss:
    """Compute EBPO's loss.

    (1 / num_prompts) sum_prompts mean_i [- min(rho_i A_i, clip(rho_i, 1 - clip, 1 + clip_high) A_i) + kl_weight *
    (log p(y_i) - log p_ref(y_i))^2 / 2], rho_i = exp(log p(y_i) - log p_old(y_i)), A the reward standardised within
    the group. log p is the mean over the mask samples of the sum over blocks, each with a ratio of its own.

    Published: likelihood elbo of a model that attends by blocks, in DARE's recipes with 16 mask samples, clip and
    clip_high 0.2 and no KL. There the ratios of a block are spread evenly over the mask samples, and the blocks of all
    rows of a batch share them. The ratio is of whole completions: a difference of 0.2 nats is clipped, whatever the
    length, and after the first update of a buffer most rollouts are beyond it. Of the KL estimates of that code the
    quadratic one is taken: the default, exp(d) - d - 1, of whole completions is as a rule either 0 or beyond float32.
    """
    assert self.likelihood is not None  # as `takes_likelihood` says
    policy = estimate(score, experience, keys, self.likelihood)
    advantage = standardise(experience.reward, experience.is_kept)
    losses, metrics = self.group_loss(policy.tokens.sum(-1), advantage, experience)
    return averaged(losses, metrics, policy.entropy, experience.is_kept, num_prompts)

  def group_loss(
    self, log_p: Float[Array, "p g"], advantage: Float[Array, "p g"], experience: Experience
  ) -> tuple[Float[Array, "p"], dict[str, Float[Array, "p"]]]:
    """Compute each prompt's loss of estimates of log p(y | x), nats; a dropped rollout is not read."""
    is_kept = experience.is_kept
    log_p = jnp.where(is_kept, log_p, 0)

    def of_update(measured: Float[Array, "p g n"]) -> Float[Array, "p g"]:
      return jnp.where(is_kept, measured.mean(-1), 0)

    assert experience.token_log_p_old is not None  # as `needs_token_log_probs` says
    log_ratio = log_p - of_update(experience.token_log_p_old)
    low, high = np.log1p(-self.clip), np.log1p(self.clip_high)
    is_clipped = jnp.where(advantage < 0, log_ratio < low, (log_ratio > high) & (advantage > 0))
    bounded = jnp.where(advantage < 0, jnp.maximum(log_ratio, low), jnp.minimum(log_ratio, high))
    losses = mean_kept(-advantage * bounded_exp(bounded), is_kept)
    metrics = {"loss_clipped": mean_kept(is_clipped.astype(jnp.float32), is_kept)}
    if experience.token_log_p_ref is None:
      return losses, metrics
    kl = mean_kept(k2(of_update(experience.token_log_p_ref), log_p), is_kept)
    return losses + self.kl_weight * kl, metrics | {"loss_kl": kl}
