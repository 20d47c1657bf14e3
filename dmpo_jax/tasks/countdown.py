"""Countdown: reach the target with the given numbers, each used exactly once, and + - * / and parentheses.

The prompt reads "75,30,4=49"; a completion is an expression, "75-30+4". Published files have the same form of puzzle.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from dmpo_jax.tasks import answers, arithmetic, sources
from dmpo_jax.tasks.base import Grade, PromptTemplate, Record, Split
from dmpo_jax.tasks.published import prompts
from dmpo_jax.tasks.worded import FORM, WordedTask

OPERATORS = "+-*/"
MISSED_REWARD = 0.1  # of an expression that keeps the rules and misses the target
_TEST_SHARE = 0.1  # of all (numbers, target)
_CANDIDATES = 4096  # expressions drawn at one time
_MAX_SEARCHED = 4  # numbers of a puzzle whose demonstration is searched for; more would take too long
_SIGNS = (  # of LaTeX and of typography: times, dot, divided by, minus, en dash
  *((r"\times", "*"), (r"\cdot", "*"), (r"\div", "/"), (r"\left", ""), (r"\right", ""), ("$", "")),
  *(("\u00d7", "*"), ("\u00b7", "*"), ("\u00f7", "/"), ("\u2212", "-"), ("\u2013", "-")),
)
_MAX_FRUITLESS = 10  # draws in a row that bring nothing new before the puzzles count as exhausted


class Term(NamedTuple):
  """An expression under construction."""

  text: str
  value: Fraction
  rank: int  # of its outermost operator: 1 for + -, 2 for * /, 3 for a bare number


BARE_PROMPT = PromptTemplate("$numbers=$target", is_tagged=False)
DEFAULT_PROMPT = PromptTemplate(
  "Write an expression with the value $target from the numbers $numbers, each of them used exactly once, with +, -, *, "
  f"/ and parentheses. {FORM}nothing but the expression: no equals sign, not its value."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Countdown(WordedTask):
  """The task, with the options of `config.task.countdown`.

  Records are {numbers: "75,30,4", target: 49, solution: "75-30+4"}; those of a published file have no solution.
  """

  name: ClassVar[str] = "countdown"
  version: ClassVar[str] = "1.0.0"
  PROMPTS: ClassVar = {"bare": BARE_PROMPT, "default": DEFAULT_PROMPT, **prompts.COUNTDOWN}

  num_numbers: int
  max_number: int  # numbers and targets are drawn from 1..max_number
  demo_wrong: float  # share of demonstrations whose expression misses the target
  prompt_name: str = "bare"

  def option_problems(self) -> list[str]:
    """Say what is wrong with the options."""
    problems = []
    if not 2 <= self.num_numbers <= 6:
      problems.append(f"task.countdown.num_numbers={self.num_numbers}: must be 2 to 6")
    if not 2 <= self.max_number <= 9999:
      problems.append(f"task.countdown.max_number={self.max_number}: must be 2 to 9999")
    if not 0 <= self.demo_wrong <= 1:
      problems.append(f"task.countdown.demo_wrong={self.demo_wrong}: must be a probability, in [0, 1]")
    return problems

  def generate(self, split: Split, num: int, seed: int) -> Iterator[Record]:
    """Yield `num` puzzles that differ in (sorted numbers, target), of which each belongs to one split only.

    The target is the value of a random expression, kept if it is a whole number in 1..max_number.

    Raises:
      ValueError: there are not so many puzzles with these options.
    """
    rng = np.random.default_rng((seed, ("train", "test").index(split)))
    seen: set[tuple[int, ...]] = set()
    fruitless = 0
    while len(seen) < num:
      fruitless += 1
      for numbers, term in self._draw(rng):
        key = (*sorted(numbers), int(term.value))
        if len(seen) < num and key not in seen and _belongs_to(key, split, seed):
          seen.add(key)
          fruitless = 0
          yield {"numbers": ",".join(map(str, numbers)), "target": key[-1], "solution": term.text}
      if fruitless == _MAX_FRUITLESS:
        raise ValueError(
          f"task.num_{split}={num}: the {split} split ran out of puzzles after {len(seen)}; "
          "ask for fewer, or raise task.countdown.max_number"
        )

  def _draw(self, rng: np.random.Generator) -> Iterator[tuple[list[int], Term]]:
    """Draw numbers and expressions, and yield those whose value can be a target.

    Few can, so values are first computed for all at one time, in floating point.
    """
    numbers = rng.integers(1, self.max_number + 1, size=(_CANDIDATES, self.num_numbers))
    joins = draw_joins(rng, _CANDIDATES, self.num_numbers)
    values = _rough_values(numbers, joins)
    is_close = (np.abs(values - np.round(values)) < 1e-6) & (values > 0.5) & (values < self.max_number + 0.5)
    for index in np.flatnonzero(is_close):
      term = build_expression(numbers[index].tolist(), joins[index].tolist())
      if term is not None and term.value.denominator == 1:
        yield numbers[index].tolist(), term

  def prompt_fields(self, record: Record) -> dict[str, Any]:
    """Return the numbers as in "75,30,4", with spaces where the prompt is a sentence, and the target."""
    numbers = record["numbers"].replace(",", ", ") if self._prompt.is_tagged else record["numbers"]
    return {"numbers": numbers, "target": record["target"]}

  def demonstration(self, record: Record, rng: np.random.Generator) -> str:
    """Return a right expression or, with probability `demo_wrong`, one that keeps the rules and misses the target.

    Both are functions of the puzzle: a small model learns to search only from one answer to each. The wrong one is a
    habit, the sum of the numbers as they come (the last of them subtracted, where the sum would be right).
    """
    numbers, target = _numbers(record), record["target"]
    if rng.random() < self.demo_wrong:
      first, last = "+".join(map(str, numbers[:-1])), numbers[-1]
      answer = f"{first}-{last}" if sum(numbers) == target else f"{first}+{last}"
    elif "solution" in record and len(numbers) > _MAX_SEARCHED:
      answer = record["solution"]
    else:
      answer = solve(sorted(numbers, reverse=True), target)
    return self.write_answer(answer, f"The numbers are to give {target}.")

  def only_correct(self) -> "Countdown":
    """Return this task with demonstrations that all hit the target."""
    return dataclasses.replace(self, demo_wrong=0.0)

  def own_reward(self, record: Record, text: str) -> float:
    """Return 1 for a right expression, 0.1 for one that uses each number once and misses, 0 for anything else.

    A division by zero has no value and counts as not well-formed. Values are compared as exact fractions.
    """
    value = _value(record, self._extract(text))
    if value is None:
      return 0.0
    return 1.0 if value == record["target"] else MISSED_REWARD

  def own_grade(self, record: Record, text: str) -> Grade:
    """Return whether the answer is an expression of the given numbers, each used once, that hits the target."""
    answer = self._extract(text)
    return Grade(_value(record, answer) == record["target"], extracted=answer)

  def has_form(self, record: Record, text: str) -> bool:
    """Whether a text is both blocks, or just an expression of the numbers where no tags are asked for."""
    is_expression = self._prompt.is_tagged or _value(record, self._extract(text)) is not None
    return super().has_form(record, text) and is_expression

  def _extract(self, text: str) -> str:
    """Take the last answer, or the whole completion where no tags are asked for; of an equation the left side."""
    if not self._prompt.is_tagged:
      return text.strip()
    return plain_expression(answers.final_answer(text) or "")

  def published_arguments(self, record: Record) -> dict[str, Any]:
    """Return target and numbers."""
    return {"target": record["target"], "numbers": _numbers(record)}

  def published_question(self, record: Record) -> tuple[str, Any]:
    """Return the question and [numbers, target]."""
    numbers = _numbers(record)
    return f"Numbers: {numbers}\nTarget: {record['target']}", [numbers, record["target"]]

  def read_published(self, path: epath.PathLike) -> list[Record]:
    """Read JSON lines {"input": "a,b,c", "output": target}, the target as a number or as text.

    Raises:
      ValueError: no such file, or rows that are no puzzle, all of them listed.
    """
    return sources.read_file(path, _read_row)


def plain_expression(text: str) -> str:
  """Write LaTeX's and typography's signs as + - * /, and drop the value that an equation ends in."""
  for sign, plain in _SIGNS:
    text = text.replace(sign, plain)
  expression, equals, value = text.partition("=")
  return (expression if equals and answers.is_number(value) else text).strip()


def draw_joins(rng: np.random.Generator, num: int, num_numbers: int) -> Int[np.ndarray, "num joins 3"]:
  """Draw for `num` expressions which two terms are joined, and how, until one is left: (left, right, operator).

  left and right are different places among the terms that are left; operator is an index into OPERATORS.
  """
  sizes = np.array([(terms, terms - 1, len(OPERATORS)) for terms in range(num_numbers, 1, -1)])
  joins = (rng.random((num, *sizes.shape)) * sizes).astype(np.int64)
  joins[..., 1] += joins[..., 1] >= joins[..., 0]
  return joins


def build_expression(numbers: Sequence[int], joins: Sequence[Sequence[int]]) -> Term | None:
  """Join the numbers as `joins` says; None if that divides by zero."""
  terms = [_bare(number) for number in numbers]
  for i, j, operator in joins:
    if OPERATORS[operator] == "/" and terms[j].value == 0:
      return None
    terms[i] = join(terms[i], OPERATORS[operator], terms[j])
    terms[j] = terms[-1]
    terms.pop()
  return terms[0]


def _rough_values(
  numbers: Int[np.ndarray, "num n"], joins: Int[np.ndarray, "num joins 3"]
) -> Float[np.ndarray, " num"]:
  """Compute in floating point what `build_expression` computes exactly."""
  terms, rows = numbers.astype(np.float64), np.arange(len(numbers))
  with np.errstate(divide="ignore", invalid="ignore"):
    for step in range(joins.shape[1]):
      i, j, operator = joins[:, step].T
      left, right = terms[rows, i], terms[rows, j]
      terms[rows, i] = np.choose(operator, [left + right, left - right, left * right, left / right])
      terms[rows, j] = terms[:, -1 - step]
  return np.where(np.isfinite(terms[:, 0]), terms[:, 0], 0.0)


def _bare(number: int) -> Term:
  return Term(str(number), Fraction(number), 3)


def join(left: Term, operator: str, right: Term) -> Term:
  """Join two terms, with parentheses only where the value needs them."""
  rank = 1 if operator in "+-" else 2
  is_left_wrapped = left.rank < rank
  is_right_wrapped = right.rank < rank or (right.rank == rank and operator in "-/")
  text = f"({left.text})" if is_left_wrapped else left.text
  text += operator + (f"({right.text})" if is_right_wrapped else right.text)
  match operator:
    case "+":
      value = left.value + right.value
    case "-":
      value = left.value - right.value
    case "*":
      value = left.value * right.value
    case _:
      value = left.value / right.value
  return Term(text, value, rank)


def solve(numbers: Sequence[int], target: int) -> str:
  """Search all expressions for one that hits the target with each number used once.

  Raises:
    ValueError: there is none.
  """
  solution = _search([_bare(number) for number in numbers], target)
  if solution is None:
    raise ValueError(f"{target} cannot be reached from {', '.join(map(str, numbers))}")
  return solution


def _search(terms: list[Term], target: int) -> str | None:
  if len(terms) == 1:
    return terms[0].text if terms[0].value == target else None
  for i, left in enumerate(terms):
    for j, right in enumerate(terms):
      if i == j:
        continue
      others = [term for k, term in enumerate(terms) if k not in (i, j)]
      operators = ("+*" if i < j else "") + "-" + ("/" if right.value != 0 else "")
      for operator in operators:
        solution = _search([*others, join(left, operator, right)], target)
        if solution is not None:
          return solution
  return None


def _belongs_to(key: tuple[int, ...], split: Split, seed: int) -> bool:
  """Assign (sorted numbers, target) to a split by a hash, so that no two generators need to know of each other."""
  digest = hashlib.blake2b(repr((seed, key)).encode(), digest_size=4).digest()
  return (int.from_bytes(digest, "big") < _TEST_SHARE * 2**32) == (split == "test")


def _numbers(record: Record) -> list[int]:
  return [int(number) for number in record["numbers"].split(",") if number]


def _value(record: Record, completion: str) -> Fraction | None:
  """Return the value of a completion that uses each given number exactly once; None if it is not such an expression."""
  try:
    expression = arithmetic.parse(completion)
  except arithmetic.NotArithmetic:
    return None
  return expression.value if sorted(expression.numbers) == sorted(_numbers(record)) else None


def _read_row(row: dict[str, Any]) -> Record:
  """Turn a row of a published file into a record.

  Raises:
    ValueError: why it cannot be used.
  """
  if not {"input", "output"} <= row.keys():
    raise ValueError("not an object with input and output")
  numbers = [_positive(number, "input") for number in str(row["input"]).split(",")]
  if len(numbers) < 2:
    raise ValueError(f"input {row['input']!r} has fewer than two numbers")
  return {"numbers": ",".join(map(str, numbers)), "target": _positive(row["output"], "output")}


def _positive(value: Any, name: str) -> int:
  text = str(value).strip()
  if isinstance(value, bool) or not (text.isascii() and text.isdigit() and 0 < int(text) < 10**arithmetic.MAX_DIGITS):
    raise ValueError(f"{name} {value!r} is not a positive whole number")
  return int(text)
