"""wd1: weighted log-likelihood without ratios, the softmax of the advantages up and that of their opposites down."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Key

from dmpo_jax.objectives.clipped import averaged, centred_advantage, estimate
from dmpo_jax.objectives.objective import Loss, Objective
from dmpo_jax.objectives.weights import softmax_kept
from dmpo_jax.ranges import POSITIVE, Range
from dmpo_jax.structs import Experience, Score


@dataclasses.dataclass(frozen=True)
class Wd1(Objective):
  """wd1 (arXiv 2507.08838).

  Args:
    sharpness: psi of the paper, of the softmax of advantages.
  """

  sharpness: float

  ranges: ClassVar[Mapping[str, Range]] = {"sharpness": POSITIVE}
  takes_likelihood: ClassVar[bool] = True

  def loss(self, score: Score, experience: Experience, keys: Key[Array, "p g"], num_prompts: int) -> Loss:
    """Compute wd1's loss (arXiv 2507.08838).

    (1 / num_prompts) sum_prompts sum_i - (w_i^+ - w_i^-) log p(y_i), w^+- = softmax_g(+- sharpness * A), A the reward
    minus the group's mean. Published: likelihood one_step with prompt_mask_ratio 0.15, sharpness 1, no reference
    policy, 12 updates a buffer (8 for Sudoku), groups of 6.
    """
    assert self.likelihood is not None  # as `takes_likelihood` says
    policy, is_kept = estimate(score, experience, keys, self.likelihood), experience.is_kept
    advantage = self.sharpness * centred_advantage(experience.reward, is_kept)
    coefficient = softmax_kept(advantage, is_kept) - softmax_kept(-advantage, is_kept)
    log_p = jnp.where(is_kept, policy.tokens.sum(-1), 0)
    metrics = {"loss_coefficient": jnp.abs(coefficient).sum(-1)}
    return averaged(-(coefficient * log_p).sum(-1), metrics, policy.entropy, is_kept, num_prompts)
