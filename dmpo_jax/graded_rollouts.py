"""Buffers of graded rollouts: batches of prompts from the stream, and which of their groups updates learn from."""

import dataclasses
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from dmpo_jax import lengths
from dmpo_jax.data import PromptStream, ids_of_batch
from dmpo_jax.models.trainable import Trainable
from dmpo_jax.objectives import weights
from dmpo_jax.policy import Policies
from dmpo_jax.rollout import Batch, Collector
from dmpo_jax.rollout_metrics import lack_of_signal
from dmpo_jax.structs import Experience, PendingRollouts, TrainState

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class GradedRollouts:
  """Buffers of rollouts of the current policy."""

  collector: Collector
  prompts: PromptStream
  num_prompts: int
  base: PyTree
  trainable: Trainable
  compares_rewards: bool  # the objective learns from the differences of rewards inside a group alone
  takes_parts: bool  # it takes the parts of the rewards apart
  is_scored: Callable[[int], bool]  # whether the objective needs scores of the rollouts that a step's policy draws
  drops_equal: bool  # where it compares rewards, updates leave out the groups whose rewards are all the same
  until_informative: int = 0  # groups that updates learn from, until which further batches follow
  max_batches: int = 1  # of a buffer
  lengths: tuple[int, ...] = ()  # prompts of one length are generated together; (): in the stream's order

  def generate(
    self, state: TrainState, buffer: int, begun: PendingRollouts | None = None, further: int = 0
  ) -> PendingRollouts:
    """Generate rollouts, or the rest of them; see `rollout.Collector.generate`."""
    if begun is not None and begun.is_whole:
      return begun
    is_scored = self.is_scored(int(state.step))
    return self.collector.generate(self._policies(state), self._batch(buffer, further), begun, is_scored=is_scored)

  def complete(
    self, state: TrainState, buffer: int, pending: PendingRollouts, further: int = 0
  ) -> tuple[Experience, dict[str, float]]:
    """Complete them for the objective, and warn where their rewards teach nothing."""
    pending = dataclasses.replace(pending, batch=self._batch(buffer, further))  # which a checkpoint does not hold
    experience, metrics = self.collector.complete(pending, self._policies(state))
    experience = self._as_drawn(experience, buffer, further)
    reward = experience.reward_parts if self.takes_parts else experience.reward
    assert reward is not None  # `build` has checked that the task has parts
    lack = lack_of_signal(reward, experience.is_kept, compares=self.compares_rewards)
    if self.drops_equal and self.compares_rewards:
      is_informative = np.asarray(weights.has_variance(jnp.asarray(reward), jnp.asarray(experience.is_kept)))
      experience = dataclasses.replace(experience, is_informative=is_informative)
      metrics["groups_dropped"] = float((~is_informative).sum())
    if lack and jax.process_index() == 0:
      logger.warning("buffer %d: %s", buffer + 1, lack)
    metrics["without_signal"] = float(bool(lack))
    if self.until_informative:
      metrics["batches"] = 1.0
    prompts_counted = {"prompts_skipped": self.prompts.num_skipped, "prompts_cut": self.prompts.num_cut}
    return experience, metrics | {name: float(count) for name, count in prompts_counted.items()}

  def wants_more(self, experience: Experience, num_batches: int) -> bool:
    """Whether too few groups have rewards that differ, and another batch is allowed."""
    if not self.until_informative or experience.is_informative is None:
      return False
    return int(experience.is_informative.sum()) < self.until_informative and num_batches < self.max_batches

  def _draw(self, buffer: int, further: int) -> tuple[Batch, Int[np.ndarray, "p"] | None]:
    """Return the prompts of a batch as the stream has them, and the order in which they are generated."""
    prompts, records = self.prompts.batch((buffer + further) * self.num_prompts, self.num_prompts)
    if further:  # a prompt may be in two batches of a buffer, at the end of an epoch
      prompts = dataclasses.replace(prompts, prompt_id=ids_of_batch(prompts.prompt_id, further))
    return Batch(buffer, prompts, records), lengths.order(prompts, self.lengths)

  def _batch(self, buffer: int, further: int) -> Batch:
    batch, order = self._draw(buffer, further)
    if order is None:
      return batch
    prompts = jax.tree.map(lambda array: array[order], batch.prompts)
    return Batch(buffer, prompts, [batch.records[place] for place in order])

  def _as_drawn(self, experience: Experience, buffer: int, further: int) -> Experience:
    """Put a batch back into the order of the stream, so that nothing else depends on the lengths."""
    _, order = self._draw(buffer, further)
    return experience if order is None else jax.tree.map(lambda array: np.asarray(array)[np.argsort(order)], experience)

  def _policies(self, state: TrainState) -> Policies:
    return Policies(self.trainable.computing(state.trainable), self.base, state.reference)
