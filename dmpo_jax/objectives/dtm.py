"""DTM, discrete tilt matching: at every masked position, towards the sampling policy tilted by the rewards."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Key

from dmpo_jax.objectives.clipped import averaged, bounded_exp, centred_advantage
from dmpo_jax.objectives.likelihood import masked_mean
from dmpo_jax.objectives.masking import Completions, draw
from dmpo_jax.objectives.objective import Loss, Objective
from dmpo_jax.objectives.weights import mean_kept
from dmpo_jax.ranges import FROM_ZERO, POSITIVE, Range
from dmpo_jax.structs import Experience, Score


@dataclasses.dataclass(frozen=True)
class Dtm(Objective):
  """Discrete tilt matching (arXiv 2604.18739).

  Args:
    tilt: h, at least 0: how far one buffer's rewards tilt the policy.
    control_variate: c, the multiple of the old policy's distribution in the target.
  """

  tilt: float
  control_variate: float

  ranges: ClassVar[Mapping[str, Range]] = {"tilt": POSITIVE, "control_variate": FROM_ZERO}
  has_teacher: ClassVar[bool] = True

  def loss(self, score: Score, experience: Experience, keys: Key[Array, "p g"], num_prompts: int) -> Loss:
    """Compute the loss of discrete tilt matching (arXiv 2604.18739).

    The policy p_old that drew the rollouts is to become p_old exp(h r). At a masked position l of a state z that a
    completion y was masked to, that is

      p_new(v | z) = E[exp(h r(y)) 1(y_l = v) | z] / E[exp(h r(y)) | z],

    the minimum of a cross-entropy with target exp(h r) 1(y_l = v). As p_old(v | z) - 1(y_l = v) is 0 on average, any
    multiple c of it may be added to the target (the control variate), and the loss is

      (1 / num_prompts) sum_prompts mean_{g, r, l in M} [c KL(p_old || p) - (exp(h r) - c) log p(y_l | z)],

    KL(p_old || p) over v at (z, l). With c = 1 the noise vanishes with h. The rewards have the group's mean taken from
    them, a factor that the rollouts of a prompt share and that moves no minimum; the authors' code takes the buffer's
    mean. h r is bounded (`clipped.bounded_exp`). An empty mask counts as 0. Over a run the tilts add up: h times the
    number of buffers.

    Args:
      score: with p_old as its teacher: the reference, synchronised after every buffer.
    """
    is_masked, _, weights = draw(keys, Completions.of(experience), self.masks)
    scores = score(is_masked, pairs=self.masks.pairs())
    assert scores.divergence is not None  # as `has_teacher` says
    weight = bounded_exp(self.tilt * centred_advantage(experience.reward, experience.is_kept)) - self.control_variate
    losses = masked_mean(
      self.control_variate * scores.divergence - weight[..., None, None] * scores.log_prob, is_masked, weights
    )
    entropy = masked_mean(scores.entropy, is_masked, weights).mean(-1)
    metrics = {
      "loss_coefficient": mean_kept(jnp.abs(weight), experience.is_kept),
      "loss_kl": mean_kept(masked_mean(scores.divergence, is_masked, weights).mean(-1), experience.is_kept),
    }
    return averaged(mean_kept(losses.mean(-1), experience.is_kept), metrics, entropy, experience.is_kept, num_prompts)
