"""What the objectives have in common: their settings, what they need of a buffer, and the loss that each of them is."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Key

from dmpo_jax import ranges
from dmpo_jax.objectives.likelihood import Estimator
from dmpo_jax.objectives.masking import KINDS, MaskSampling
from dmpo_jax.ranges import Range
from dmpo_jax.structs import Experience, Score

Loss = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]  # and metrics


@dataclasses.dataclass(frozen=True)
class Objective:
  """A loss and its settings. An objective is a subclass in a file of its own; its fields are its keys in the config.

  Args:
    masks: how a gradient step draws its masks, for losses that draw their own.
    likelihood: the estimator of log p, for losses that take one.
  """

  masks: MaskSampling
  likelihood: Estimator | None

  ranges: ClassVar[Mapping[str, Range]] = {}  # of its own settings
  likelihoods: ClassVar[tuple[str, ...]] = ()  # names of the only ones it can have; (): any

  # What a buffer must hold for it. A buffer of rollouts always has their rewards.
  learns_from_demonstrations: ClassVar[bool] = False  # instead of rollouts
  needs_weights: ClassVar[bool] = False  # importance weights
  needs_token_log_probs: ClassVar[bool] = False  # of the policy that drew the rollouts, under the update's own views
  reads_tokens: ClassVar[bool] = False  # of these, each position's part; else one estimate of a completion a draw
  has_teacher: ClassVar[bool] = False  # scores come with the divergence from the reference policy
  takes_likelihood: ClassVar[bool] = False  # the loss reads `likelihood`; else it draws `masks`,
  mask_kinds: ClassVar[tuple[str, ...]] = KINDS  # which may be of these kinds

  def __post_init__(self) -> None:
    ranges.check(self, self.ranges)

  @property
  def needs_reference(self) -> bool:
    """Whether the token log-probabilities of the reference are needed too."""
    return False

  @property
  def scores_updates(self) -> bool:
    """Whether log p_old of whole completions is needed under the masks of each update, beside the weights."""
    return False

  @property
  def reads_log_p_old(self) -> bool:
    """Whether the loss reads log p_old of whole completions; metrics may."""
    return False

  @classmethod
  def compares_rewards(cls, weighting: str, own: Mapping[str, object]) -> bool:
    """Whether a loss with these settings of its own learns from differences of rewards inside a group alone."""
    return not cls.needs_weights or weighting != "reward"

  def demonstration_weights(self, is_counted: Bool[np.ndarray, "p g c"]) -> Float32[np.ndarray, "p g"]:
    """Weigh a buffer's demonstrations, for objectives that learn from them; `Experience.weight` then holds this."""
    return np.ones(is_counted.shape[:2], np.float32)

  def loss(self, score: Score, experience: Experience, keys: Key[Array, "p g"], num_prompts: int) -> Loss:
    """Compute the loss of some prompts of a buffer, and its metrics.

    Both are sums over the prompts given, divided by `num_prompts`: those of microbatches add up to the buffer's.

    Args:
      score: the policy under update, differentiable: `score(is_masked)` gives its log-probabilities (`structs.Scores`).
      keys: the rollouts' keys for this step; all masks are drawn from them.
      num_prompts: prompts of the whole buffer.
    """
    raise NotImplementedError
