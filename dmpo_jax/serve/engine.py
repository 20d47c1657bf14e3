"""The model's side of serving: a bounded queue of jobs -> batches of them -> what every model call decided.

One thread has the device. Jobs that wait together are decoded together, so a batch is whatever has come meanwhile.
"""

import dataclasses
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dmpo_jax import noise
from dmpo_jax.build import ModelParts, make_sample
from dmpo_jax.data import prompt_id
from dmpo_jax.measure import Policies
from dmpo_jax.progress import Progress
from dmpo_jax.sample import BUCKET, pad

Publish = Callable[[int, np.ndarray], None]  # number of the model call (from 0), completions [b, c]
Decode = Callable[[Sequence["Job"], Publish], np.ndarray]  # jobs -> completions [b, c]


@dataclasses.dataclass(eq=False)
class Job:
  """One prompt on its way.

  `deliver` is called in the engine's thread with ("state", (call, ids)) after model calls, and once, at the end, with
  ("done", ids) or ("failed", message).
  """

  prompt: list[int]
  deliver: Callable[[str, Any], None]
  seed: int | None = None  # None: the server's; the same prompt then gets the same completion
  temperature: float = 0.0
  choice: int = 0  # number of this completion among those of one request
  is_cancelled: bool = False

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
    self._decode, self._batch_size = decode, batch_size
    self._queue: queue.Queue[Job | None] = queue.Queue(max_queue)
    self._is_closed = False
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
    self._thread.start()

  def submit(self, job: Job) -> bool:
    """Queue a job; False: there is no room, or the engine is closed."""
    try:
      if not self._is_closed:
        self._queue.put_nowait(job)
        return True
    except queue.Full:
      pass
    return False

  def close(self) -> None:
    """Finish what is queued, and stop."""
    self._is_closed = True
    self._queue.put(None)
    self._thread.join()

  def _run(self) -> None:
    left: list[Job] = []  # of another bucket than the batch that went before
    while True:
      waiting = left or [self._queue.get()]
      while len(waiting) < self._batch_size and not self._queue.empty():
        waiting.append(self._queue.get())
      is_last = None in waiting
      jobs = [job for job in waiting if job is not None and not job.is_cancelled]
      batch = [job for job in jobs if job.bucket == jobs[0].bucket][: self._batch_size]
      left = [job for job in jobs if job not in batch] + [None] * is_last
      if batch:
        self._decode_batch(batch)
      elif is_last:
        return

  def _decode_batch(self, batch: Sequence[Job]) -> None:
    newest = -1

    def publish(number: int, completion: np.ndarray) -> None:
      nonlocal newest
      if number > newest:  # calls may come out of order
        newest = number
        for job, ids in zip(batch, completion, strict=False):
          job.deliver("state", (number, ids))

    try:
      completion = self._decode(batch, publish)
    except Exception as error:  # a batch that fails must not end the server
      for job in batch:
        job.deliver("failed", f"{type(error).__name__}: {error}")
      return
    for job, ids in zip(batch, completion, strict=False):
      job.deliver("done", ids)


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

  def decode(jobs: Sequence[Job], publish: Publish) -> np.ndarray:
    numbers = np.array([job.prompt_id for job in jobs], np.uint32)
    prompts = pad([job.prompt for job in jobs], numbers, parts.tokenizer, num_rows=own.batch_size)
    temperature = np.zeros(own.batch_size, np.float32)
    temperature[: len(jobs)] = [job.temperature for job in jobs]
    length, arguments = prompts.tokens.shape[1], (policies, prompts, key, temperature)
    with jax.set_mesh(parts.mesh):
      if length not in programs:
        programs[length] = sample.lower(*arguments).compile()
      current[0] = publish
      rollouts = jax.device_get(programs[length](*arguments))
      jax.effects_barrier()
    return rollouts.completion[: len(jobs), 0]

  with Progress("compiling", 1) as shown:
    decode([Job([parts.tokenizer.eos_token_id], deliver=lambda kind, value: None)], current[0])
    shown.advance()
  return decode
