"""The verdict on one completion, and the worker process that grades tasks whose grading may hang or crash.

A worker is `python -c "from dmpo_jax.tasks import judge; judge.serve(...)"`: two processes that never import jax. The
inner process answers one request at a time over a pipe. The outer process, its keeper, ends the inner one and every
process that it has started, including those in other sessions.
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
    reward, grade = task.reward_and_grade(record, completion, is_ended)
    return Verdict("graded", *split_reward(reward, task.reward_parts), grade)
  except MemoryError:
    return Verdict("crash", problem="out of memory")
  except BadReward as error:
    return Verdict("failed", problem=str(error))
  except BaseException as error:  # a user's reward may raise anything, including SystemExit
    return Verdict("failed", problem=f"raised {describe(error)}")


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
  """Receive `make_task`'s arguments, then grade each (record, completion, is_ended, seconds) until the pipe closes."""
  limit = int(memory_gb * 2**30)
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  with Connection(requests) as connection:
    try:
      task = tasks.make_task(**connection.recv())
      getattr(task, "warm_up", lambda: None)()
      connection.send("ready")
      while True:
        record, completion, is_ended, seconds = connection.recv()
        signal.alarm(math.ceil(seconds) + GRACE)  # its default action ends the process
        verdict = judge(task, record, completion, is_ended)
        signal.alarm(0)
        connection.send(verdict)
    except (EOFError, BrokenPipeError):
      return


def _end_descendants() -> None:
  """Kill every descendant of this process."""
  while found := psutil.Process().children(recursive=True):
    for process in found:
      with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
    psutil.wait_procs(found, timeout=1)
