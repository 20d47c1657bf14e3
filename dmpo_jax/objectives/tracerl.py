"""TraceRL: a clipped ratio a token along the trajectory that was sampled, in chunks of model calls."""

from jaxtyping import Array, Float, Key

from dmpo_jax.objectives.clipped import ratio_loss
from dmpo_jax.objectives.likelihood import Estimator, Score
from dmpo_jax.objectives.weights import standardise
from dmpo_jax.structs import Experience


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
  """Compute TraceRL's loss without its value model (arXiv 2509.06949): `clipped.token_loss`, KL to p_old.

  The advantage is the reward standardised within the group. Published: likelihood trajectory with chunks of 8 calls of
  LLaDA's sampler, clip 0.2, kl_weight 0.01 on the k3 estimate to the policy that sampled, 1 update a buffer, groups of
  8.

  Args:
    experience, likelihood: as in `diffu_grpo.loss`; the reference policy is not read.
  """
  advantage = standardise(experience.reward, experience.is_kept)
  own = dict(num_prompts=num_prompts, likelihood=likelihood, clip=clip, kl_weight=kl_weight)
  return ratio_loss(score, experience, keys, advantage, experience.token_log_p_old, **own)
