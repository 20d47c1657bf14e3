"""The tasks by name. Each is one file with its data, prompts, rewards and grading."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dmpo_jax.tasks import code, countdown, gsm8k, knights, maths, sudoku, user
from dmpo_jax.tasks.base import Grade, Limits, Record, Reward, Split, Task
from dmpo_jax.tasks.builtin import BuiltinTask

__all__ = [
  "TASKS",
  "Grade",
  "Limits",
  "Record",
  "Reward",
  "Split",
  "Task",
  "has_difficulty",
  "make_task",
  "option_types",
  "section",
  "spec",
]

TASKS: dict[str, type[BuiltinTask]] = {
  "sudoku": sudoku.Sudoku,
  "countdown": countdown.Countdown,
  "knights": knights.Knights,
  "gsm8k": gsm8k.GSM8K,
  "math": maths.Math,
  "code": code.Code,
}


def make_task(
  name: str, *, options: Mapping[str, Any], prompt: str, rewards: str, grader: str, limits: Limits | None = None
) -> Task:
  """Make a task.

  Args:
    name: a name in TASKS, or the path of a user's file (see `user.py`), which ignores prompt, rewards and grader.
    options: the keys of `config.task.<name>`, or of `config.task.user`.
    prompt, rewards, grader: see `BuiltinTask`. limits: of the grading of a completion; None: the defaults.

  Raises:
    ValueError: the task refuses its options, or the file cannot be used.
  """
  if user.is_file(name):
    return user.load(name, **options, limits=limits)
  return TASKS[name](**options, prompt_name=prompt, rewards=rewards, grader=grader, limits=limits or Limits())


def has_difficulty(name: str) -> bool:
  """Whether a task says how difficult a prompt is."""
  return name in TASKS and issubclass(TASKS[name], sudoku.Sudoku | countdown.Countdown | knights.Knights)


def section(name: str) -> str:
  """Return the section of `config.task` that holds a task's options; `user` for a user's file."""
  return "user" if user.is_file(name) else name


def spec(config: Mapping[str, Any]) -> dict[str, Any]:
  """Return the arguments of `make_task` from `config.task`."""
  names = {key: config[key] for key in ("name", "prompt", "rewards", "grader")}
  return names | {"options": dict(config[section(config["name"])])}


def option_types(name: str) -> dict[str, type]:
  """Return the names and types of a task's options, the keys of `config.task.<name>`."""
  if user.is_file(name):
    return {"grader": str}
  common = {field.name for field in dataclasses.fields(BuiltinTask)}
  # a type as it stands in the class: none is a string here
  return {field.name: field.type for field in dataclasses.fields(TASKS[name]) if field.name not in common}  # pyright: ignore[reportReturnType]
