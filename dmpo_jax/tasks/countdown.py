"""Countdown: reach the target with the given numbers, each used exactly once, and + - * / and parentheses.

The bare prompt is "75,30,4=49"; a completion is an expression, "75-30+4".
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
from dmpo_jax.tasks.builtin import FORM, BuiltinTask
from dmpo_jax.tasks.published import prompts

OPERATORS = "+-*/"
MISSED_REWARD = 0.1  # for an expression that follows the rules and misses the target
_TEST_SHARE = 0.1  # of all (numbers, target)
_CANDIDATES = 4096  # expressions drawn at a time
_MAX_SEARCHED = 4  # most numbers for which a demonstration is searched; more would take too long
_SIGNS = (  # LaTeX and typographic signs: times, dot, divided by, minus, en dash
  *((r"\times", "*"), (r"\cdot", "*"), (r"\div", "/"), (r"\left", ""), (r"\right", ""), ("$", "")),
  *(("\u00d7", "*"), ("\u00b7", "*"), ("\u00f7", "/"), ("\u2212", "-"), ("\u2013", "-")),
)
_MAX_FRUITLESS = 10  # draws in a row without a new puzzle after which puzzles count as exhausted


class Term(NamedTuple):
  """An expression under construction."""

  text: str
  value: Fraction
  rank: int  # precedence of its outermost operator: 1 for + -, 2 for * /, 3 for a number


BARE_PROMPT = PromptTemplate("$numbers=$target", is_tagged=False)
DEFAULT_PROMPT = PromptTemplate(
  "Write an expression with the value $target from the numbers $numbers, each of them used exactly once, with +, -, *, "
  f"/ and parentheses. {FORM}nothing but the expression: no equals sign, not its value."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Countdown(BuiltinTask):
  """The task, with the options of `config.task.countdown`.

  Records are {numbers: "75,30,4", target: 49, solution: "75-30+4"}; records of a published file have no solution.
  """

  name: ClassVar[str] = "countdown"
  version: ClassVar[str] = "1.0.0"
  PROMPTS: ClassVar = {"bare": BARE_PROMPT, "default": DEFAULT_PROMPT, **prompts.COUNTDOWN}

  num_numbers: int
  max_number: int  # numbers and targets are drawn from 1..max_number
  demo_wrong: float  # share of demonstrations that miss the target
  max_numbers: int = 0  # puzzles have num_numbers to so many numbers, each equally often; 0: num_numbers
  prompt_name: str = "bare"

  def option_problems(self) -> list[str]:
    """Return the problems with the options."""
    problems = []
    if not 2 <= self.num_numbers <= 6:
      problems.append(f"task.countdown.num_numbers={self.num_numbers}: must be 2 to 6")
    if self.max_numbers and not self.num_numbers <= self.max_numbers <= 6:
      problems.append(
        f"task.countdown.max_numbers={self.max_numbers}: must be 0, or {self.num_numbers} "
        "(task.countdown.num_numbers) to 6"
      )
    if not 2 <= self.max_number <= 9999:
      problems.append(f"task.countdown.max_number={self.max_number}: must be 2 to 9999")
    if not 0 <= self.demo_wrong <= 1:
      problems.append(f"task.countdown.demo_wrong={self.demo_wrong}: must be a probability, in [0, 1]")
    return problems

  def generate(self, split: Split, num: int, seed: int) -> Iterator[Record]:
    """Yield `num` puzzles that differ in (sorted numbers, target); no puzzle is in both splits.

    The target is the value of a random expression, if that is a whole number in 1..max_number.

    Raises:
      ValueError: there are fewer puzzles with these options.
    """
    part = ("train", "test").index(split)
    counts = [self.num_numbers] * num
    draw = {
      self.num_numbers: self._distinct_puzzles(self.num_numbers, split, seed, np.random.default_rng((seed, part)))
    }
    if self.max_numbers > self.num_numbers:
      possible = range(self.num_numbers, self.max_numbers + 1)
      draw = {
        count: self._distinct_puzzles(count, split, seed, np.random.default_rng((seed, part, count)))
        for count in possible
      }
      counts = np.random.default_rng((seed, part)).choice(possible, size=num).tolist()
    for index, count in enumerate(counts):
      record = next(draw[count], None)
      if record is None:
        raise ValueError(
          f"task.num_{split}={num}: the {split} split ran out of puzzles after {index}; "
          "ask for fewer, or raise task.countdown.max_number"
        )
      yield record

  @staticmethod
  def difficulty(record: Record) -> int:
    """Return how many numbers there are."""
    return record["numbers"].count(",") + 1

  def _distinct_puzzles(self, count: int, split: Split, seed: int, rng: np.random.Generator) -> Iterator[Record]:
    """Yield different puzzles of so many numbers, until drawing finds no new ones."""
    seen: set[tuple[int, ...]] = set()
    fruitless = 0
    while fruitless < _MAX_FRUITLESS:
      fruitless += 1
      for numbers, term in self._draw(count, rng):
        key = (*sorted(numbers), int(term.value))
        if key not in seen and _belongs_to(key, split, seed):
          seen.add(key)
          fruitless = 0
          yield {"numbers": ",".join(map(str, numbers)), "target": key[-1], "solution": term.text}

  def _draw(self, count: int, rng: np.random.Generator) -> Iterator[tuple[list[int], Term]]:
    """Draw numbers and expressions, and yield those whose value can be a target.

    As few can, approximate values are first computed for all of them at once.
    """
    numbers = rng.integers(1, self.max_number + 1, size=(_CANDIDATES, count))
    joins = draw_joins(rng, _CANDIDATES, count)
    values = _rough_values(numbers, joins)
    is_close = (np.abs(values - np.round(values)) < 1e-6) & (values > 0.5) & (values < self.max_number + 0.5)
    for index in np.flatnonzero(is_close):
      term = build_expression(numbers[index].tolist(), joins[index].tolist())
      if term is not None and term.value.denominator == 1:
        yield numbers[index].tolist(), term

  def prompt_fields(self, record: Record) -> dict[str, Any]:
    """Return the numbers, as "75,30,4" or with spaces in a sentence, and the target."""
    numbers = record["numbers"].replace(",", ", ") if self._prompt.is_tagged else record["numbers"]
    return {"numbers": numbers, "target": record["target"]}

  def demonstration(self, record: Record, rng: np.random.Generator) -> str:
    """Return a correct expression or, with probability `demo_wrong`, one that follows the rules and misses the target.

    Both are determined by the puzzle, as a small model learns to search only if each puzzle has one answer. The wrong
    one is the sum of the numbers in order, with the last one subtracted if the sum would be correct.
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

  def default_reward(self, record: Record, text: str) -> float:
    """Return 1 for a correct expression, 0.1 for one that uses each number once and misses the target, else 0.

    An expression that divides by zero counts as not well-formed. Values are exact fractions.
    """
    value = _value(record, self._extract(text))
    if value is None:
      return 0.0
    return 1.0 if value == record["target"] else MISSED_REWARD

  def default_grade(self, record: Record, text: str) -> Grade:
    """Return whether the answer is an expression of the given numbers, each used once, that reaches the target."""
    answer = self._extract(text)
    return Grade(_value(record, answer) == record["target"], extracted=answer)

  def has_form(self, record: Record, text: str) -> bool:
    """Whether a text is both blocks, or an expression of the numbers if the prompt asks for no tags."""
    is_expression = self._prompt.is_tagged or _value(record, self._extract(text)) is not None
    return super().has_form(record, text) and is_expression

  def _extract(self, text: str) -> str:
    """Return the last answer, or the whole completion if the prompt asks for no tags; of an equation, the left side."""
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
    """Read JSON lines {"input": "a,b,c", "output": target}, where the target is a number or text.

    Raises:
      ValueError: the file is absent, or rows are not puzzles; all of them are listed.
    """
    return sources.read_file(path, _read_row)


def plain_expression(text: str) -> str:
  """Write LaTeX and typographic signs as + - * /, and drop the value at the end of an equation."""
  for sign, plain in _SIGNS:
    text = text.replace(sign, plain)
  expression, equals, value = text.partition("=")
  return (expression if equals and answers.is_number(value) else text).strip()


def draw_joins(rng: np.random.Generator, num: int, num_numbers: int) -> Int[np.ndarray, "num joins 3"]:
  """Draw `num` expressions, each as a sequence of (left, right, operator) that joins two terms until one is left.

  left and right are different positions among the remaining terms; operator is an index into OPERATORS.
  """
  sizes = np.array([(terms, terms - 1, len(OPERATORS)) for terms in range(num_numbers, 1, -1)])
  joins = (rng.random((num, *sizes.shape)) * sizes).astype(np.int64)
  joins[..., 1] += joins[..., 1] >= joins[..., 0]
  return joins


def build_expression(numbers: Sequence[int], joins: Sequence[Sequence[int]]) -> Term | None:
  """Join the numbers as `joins` describes; None if that divides by zero."""
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
  """Compute the values of `build_expression` in floating point."""
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
  """Join two terms, with parentheses only where they are needed."""
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
  """Search all expressions for one that reaches the target with each number used once.

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
  """Assign (sorted numbers, target) to a split by a hash, so that the splits can be generated independently."""
  digest = hashlib.blake2b(repr((seed, key)).encode(), digest_size=4).digest()
  return (int.from_bytes(digest, "big") < _TEST_SHARE * 2**32) == (split == "test")


def _numbers(record: Record) -> list[int]:
  return [int(number) for number in record["numbers"].split(",") if number]


def _value(record: Record, completion: str) -> Fraction | None:
  """Return the value of an expression that uses each given number exactly once; None for other text."""
  try:
    expression = arithmetic.parse(completion)
  except arithmetic.NotArithmetic:
    return None
  return expression.value if sorted(expression.numbers) == sorted(_numbers(record)) else None


def _read_row(row: dict[str, Any]) -> Record:
  """Turn a row of a published file into a record.

  Raises:
    ValueError: it cannot be used; the message says why.
  """
  if not {"input", "output"} <= row.keys():
    raise ValueError("not an object with input and output")
  numbers = [_positive(number, "input") for number in str(row["input"]).split(",")]
  if len(numbers) < 2:
    raise ValueError(f"input {row['input']!r} has fewer than two numbers")
  return {"numbers": ",".join(map(str, numbers)), "target": _positive(row["output"], "output")}


def _positive(value: object, name: str) -> int:
  text = str(value).strip()
  if isinstance(value, bool) or not (text.isascii() and text.isdigit() and 0 < int(text) < 10**arithmetic.MAX_DIGITS):
    raise ValueError(f"{name} {value!r} is not a positive whole number")
  return int(text)
