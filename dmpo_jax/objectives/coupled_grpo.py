"""Coupled-GRPO, DiffuCoder's objective: a clipped ratio a token under complementary masks, leave-one-out advantages."""

from jaxtyping import Array, Float, Key

from dmpo_jax.objectives.clipped import leave_one_out_advantage, ratio_loss
from dmpo_jax.objectives.likelihood import Estimator
from dmpo_jax.structs import Experience, Score


def loss(
  score: Score,
  experience: Experience,
  keys: Key[Array, "p g"],
  *,
  num_prompts: int,
  likelihood: Estimator,
  clip: float,
  kl_weight: float,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Compute DiffuCoder's loss (arXiv 2506.20639): `clipped.token_loss`, KL to the reference policy.

  The advantage is the reward minus the mean of the group's other rewards. Published: likelihood coupled with one pair
  (3 mask samples), mask ratios from U(0.2, 0.8), clip 0.5, kl_weight 0.01, 2 updates a buffer, groups of 10.

  Args:
    experience, likelihood: as in `diffu_grpo.loss`.
  """
  advantage = leave_one_out_advantage(experience.reward, experience.is_kept)
  own = dict(num_prompts=num_prompts, likelihood=likelihood, clip=clip, kl_weight=kl_weight)
  return ratio_loss(score, experience, keys, advantage, experience.token_log_p_ref, **own)
