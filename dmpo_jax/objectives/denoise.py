"""Masked-diffusion training on given completions (demonstrations): the supervised loss of LLaDA and of dllm."""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Key

from dmpo_jax.objectives.likelihood import masked_mean
from dmpo_jax.objectives.masking import Blocks, Completions, place_masks, spread_evenly, uniform_noise
from dmpo_jax.objectives.objective import Loss, Objective
from dmpo_jax.objectives.weights import mean_kept
from dmpo_jax.ranges import Range, one_of
from dmpo_jax.structs import Experience, Score

EPSILON = 1e-6  # of the weight `scheduler`, dllm's


@dataclasses.dataclass(frozen=True)
class Denoise(Objective):
  """Cross-entropy of masked tokens, weighed by how many are masked.

  A mask sample has a time t, drawn from U(min_ratio, max_ratio) of `masks`; each counted position is masked with
  probability p(t). The defaults are LLaDA's (arXiv 2502.09992, eq. 5, algorithm 2), the other choices those of dllm's
  MDLMTrainer and BD3LMTrainer (github.com/ZHZisZZ/dllm), of SDAR (github.com/JetAstra/SDAR) and of dFactory
  (github.com/inclusionAI/dFactory).

  Args:
    schedule: `linear`, p(t) = t, or `cosine`, p(t) = sin(pi t / 2).
    weight: of a mask sample. `bound`: p'(t) / p(t), so that the loss bounds -log p(y | x) over t ~ U(0, 1); 1 / t if
      linear. `scheduler`: dllm's, p'(t) / (p(t) + 1e-6). `uniform`: 1.
    normalisation: what the weighed sum is divided by: for each `sequence` its own counted positions, and their number;
      the counted positions of the whole buffer (`token`); the number of sequences (`batch`); the masked positions of a
      microbatch (`masked`, with microbatches alike).
    level: what has a time of its own: each mask sample of a `sequence`, or each `block` of a model that attends by
      blocks (BD3-LM, arXiv 2503.09573).
  """

  schedule: str = "linear"
  weight: str = "bound"
  normalisation: str = "sequence"
  level: str = "sequence"

  ranges: ClassVar[Mapping[str, Range]] = {
    "schedule": one_of("linear", "cosine"),
    "weight": one_of("bound", "scheduler", "uniform"),
    "normalisation": one_of("sequence", "token", "batch", "masked"),
    "level": one_of("sequence", "block"),
  }
  learns_from_demonstrations: ClassVar[bool] = True
  mask_kinds: ClassVar[tuple[str, ...]] = ("random", "stratified")  # a demonstration has no trajectory

  def loss(self, score: Score, experience: Experience, keys: Key[Array, "p g"], num_prompts: int) -> Loss:
    """Compute (1 / num_prompts) sum_prompts mean_g w_i `cross_entropy`_i, w_i the weights of the demonstrations.

    These weights normalise the loss over the whole buffer (`demonstration_weights`). Groups usually hold one
    completion, the prompt's demonstration; dropped ones are left out.

    Returns:
      The loss, and `loss_entropy` (nats a masked token).
    """
    u_time, u_position = self._draw(keys, Completions.of(experience))
    is_masked, divisor = self.place(u_time, u_position, experience.is_counted)
    scores, is_kept = score(is_masked, pairs=self.masks.pairs()), experience.is_kept
    losses = self.rollout_losses(scores.log_prob, is_masked, divisor, experience)
    entropy = mean_kept(masked_mean(scores.entropy, is_masked).mean(-1), is_kept)
    return mean_kept(losses, is_kept).sum() / num_prompts, {"loss_entropy": entropy.sum() / num_prompts}

  def rollout_losses(
    self,
    log_prob: Float[Array, "p g r c"],
    is_masked: Bool[Array, "p g r c"],
    divisor: Float[Array, "p g r *k"],
    experience: Experience,
  ) -> Float[Array, "p g"]:
    """Compute each demonstration's part of the loss, before the mean over a group and over prompts."""
    losses = experience.weight * cross_entropy(log_prob, is_masked, divisor, experience.is_counted)
    if self.normalisation != "masked":
      return losses
    is_kept = experience.is_kept
    num_masked = jnp.where(is_kept[..., None, None], is_masked, False).sum()
    num_counted = jnp.maximum(experience.is_counted.sum(-1), 1)
    return losses * num_counted * self.masks.num * is_kept.sum() / jnp.maximum(num_masked, 1)

  def _draw(
    self, keys: Key[Array, "p g"], about: Completions
  ) -> tuple[Float[Array, "p g n *k"], Float[Array, "p g n c"]]:
    """Draw noise for the times, one for each mask sample or, by blocks, for each position; and for the positions."""
    is_stratified, size, num = self.masks.kind == "stratified", self.masks.model_block, self.masks.num_draws
    if self.level == "sequence":
      noise = uniform_noise(keys, num, 1 + about.is_counted.shape[-1])
      return spread_evenly(keys, num) if is_stratified else noise[..., 0], noise[..., 1:]
    blocks = Blocks.of(about, size)
    noise = uniform_noise(keys, num, blocks.number + about.is_counted.shape[-1])
    u_time = blocks.spread(keys, num) if is_stratified else noise[..., : blocks.number]
    return blocks.join(jnp.repeat(u_time[..., None], size, axis=-1)), noise[..., blocks.number :]

  def place(
    self, u_time: Float[Array, "p g n *k"], u_position: Float[Array, "p g n c"], is_counted: Bool[Array, "p g c"]
  ) -> tuple[Bool[Array, "p g r c"], Float[Array, "p g r *k"]]:
    """Turn uniform noise into masks, and what a cross-entropy is divided by: 1 / the weight of its mask sample.

    With a time for each position, a position's weight is that of its time.

    A complement is masked with probability 1 - p(t), and weighed by p'(t) / (1 - p(t)).

    Raises:
      ValueError: see `MaskSampling.problem`.
    """
    if problem := self.masks.problem():
      raise ValueError(problem)
    time = self.masks.ratio(u_time)
    ratio, slope = time, jnp.ones_like(time)
    if self.schedule == "cosine":
      angle = math.pi / 2 * time
      ratio, slope = jnp.sin(angle), math.pi / 2 * jnp.maximum(jnp.cos(angle), 0)  # rounded, the cosine may be negative
    as_given = dataclasses.replace(self.masks, min_ratio=0.0, max_ratio=1.0)
    is_masked, ratio = place_masks(ratio, u_position, is_counted, as_given)
    if self.weight == "uniform":
      return is_masked, jnp.ones_like(ratio)
    slope = jnp.concatenate([slope, slope], axis=2) if self.masks.antithetic else slope
    return is_masked, (ratio + EPSILON * (self.weight == "scheduler")) / slope

  def demonstration_weights(self, is_counted: Bool[np.ndarray, "p g c"]) -> Float32[np.ndarray, "p g"]:
    """Return the weights by which the mean of a buffer's `cross_entropy` is normalised as asked."""
    count = is_counted.sum(-1)
    if self.normalisation in ("sequence", "masked"):  # the latter is not known before the masks are drawn
      return np.ones(count.shape, np.float32)
    if self.normalisation == "batch":
      return count.astype(np.float32)
    return (count / max(count.mean(), 1 / count.size)).astype(np.float32)


def cross_entropy(
  token_log_prob: Float[Array, "p g r c"],
  is_masked: Bool[Array, "p g r c"],
  divisor: Float[Array, "p g r *k"],
  is_counted: Bool[Array, "p g c"],
) -> Float[Array, "p g"]:
  """Average over mask samples (1/n) (1/divisor) sum_{l in M} -log p(y_l | ...), n counted positions.

  In nats a position. With the weight `bound`, n times it bounds -log p(y | x) from above, in expectation over t. A
  divisor of 0, of a ratio of 0, masks nothing and counts as 0.
  """
  divisor = jnp.where(divisor > 0, divisor, 1).reshape(*divisor.shape[:3], -1)
  total = -jnp.where(is_masked, token_log_prob / divisor, 0).sum(-1)
  return (total / jnp.maximum(is_counted.sum(-1), 1)[:, :, None]).mean(-1)
