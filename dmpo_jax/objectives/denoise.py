"""Masked-diffusion training on given completions (demonstrations): the supervised loss of LLaDA and of dllm."""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Key

from dmpo_jax.objectives.likelihood import masked_mean
from dmpo_jax.objectives.masking import place_masks, spread_evenly, uniform_noise
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
  MDLMTrainer (github.com/ZHZisZZ/dllm).

  Args:
    schedule: `linear`, p(t) = t, or `cosine`, p(t) = sin(pi t / 2).
    weight: of a mask sample. `bound`: p'(t) / p(t), so that the loss bounds -log p(y | x) over t ~ U(0, 1); 1 / t if
      linear. `scheduler`: dllm's, p'(t) / (p(t) + 1e-6). `uniform`: 1.
    normalisation: what the weighed sum is divided by: for each `sequence` its own counted positions, and their number;
      the counted positions of the whole buffer (`token`); the number of sequences (`batch`).
  """

  schedule: str = "linear"
  weight: str = "bound"
  normalisation: str = "sequence"

  ranges: ClassVar[Mapping[str, Range]] = {
    "schedule": one_of("linear", "cosine"),
    "weight": one_of("bound", "scheduler", "uniform"),
    "normalisation": one_of("sequence", "token", "batch"),
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
    noise = uniform_noise(keys, self.masks.num_draws, 1 + experience.is_counted.shape[-1])
    u_time = spread_evenly(keys, self.masks.num_draws) if self.masks.kind == "stratified" else noise[..., 0]
    is_masked, divisor = self.place(u_time, noise[..., 1:], experience.is_counted)
    scores, is_kept = score(is_masked, pairs=self.masks.pairs()), experience.is_kept
    losses = experience.weight * cross_entropy(scores.log_prob, is_masked, divisor, experience.is_counted)
    entropy = mean_kept(masked_mean(scores.entropy, is_masked).mean(-1), is_kept)
    return mean_kept(losses, is_kept).sum() / num_prompts, {"loss_entropy": entropy.sum() / num_prompts}

  def place(
    self, u_time: Float[Array, "p g n"], u_position: Float[Array, "p g n c"], is_counted: Bool[Array, "p g c"]
  ) -> tuple[Bool[Array, "p g r c"], Float[Array, "p g r"]]:
    """Turn uniform noise into masks, and what each mask sample's cross-entropy is divided by: 1 / its weight.

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
    if self.normalisation == "sequence":
      return np.ones(count.shape, np.float32)
    if self.normalisation == "batch":
      return count.astype(np.float32)
    return (count / max(count.mean(), 1 / count.size)).astype(np.float32)


def cross_entropy(
  token_log_prob: Float[Array, "p g r c"],
  is_masked: Bool[Array, "p g r c"],
  divisor: Float[Array, "p g r"],
  is_counted: Bool[Array, "p g c"],
) -> Float[Array, "p g"]:
  """Average over mask samples (1/n) (1/divisor) sum_{l in M} -log p(y_l | ...), n counted positions.

  In nats a position. With the weight `bound`, n times it bounds -log p(y | x) from above, in expectation over t. A
  divisor of 0, of a ratio of 0, masks nothing and counts as 0.
  """
  total = -jnp.where(is_masked, token_log_prob, 0).sum(-1)
  num_counted = jnp.maximum(is_counted.sum(-1), 1)[:, :, None]
  return (total / (num_counted * jnp.where(divisor > 0, divisor, 1))).mean(-1)
