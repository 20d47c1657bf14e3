"""MATH: competition problems whose answer is a LaTeX expression (Hendrycks et al., arXiv 2103.03874).

Trained on 12,000 problems, tested on the 500 of MATH-500 (Lightman et al., arXiv 2305.20050).
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np
from etils import epath

from dmpo_jax.tasks import answers, equivalence, sources
from dmpo_jax.tasks.base import Grade, PromptTemplate, Record, Reward, Split
from dmpo_jax.tasks.builtin import FORM, BuiltinTask
from dmpo_jax.tasks.published import prompts

CORRECT = 2.0  # sizes as in the published rewards
FORMAT = 0.5

# the files are in Git LFS; its pointers contain these checksums
_REPOSITORY = (
  "https://media.githubusercontent.com/media/openai/prm800k/7ecc794703b2877f63226f2477a49b34f9b25163/"
  "prm800k/math_splits"
)

DEFAULT_PROMPT = PromptTemplate(
  f"Solve the problem below step by step. {FORM}the final answer in \\boxed{{}}.\n\n$problem",
  answer="\\boxed{$answer}",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Math(BuiltinTask):
  """Competition problems. Records are {problem, answer}; those to train on have a {solution} too."""

  name: ClassVar[str] = "math"
  version: ClassVar[str] = "1.0.0"
  default_range: ClassVar[tuple[float, float]] = (0.0, 3.0)
  default_parts: ClassVar[tuple[str, ...]] = ("correct", "form")
  is_default_bounded: ClassVar[bool] = False  # math-verify may take arbitrarily long
  PROMPTS: ClassVar = {"default": DEFAULT_PROMPT, **prompts.MATH}
  SOURCES: ClassVar[dict[Split, sources.Source]] = {
    "train": sources.Source(
      "math_train.jsonl",
      f"{_REPOSITORY}/train.jsonl",
      ("90d96daeac3fe343ebb1e22ce93dd99690f75983e957f88de42f87cffe1e8076",),
    ),
    "test": sources.Source(
      "math500_test.jsonl",
      f"{_REPOSITORY}/test.jsonl",
      (
        "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
        "54485e1c64755d3e0fba13e4ef19fb5aa41049e75de86223c54b88329f1b947b",  # the problems and answers alone
      ),
    ),
  }

  def source(self, split: Split) -> sources.Source:
    """Return the file of a split."""
    return self.SOURCES[split]

  @staticmethod
  def read_row(row: dict[str, Any]) -> Record:
    """Make a record from {problem, answer} and, if there is one, the solution.

    Raises:
      ValueError: a field is missing or empty.
    """
    record = {"problem": sources.text_field(row, "problem"), "answer": sources.text_field(row, "answer")}
    if answers.last_box(f"\\boxed{{{record['answer']}}}") is None:
      raise ValueError(f"the braces of the answer {record['answer']!r:.60} do not match")
    if isinstance(row.get("solution"), str):
      record["solution"] = row["solution"]
    return record

  def read_published(self, path: epath.PathLike) -> list[Record]:
    """Read JSON lines {problem, answer}.

    Raises:
      ValueError: rows cannot be used; all of them are listed.
    """
    return sources.read_file(path, self.read_row)

  def demonstration(self, record: Record, rng: np.random.Generator) -> str:
    """Return the solution of the data set in the form that the prompt asks for."""
    return self.write_answer(record["answer"], record.get("solution", ""))

  def default_reward(self, record: Record, text: str) -> Reward:
    """Return `correct`, 2 for an equivalent answer, and `form`, 0.5 for both blocks and 0.5 for a boxed answer."""
    is_boxed = answers.last_box(answers.last_block(text) or "") is not None
    form = answers.has_blocks(text) + is_boxed
    return {"correct": CORRECT * self._is_right(record, answers.final_answer(text)), "form": FORMAT * form}

  def default_grade(self, record: Record, text: str) -> Grade:
    """Return whether the last answer is equivalent to the gold answer."""
    answer = answers.final_answer(text)
    return Grade(self._is_right(record, answer), extracted=answer)

  @staticmethod
  def warm_up() -> None:
    """Do the one-time work of the first comparison."""
    equivalence.warm_up()

  @staticmethod
  def _is_right(record: Record, answer: str | None) -> bool:
    return bool(answer) and equivalence.are_equal(answer, record["answer"])

  def published_arguments(self, record: Record) -> dict[str, Any]:
    """Return the answer in a box, as a solution."""
    return {"answer": f"\\boxed{{{record['answer']}}}"}

  def published_question(self, record: Record) -> tuple[str, Any]:
    """Return the problem and its answer."""
    return record["problem"], record["answer"]
