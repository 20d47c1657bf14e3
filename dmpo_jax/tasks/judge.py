"""One completion's verdict, and the worker process that gives verdicts on tasks whose grading promises nothing.

A worker is `python -c "from dmpo_jax.tasks import judge; judge.serve(...)"`: it imports strings only, never jax, and
answers one request at a time over a pipe.
"""

import dataclasses
import math
import resource
import signal
from multiprocessing.connection import Connection
from typing import Literal

from dmpo_jax import tasks

GRACE = 5  # seconds after the time limit in which a worker that nobody stops any more ends by itself


NO_GRADE = tasks.Grade(is_correct=False, extracted=None, is_formatted=False)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What grading one completion came to."""

  kind: Literal["graded", "failed", "timeout", "crash"]
  reward: float = 0.0
  grade: tasks.Grade = NO_GRADE
  problem: str = ""  # of all kinds but "graded"


def judge(task: tasks.Task, record: tasks.Record, completion: str, is_ended: bool) -> Verdict:
  """Grade one completion.

  A reward that raises, or is not one finite number, is "failed"; one that runs out of memory is a "crash".
  """
  try:
    reward = task.reward(record, completion)
    grade = task.grade(record, completion, is_ended)
  except MemoryError:
    return Verdict("crash", problem="out of memory")
  except Exception as error:  # a user's reward may raise anything
    return Verdict("failed", problem=f"raised {error!r:.300}")
  try:
    value = float(reward)
  except (TypeError, ValueError):
    return Verdict("failed", problem=f"gave {reward!r:.100}, not one number")
  if not math.isfinite(value):
    return Verdict("failed", problem=f"gave {value!r}")
  return Verdict("graded", value, grade)


def serve(file_descriptor: int, memory_gb: float) -> None:
  """Answer requests until the other end closes: `make_task`'s arguments, then (record, completion, ended, limit)."""
  limit = int(memory_gb * 2**30)
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  with Connection(file_descriptor) as connection:
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
