"""The verdict on one completion, and the worker process that grades tasks whose grading may hang or crash.

A worker is `python -c "from dmpo_jax.tasks import judge; judge.serve(...)"`: two processes that never import jax. The
inner process answers one request at a time over a pipe. The outer process, its keeper, ends the inner one and every
process that it has started, including those in other sessions.
"""

import asyncio
import contextlib
import ctypes
import dataclasses
import math
import os
import resource
import select
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Literal

import psutil

from dmpo_jax import tasks
from dmpo_jax.tasks.base import BadReward, NoAnswer, Reward, describe, split_reward
from dmpo_jax.tasks.user import PythonTask

GRACE = 5  # seconds after the time limit until a worker ends by itself, if nobody stops it
_SET_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # of Linux's prctl


NO_GRADE = tasks.Grade(is_correct=False, extracted=None, is_formatted=False)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The outcome of grading one completion."""

  kind: Literal["graded", "failed", "timeout", "crash"]
  reward: float = 0.0
  parts: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of the reward, by name
  grade: tasks.Grade = NO_GRADE
  problem: str = ""  # set unless kind is "graded"


def judge(task: tasks.Task, record: tasks.Record, completion: str, is_ended: bool) -> Verdict:
  """Grade one completion.

  A reward that raises, or that `split_reward` refuses, is "failed". One that runs out of memory is a "crash".
  """
  try:
    return _verdict(task, *task.reward_and_grade(record, completion, is_ended))
  except BaseException as error:  # a user's reward may raise anything, including SystemExit
    return _verdict_on(error)


async def judge_awaited(task: PythonTask, record: tasks.Record, completion: str) -> Verdict:
  """Grade one completion as `judge` does, of a task whose reward is awaited.

  One that never answers is "failed": that it took long says nothing of the completion.
  """
  try:
    return _verdict(task, *await task.await_reward_and_grade(record, completion))
  except BaseException as error:
    return _verdict_on(error)


def _verdict(task: tasks.Task, reward: Reward, grade: tasks.Grade) -> Verdict:
  return Verdict("graded", *split_reward(reward, task.reward_parts), grade)


def _verdict_on(error: BaseException) -> Verdict:
  """Return the verdict on a completion whose reward has raised this."""
  if isinstance(error, MemoryError):
    return Verdict("crash", problem="out of memory")
  is_said = isinstance(error, BadReward | NoAnswer)
  return Verdict("failed", problem=str(error) if is_said else f"raised {describe(error)}")


def serve(requests: int, life: int, memory_gb: float) -> None:
  """Fork a process that answers requests, wait for its end, and end every process that it leaves behind.

  Args:
    requests: file descriptor of the connection to the run.
    life: file descriptor of a pipe without data. The worker ends when the run closes its end of the pipe, or dies.
    memory_gb: address space of the answering process, and of each process that it starts.
  """
  _prctl(_SET_CHILD_SUBREAPER, 1)  # orphaned descendants become children of this process
  answering = os.fork()
  if not answering:
    _prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)  # the inner process does not outlive its keeper
    os.close(life)
    code = 1
    try:
      _answer(requests, memory_gb)
      code = 0
    finally:
      os._exit(code)
  os.close(requests)
  while not select.select([life], [], [], 0.05)[0] and os.waitpid(answering, os.WNOHANG)[0] == 0:
    pass
  _end_descendants()


def _prctl(option: int, value: int) -> None:
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _answer(requests: int, memory_gb: float) -> None:
  """Receive `make_task`'s arguments, then requests until the pipe closes.

  A request is ([(record, completion, is_ended), ...], seconds for all of them). For each completion, its index and its
  verdict are sent as soon as it is known.
  """
  limit = int(memory_gb * 2**30)
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  with Connection(requests) as connection:
    try:
      task = tasks.make_task(**connection.recv())
      getattr(task, "warm_up", lambda: None)()
      loop = _Loop(task) if isinstance(task, PythonTask) and task.is_awaited else None
      connection.send("ready")
      while True:
        items, seconds = connection.recv()
        signal.alarm(math.ceil(seconds) + GRACE)  # its default action ends the process
        if loop is not None:
          loop.judge_all(items, lambda *found: connection.send(found))
        else:
          for index, item in enumerate(items):
            connection.send((index, judge(task, *item)))
        signal.alarm(0)
    except (EOFError, BrokenPipeError):
      return


class _Loop:
  """An event loop, the same for all requests, as threads that a reward has started may outlive one."""

  def __init__(self, task: PythonTask):
    self._task = task
    self._loop = asyncio.new_event_loop()
    self._loop.set_default_executor(ThreadPoolExecutor(task.limits.concurrency))  # of asyncio.to_thread

  def judge_all(self, items: Sequence[tuple], tell: Callable[[int, Verdict], None]) -> None:
    """Grade completions, `Limits.concurrency` at a time."""
    turns = asyncio.Semaphore(self._task.limits.concurrency)

    async def judge_one(index: int, record: tasks.Record, completion: str) -> None:
      async with turns:
        tell(index, await judge_awaited(self._task, record, completion))

    async def judge_each(calls: Sequence[Awaitable[None]]) -> None:
      await asyncio.gather(*calls)

    self._loop.run_until_complete(judge_each([judge_one(index, *item[:2]) for index, item in enumerate(items)]))


def _end_descendants() -> None:
  """Kill every descendant of this process."""
  while found := psutil.Process().children(recursive=True):
    for process in found:
      with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
    psutil.wait_procs(found, timeout=1)
