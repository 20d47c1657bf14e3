"""One completion's verdict, and the worker process that gives verdicts on tasks whose grading promises nothing.

A worker is `python -c "from dmpo_jax.tasks import judge; judge.serve(...)"`: two processes that import strings only,
never jax. The inner one answers one request at a time over a pipe. The outer one, its keeper, ends it and everything
that it has started, in sessions of their own too.
"""

import contextlib
import ctypes
import dataclasses
import math
import os
import resource
import select
import signal
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Literal

import psutil

from dmpo_jax import tasks
from dmpo_jax.tasks.base import BadReward, describe, split_reward

GRACE = 5  # seconds after the time limit in which a worker that nobody stops any more ends by itself
_SET_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # of Linux's prctl


NO_GRADE = tasks.Grade(is_correct=False, extracted=None, is_formatted=False)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What grading one completion came to."""

  kind: Literal["graded", "failed", "timeout", "crash"]
  reward: float = 0.0
  parts: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of the reward, by the task's names for them
  grade: tasks.Grade = NO_GRADE
  problem: str = ""  # of all kinds but "graded"


def judge(task: tasks.Task, record: tasks.Record, completion: str, is_ended: bool) -> Verdict:
  """Grade one completion.

  A reward that raises, or is not what `split_reward` takes, is "failed"; one that runs out of memory is a "crash".
  """
  try:
    reward, grade = task.reward_and_grade(record, completion, is_ended)
    return Verdict("graded", *split_reward(reward, task.reward_parts), grade)
  except MemoryError:
    return Verdict("crash", problem="out of memory")
  except BadReward as error:
    return Verdict("failed", problem=str(error))
  except BaseException as error:  # a user's reward may raise anything, SystemExit and KeyboardInterrupt too
    return Verdict("failed", problem=f"raised {describe(error)}")


def serve(requests: int, life: int, memory_gb: float) -> None:
  """Fork a process that answers requests, wait for its end, and end all that is left of it.

  Args:
    requests: file descriptor of the connection to the run.
    life: of a pipe that nobody writes to; once the run's end of it is closed, or the run has died, the worker ends.
    memory_gb: that the answering process, and each that it starts, may address.
  """
  _prctl(_SET_CHILD_SUBREAPER, 1)  # what a descendant leaves behind becomes this process's child
  answering = os.fork()
  if not answering:
    _prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)  # nobody answers without a keeper
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
  """Answer until the other end closes: `make_task`'s arguments, then (record, completion, ended, limit)."""
  limit = int(memory_gb * 2**30)
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  with Connection(requests) as connection:
    try:
      task = tasks.make_task(**connection.recv())
      getattr(task, "warm_up", lambda: None)()
      connection.send("ready")
      while True:
        record, completion, is_ended, seconds = connection.recv()
        signal.alarm(math.ceil(seconds) + GRACE)  # its default action ends the process, whatever runs
        verdict = judge(task, record, completion, is_ended)
        signal.alarm(0)
        connection.send(verdict)
    except (EOFError, BrokenPipeError):
      return


def _end_descendants() -> None:
  """Kill every process below this one, until there is none."""
  while found := psutil.Process().children(recursive=True):
    for process in found:
      with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
    psutil.wait_procs(found, timeout=1)
