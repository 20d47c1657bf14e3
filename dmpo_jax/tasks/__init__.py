"""The tasks by name: one file each, with its data, its prompt, its reward and its grading."""

from collections.abc import Mapping
from typing import Any

from dmpo_jax.tasks import countdown, gsm8k, maths, sudoku, user
from dmpo_jax.tasks.base import Grade, Record, Split, Task

__all__ = ["TASKS", "Grade", "Record", "Split", "Task", "make_task"]

TASKS: dict[str, type[Task]] = {
  "sudoku": sudoku.Sudoku,
  "countdown": countdown.Countdown,
  "gsm8k": gsm8k.GSM8K,
  "math": maths.Math,
}


def make_task(name: str, *, options: Mapping[str, Any], prompt: str, rewards: str, grader: str) -> Task:
  """Make a task.

  Args:
    name: in TASKS, or the path of a user's file (see `user.py`), which has no choice of prompt, rewards and grader.
    options: the keywords of `config.task.<name>`, or of `config.task.user`.
    prompt, rewards, grader: see `WordedTask`.

  Raises:
    ValueError: options that the task refuses, or a file that cannot be used.
  """
  if user.is_file(name):
    return user.load(name, **options)
  return TASKS[name](**options, prompt_name=prompt, rewards=rewards, grader=grader)
