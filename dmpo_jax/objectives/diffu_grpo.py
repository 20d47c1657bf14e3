"""diffu-GRPO, d1's objective: a clipped ratio a token under the one-step likelihood, and a KL to the reference."""

import dataclasses

from jaxtyping import Array, Key

from dmpo_jax.objectives.clipped import RatioObjective, centred_advantage
from dmpo_jax.objectives.objective import Loss
from dmpo_jax.structs import Experience, Score


@dataclasses.dataclass(frozen=True)
class DiffuGrpo(RatioObjective):
  """d1 (arXiv 2504.12216)."""

  def loss(self, score: Score, experience: Experience, keys: Key[Array, "p g"], num_prompts: int) -> Loss:
    """Compute d1's loss (arXiv 2504.12216): `clipped.token_loss`, KL to the reference policy.

    The advantage is the reward minus the group's mean, not divided by its deviation. Published: likelihood one_step
    with prompt_mask_ratio 0.15 drawn anew at every update, clip 0.5, kl_weight 0.04, 8 updates a buffer for Sudoku and
    Countdown and 12 for GSM8K and MATH, groups of 6.
    """
    advantage = centred_advantage(experience.reward, experience.is_kept)
    return self.ratio_loss(score, experience, keys, num_prompts, advantage)
