"""Completions to rewards, in worker processes with limits, while the accelerators work on.

Tasks whose grading is fast on any text are graded in a thread of this process. All others (math-verify, a user's own
reward) are graded in worker processes, which start when first needed and are killed when late. A completion whose
grading hangs, crashes or runs out of memory gets reward 0 and is counted; the run goes on.
"""

import contextlib
import dataclasses
import itertools
import logging
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from typing import IO, Any

import jax
import numpy as np
from jaxtyping import Int

from dmpo_jax import processes
from dmpo_jax.hub.tokenizer import Tokenizer
from dmpo_jax.processes import PATIENCE, HostShare
from dmpo_jax.tasks import Limits, Record, Task, make_task, sandbox
from dmpo_jax.tasks.code import Code
from dmpo_jax.tasks.judge import Verdict, judge
from dmpo_jax.tasks.user import PythonTask, wait_before

logger = logging.getLogger(__name__)

START_SECONDS = 120.0  # for a worker to import and build its task
STOP_SECONDS = 10.0  # for a worker to end the processes that it has started
SLACK = 1.0  # beyond the time limits of awaited rewards, until their worker counts as stuck
KINDS = ("graded", "failed", "timeout", "crash")
_MAX_LOGGED = 5  # problems per batch that the log describes; all are counted
_MAX_LOGGED_LINES = 50  # per worker's stderr


CLOSED = Verdict("crash", problem="grading was closed")


class Grading:
  """Grades the completions of one task.

  Args:
    spec: the arguments of `tasks.make_task`, with which each worker makes the task.
    workers: number of worker processes, for a task that is not bounded.
    task: a task to use instead of `spec`; it is graded in this process.
    **limits: the fields of `Limits`; memory_gb is also the address space of one worker.

  Raises:
    ValueError: the task's rewards run what the model writes, and there is no sandbox.
  """

  def __init__(
    self,
    spec: dict[str, Any] | None = None,
    *,
    workers: int = 1,
    task: Task | None = None,
    **limits: Any,
  ):
    own = Limits(**limits)
    spec = (spec or {}) | {"limits": own}
    self.task = task or make_task(**spec)
    if isinstance(self.task, Code):
      sandbox.check(own.sandbox)
    self._is_local = task is not None or self.task.is_bounded
    self._limits = own
    self._awaits = isinstance(self.task, PythonTask) and self.task.is_awaited
    self._seconds = _most_seconds(own) if self._awaits else own.seconds  # that grading one completion may take
    self._threads = ThreadPoolExecutor(1 if self._is_local else workers, thread_name_prefix="grading")
    self._workers = [] if self._is_local else [_Worker(spec, own.memory_gb) for _ in range(workers)]
    self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in self._workers:
      self._idle.put(worker)
    self._is_closed = False

  def submit(self, records: Sequence[Record], completions: Sequence[str], is_ended: Sequence[bool]) -> "Pending":
    """Start grading completions, each with the record of its prompt; return at once."""
    start = time.monotonic()
    items = list(zip(records, completions, map(bool, is_ended), strict=True))
    if self._is_local:
      return Pending([self._threads.submit(self._judge, items)], len(items), start, 0.0)
    if self._awaits:
      size = max(-(-len(items) // len(self._workers)), 1)
      shares = [items[first : first + size] for first in range(0, len(items), size)]
      futures = [self._threads.submit(self._ask_together, share) for share in shares]
      return Pending(futures, len(items), start, self._seconds_for(len(items)))
    groups = itertools.groupby(items, key=lambda item: id(item[0]))  # a worker caches the answers of a prompt
    futures = [self._threads.submit(self._ask, list(group)) for _, group in groups]
    return Pending(futures, len(items), start, self._seconds_for(len(items)))

  def patience(self, num: int) -> float:
    """Return how many seconds a process may take longer than the others for its share of `num` completions.

    In the worst case, all of them reach the time limit on a single worker.
    """
    return PATIENCE + (0.0 if self._is_local else self._seconds_for(math.ceil(num / jax.process_count())))

  def tasks_of(self, records: Sequence[Record]) -> tuple[tuple[str, ...], list[int] | None]:
    """Return the names of a mixture's tasks, and which of them each record is of; () and None if there is one task."""
    return (), None

  def task_of(self, record: Record) -> Task:
    """Return the task of a record."""
    return self.task

  def _seconds_for(self, num: int) -> float:
    """Return how long `num` completions may take: one after the other, each as long as it may.

    Awaited rewards are first tried together, and then alone those that were lost with a worker that had to be stopped.
    """
    return num * self._seconds + (self._seconds_together(num) if self._awaits else 0.0)

  def _seconds_together(self, num: int) -> float:
    return math.ceil(num / self._limits.concurrency) * self._seconds + SLACK

  def _judge(self, items: list[tuple]) -> list[Verdict]:
    return [judge(self.task, *item) for item in items]

  def _ask(self, items: list[tuple]) -> list[Verdict]:
    worker = self._idle.get()
    try:
      return [self._ask_one(worker, item) for item in items]
    finally:
      self._idle.put(worker)

  def _ask_one(self, worker: "_Worker", item: tuple) -> Verdict:
    return CLOSED if self._is_closed else worker.ask([item], self._seconds)[0]

  def _ask_together(self, items: list[tuple]) -> list[Verdict]:
    """Grade by awaited rewards. What takes the worker with it is found by asking again, one at a time."""
    worker = self._idle.get()
    try:
      verdicts = worker.ask(items, self._seconds_together(len(items)))
      is_lost = [verdict.kind in ("timeout", "crash") for verdict in verdicts]
      again = (self._ask_one(worker, item) if lost else None for item, lost in zip(items, is_lost, strict=True))
      return [new or old for new, old in zip(again, verdicts, strict=True)]
    finally:
      self._idle.put(worker)

  def close(self) -> None:
    """Cancel grading that has not started, and end the workers at once."""
    self._is_closed = True
    self._threads.shutdown(wait=False, cancel_futures=True)
    for worker in self._workers:
      worker.stop()
    self._threads.shutdown(wait=True)  # a worker may just be starting
    for worker in self._workers:
      worker.stop()


class Pending:
  """Grading in progress."""

  def __init__(self, futures: list[Future], num: int, start: float, seconds: float):
    """Take futures of the verdicts; `seconds` is the longest time that they may take."""
    self._start, self._end, self._num, self._seconds = start, start, num, seconds
    self._futures = futures
    for future in futures:
      future.add_done_callback(self._note)

  def _note(self, _: Future) -> None:
    self._end = max(self._end, time.monotonic())

  def result(self) -> list[Verdict]:
    """Wait for the verdicts and return them in the order of the completions."""
    with processes.working(self._seconds):
      return [verdict for future in self._futures for verdict in future.result()]

  @property
  def per_second(self) -> float:
    """Completions graded per second, NaN if there were none; known after `result`."""
    return self._num / max(self._end - self._start, 1e-9) if self._num else math.nan


class _Worker:
  """One worker process. The first request starts it, and the next request after its death starts it again."""

  def __init__(self, spec: dict[str, Any], memory_gb: float):
    self._spec, self._memory_gb = spec, memory_gb
    self._process: subprocess.Popen | None = None
    self._stopping = threading.Lock()  # two threads may stop it: the one that asks and the one that closes

  def ask(self, items: Sequence[tuple], seconds: float) -> list[Verdict]:
    """Return the verdict on each (record, completion, is_ended), or a timeout on what is left after `seconds`."""
    found: dict[int, Verdict] = {}
    try:
      if self._process is None:
        self._start()
      self._connection.send((items, seconds))
      deadline = time.monotonic() + seconds
      while len(found) < len(items) and self._connection.poll(max(deadline - time.monotonic(), 0.0)):
        index, found_verdict = self._connection.recv()
        found[index] = found_verdict
      missing = Verdict("timeout", problem=f"took more than {seconds:g} seconds")
    except (EOFError, OSError) as error:
      missing = Verdict("crash", problem=f"its process ended ({error!r:.100})")
    if len(found) < len(items):
      self.stop()
    return [found.get(index, missing) for index in range(len(items))]

  def _start(self) -> None:
    self._connection, child = Pipe()
    alive, self._life = os.pipe()
    program = f"from dmpo_jax.tasks import judge; judge.serve({child.fileno()}, {alive}, {self._memory_gb})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    self._process = subprocess.Popen(
      [sys.executable, "-c", program],
      pass_fds=[child.fileno(), alive],
      env=environment,
      start_new_session=True,  # Ctrl-C reaches this process only
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,  # a user's prints do not belong in the run's output
      stderr=subprocess.PIPE,  # not the run's own, which processes left behind would keep open
    )
    child.close()
    os.close(alive)
    threading.Thread(target=_log_lines, args=[self._process.stderr], daemon=True).start()
    self._connection.send(self._spec)
    if not self._connection.poll(START_SECONDS):
      raise OSError(f"not ready within {START_SECONDS:g} seconds")
    self._connection.recv()

  def stop(self) -> None:
    """End the process and every process that it has started."""
    with self._stopping:
      if self._process is not None:
        self._end()

  def _end(self) -> None:
    assert self._process is not None
    os.close(self._life)  # the keeper notices and ends them
    try:
      self._process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:  # a reward has stopped the keeper
      self._process.kill()
      self._process.wait()
    if self._process.returncode:  # the keeper was killed: kill its process group
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self._process.pid, signal.SIGKILL)
    self._connection.close()
    self._process = None


def _most_seconds(limits: Limits) -> float:
  """Return how long an awaited reward may take, with all its attempts and the waits between them."""
  waits = sum(wait_before(retry) for retry in range(1, limits.retries + 1))
  return (limits.retries + 1) * limits.seconds + waits + SLACK


def _log_lines(stream: IO[bytes]) -> None:
  """Log the first lines that a worker writes to its stderr."""
  with stream:
    for number, line in enumerate(stream):
      if number < _MAX_LOGGED_LINES:
        logger.warning("a reward's stderr: %.500s", line.decode(errors="replace").rstrip())


@dataclasses.dataclass(frozen=True)
class Grades:
  """The rewards of a buffer, the same on every host."""

  reward: np.ndarray  # float32 [p, g]; 0 where dropped
  is_kept: np.ndarray  # bool [p, g]; False where the reward failed
  is_solved: np.ndarray  # bool [p, g]
  parts: np.ndarray | None = None  # float32 [p, g, parts]; the parts of the rewards, if they have any
  part_names: tuple[str, ...] = ()  # see Task.reward_parts
  task: np.ndarray | None = None  # int [p, g]; which task of a mixture a rollout is of
  task_names: tuple[str, ...] = ()  # of a mixture
  num_timeouts: int = 0  # completions with reward 0 because grading them took too long
  num_crashes: int = 0  # completions with reward 0 because grading them crashed or ran out of memory
  per_second: float = math.nan  # completions graded per second by this host; NaN if it had none

  @classmethod
  def join(cls, parts: Sequence["Grades"], group_size: int) -> "Grades":
    """Join the grades of a buffer's chunks, which hold its rollouts in order."""

    def groups(arrays: list[np.ndarray]) -> np.ndarray:
      rows = np.concatenate([array.reshape(-1, *array.shape[2:]) for array in arrays])
      return rows.reshape(-1, group_size, *rows.shape[1:])

    paces = [(part.reward.size, part.per_second) for part in parts if not math.isnan(part.per_second)]
    seconds = sum(size / pace for size, pace in paces)
    of_parts = [part.parts for part in parts if part.parts is not None]
    of_tasks = [part.task for part in parts if part.task is not None]
    return cls(
      reward=groups([part.reward for part in parts]),
      is_kept=groups([part.is_kept for part in parts]),
      is_solved=groups([part.is_solved for part in parts]),
      parts=groups(of_parts) if of_parts else None,
      part_names=parts[0].part_names,
      task=groups(of_tasks) if of_tasks else None,
      task_names=parts[0].task_names,
      num_timeouts=sum(part.num_timeouts for part in parts),
      num_crashes=sum(part.num_crashes for part in parts),
      per_second=sum(size for size, _ in paces) / seconds if paces else math.nan,
    )


def grade(
  grading: Grading, tokenizer: Tokenizer, records: Sequence[Record], completion: Int[np.ndarray, "p g c"]
) -> Callable[[], Grades]:
  """Start grading rollouts, each process its share of them; return a function that waits for all grades.

  A reward that fails drops its rollout from the group and never stops the run. A completion that timed out or crashed
  has 0 of each part.
  """
  group_size, length = completion.shape[1:]
  rows = completion.reshape(-1, length)
  share = HostShare(len(rows))
  texts, is_ended = decode(tokenizer, rows[share.mine])
  record_of_each = [record for record in records for _ in range(group_size)]
  pending = grading.submit(record_of_each[share.mine], texts, is_ended)
  names = grading.task.reward_parts
  task_names, task = grading.tasks_of(record_of_each)

  def collect() -> Grades:
    verdicts = pending.result()
    log_problems(grading.task, verdicts, texts)
    columns = [
      [x.reward, KINDS.index(x.kind), x.grade.is_correct, *(x.parts.get(name, 0.0) for name in names)] for x in verdicts
    ]
    table = np.array(columns, np.float32).reshape(-1, 3 + len(names))
    processes.meet("completions are graded", grading.patience(len(rows)))
    table = share.gather(table).reshape(-1, group_size, 3 + len(names))
    kind = table[..., 1]
    return Grades(
      reward=table[..., 0],
      is_kept=kind != KINDS.index("failed"),
      is_solved=table[..., 2] > 0,
      parts=table[..., 3:] if names else None,
      part_names=names,
      task=None if task is None else np.array(task, np.int64).reshape(-1, group_size),
      task_names=task_names,
      num_timeouts=int((kind == KINDS.index("timeout")).sum()),
      num_crashes=int((kind == KINDS.index("crash")).sum()),
      per_second=pending.per_second,
    )

  return collect


def decode(tokenizer: Tokenizer, completion: Int[np.ndarray, "... c"]) -> tuple[list[str], list[bool]]:
  """Return the texts of completions in order, and whether each ended with an end token."""
  rows = completion.reshape(-1, completion.shape[-1])
  ends = [*tokenizer.end_token_ids, tokenizer.eot_token_id]
  return [tokenizer.decode(row.tolist()) for row in rows], np.any(np.isin(rows, ends), axis=-1).tolist()


def log_problems(task: Task, verdicts: Sequence[Verdict], texts: Sequence[str]) -> None:
  """Log which completions could not be graded, and why."""
  problems = [(x, text) for x, text in zip(verdicts, texts, strict=True) if x.kind != "graded"]
  for verdict, text in problems[:_MAX_LOGGED]:
    name, outcome = type(task).__name__, "dropped" if verdict.kind == "failed" else "reward 0"
    logger.warning("the reward of task %s %s on completion %.200r: %s", name, verdict.problem, text, outcome)
  if len(problems) > _MAX_LOGGED:
    logger.warning("and %d more of %d completions", len(problems) - _MAX_LOGGED, len(verdicts))
