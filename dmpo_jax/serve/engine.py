"""The model's side of serving: a bounded queue of jobs -> batches of them -> what every model call decided.

One thread has the device. Jobs that wait together are decoded together, so a batch is whatever has come meanwhile.
"""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dmpo_jax import noise
from dmpo_jax.build import ModelParts, make_sample
from dmpo_jax.data import prompt_id
from dmpo_jax.measure import Policies, check_confidence
from dmpo_jax.run.progress import Progress
from dmpo_jax.sample import BUCKET, pad

Publish = Callable[[int, np.ndarray], None]  # number of the model call (from 0), completions [b, c]
Decode = Callable[[Sequence["Job"], Publish], "Decoded"]


class Decoded(NamedTuple):
  """What a batch of jobs came to."""

  completion: np.ndarray  # [b, c]
  confidence: np.ndarray  # [b, c]; of the model in each token, at the call that decided it


@dataclasses.dataclass(eq=False)
class Job:
  """One prompt on its way.

  `deliver` is called in the engine's thread with ("state", (call, ids)) after model calls, and once, at the end, with
  ("done", (ids, confidence)) or ("failed", message).
  """

  prompt: list[int]
  deliver: Callable[[str, Any], None]
  seed: int | None = None  # None: the server's; the same prompt then gets the same completion
  temperature: float = 0.0
  choice: int = 0  # number of this completion among those of one request

  @property
  def bucket(self) -> int:
    """Prompts of one bucket share a program."""
    return max(-(-len(self.prompt) // BUCKET), 1)

  @property
  def prompt_id(self) -> int:
    """What the noise of its row belongs to."""
    return prompt_id(f"{self.prompt} {self.seed} {self.choice}")


class Engine:
  """A thread that decodes jobs in batches.

  Args:
    decode: decodes up to `batch_size` jobs of one bucket.
    max_queue: jobs that may wait.
  """

  def __init__(self, decode: Decode, *, batch_size: int, max_queue: int):
    self._decode, self._batch_size, self._max_queue = decode, batch_size, max_queue
    self._waiting: list[Job] = []  # the oldest first
    self._is_closed = False
    self._news = threading.Condition()  # guards both
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
    self._thread.start()

  def submit(self, jobs: Sequence[Job]) -> bool:
    """Queue all of a request's jobs; False: there is no room for them, or the engine is closed."""
    with self._news:
      if self._is_closed or len(self._waiting) + len(jobs) > self._max_queue:
        return False
      self._waiting += jobs
      self._news.notify()
      return True

  def withdraw(self, jobs: Sequence[Job]) -> None:
    """Give the places of jobs that nobody waits for any more to others; a batch that has begun is finished."""
    with self._news:
      self._waiting = [job for job in self._waiting if job not in jobs]

  def close(self) -> None:
    """Finish what is queued, and stop."""
    with self._news:
      self._is_closed = True
      self._news.notify()
    self._thread.join()

  def _run(self) -> None:
    while batch := self._take():
      self._decode_batch(batch)

  def _take(self) -> list[Job]:
    """Wait for jobs and take the oldest with others of its bucket; none are left where the engine has been closed."""
    with self._news:
      self._news.wait_for(lambda: self._waiting or self._is_closed)
      batch = [job for job in self._waiting if job.bucket == self._waiting[0].bucket][: self._batch_size]
      self._waiting = [job for job in self._waiting if job not in batch]
      return batch

  def _decode_batch(self, batch: Sequence[Job]) -> None:
    newest = -1

    def publish(number: int, completion: np.ndarray) -> None:
      nonlocal newest
      if number > newest:  # calls may come out of order
        newest = number
        for job, ids in zip(batch, completion, strict=False):
          job.deliver("state", (number, ids))

    try:
      decoded = self._decode(batch, publish)
    except Exception as error:  # a batch that fails must not end the server
      for job in batch:
        job.deliver("failed", f"{type(error).__name__}: {error}")
      return
    for job, *found in zip(batch, *decoded, strict=True):
      job.deliver("done", tuple(found))


def make_decode(config: ConfigDict, parts: ModelParts, policies: Policies) -> Decode:
  """Close over the model: one program for each bucket of prompt lengths, compiled when it is first needed.

  The shortest bucket's is compiled here, so that a server that listens can answer.
  """
  own, programs, current = config.serve, {}, [lambda number, completion: None]
  sample = make_sample(
    config,
    parts,
    group_size=1,
    temperature=0.0,  # each job brings its own
    early_exit=config.eval.early_exit,
    on_call=lambda number, completion, *_: current[0](int(number), np.asarray(completion)),
  )
  key = noise.step_key(config.seed, "sample", 0)

  def decode(jobs: Sequence[Job], publish: Publish) -> Decoded:
    numbers = np.array([job.prompt_id for job in jobs], np.uint32)
    prompts = pad([job.prompt for job in jobs], numbers, parts.tokenizer, num_rows=own.batch_size)
    temperature = np.zeros(own.batch_size, np.float32)
    temperature[: len(jobs)] = [job.temperature for job in jobs]
    length, arguments = prompts.tokens.shape[1], (policies, prompts, key, temperature)
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
