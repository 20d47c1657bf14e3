"""Masked-diffusion training on given completions (demonstrations): LLaDA's supervised loss."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from dmpo_jax.objectives.likelihood import masked_mean
from dmpo_jax.objectives.masking import draw_masks
from dmpo_jax.objectives.objective import Loss, Objective
from dmpo_jax.objectives.weights import mean_kept
from dmpo_jax.structs import Experience, Score


@dataclasses.dataclass(frozen=True)
class Denoise(Objective):
  """LLaDA's supervised loss."""

  learns_from_demonstrations: ClassVar[bool] = True
  mask_kinds: ClassVar[tuple[str, ...]] = ("random", "stratified")  # a demonstration has no trajectory

  def loss(self, score: Score, experience: Experience, keys: Key[Array, "p g"], num_prompts: int) -> Loss:
    """Compute LLaDA's loss: (1 / num_prompts) sum_prompts mean_g `bound` (arXiv 2502.09992, eq. 5, algorithm 2).

    Groups usually hold one completion, the prompt's demonstration; dropped ones are left out, weights are not used.

    Returns:
      The loss, and `loss_entropy` (nats a masked token).
    """
    is_masked, ratio = draw_masks(keys, experience.is_counted, self.masks)
    scores, is_kept = score(is_masked, pairs=self.masks.pairs()), experience.is_kept
    losses = mean_kept(bound(scores.log_prob, is_masked, ratio, experience.is_counted), is_kept)
    entropy = mean_kept(masked_mean(scores.entropy, is_masked).mean(-1), is_kept)
    return losses.sum() / num_prompts, {"loss_entropy": entropy.sum() / num_prompts}


def bound(
  token_log_prob: Float[Array, "p g r c"],
  is_masked: Bool[Array, "p g r c"],
  ratio: Float[Array, "p g r"],
  is_counted: Bool[Array, "p g c"],
) -> Float[Array, "p g"]:
  """Average over mask samples (1/n) (1/t) sum_{l in M} -log p(y_l | ...): n counted positions, t the mask ratio.

  In nats a position; n times it bounds -log p(y | x) from above, in expectation over t ~ U(0, 1). A ratio of 0 masks
  nothing and counts as 0.
  """
  total = -jnp.where(is_masked, token_log_prob, 0).sum(-1)
  num_counted = jnp.maximum(is_counted.sum(-1), 1)[:, :, None]
  return (total / (num_counted * jnp.where(ratio > 0, ratio, 1))).mean(-1)
