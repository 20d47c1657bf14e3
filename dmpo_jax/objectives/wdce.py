"""DMPO's loss, weighted denoising cross-entropy: a group's rollouts, predicted from their masked selves, by weight."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from dmpo_jax.objectives import weights
from dmpo_jax.objectives.likelihood import elbo, masked_mean
from dmpo_jax.objectives.masking import Completions, draw
from dmpo_jax.objectives.objective import Loss, Objective
from dmpo_jax.objectives.weights import mean_kept
from dmpo_jax.ranges import FROM_ZERO, Range, number, one_of
from dmpo_jax.structs import Experience, Score, Scores


@dataclasses.dataclass(frozen=True)
class Wdce(Objective):
  """Weighted denoising cross-entropy (DMPO, arXiv 2510.08233).

  Args:
    baseline: b, what is subtracted from the weights: a name in `weights.BASELINES`.
    baseline_strength: s, what it is multiplied by.
    unlearning: `unbounded`, or `bounded`: a rollout with a negative coefficient stops counting once
      log p_theta - log p_old is below min_log_ratio, in nats.
    old_masks: what log p_old is estimated under where the loss compares the policy with it: the `buffer`'s masks, other
      ones than the update's, or those of each `update`, so that most of the noise of the difference cancels.
  """

  baseline: str
  baseline_strength: float
  unlearning: str = "unbounded"
  min_log_ratio: float = 0.0
  old_masks: str = "buffer"

  ranges: ClassVar[Mapping[str, Range]] = {
    "baseline": one_of(*weights.BASELINES),
    "baseline_strength": FROM_ZERO,
    "unlearning": one_of("unbounded", "bounded"),
    "min_log_ratio": number("(-inf, 0]"),
    "old_masks": one_of("buffer", "update"),
  }
  needs_weights: ClassVar[bool] = True

  @staticmethod
  def compares_with_old(baseline: str, unlearning: str) -> bool:
    """Whether the loss with these settings compares the policy with the one that drew the rollouts."""
    return baseline == "model" or unlearning == "bounded"

  @property
  def scores_updates(self) -> bool:
    return self.old_masks == "update"

  @property
  def reads_log_p_old(self) -> bool:
    return self.compares_with_old(self.baseline, self.unlearning) and self.old_masks == "buffer"

  @classmethod
  def compares_rewards(cls, weighting: str, own: Mapping[str, object]) -> bool:
    cancels = own["baseline"] == "mean" and own["baseline_strength"] == 1  # weights that are the same in a group
    return cancels or super().compares_rewards(weighting, own)

  def loss(self, score: Score, experience: Experience, keys: Key[Array, "p g"], num_prompts: int) -> Loss:
    """Compute the cross-entropy of the policy to the target, on fresh masks of the buffer's rollouts.

    (1 / num_prompts) sum_prompts sum_g (w_i - s * b_i) * mean_r[(1/m) sum_{l in M_r} -log p_theta(y_il | ...)];
    w the importance weights, b the baseline (`weights.baseline`), M_r the masks, m = max(|M_r|, 1).

    Returns:
      The loss, and of the kept rollouts, averaged over prompts: `loss_cross_entropy` and `loss_entropy` (nats a masked
      token), `loss_coefficient` (sum_g |w - s * b|; at s = 1 from 0, where the signal cancels, to 2, where weights and
      baseline pick different rollouts), `loss_log_ratio` (log p_theta - log p_old in nats, under `old_masks`: how far
      the policy moved since it drew the rollouts), and where unlearning is bounded `loss_stopped`, the share of the
      rollouts that no longer count.
    """
    is_masked, _, weight = draw(keys, Completions.of(experience), self.masks)
    scores = score(is_masked, pairs=self.masks.pairs())
    losses, metrics = self.group_loss(scores, is_masked, experience, weight)
    return losses.sum() / num_prompts, {name: value.sum() / num_prompts for name, value in metrics.items()}

  def group_loss(
    self,
    scores: Scores,
    is_masked: Bool[Array, "p g r c"],
    experience: Experience,
    mask_weight: Float[Array, "p g r c"] | None = None,
  ) -> tuple[Float[Array, "p"], dict[str, Float[Array, "p"]]]:
    """Compute each prompt's part of `loss`, before the mean over prompts, from scores under given masks.

    A dropped rollout adds nothing to a loss or metric, whatever its values are, NaN included.

    Args:
      mask_weight: of the masked positions, where they do not count alike (`masking.Drawn`).
    """
    is_kept, log_p_old = experience.is_kept, experience.log_p_old
    if self.scores_updates:
      assert experience.token_log_p_old is not None  # as `scores_updates` says
      log_p_old = experience.token_log_p_old.mean(-1)
    rollout_loss = cross_entropy(scores.log_prob, is_masked, mask_weight)
    log_p_theta = elbo(scores.log_prob, is_masked, experience.is_counted, mask_weight).mean(-1)
    subtracted = weights.baseline(
      self.baseline,
      weight=experience.weight,
      negative_weight=experience.negative_weight,
      log_p_theta=log_p_theta,
      log_p_old=log_p_old,
      is_kept=is_kept,
    )
    coefficient = jnp.where(is_kept, experience.weight - self.baseline_strength * subtracted, 0)
    is_stopped = jnp.zeros_like(is_kept)
    if self.unlearning == "bounded":
      is_stopped = is_kept & (coefficient < 0) & (log_p_theta - log_p_old < self.min_log_ratio)
      coefficient = jnp.where(is_stopped, 0, coefficient)
    metrics = {
      "loss_cross_entropy": mean_kept(rollout_loss, is_kept),
      "loss_entropy": mean_kept(masked_mean(scores.entropy, is_masked, mask_weight).mean(-1), is_kept),
      "loss_coefficient": jnp.abs(coefficient).sum(-1),
      "loss_log_ratio": mean_kept(log_p_theta - log_p_old, is_kept),
    }
    if self.unlearning == "bounded":
      metrics["loss_stopped"] = mean_kept(is_stopped.astype(jnp.float32), is_kept)
    return (coefficient * jnp.where(is_kept, rollout_loss, 0)).sum(-1), metrics


def cross_entropy(
  token_log_prob: Float[Array, "p g r c"],
  is_masked: Bool[Array, "p g r c"],
  weight: Float[Array, "p g r c"] | None = None,
) -> Float[Array, "p g"]:
  """Average -log p over each mask sample's masked tokens, then over the samples (an empty one counts as 0)."""
  return -masked_mean(token_log_prob, is_masked, weight).mean(-1)
