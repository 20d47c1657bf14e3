"""What a task is: its records, its prompts, demonstrations, rewards and grading.

Data flows from here to `data.py`, which turns records into tokens, and comes back from `rollout.py` and `evaluate.py`,
which pass decoded completions to be graded. A task handles strings only.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from etils import epath

from dmpo_jax.messages import Prompt

Record = dict[str, Any]  # one prompt and what grading needs; values that JSON can hold
Split = Literal["train", "test"]
Reward = float | Mapping[str, float]  # one number, or named parts whose sum is the reward


@dataclasses.dataclass(frozen=True)
class Limits:
  """How far the grading of one completion may go: `config.grading` without the number of workers."""

  seconds: float = 10.0
  memory_gb: float = 4.0
  sandbox: str = "bubblewrap"  # where a model's code runs, see `sandbox.SANDBOXES`
  concurrency: int = 16  # calls of an `async def reward` that one worker waits for at a time
  retries: int = 2  # of such a call, after an error or `seconds` without an answer


@dataclasses.dataclass(frozen=True)
class Grade:
  """The verdict on one completion."""

  is_correct: bool
  extracted: Any  # the answer found in the completion: a text, a number, or None
  is_formatted: bool = True  # the completion has the form that the prompt asks for
  value: complex | None = None  # value of an expression, if one was computed
  cells: tuple[int, int] | None = None  # correct cells and blank cells, if the grader counts cells of a Sudoku


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
  """The text of a task's prompts. `$name` is replaced by a field of the record; no other dollar sign is allowed."""

  text: str  # the user's turn
  prefill: str = ""  # the beginning of the answer, which the model does not have to write
  answer: str = "$answer"  # form of an answer between the answer tags
  is_tagged: bool = True  # the prompt asks for tags; otherwise the whole completion is the answer


@runtime_checkable
class Task(Protocol):
  """One task. Implementations are frozen dataclasses; `tasks.make_task` makes them."""

  version: ClassVar[str]  # version of the records, such as "1.0.0"; raised when the same options give other records

  def prompt(self, record: Record) -> Prompt:
    """Return what the model is to answer: the text of the user's turn, or a conversation."""
    ...

  @property
  def prefill(self) -> str:
    """The beginning of the answer, appended to every prompt; usually ""."""
    ...

  @property
  def is_bounded(self) -> bool:
    """Whether grading is fast on any text. If not, it runs in worker processes with a time limit."""
    ...

  def demonstration(self, record: Record, rng: np.random.Generator) -> str:
    """Return a completion to imitate. It follows the rules of the task, but its answer may be wrong."""
    ...

  def only_correct(self) -> "Task":
    """Return this task with demonstrations that are always correct."""
    ...

  @property
  def reward_parts(self) -> tuple[str, ...]:
    """The names of the parts of every reward, in order; () if a reward is one number."""
    ...

  def reward_and_grade(self, record: Record, completion: str, is_ended: bool = True) -> tuple[Reward, Grade]:
    """Return the reward and the grade of a completion; called once per completion.

    Args:
      is_ended: the completion ended with an end token, not because it reached its length.
    """
    ...

  def read_published(self, path: epath.PathLike) -> list[Record]:
    """Read a published test file.

    Raises:
      ValueError: rows cannot be used; all of them are listed.
    """
    ...


@runtime_checkable
class GeneratedTask(Task, Protocol):
  """A task whose records are generated."""

  def generate(self, split: Split, num: int, seed: int) -> Iterator[Record]:
    """Yield `num` different records, determined by the arguments. The splits of one seed share no answer."""
    ...

  def difficulty(self, record: Record) -> int:
    """Return how difficult a prompt is; more is harder."""
    ...


@runtime_checkable
class UserTask(Task, Protocol):
  """A task whose records are read from the user's file whenever they are needed."""

  def records(self, split: Split) -> list[Record]:
    """Return the records of a split.

    Raises:
      ValueError: records cannot be used; all of them are listed.
    """
    ...


MAX_REWARD = 1e15  # training squares and sums rewards in float32, whose range ends at 3e38
PART_NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)
TAKEN = ("mean", "std")  # metrics have reward_mean and reward_std beside reward_<part>


class NoAnswer(Exception):
  """An `async def reward` has not answered in time, at no attempt."""


class BadReward(ValueError):
  """A reward that is neither one finite number nor the parts that the task names."""


def check_part_names(names: Any) -> str:
  """Return the problem with the names of a reward's parts, or ""."""
  if not isinstance(names, tuple | list) or not all(isinstance(x, str) and PART_NAME.fullmatch(x) for x in names):
    return f'must be a tuple of names such as ("correct", "form"), not {describe(names)}'
  if clashes := [name for name in TAKEN if name in names]:
    return f"{clashes[0]!r} is taken: the metrics have reward_{clashes[0]} for the whole reward"
  return "names a part twice" if len(set(names)) < len(names) else ""


def split_reward(value: Any, names: Sequence[str]) -> tuple[float, dict[str, float]]:
  """Return a reward as one float, and its parts in the order of `names`.

  Raises:
    BadReward: without names, it is not one finite number; with names, it is not a mapping from each to such a number.
  """
  if not isinstance(value, Mapping):
    if names:
      raise BadReward(f"gave {describe(value)}, not the parts {', '.join(names)}")
    return finite_number(value), {}
  if not names:
    raise BadReward(f"gave the parts {describe(list(value))}: name them, as REWARD_PARTS = {describe(tuple(value))}")
  if set(value) != set(names):
    raise BadReward(f"gave the parts {describe(list(value))}, not {', '.join(names)}")
  parts = {}
  for name in names:
    try:
      parts[name] = finite_number(value[name])
    except BadReward as error:
      raise BadReward(f"{error} (part {name!r})") from error
  return finite_number(sum(parts.values())), parts


def finite_number(value: Any) -> float:
  """Return a number as a float.

  Raises:
    BadReward: it is not one finite number of at most MAX_REWARD. Text such as "1.0" is not a number.
  """
  try:
    if isinstance(value, str | bytes):
      raise TypeError("a text is not a number")
    number = float(value)
  except (TypeError, ValueError, OverflowError) as error:
    raise BadReward(f"gave {describe(value)}, not one finite number") from error
  if not math.isfinite(number):
    raise BadReward(f"gave {number}, not a finite number")
  if abs(number) > MAX_REWARD:
    raise BadReward(f"gave {number}, beyond the {MAX_REWARD:g} that learning can compute with")
  return number


def describe(value: Any) -> str:
  """Show a user's value in at most 100 characters, even if its `repr` raises."""
  try:
    return f"{value!r:.100}"
  except Exception:  # such as an int of too many digits
    return f"a value of type {type(value).__name__}"


def read_text(path: epath.PathLike) -> str:
  """Return the text of a published file, local or gs://.

  Raises:
    ValueError: the file does not exist, or is not text.
  """
  path = epath.Path(path)
  if not path.is_file():
    raise ValueError(f"task.eval_path={str(path)!r}: no such file")
  try:
    return path.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"task.eval_path={str(path)!r}: not a text file in UTF-8 ({error})") from error


def refuse_rows(path: epath.PathLike, problems: Sequence[str]) -> None:
  """Raise one ValueError that lists the problems in a published file, if there are any."""
  if problems:
    listing = "\n".join(f"  {problem}" for problem in problems)
    raise ValueError(f"task.eval_path={str(path)!r}: {len(problems)} rows cannot be used\n{listing}")


def refuse_options(problems: Sequence[str]) -> None:
  """Raise one ValueError that lists the problems with a task's options, if there are any."""
  if problems:
    raise ValueError("\n".join(problems))
