"""The model's side of serving: a bounded queue of jobs -> batches -> the completions after every model call.

One thread owns the device. A batch is made of the jobs that arrived while the last one was decoded. Models that attend
by blocks have another engine (`slots.py`).
"""

import dataclasses
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dmpo_jax import noise
from dmpo_jax.data import prompt_id
from dmpo_jax.policy import ModelParts, Policies, check_confidence, make_sample
from dmpo_jax.run.progress import Progress
from dmpo_jax.sample import BUCKET, pad

Publish = Callable[[int, np.ndarray], None]  # number of the model call (from 0), completions [b, c]
Decode = Callable[[Sequence["Job"], Publish], "Decoded"]


class Decoded(NamedTuple):
  """The completions of a batch of jobs."""

  completion: np.ndarray  # [b, c]
  confidence: np.ndarray  # [b, c]; the model's probability of each token, at the call that decided it


@dataclasses.dataclass(eq=False)
class Job:
  """One completion to decode.

  The engine's thread calls `deliver` with ("state", (call, ids)) after model calls, and once at the end with
  ("done", (ids, confidence)) or ("failed", message).
  """

  prompt: list[int]
  deliver: Callable[[str, Any], None]
  seed: int | None = None  # None: the server's, which gives a prompt the same completion every time
  temperature: float = 0.0
  choice: int = 0  # index of this completion among those of its prompt
  max_tokens: int | None = None  # that are wanted; None: all
  is_wanted: bool = True  # False once it was withdrawn

  @property
  def bucket(self) -> int:
    """Length class of the prompt; prompts of one bucket share a program."""
    return max(-(-len(self.prompt) // BUCKET), 1)

  @property
  def prompt_id(self) -> int:
    """The id from which the noise of its row is derived."""
    return prompt_id(f"{self.prompt} {self.seed} {self.choice}")


class JobQueue:
  """A thread that decodes jobs, and the jobs that wait for it. Its subclasses say how.

  Args:
    batch_size: jobs that are decoded at a time.
    max_queue: the most jobs that may wait.
  """

  def __init__(self, *, batch_size: int, max_queue: int):
    self._batch_size, self._max_queue = batch_size, max_queue
    self._waiting: list[Job] = []  # the oldest first
    self._is_closed = False
    self._news = threading.Condition()  # guards the two above
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
    self._thread.start()

  def _run(self) -> None:
    raise NotImplementedError

  def submit(self, jobs: Sequence[Job]) -> bool:
    """Queue all jobs of a request, or none; False: the queue is full or the engine is closed."""
    with self._news:
      if self._is_closed or len(self._waiting) + len(jobs) > self._max_queue:
        return False
      self._waiting += jobs
      self._news.notify()
      return True

  def withdraw(self, jobs: Sequence[Job]) -> None:
    """Remove jobs from the queue; a batch that has begun is finished, a slot is given up."""
    for job in jobs:
      job.is_wanted = False
    with self._news:
      self._waiting = [job for job in self._waiting if job not in jobs]

  def close(self) -> None:
    """Finish the queued jobs, then stop."""
    with self._news:
      self._is_closed = True
      self._news.notify()
    self._thread.join()


class Engine(JobQueue):
  """A thread that decodes jobs in batches.

  Args:
    decode: decodes up to `batch_size` jobs of one bucket.
    batch_size, max_queue: see `JobQueue`.
  """

  def __init__(self, decode: Decode, *, batch_size: int, max_queue: int):
    self._decode = decode
    super().__init__(batch_size=batch_size, max_queue=max_queue)

  def _run(self) -> None:
    while batch := self._take():
      self._decode_batch(batch)

  def _take(self) -> list[Job]:
    """Wait for jobs; take the oldest and others of its bucket, or none once the engine is closed and has no more."""
    with self._news:
      self._news.wait_for(lambda: self._waiting or self._is_closed)
      batch = [job for job in self._waiting if job.bucket == self._waiting[0].bucket][: self._batch_size]
      self._waiting = [job for job in self._waiting if job not in batch]
      return batch

  def _decode_batch(self, batch: Sequence[Job]) -> None:
    newest = -1

    def publish(number: int, completion: np.ndarray) -> None:
      nonlocal newest
      if number > newest:  # callbacks may come out of order
        newest = number
        for job, ids in zip(batch, completion, strict=False):
          job.deliver("state", (number, ids))

    try:
      decoded = self._decode(batch, publish)
    except Exception as error:  # a failed batch must not end the server
      fail(batch, error)
      return
    for job, *found in zip(batch, *decoded, strict=True):
      job.deliver("done", tuple(found))


def fail(jobs: Iterable[Job], error: Exception) -> None:
  """Tell the clients of jobs what went wrong."""
  for job in jobs:
    job.deliver("failed", f"{type(error).__name__}: {error}")


def make_decode(config: ConfigDict, parts: ModelParts, policies: Policies) -> Decode:
  """Make the function that decodes a batch; each bucket of prompt lengths has a program, compiled on first use.

  That of the shortest bucket is compiled here, so that a server that listens can respond.
  """
  batch_size, programs = config.serve.batch_size, {}
  current: list[Publish] = [lambda number, completion: None]
  sample = make_sample(
    config,
    parts.model,
    parts.mesh,
    group_size=1,
    temperature=0.0,  # each job brings its own
    early_exit=config.eval.early_exit,
    on_call=lambda number, completion, *_: current[0](int(number), np.asarray(completion)),
  )
  key = noise.step_key(config.seed, "sample", 0)

  def decode(jobs: Sequence[Job], publish: Publish) -> Decoded:
    numbers = np.array([job.prompt_id for job in jobs], np.uint32)
    prompts = pad([job.prompt for job in jobs], numbers, parts.tokenizer, num_rows=batch_size)
    temperature = np.zeros(batch_size, np.float32)
    temperature[: len(jobs)] = [job.temperature for job in jobs]
    length, arguments = prompts.tokens.shape[1], (policies, prompts, key, 0, temperature)
    with jax.set_mesh(parts.mesh):
      if length not in programs:
        with Progress(f"compiling for prompts of up to {length} tokens", 1) as shown:
          programs[length] = sample.lower(*arguments).compile()
          shown.advance()
      current[0] = publish
      rollouts = jax.device_get(programs[length](*arguments))
      jax.effects_barrier()
    check_confidence(rollouts)
    return Decoded(rollouts.completion[: len(jobs), 0], rollouts.confidence[: len(jobs), 0])

  decode([Job([parts.tokenizer.eos_token_id], deliver=lambda kind, value: None)], current[0])
  return decode
