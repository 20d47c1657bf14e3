"""What the built-in tasks share: prompts by name, demonstrations in the prompt's form, published or own grading."""

import dataclasses
import string
from collections.abc import Mapping
from typing import Any, ClassVar

from dmpo_jax.tasks import answers
from dmpo_jax.tasks.base import Grade, PromptTemplate, Record, Reward, refuse_options
from dmpo_jax.tasks.published import GRADERS, rewards

CHOICES = ("default", "published")  # of rewards and graders
FORM = (  # what the default prompts say of the answer's form
  "Put your thoughts between the tags <reasoning> and </reasoning>, each on a line of its own, and after them, between "
  "<answer> and </answer>, "
)
END = "<|endoftext|>"  # what the published graders look for at the end of a generation


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordedTask:
  """What the four tasks have in common: prompts by name, and a published and an own set of rewards and graders.

  A task adds its data, its own reward and grade, and what the published ones need of a record.
  """

  name: ClassVar[str]
  PROMPTS: ClassVar[Mapping[str, PromptTemplate]]
  own_range: ClassVar[tuple[float, float]] = (0.0, 1.0)  # that the own reward never leaves
  own_parts: ClassVar[tuple[str, ...]] = ()  # of the own reward; see Task.reward_parts
  is_own_bounded: ClassVar[bool] = True  # see Task.is_bounded, for the own reward and grade

  prompt_name: str = "default"  # task.prompt
  rewards: str = "default"  # task.rewards: default, published
  grader: str = "default"  # task.grader: default, published

  def __post_init__(self) -> None:
    problems = [
      f"task.{key}={value!r}: must be one of {', '.join(names)}"
      for key, value, names in (
        ("prompt", self.prompt_name, self.PROMPTS),
        ("rewards", self.rewards, CHOICES),
        ("grader", self.grader, CHOICES),
      )
      if value not in names
    ]
    refuse_options(problems + self.option_problems())

  def option_problems(self) -> list[str]:
    """Say what is wrong with the task's own options."""
    return []

  def prompt_fields(self, record: Record) -> Mapping[str, Any]:
    """Return what the prompt's template may name: the record itself, unless a task says otherwise."""
    return record

  def own_reward(self, record: Record, text: str) -> Reward:
    """Return what an answer is worth by the task's own rewards; `text` begins with the prefill."""
    raise NotImplementedError

  def own_grade(self, record: Record, text: str) -> Grade:
    """Return whether an answer is right by the task's own grader; `text` begins with the prefill."""
    raise NotImplementedError

  def published_arguments(self, record: Record) -> dict[str, Any]:
    """Return what the published rewards need of a record."""
    raise NotImplementedError

  def published_question(self, record: Record) -> tuple[str, Any]:
    """Return the question and the gold answer in the form of the published generations."""
    raise NotImplementedError

  def prompt(self, record: Record) -> str:
    """Return the user's turn."""
    return string.Template(self._prompt.text).substitute(self.prompt_fields(record))

  @property
  def prefill(self) -> str:
    """The beginning of the answer that every prompt ends with."""
    return self._prompt.prefill

  @property
  def _prompt(self) -> PromptTemplate:
    return self.PROMPTS[self.prompt_name]

  @property
  def is_bounded(self) -> bool:
    """Whether reward and grade surely end soon on any text: the published ones do."""
    return self.is_own_bounded or (self.rewards == "published" and self.grader == "published")

  @property
  def reward_parts(self) -> tuple[str, ...]:
    """The parts of the chosen set of rewards; a set of one has none."""
    if self.rewards == "default":
      return self.own_parts
    names = tuple(rewards.TRAINED_WITH[self.name])
    return names if len(names) > 1 else ()

  def reward(self, record: Record, completion: str) -> Reward:
    """Return what a completion is worth by the chosen set of rewards."""
    if self.rewards == "default":
      return self.own_reward(record, self.prefill + completion)
    parts = rewards.score(self.name, completion, **self.published_arguments(record))
    return parts if self.reward_parts else sum(parts.values())

  def grade(self, record: Record, completion: str, is_ended: bool = True) -> Grade:
    """Return whether a completion is right by the chosen grader."""
    text = self.prefill + completion
    is_published = self.grader == "published"
    grade = self.published_grade(record, completion, is_ended) if is_published else self.own_grade(record, text)
    return dataclasses.replace(grade, is_formatted=self.has_form(record, text))

  def reward_and_grade(self, record: Record, completion: str, is_ended: bool = True) -> tuple[Reward, Grade]:
    """Return what a completion is worth, and whether it is right."""
    return self.reward(record, completion), self.grade(record, completion, is_ended)

  def has_form(self, record: Record, text: str) -> bool:
    """Whether a text has the form that the prompt asks for: both blocks, unless it asks for no tags."""
    return answers.has_blocks(text) or not self._prompt.is_tagged

  def only_correct(self) -> "WordedTask":
    """Return this task with demonstrations that are always right: they are."""
    return self

  def write_answer(self, answer: str, reasoning: str) -> str:
    """Write a completion with this answer, as the prompt asks for it, less what the prompt has begun."""
    if not self._prompt.is_tagged:
      return answer
    written = string.Template(self._prompt.answer).substitute(answer=answer)
    return answers.wrap(reasoning, written).removeprefix(self.prefill)

  def published_grade(self, record: Record, completion: str, is_ended: bool) -> Grade:
    """Grade as the published evaluation does, on a text that shows its end."""
    question, gold = self.published_question(record)
    return GRADERS[self.name](completion + END * is_ended, question, gold)
