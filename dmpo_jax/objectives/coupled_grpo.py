"""Coupled-GRPO, DiffuCoder's objective: a clipped ratio a token under complementary masks, leave-one-out advantages."""

import dataclasses

from jaxtyping import Array, Key

from dmpo_jax.objectives.clipped import RatioObjective, leave_one_out_advantage
from dmpo_jax.objectives.objective import Loss
from dmpo_jax.structs import Experience, Score


@dataclasses.dataclass(frozen=True)
class CoupledGrpo(RatioObjective):
  """DiffuCoder (arXiv 2506.20639)."""

  def loss(self, score: Score, experience: Experience, keys: Key[Array, "p g"], num_prompts: int) -> Loss:
    """Compute DiffuCoder's loss (arXiv 2506.20639): `clipped.token_loss`, KL to the reference policy.

    The advantage is the reward minus the mean of the group's other rewards. Published: likelihood coupled with one pair
    (3 mask samples), mask ratios from U(0.2, 0.8), clip 0.5, kl_weight 0.01, 2 updates a buffer, groups of 10.
    """
    advantage = leave_one_out_advantage(experience.reward, experience.is_kept)
    return self.ratio_loss(score, experience, keys, num_prompts, advantage)
