"""The engine for models that attend by blocks: a job joins while others are decoded, and leaves when it is done."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from dmpo_jax import continuous, noise
from dmpo_jax.policy import ModelParts, Policies, check_confidence
from dmpo_jax.run.progress import Progress
from dmpo_jax.sample import BUCKET, pad
from dmpo_jax.samplers import SAMPLERS
from dmpo_jax.serve.engine import Job, JobQueue, fail
from dmpo_jax.structs import Rollouts

LANES = 2  # at a time: each has slots of its own


class Lane:
  """The slots for prompts of one bucket.

  Args:
    session: its tags are jobs.
    encode: lays jobs out as rows.
    can_revoke: the sampler may change decided tokens of a row's current block.
  """

  def __init__(
    self, session: continuous.Session, encode: Callable[[Sequence[Job]], continuous.Queued], *, can_revoke: bool
  ):
    self.session, self._encode, self._can_revoke = session, encode, can_revoke
    self._num_shown: dict[Job, int] = {}  # calls of each job that were delivered

  @property
  def jobs(self) -> list[Job]:
    """The jobs in the slots."""
    return [job for job in self.session.tags if job is not None]

  def fill(self, jobs: Sequence[Job]) -> None:
    """Put jobs into slots, of which so many must be free."""
    while jobs:
      jobs = jobs[self.session.fill(self._encode(jobs), jobs) :]

  def advance(self) -> None:
    """Make one model call and deliver what it has decided; jobs that nobody wants any more give up their slots."""
    for job in self.jobs:
      if not job.is_wanted:
        self._leave(job)
    slots = {job: slot for slot, job in enumerate(self.session.tags) if job is not None}
    if not slots:
      return
    done = {job for job, _ in self.session.advance(self.session.num_free + 1, most_calls=1)}
    for job, slot in slots.items():
      row = jax.tree.map(lambda array, slot=slot: array[slot], self.session.rows)
      self._deliver(job, row, is_done=job in done)

  def _deliver(self, job: Job, row: Rollouts, *, is_done: bool) -> None:
    number, ids = int(row.num_calls), np.asarray(row.completion)
    if number > self._num_shown.get(job, 0):
      self._num_shown[job] = number
      job.deliver("state", (number - 1, ids))
    is_decided = np.asarray(row.seen_at) < number
    is_enough = job.max_tokens is not None and not self._can_revoke and is_decided[: job.max_tokens].all()
    if not is_done and not is_enough:
      return
    try:
      check_confidence(row)
      job.deliver("done", (ids, np.asarray(row.confidence)))
    except Exception as error:  # a failed job must not end the server
      fail([job], error)
    self._leave(job)

  def _leave(self, job: Job) -> None:
    self._num_shown.pop(job, None)
    if job in self.session.tags:
      self.session.drop(job)


class SlotEngine(JobQueue):
  """A thread that decodes jobs in slots. Every bucket with jobs has a lane; the lanes take turns, a model call each.

  Args:
    open_lane: makes the lane of a bucket.
    batch_size: slots of a lane.
    max_queue: the most jobs that may wait.
  """

  def __init__(self, open_lane: Callable[[int], Lane], *, batch_size: int, max_queue: int):
    self._open_lane, self._lanes = open_lane, dict[int, Lane]()
    super().__init__(batch_size=batch_size, max_queue=max_queue)

  def _run(self) -> None:
    while self._wait():
      for bucket, jobs in self._take_joining().items():
        with self._failing(bucket, jobs):
          if bucket not in self._lanes:
            self._lanes[bucket] = self._open_lane(bucket)
          self._lanes[bucket].fill(jobs)
      for bucket, lane in list(self._lanes.items()):
        with self._failing(bucket, lane.jobs):
          lane.advance()
        if not lane.jobs:
          self._lanes.pop(bucket, None)  # and with it the memory of its slots

  def _wait(self) -> bool:
    """Wait until there is something to do; False: the engine is closed and has no more jobs."""
    with self._news:
      self._news.wait_for(lambda: self._waiting or self._lanes or self._is_closed)
      return bool(self._waiting or self._lanes)

  def _take_joining(self) -> dict[int, list[Job]]:
    """Take the waiting jobs for which there is a slot, by bucket, the oldest first.

    None overtakes a job that waits for a lane, so that one becomes free.
    """
    with self._news:
      joining: dict[int, list[Job]] = {}
      for job in self._waiting:
        if len({*self._lanes, *joining, job.bucket}) > LANES:
          break
        taken, lane = joining.setdefault(job.bucket, []), self._lanes.get(job.bucket)
        if len(taken) < (lane.session.num_free if lane else self._batch_size):
          taken.append(job)
      self._waiting = [job for job in self._waiting if job not in joining.get(job.bucket, ())]
      return {bucket: jobs for bucket, jobs in joining.items() if jobs}

  @contextlib.contextmanager
  def _failing(self, bucket: int, jobs: Sequence[Job]) -> Iterator[None]:
    """Let what goes wrong with a lane be the failure of its jobs alone."""
    lane = self._lanes.get(bucket)
    own = {*jobs, *(lane.jobs if lane else ())}
    try:
      yield
    except Exception as error:
      fail(own, error)
      self._lanes.pop(bucket, None)


def make_slot_engine(config: ConfigDict, parts: ModelParts, policies: Policies) -> SlotEngine:
  """Make the engine; each bucket of prompt lengths has programs, compiled on first use.

  Those of the shortest bucket are compiled here, so that a server that listens can respond.
  """
  serve, tokenizer, key = config.serve, parts.tokenizer, noise.step_key(config.seed, "sample", 0)
  programs = continuous.Programs(
    config,
    parts.model,
    parts.mesh,
    num_slots=serve.batch_size,
    temperature=None,  # each job brings its own
    early_exit=config.eval.early_exit,
  )
  compiled: set[int] = set()

  def encode(jobs: Sequence[Job]) -> continuous.Queued:
    numbers = np.array([job.prompt_id for job in jobs], np.uint32)
    prompts = pad([job.prompt for job in jobs], numbers, tokenizer, num_rows=len(jobs))
    temperature = np.array([job.temperature for job in jobs], np.float32)
    return continuous.Queued.of_prompts(prompts, 1)._replace(temperature=temperature)

  def open_lane(bucket: int) -> Lane:
    first = encode([Job([tokenizer.eos_token_id] * (bucket * BUCKET), deliver=lambda kind, value: None)])
    session = continuous.Session(programs, policies, key, first)
    if bucket not in compiled:
      with Progress(f"compiling for prompts of up to {bucket * BUCKET} tokens", 1) as shown:
        session.fill(first, [0])
        session.advance(num_done=programs.num_slots, most_calls=1)
        shown.advance()
      compiled.add(bucket)
      session = continuous.Session(programs, policies, key, first)
    return Lane(session, encode, can_revoke=SAMPLERS[config.sampler.name].can_revoke)

  open_lane(1)
  return SlotEngine(open_lane, batch_size=programs.num_slots, max_queue=serve.max_queue)
