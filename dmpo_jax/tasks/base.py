"""What a task is: where its prompts come from, how they read, and what an answer to them is worth.

First in the flow: `data.py` turns a task's records into tokens, `rollout.py` and `evaluate.py` hand the decoded
completions back to it. A task sees strings only.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from etils import epath

from dmpo_jax.messages import Prompt

Record = dict[str, Any]  # one prompt and what grading it needs: strings and numbers, as JSON keeps them
Split = Literal["train", "test"]
Reward = float | Mapping[str, float]  # one number, or named parts: their sum is the reward


@dataclasses.dataclass(frozen=True)
class Grade:
  """The verdict on one completion."""

  is_correct: bool
  extracted: Any  # what was taken as the answer: a text, a number, or None where there was none
  is_formatted: bool = True  # whether the text has the form that the prompt asks for
  value: complex | None = None  # of an expression, where one was computed
  cells: tuple[int, int] | None = None  # right cells and blank cells, where the grader counts those of a Sudoku


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
  """How a task's prompts read. `$name` stands for a field of the record; a template has no other dollar sign."""

  text: str  # the user's turn
  prefill: str = ""  # the beginning of the answer, which the model is not to write any more
  answer: str = "$answer"  # how an answer to it is written between the answer tags
  is_tagged: bool = True  # whether the answer is asked for in tags; otherwise the whole completion is the answer


@runtime_checkable
class Task(Protocol):
  """One task. Implementations are frozen dataclasses; `tasks.make_task` makes them."""

  version: ClassVar[str]  # of the records, as "1.0.0": raised whenever the same options would give other ones

  def prompt(self, record: Record) -> Prompt:
    """Return what the model is to answer: the text of the user's turn, or a conversation."""
    ...

  @property
  def prefill(self) -> str:
    """The beginning of the answer that every prompt ends with; "" mostly."""
    ...

  @property
  def is_bounded(self) -> bool:
    """Whether reward and grade surely end soon on any text; if not, they run in worker processes with a time limit."""
    ...

  def demonstration(self, record: Record, rng: np.random.Generator) -> str:
    """Return a completion to imitate; it knows the rules of the task, but not always the answer."""
    ...

  def only_correct(self) -> "Task":
    """Return this task with demonstrations that are always right."""
    ...

  @property
  def reward_parts(self) -> tuple[str, ...]:
    """The names of the parts that every reward has, in their order; (): a reward is one number."""
    ...

  def reward_and_grade(self, record: Record, completion: str, is_ended: bool = True) -> tuple[Reward, Grade]:
    """Return what a completion is worth and whether it is right.

    Called once per completion.

    Args:
      is_ended: the completion ended by an end token, not by its length.
    """
    ...

  def read_published(self, path: epath.PathLike) -> list[Record]:
    """Read a published test file; one ValueError lists every row that cannot be used."""
    ...


@runtime_checkable
class GeneratedTask(Task, Protocol):
  """A task whose records are generated."""

  def generate(self, split: Split, num: int, seed: int) -> Iterator[Record]:
    """Yield `num` different records, a function of the arguments; the splits of one seed share no answer."""
    ...


MAX_REWARD = 1e15  # learning squares rewards, and adds them up, in float32, which ends at 3e38


PART_NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)
TAKEN = ("mean", "std")  # metrics have reward_mean and reward_std beside reward_<part>


class BadReward(ValueError):
  """A reward that is neither one finite number nor the parts that the task names."""


def check_part_names(names: Any) -> str:
  """Return what is wrong with the names of a reward's parts; "" if nothing is."""
  if not isinstance(names, tuple | list) or not all(isinstance(x, str) and PART_NAME.fullmatch(x) for x in names):
    return f'must be a tuple of names such as ("correct", "form"), not {describe(names)}'
  if clashes := [name for name in TAKEN if name in names]:
    return f"{clashes[0]!r} is taken: the metrics have reward_{clashes[0]} for the whole reward"
  return "names a part twice" if len(set(names)) < len(names) else ""


def split_reward(value: Any, names: Sequence[str]) -> tuple[float, dict[str, float]]:
  """Return a reward as one float, and its parts in the order of `names`: {} where these are none.

  Raises:
    BadReward: it is not one finite number, or not a mapping from each of `names` to one.
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
    BadReward: it is anything but one finite number of at most MAX_REWARD, such as a text that reads like one.
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
  """Show a value of a user's in at most 100 characters, whatever its `repr` does."""
  try:
    return f"{value!r:.100}"
  except Exception:  # such as an int of too many digits
    return f"a value of type {type(value).__name__}"


def read_text(path: epath.PathLike) -> str:
  """Return the text of a published file, local or gs://.

  Raises:
    ValueError: there is no such file, or it is not text.
  """
  path = epath.Path(path)
  if not path.is_file():
    raise ValueError(f"task.eval_path={str(path)!r}: no such file")
  try:
    return path.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"task.eval_path={str(path)!r}: not a text file in UTF-8 ({error})") from error


def refuse_rows(path: epath.PathLike, problems: Sequence[str]) -> None:
  """Raise one ValueError that lists the problems found in a published file, if there are any."""
  if problems:
    listing = "\n".join(f"  {problem}" for problem in problems)
    raise ValueError(f"task.eval_path={str(path)!r}: {len(problems)} rows cannot be used\n{listing}")


def refuse_options(problems: Sequence[str]) -> None:
  """Raise one ValueError that lists the problems of a task's options, one a line, if there are any."""
  if problems:
    raise ValueError("\n".join(problems))
