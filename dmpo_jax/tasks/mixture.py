"""Several tasks in one run: what `task.mixture` says of them, and the task that hands each record to its own.

A record of a mixture has its task's name under OF_TASK.
"""

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from etils import epath

from dmpo_jax.messages import Prompt
from dmpo_jax.tasks.base import Grade, Record, Reward, Task

NAME = "mixture"  # as task.name
OF_TASK = "task_of_mixture"
OWN_KEYS = ("prompt", "rewards", "grader", "data_dir", "eval_path", "num_train", "num_test", "curriculum")  # of task
TAKEN = ("mean", "std", "low", "high")  # metrics have reward_mean, solve_rate_low and others beside reward_<task>
OWN_LIMITS = ("workers", "seconds", "memory_gb", "concurrency", "retries", "sandbox")  # of grading


@dataclasses.dataclass(frozen=True)
class Part:
  """One task of a mixture."""

  share: float  # of the prompts; those of all parts add up to 1
  keys: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of OWN_KEYS, in place of the run's
  limits: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of OWN_LIMITS


def label(name: str) -> str:
  """Return what a task is called in metrics: its name, or its file's without folder and ending."""
  return epath.Path(name).stem


def read(text: str) -> dict[str, Part]:
  """Read "{'gsm8k': 0.5, 'countdown': {'share': 0.5, 'seconds': 2.0}}".

  Raises:
    ValueError: it is no such text; the message says what would do.
  """
  form = "write \"{'gsm8k': 0.5, 'countdown': 0.5}\", or \"{'gsm8k': {'share': 0.5, 'rewards': 'published'}, ...}\""
  try:
    found = ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
    raise ValueError(f"not a dict of tasks: {form}") from error
  if not isinstance(found, dict) or len(found) < 2 or not all(isinstance(name, str) for name in found):
    raise ValueError(f"not a dict of two tasks or more: {form}")
  parts = {name: dict(own) if isinstance(own, dict) else {"share": own} for name, own in found.items()}
  for name, own in parts.items():
    share = own.get("share")
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1e9:
      raise ValueError(f"{name!r} has the share {share!r}: give a number above 0")
    if unknown := [key for key in own if key not in ("share", *OWN_KEYS, *OWN_LIMITS)]:
      raise ValueError(f"{name!r} has no key {unknown[0]!r} of its own: {', '.join(('share', *OWN_KEYS, *OWN_LIMITS))}")
  labels = [label(name) for name in parts]
  for name in labels:
    if labels.count(name) > 1 or name in TAKEN:
      why = "two tasks are called so" if labels.count(name) > 1 else "the metrics have other figures of this name"
      raise ValueError(f"a file's name without its ending, {name!r}, is a task's in the metrics, and {why}: rename it")
  total = sum(own["share"] for own in parts.values())
  return {
    name: Part(
      own["share"] / total,
      {key: own[key] for key in OWN_KEYS if key in own},
      {key: own[key] for key in OWN_LIMITS if key in own},
    )
    for name, own in parts.items()
  }


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Tasks by name. A reward is one number: the tasks' rewards have different parts."""

  tasks: Mapping[str, Task]

  version: ClassVar[str] = "1.0.0"

  def __post_init__(self) -> None:
    if len({task.prefill for task in self.tasks.values()}) > 1:
      raise ValueError("task.mixture: its tasks begin the answer differently; give them the same task.prompt")

  def of(self, record: Record) -> Task:
    """Return the task of a record."""
    return self.tasks[record[OF_TASK]]

  @property
  def prefill(self) -> str:
    """The beginning of every answer."""
    return next(iter(self.tasks.values())).prefill

  @property
  def is_bounded(self) -> bool:
    """Whether grading is fast on any text, for all tasks."""
    return all(task.is_bounded for task in self.tasks.values())

  @property
  def reward_parts(self) -> tuple[str, ...]:
    """None: each task has others."""
    return ()

  def prompt(self, record: Record) -> Prompt:
    """Return the prompt of the record's task."""
    return self.of(record).prompt(record)

  def demonstration(self, record: Record, rng: np.random.Generator) -> str:
    """Return a demonstration of the record's task."""
    return self.of(record).demonstration(record, rng)

  def only_correct(self) -> "Mixture":
    """Return this mixture with demonstrations that are always correct."""
    return Mixture({name: task.only_correct() for name, task in self.tasks.items()})

  def reward_and_grade(self, record: Record, completion: str, is_ended: bool = True) -> tuple[Reward, Grade]:
    """Return the reward, as one number, and the grade of the record's task."""
    reward, grade = self.of(record).reward_and_grade(record, completion, is_ended)
    return sum(reward.values()) if isinstance(reward, Mapping) else reward, grade

  def read_published(self, path: epath.PathLike) -> list[Record]:
    """Refuse: each task has a test file of its own."""
    raise ValueError(
      f"task.eval_path={str(path)!r}: give each task of task.mixture its own eval_path, and leave this ''"
    )
