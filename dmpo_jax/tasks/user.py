"""A user's own task: a Python file with a few functions, or a JSONL file of prompts and answers, or of chats.

--config.task.name=path/to/my_task.py        the file defines records, prompt and reward
--config.task.name=path/to/rows.jsonl        each line is {"prompt": ..., "answer": ...}, graded by task.user.grader

A prompt is the text of the user's turn, or a conversation: {"messages": [{"role": ..., "content": ...}], ...}. Messages
that end with the assistant's are a chat to imitate: each of its turns is a demonstration, and what stands before the
turn is its prompt.
"""

import asyncio
import dataclasses
import hashlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
from etils import epath

from dmpo_jax.messages import Prompt, Turn, as_text, read_chat, turns_of
from dmpo_jax.tasks import answers, equivalence, sources
from dmpo_jax.tasks.base import (
  Grade,
  Limits,
  NoAnswer,
  Record,
  Reward,
  Split,
  UserTask,
  check_part_names,
  describe,
  split_reward,
)

TEST_SHARE = 0.1  # share of the rows of a JSONL file that is held out, chosen by a hash of the prompt
NEEDED = ("records", "prompt", "reward")  # functions that a Python file must define
OPTIONAL = ("is_correct", "demonstration")  # and those that it may define
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0  # seconds before the second attempt at a reward, doubled before each further one

_SUFFIXES = (".py", ".jsonl")


def is_file(name: str) -> bool:
  """Whether a task's name is the path of a user's file."""
  return name.endswith(_SUFFIXES)


def load(path: str, *, grader: str, limits: Limits | None = None) -> UserTask:
  """Load the task of a user's file.

  Args:
    grader: a name in GRADERS, for a JSONL file. limits: of the rewards of a Python file; None: the defaults.

  Raises:
    ValueError: the file cannot be used.
  """
  if not epath.Path(path).is_file():
    raise ValueError(f"task.name={path!r}: no such file")
  return PythonTask(path, limits or Limits()) if path.endswith(".py") else JsonlTask(path, grader)


def _same_text(answer: str, gold: str) -> bool:
  return " ".join(answer.split()).casefold() == " ".join(gold.split()).casefold()


def _same_number(answer: str, gold: str) -> bool:
  value = answers.read_number(answer)
  return value is not None and value == answers.read_number(gold)


GRADERS: dict[str, Callable[[str, str], bool]] = {
  "exact": _same_text,
  "number": _same_number,
  "math": equivalence.are_equal,
}
"""How answers are compared with those of a JSONL file: as words, as numbers, or as mathematics."""


@dataclasses.dataclass(frozen=True)
class JsonlTask:
  """Rows of prompt and answer, or chats. The reward is 1 if the last answer is correct.

  Without answer tags and box, the whole completion is the answer. A chat becomes one record for each turn of the
  assistant that answers something, so that no turn is learned from what follows it.
  """

  path: str
  grader: str

  version: ClassVar[str] = "1.0.0"

  def __post_init__(self) -> None:
    if self.grader not in GRADERS:
      raise ValueError(f"task.user.grader={self.grader!r}: must be one of {', '.join(GRADERS)}")

  @property
  def prefill(self) -> str:
    """Nothing."""
    return ""

  @property
  def reward_parts(self) -> tuple[str, ...]:
    """None: the reward is one number."""
    return ()

  @property
  def is_bounded(self) -> bool:
    """Whether grading is fast on any text: not if answers are compared as mathematics."""
    return self.grader != "math"

  def warm_up(self) -> None:
    """Do the one-time work of the first comparison."""
    if self.grader == "math":
      equivalence.warm_up()

  def records(self, split: Split) -> list[Record]:
    """Return the rows of a split.

    Raises:
      ValueError: rows cannot be used; all of them are listed.
    """
    rows, problems = sources.read_rows(epath.Path(self.path).read_bytes(), self._read_row)
    sources.refuse_rows(f"task.name={self.path!r}", problems)
    return [
      record for records in rows if _is_held_out(self.prompt(records[0])) == (split == "test") for record in records
    ]

  def _read_row(self, row: dict[str, Any]) -> list[Record]:
    """Make a record of a row, or of each answer in a chat."""
    if "messages" in row:
      if "prompt" in row:
        raise ValueError("fields 'prompt' and 'messages': give one of them")
      turns = read_chat(row["messages"])
      if turns[-1].role == "assistant":
        return self._read_chat(row, turns)
    else:
      sources.text_field(row, "prompt")
    if "demonstration" in row:
      sources.text_field(row, "demonstration")
    return [{**row, "answer": self._read_answer(row)}]

  def _read_answer(self, row: dict[str, Any]) -> str:
    answer = row.get("answer")
    answer = str(answer) if type(answer) in (int, float) else sources.text_field(row, "answer")
    if self.grader == "number" and answers.read_number(answer) is None:
      raise ValueError(f"the answer {answer!r:.60} is no number")
    return answer

  def _read_chat(self, row: dict[str, Any], turns: list[Turn]) -> list[Record]:
    """Make a record of each turn of the assistant but one that begins the chat.

    The row's answer, if it has one, is that of the last turn. A turn without one is graded against its own text.
    """
    numbers = [number for number, turn in enumerate(turns) if turn.role == "assistant" and number > 0]
    if not numbers:
      raise ValueError("the assistant answers nothing in it")
    if empty := [number for number in numbers if not turns[number].text.strip()]:
      raise ValueError(f"messages[{empty[0]}] is empty")
    records = [
      {**row, "messages": row["messages"][:number], "demonstration": turns[number].text, "answer": turns[number].text}
      for number in numbers
    ]
    if row.get("answer") is not None or self.grader == "number":
      records[-1]["answer"] = self._read_answer(row)
    return records

  def read_published(self, path: epath.PathLike) -> list[Record]:
    """Read another JSONL file to evaluate on."""
    return [record for records in sources.read_file(path, self._read_row) for record in records]

  def prompt(self, record: Record) -> Prompt:
    """Return the prompt or the messages of a row."""
    return record["messages"] if "messages" in record else record["prompt"]

  def demonstration(self, record: Record, rng: np.random.Generator) -> str:
    """Return the turn of a chat or the demonstration of a row, or else its answer."""
    return record.get("demonstration", record["answer"])

  def only_correct(self) -> "JsonlTask":
    """Return this task: its demonstrations are right."""
    return self

  def reward_and_grade(self, record: Record, completion: str, is_ended: bool = True) -> tuple[Reward, Grade]:
    """Return reward 1 if the last answer is that of the row, else 0, and the grade."""
    answer = answers.final_answer(completion)
    answer = completion.strip() if answer is None else answer
    is_correct = GRADERS[self.grader](answer, record["answer"])
    return float(is_correct), Grade(is_correct, extracted=answer)


@dataclasses.dataclass(frozen=True)
class PythonTask:
  """A Python file that defines

  records(split) -> an iterable of dicts of JSON values, for split "train" and "test"
  prompt(record) -> the user's turn, or a list of messages {"role": ..., "content": ...}
  reward(record, completion) -> a finite number, or a dict of named parts whose sum is the reward; may be `async def`
  REWARD_PARTS                                  the names of the parts, if the reward has any: ("correct", "form")
  is_correct(record, completion) -> bool        optional; by default, whether the reward is above 0
  demonstration(record, rng) -> a completion    optional, for the warm start
  PREFILL                                       optional, the beginning of every answer
  """

  path: str
  limits: Limits = dataclasses.field(default_factory=Limits)

  version: ClassVar[str] = "1.0.0"

  def __post_init__(self) -> None:
    missing = [name for name in NEEDED if not callable(getattr(self._module, name, None))]
    if missing:
      raise ValueError(f"task.name={self.path!r}: the file defines no function {', '.join(missing)}")
    for name in (*NEEDED[:2], *OPTIONAL):
      if inspect.iscoroutinefunction(getattr(self._module, name, None)):
        raise ValueError(f"task.name={self.path!r}: {name} must not be async; only reward may be")
    if problem := check_part_names(getattr(self._module, "REWARD_PARTS", ())):
      raise ValueError(f"task.name={self.path!r}: REWARD_PARTS {problem}")

  @property
  def _module(self) -> ModuleType:
    if self.path not in _MODULES:
      _MODULES[self.path] = _import(self.path)
    return _MODULES[self.path]

  @property
  def is_bounded(self) -> bool:
    """Whether grading is fast on any text: nothing is known of the file's functions."""
    return False

  @property
  def prefill(self) -> str:
    """The beginning of every answer."""
    return getattr(self._module, "PREFILL", "")

  @property
  def reward_parts(self) -> tuple[str, ...]:
    """The names of the parts of a reward; () if it is one number."""
    return tuple(getattr(self._module, "REWARD_PARTS", ()))

  def records(self, split: Split) -> list[Record]:
    """Return the file's records of a split.

    Raises:
      ValueError: records cannot be used; all of them are listed.
    """
    try:
      records = list(self._module.records(split))
    except Exception as error:  # raised by the file's function, or it returned nothing to iterate over
      raise ValueError(f"task.name={self.path!r}: records({split!r}): {type(error).__name__}: {error}") from error
    problems = [f"record {index}: {why}" for index, record in enumerate(records) if (why := self._problem(record))]
    sources.refuse_rows(f"task.name={self.path!r}, {split} split", problems)
    return records

  def _problem(self, record: object) -> str:
    if not isinstance(record, Mapping):
      return f"{record!r:.60} is not a dict"
    try:
      json.dumps(record)
      prompt = self._module.prompt(record)
    except Exception as error:  # whatever the file's function raises
      return f"{type(error).__name__}: {error}"
    try:
      is_usable = any(turn.text.strip() for turn in turns_of(prompt))
    except ValueError as error:
      return f"its prompt is {describe(prompt)}: neither a text nor messages ({error})"
    return "" if is_usable else f"its prompt is {describe(prompt)}"

  def read_published(self, path: epath.PathLike) -> list[Record]:
    """Refuse: the file itself defines its test split."""
    raise ValueError(f"task.eval_path={str(path)!r}: {self.path} gives its own test records; leave eval_path empty")

  def prompt(self, record: Record) -> Prompt:
    """Return the user's turn, or a conversation."""
    return self._module.prompt(record)

  def demonstration(self, record: Record, rng: np.random.Generator) -> str:
    """Return a completion to imitate.

    Raises:
      ValueError: the file defines no demonstration, or it raised or returned no text.
    """
    if not hasattr(self._module, "demonstration"):
      raise ValueError(f"task.name={self.path!r} defines no demonstration(record, rng): set warm_start.updates to 0")
    try:
      text = self._module.demonstration(record, rng)
    except Exception as error:  # whatever the file's function raises
      raise ValueError(
        f"task.name={self.path!r}: demonstration({record!r:.60}) raised {type(error).__name__}: {error}"
      ) from error
    if not isinstance(text, str):
      raise ValueError(f"task.name={self.path!r}: demonstration({record!r:.60}) returned {text!r:.60}, not a text")
    return text

  def only_correct(self) -> "PythonTask":
    """Return this task: one kind of demonstrations is all it has."""
    return self

  def reward_and_grade(self, record: Record, completion: str, is_ended: bool = True) -> tuple[Reward, Grade]:
    """Return the file's reward, called once, and whether the completion is correct."""
    if self.is_awaited:
      return asyncio.run(self.await_reward_and_grade(record, completion))
    return self._with_grade(record, completion, self._module.reward(record, completion))

  def _with_grade(self, record: Record, completion: str, reward: Any) -> tuple[Reward, Grade]:
    total, _ = split_reward(reward, self.reward_parts)
    is_correct = getattr(self._module, "is_correct", lambda *_: total > 0)
    return reward, Grade(bool(is_correct(record, completion)), extracted=completion)

  @property
  def is_awaited(self) -> bool:
    """Whether the reward is an `async def`, which waits for others: many calls are under way at a time."""
    return inspect.iscoroutinefunction(self._module.reward)

  async def await_reward_and_grade(self, record: Record, completion: str) -> tuple[Reward, Grade]:
    """Return the same as `reward_and_grade`, of an awaited reward, at the first attempt that returns in time.

    Raises:
      NoAnswer: no attempt has. Exception: what the last attempt raised.
    """
    return self._with_grade(record, completion, await self._await_reward(record, completion))

  async def _await_reward(self, record: Record, completion: str) -> Any:
    seconds, retries = self.limits.seconds, self.limits.retries
    for attempt in range(retries + 1):
      try:
        async with asyncio.timeout(seconds):  # in this task: of another, SystemExit would end the event loop
          return await self._module.reward(record, completion)
      except Exception as error:
        if attempt == retries:
          if isinstance(error, TimeoutError):
            raise NoAnswer(f"no answer within {seconds:g} seconds, at {retries + 1} attempts") from error
          raise
      await asyncio.sleep(wait_before(attempt + 1))
    raise AssertionError("the last attempt returns or raises")


def wait_before(retry: int) -> float:
  """Return the seconds between an attempt and the `retry`-th further one."""
  return min(FIRST_WAIT * 2 ** (retry - 1), LONGEST_WAIT)


_MODULES: dict[str, ModuleType] = {}  # imported files, by path


def _import(path: str) -> ModuleType:
  spec = importlib.util.spec_from_file_location("user_task_" + hashlib.sha256(path.encode()).hexdigest()[:8], path)
  assert spec is not None  # the name ends in .py
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    raise ValueError(f"task.name={path!r}: cannot be imported ({type(error).__name__}: {error})") from error
  return module


def _is_held_out(prompt: Prompt) -> bool:
  digest = hashlib.blake2b(as_text(turns_of(prompt)).encode(), digest_size=4).digest()
  return int.from_bytes(digest, "big") < TEST_SHARE * 2**32
