"""What the built-in tasks share: named prompts, demonstrations in their form, default and published grading."""

import dataclasses
import string
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from etils import epath

from dmpo_jax.tasks import answers
from dmpo_jax.tasks.base import Grade, Limits, PromptTemplate, Record, Reward, refuse_options
from dmpo_jax.tasks.published import GRADERS, rewards

CHOICES = ("default", "published")  # rewards and graders
FORM = (  # how the default prompts describe the form of an answer
  "Put your thoughts between the tags <reasoning> and </reasoning>, each on a line of its own, and after them, between "
  "<answer> and </answer>, "
)
END = "<|endoftext|>"  # the published graders look for it at the end of a generation


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuiltinTask:
  """Base of the built-in tasks: named prompts, a default and, for the published ones, a published set of rewards.

  A task adds its data, its default reward and grade, and what the published ones need from a record.
  """

  name: ClassVar[str]
  version: ClassVar[str]  # of the records; see Task.version
  PROMPTS: ClassVar[Mapping[str, PromptTemplate]]
  default_range: ClassVar[tuple[float, float]] = (0.0, 1.0)  # bounds of the default reward
  default_parts: ClassVar[tuple[str, ...]] = ()  # of the default reward; see Task.reward_parts
  is_default_bounded: ClassVar[bool] = True  # Task.is_bounded of the default reward and grade

  prompt_name: str = "default"  # task.prompt
  rewards: str = "default"  # task.rewards: default, published
  grader: str = "default"  # task.grader: default, published
  limits: Limits = dataclasses.field(default_factory=Limits)  # of the grading of a completion

  def __post_init__(self) -> None:
    problems = [
      f"task.{key}={value!r}: must be one of {', '.join(names)}"
      for key, value, names in (
        ("prompt", self.prompt_name, self.PROMPTS),
        ("rewards", self.rewards, self.choices()),
        ("grader", self.grader, self.choices()),
      )
      if value not in names
    ]
    refuse_options(problems + self.option_problems())

  @classmethod
  def choices(cls) -> tuple[str, ...]:
    """Return the sets of rewards and graders that the task has."""
    return CHOICES if cls.name in GRADERS else CHOICES[:1]

  def option_problems(self) -> list[str]:
    """Return the problems with the task's options."""
    return []

  def prompt_fields(self, record: Record) -> Mapping[str, Any]:
    """Return the fields that the prompt's template may name: those of the record, unless a task overrides this."""
    return record

  def default_reward(self, record: Record, text: str) -> Reward:
    """Return the default reward of an answer; `text` starts with the prefill."""
    raise NotImplementedError

  def default_grade(self, record: Record, text: str) -> Grade:
    """Return the default grade of an answer; `text` starts with the prefill."""
    raise NotImplementedError

  def published_arguments(self, record: Record) -> dict[str, Any]:
    """Return the arguments that the published rewards take from a record."""
    raise NotImplementedError

  def published_question(self, record: Record) -> tuple[str, Any]:
    """Return the question and the gold answer as in the published generations."""
    raise NotImplementedError

  def prompt(self, record: Record) -> str:
    """Return the user's turn."""
    return string.Template(self._prompt.text).substitute(self.prompt_fields(record))

  @property
  def prefill(self) -> str:
    """The beginning of the answer, appended to every prompt."""
    return self._prompt.prefill

  @property
  def _prompt(self) -> PromptTemplate:
    return self.PROMPTS[self.prompt_name]

  @property
  def is_bounded(self) -> bool:
    """Whether the chosen reward and grade are fast on any text. The published ones are."""
    return self.is_default_bounded or (self.rewards == "published" and self.grader == "published")

  @property
  def reward_parts(self) -> tuple[str, ...]:
    """The names of the parts of the chosen rewards; a single published reward has no parts."""
    if self.rewards == "default":
      return self.default_parts
    names = tuple(rewards.TRAINED_WITH[self.name])
    return names if len(names) > 1 else ()

  def reward(self, record: Record, completion: str) -> Reward:
    """Return the reward of a completion by the chosen set of rewards."""
    if self.rewards == "default":
      return self.default_reward(record, self.prefill + completion)
    parts = rewards.score(self.name, completion, **self.published_arguments(record))
    return parts if self.reward_parts else sum(parts.values())

  def grade(self, record: Record, completion: str, is_ended: bool = True) -> Grade:
    """Return the grade of a completion by the chosen grader."""
    text = self.prefill + completion
    is_published = self.grader == "published"
    grade = self.published_grade(record, completion, is_ended) if is_published else self.default_grade(record, text)
    return dataclasses.replace(grade, is_formatted=self.has_form(record, text))

  def reward_and_grade(self, record: Record, completion: str, is_ended: bool = True) -> tuple[Reward, Grade]:
    """Return the reward and the grade of a completion."""
    return self.reward(record, completion), self.grade(record, completion, is_ended)

  def has_form(self, record: Record, text: str) -> bool:
    """Whether a text has the form that the prompt asks for: both blocks, or any text if it asks for no tags."""
    return answers.has_blocks(text) or not self._prompt.is_tagged

  def demonstration(self, record: Record, rng: np.random.Generator) -> str:
    """Return a completion to imitate; see Task.demonstration."""
    raise NotImplementedError

  def read_published(self, path: epath.PathLike) -> list[Record]:
    """Read a published test file; see Task.read_published."""
    raise NotImplementedError

  def only_correct(self) -> "BuiltinTask":
    """Return this task: its demonstrations are always correct."""
    return self

  def write_answer(self, answer: str, reasoning: str) -> str:
    """Write a completion with this answer in the form that the prompt asks for, without the prefill."""
    if not self._prompt.is_tagged:
      return answer
    written = string.Template(self._prompt.answer).substitute(answer=answer)
    return answers.wrap(reasoning, written).removeprefix(self.prefill)

  def published_grade(self, record: Record, completion: str, is_ended: bool) -> Grade:
    """Grade as the published evaluation does, on a text that includes its end token."""
    question, gold = self.published_question(record)
    return GRADERS[self.name](completion + END * is_ended, question, gold)
