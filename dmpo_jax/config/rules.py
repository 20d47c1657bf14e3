"""Kinds of rules: which values a key may have, and what these must be to the values of other keys."""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

from etils import epath

from dmpo_jax import ranges
from dmpo_jax.ranges import Range
from dmpo_jax.tasks import TASKS, mixture, user


@dataclasses.dataclass(frozen=True)
class Relation:
  """What a key must be to others; checked only if all of them are right in themselves."""

  others: tuple[str, ...]
  problem: Callable[..., str]  # takes the key's value and the others'; "" if they fit


@dataclasses.dataclass(frozen=True)
class Rule(Range):
  """The values that one key may have, and what these must be to the values of others."""

  relations: tuple[Relation, ...] = ()

  def also(self, allowed: str, holds: Callable[..., bool], *others: str) -> "Rule":
    """Add a relation to other keys.

    Args:
      allowed: what would do; {0}, {1}, ... stand for the others and their values.
      holds: takes the key's value and the others'.
    """

    def problem(value: Any, *values: Any) -> str:
      named = (f"{path} = {other!r}" for path, other in zip(others, values, strict=True))
      return "" if holds(value, *values) else allowed.format(*named)

    return self.checked_by(problem, *others)

  def checked_by(self, problem: Callable[..., str], *others: str) -> "Rule":
    """Add a relation to other keys that says by itself what would do; see `Relation`."""
    return dataclasses.replace(self, relations=(*self.relations, Relation(others, problem)))


def of(own: Range) -> Rule:
  """Make a rule of a range, which a settings object may have stated."""
  return Rule(own.allowed, own.holds, own.names)


def whole(low: int, high: int = ranges.MOST) -> Rule:
  """Allow whole numbers from `low` to `high`."""
  return of(ranges.whole(low, high))


def number(interval: str) -> Rule:
  """Allow the finite numbers of an interval such as "[0, 1)"."""
  return of(ranges.number(interval))


def flag() -> Rule:
  """Allow True and False."""
  return Rule("True or False", lambda value: type(value) is bool)


def text() -> Rule:
  """Allow any string."""
  return Rule("a string", lambda value: isinstance(value, str))


def one_of(*names: str) -> Rule:
  """Allow one of these names."""
  return of(ranges.one_of(*names))


def some_of(*names: str, empty: str = "") -> Rule:
  """Allow a sequence of these names; an empty one only if `empty` says what it means."""

  def holds(value: Any) -> bool:
    return isinstance(value, tuple | list) and (bool(value) or bool(empty)) and all(name in names for name in value)

  return Rule(f"a tuple of {', '.join(names)}" + (f", or () for {empty}" if empty else ""), holds, names)


def existing(what: str, empty: str) -> Rule:
  """Allow the path of something that exists, and the empty path, which means `empty`."""
  allowed = f'the path of {what} that exists, or "" for {empty}'
  return Rule(allowed, lambda value: isinstance(value, str) and (not value or epath.Path(value).exists()))


def mesh_size(empty: str = "") -> Rule:
  """Allow the size of a mesh axis; 0 only if `empty` says what it means."""
  allowed = "1 or more, or -1 for the devices left" + (f", or 0 for {empty}" if empty else "")
  return Rule(allowed, lambda value: type(value) is int and (value >= 1 or value == -1 or (value == 0 and bool(empty))))


def lengths() -> Rule:
  """Allow a sequence of whole numbers above 0, or none."""
  rule = whole(1)
  return Rule(
    "a tuple of whole numbers, 1 or more, or () for the configured length",
    lambda value: isinstance(value, tuple | list) and all(rule.holds(length) for length in value),
  )


def task_name() -> Rule:
  """Allow a task's name, or a user's file that exists."""
  names = (*TASKS, mixture.NAME)
  return Rule(
    f"one of {', '.join(names)}, or the path of a .py or .jsonl file that exists",
    lambda value: value in names or (isinstance(value, str) and user.is_file(value) and epath.Path(value).is_file()),
    names,
  )


NO_WANDB = 'Weights & Biases is not installed: `pip install wandb`, or "" to do without it'


def wandb_project() -> Rule:
  """Allow a project's name if Weights & Biases is installed, and the empty one."""
  return Rule(
    f"the name of a project; {NO_WANDB}",
    lambda value: isinstance(value, str) and (not value or importlib.util.find_spec("wandb") is not None),
  )
