"""diffu-GRPO, d1's objective: a clipped ratio a token under the one-step likelihood, and a KL to the reference."""

from jaxtyping import Array, Float, Key

from dmpo_jax.objectives.clipped import centred_advantage, ratio_loss
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
  """Compute d1's loss (arXiv 2504.12216): `clipped.token_loss`, KL to the reference policy.

  The advantage is the reward minus the group's mean, not divided by its deviation. Published: likelihood one_step with
  prompt_mask_ratio 0.15 drawn anew at every update, clip 0.5, kl_weight 0.04, 8 updates a buffer for Sudoku and
  Countdown and 12 for GSM8K and MATH, groups of 6.

  Args:
    experience: token_log_p_old and token_log_p_ref are those of this update's views.
    likelihood: the estimator of log p, on views from `keys`.
  """
  advantage = centred_advantage(experience.reward, experience.is_kept)
  own = dict(num_prompts=num_prompts, likelihood=likelihood, clip=clip, kl_weight=kl_weight)
  return ratio_loss(score, experience, keys, advantage, experience.token_log_p_ref, **own)
