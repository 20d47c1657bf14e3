"""GSM8K: grade-school word problems whose answer is a number (Cobbe et al., arXiv 2110.14168)."""

import dataclasses
import re
from typing import Any, ClassVar

import numpy as np
from etils import epath

from dmpo_jax.tasks import answers, sources
from dmpo_jax.tasks.base import Grade, PromptTemplate, Record, Reward, Split
from dmpo_jax.tasks.builtin import FORM, BuiltinTask
from dmpo_jax.tasks.published import prompts, rewards

CORRECT = 2.0  # sizes as in the published rewards
FORMAT = 0.5

_REPOSITORY = (
  "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
  "grade_school_math/data"
)
_NOTE = re.compile(r"<<[^<>]*>>")  # calculator annotations in the solutions

DEFAULT_PROMPT = PromptTemplate(
  f"Solve the problem below step by step. {FORM}nothing but the final number.\n\n$question"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GSM8K(BuiltinTask):
  """Grade-school word problems. Records are {question, solution, answer}; `answer` is the number after ####."""

  name: ClassVar[str] = "gsm8k"
  version: ClassVar[str] = "1.0.0"
  default_range: ClassVar[tuple[float, float]] = (0.0, 4.0)
  default_parts: ClassVar[tuple[str, ...]] = ("correct", "form")
  PROMPTS: ClassVar = {"default": DEFAULT_PROMPT, **prompts.GSM8K}
  SOURCES: ClassVar[dict[Split, sources.Source]] = {
    "train": sources.Source(
      "gsm8k_train.jsonl",
      f"{_REPOSITORY}/train.jsonl",
      ("17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",),
    ),
    "test": sources.Source(
      "gsm8k_test.jsonl",
      f"{_REPOSITORY}/test.jsonl",
      ("3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",),
    ),
  }

  def source(self, split: Split) -> sources.Source:
    """Return the file of a split."""
    return self.SOURCES[split]

  @staticmethod
  def read_row(row: dict[str, Any]) -> Record:
    """Make a record from {question, answer}, where answer is a solution that ends in "#### number".

    Raises:
      ValueError: a field is missing or empty, or the answer contains no number.
    """
    question, solution = sources.text_field(row, "question"), sources.text_field(row, "answer")
    answer = rewards.hash_answer(solution)
    if not answers.is_number(answer):
      raise ValueError(f"the answer ends in {solution[-40:]!r}, not in #### and a number")
    return {"question": question, "solution": solution.partition("####")[0].strip(), "answer": answer}

  def read_published(self, path: epath.PathLike) -> list[Record]:
    """Read JSON lines {question, answer}.

    Raises:
      ValueError: rows cannot be used; all of them are listed.
    """
    return sources.read_file(path, self.read_row)

  def demonstration(self, record: Record, rng: np.random.Generator) -> str:
    """Return the solution of the data set in the form that the prompt asks for."""
    return self.write_answer(record["answer"], _NOTE.sub("", record["solution"]))

  def default_reward(self, record: Record, text: str) -> Reward:
    """Return `correct`, 2 for the correct number, and `form`, up to 2.

    Form: 0.5 for the tags (see `answers.tag_score`), 0.5 for both blocks and nothing else, 0.5 for tags on their own
    lines, 0.5 if the answer is a number and nothing else.
    """
    answer = answers.final_answer(text)
    form = answers.tag_score(text) + answers.has_blocks(text) + answers.has_lines(text) + answers.is_number(answer)
    return {"correct": CORRECT * self._is_right(record, answer), "form": FORMAT * form}

  def default_grade(self, record: Record, text: str) -> Grade:
    """Compare the last answer with the gold number."""
    answer = answers.final_answer(text)
    return Grade(self._is_right(record, answer), extracted=answer)

  @staticmethod
  def _is_right(record: Record, answer: str | None) -> bool:
    value = answers.read_number(answer)
    return value is not None and value == answers.read_number(record["answer"])

  def published_arguments(self, record: Record) -> dict[str, Any]:
    """Return the answer as it is in the data."""
    return {"answer": record["answer"]}

  def published_question(self, record: Record) -> tuple[str, Any]:
    """Return the question and the answer as a float, or None, which no answer equals, if it is negative.

    The official evaluation does not read minus signs in the data, so no answer to such a question is correct there.
    """
    number = answers.read_number(record["answer"])
    assert number is not None  # `read_row` refuses others
    gold = float(number)
    return record["question"], gold if gold >= 0 else None
