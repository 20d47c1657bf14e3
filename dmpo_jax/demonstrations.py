"""Demonstrations for supervised training: buffers of them, and the loss on held-out ones."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jaxtyping import Array, Float, Key, PyTree
from ml_collections import ConfigDict

from dmpo_jax import data, noise, rollout, sharding
from dmpo_jax.build import Parts
from dmpo_jax.logprobs import make_score
from dmpo_jax.models.trainable import Trainable
from dmpo_jax.objectives import Objective
from dmpo_jax.run.preemption import check_preemption
from dmpo_jax.structs import Experience, PendingRollouts, TrainState


class Demonstrations:
  """Buffers of demonstrations, the first `num_correct` of which are all right.

  The next one is made while the devices learn from this one, by a thread that leaves them alone.
  """

  def __init__(
    self,
    config: ConfigDict,
    parts: Parts,
    objective: Objective,
    batch_size: int,
    *,
    counted: str = "all",
    num_correct: int = 0,
  ):
    self._parts, self._objective, self._counted = parts, objective, counted
    self._batch_size, self._num_correct = batch_size, num_correct
    self._completion_length = config.sampler.completion_length
    self._thread = ThreadPoolExecutor(1, thread_name_prefix="demonstrations")
    self._ahead: dict[int, Future[Experience]] = {}

  def generate(
    self, state: TrainState, buffer: int, begun: PendingRollouts | None = None, further: int = 0
  ) -> Experience:
    """Return a buffer's demonstrations, and begin to make the next ones."""
    made = self._ahead.pop(buffer, None) or self._thread.submit(self._make, buffer)
    self._ahead[buffer + 1] = self._thread.submit(self._make, buffer + 1)
    return made.result()

  def complete(
    self, state: TrainState, buffer: int, pending: Experience, further: int = 0
  ) -> tuple[Experience, dict[str, float]]:
    """Return what was generated: demonstrations have no rewards to wait for."""
    return pending, {}

  def wants_more(self, experience: Experience, num_batches: int) -> bool:
    """Return False: a batch of demonstrations is a buffer."""
    return False

  def _make(self, buffer: int) -> Experience:
    stream = self._parts.correct_demonstrations if buffer < self._num_correct else self._parts.prompts
    assert stream is not None  # training has both
    where = buffer * self._batch_size, self._batch_size
    return take(stream, *where, self._objective, self._parts, self._completion_length, self._counted)


def take(
  stream: data.PromptStream,
  position: int,
  n: int,
  objective: Objective,
  parts: Parts,
  completion_length: int,
  counted: str,
) -> Experience:
  """Take demonstrations from a stream, and weigh them for the objective."""
  prompts, completion, _ = stream.demonstrations(position, n, completion_length=completion_length)
  experience = rollout.demonstrate(prompts, completion)
  is_counted = np.asarray(rollout.count_positions(experience.completion, parts.tokenizer.end_token_ids, counted))
  weight = objective.demonstration_weights(is_counted)
  return dataclasses.replace(experience, is_counted=is_counted, weight=weight)


def make_held_out_loss(
  config: ConfigDict, parts: Parts, objective: Objective, base: PyTree
) -> Callable[[PyTree], float]:
  """Close over the held-out demonstrations: `loss(trainable)`, under masks that are the same every time.

  Raises:
    ValueError: a held-out record has no demonstration, or one that does not fit.
  """
  prompts, records = parts.held_out
  stream = data.PromptStream(
    records,
    parts.task.only_correct(),
    parts.tokenizer,
    seed=None,
    max_prompt_length=prompts.tokens.shape[1],
    overlong=config.task.overlong_prompts,
  )
  length, num = config.sampler.completion_length, len(stream)
  stream.check_demonstrations(length)
  experience = take(stream, 0, num, objective, parts, length, config.objective.counted)
  size = min(config.eval.batch_size, num)
  trainable = Trainable.of(parts.model.config)

  def loss(trained: PyTree, frozen: PyTree, batch: Experience, key: Key[Array, ""]) -> Float[Array, ""]:
    policy = trainable.policy(trained, frozen)
    score = make_score(parts.model, policy, batch.prompts, batch.completion, is_counted=batch.is_counted)
    return objective.loss(score, batch, noise.row_keys(key, batch.prompts.prompt_id, 1), num)[0]

  program = jax.jit(loss, out_shardings=sharding.replicated(parts.mesh))
  frozen = base if trainable.has_adapters else {}

  def run(trained: PyTree) -> float:
    key, total = noise.step_key(config.seed, "held_out", 0), 0.0
    for first in range(0, num, size):
      check_preemption()
      index = np.minimum(np.arange(first, first + size), num - 1)
      batch: Experience = jax.tree.map(lambda array, index=index: array[index], experience)
      is_kept = (np.arange(first, first + size) < num)[:, None]  # the others fill the last batch up
      total += float(program(trained, frozen, dataclasses.replace(batch, is_kept=is_kept), key))
    return total

  return run
