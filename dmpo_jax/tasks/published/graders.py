"""The published evaluation: how each task extracts the answer from a generation, and whether it is correct."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from dmpo_jax.tasks.base import Grade
from dmpo_jax.tasks.published import latex, python_arithmetic
from dmpo_jax.tasks.published.rewards import CELLS, count_right_cells, is_close, uses_each_once

_BOX = re.compile(r"\\boxed\{([^}\n]*)\}")  # up to the first closing brace, on one line
_NUMBER = re.compile(r"-?\d+\.?\d*")
_SIDE = re.compile(r"([0-9+\-*/() ]+)(=[0-9. ])?")  # an expression, and whether a value follows it
_LATEX_OPERATORS = ((r"\div", "/"), (r"\times", "*"), (r"\cdot", "*"))


def grade_gsm8k(generation: str, question: str, gold: Any) -> Grade:
  """Take the first number in the first box with one, else the last in the first answer block; a comma ends a number."""
  answer = _first_box_number(generation)
  if answer is None:
    answer = _number(_first_block(generation) or "", last=True)
  return Grade(is_correct=answer is not None and answer == gold, extracted=answer)


def grade_math(generation: str, question: str, gold: Any) -> Grade:
  """Take the last box, or the whole text without one; if the box is empty or not closed, the first answer block."""
  answer = latex.boxed_answer(generation)
  if not answer:
    block = _first_block(generation)
    answer = answer if block is None else block
  return Grade(is_correct=answer is not None and latex.are_equivalent(answer, gold), extracted=answer)


def grade_countdown(generation: str, question: str, gold: Any) -> Grade:
  """Take the last box, or the whole text without one; of `expression = value`, take the left side.

  Args:
    gold: [numbers, target]; otherwise they are read from the question.
  """
  equation = latex.boxed_answer(generation)
  if equation is None:
    block = _first_block(generation)
    equation = generation if block is None else block
  for command, sign in _LATEX_OPERATORS:
    equation = equation.replace(command, sign)
  sides = (match[1].strip() for match in _SIDE.finditer(equation) if match[2])
  equation = next(sides, equation)
  numbers, target = gold if isinstance(gold, list | tuple) and len(gold) == 2 else _read_puzzle(question)
  if not uses_each_once(equation, numbers):
    return Grade(is_correct=False, extracted=equation)
  value = python_arithmetic.evaluate(equation.strip())
  is_correct = target is not None and is_close(value, target)
  return Grade(is_correct=is_correct, extracted=equation, value=math.inf if value is None else value)


def grade_sudoku(generation: str, question: str, gold: str) -> Grade:
  """Take the first of five places that is not empty; each blank cell counts separately.

  Raises:
    ValueError: the question contains no puzzle.
  """
  puzzle = _read_grid(question)
  answer = "".join(_sudoku_answer(generation).split())
  answer = answer and answer[:CELLS].ljust(CELLS, "0")
  right, blanks = count_right_cells(answer, puzzle, gold) if answer else (0, puzzle.count("0"))
  return Grade(is_correct=blanks > 0 and right == blanks, extracted=answer, cells=(right, blanks))


_FENCED = re.compile(r"```([\d\s]+)```")
_END = re.compile(r"<\|eot_id\|>|<\|endoftext\|>")
_END_OR_CLOSED = re.compile(_END.pattern + "|</answer>")
_ROWS_BEFORE_CLOSED = re.compile(r"(\d{16})\s*</answer>")
_ROWS_ALONE = re.compile(r"\b(\d{16})\b")


def _sudoku_answer(generation: str) -> str:
  return next((text.strip() for text in _sudoku_places(generation) if text.strip()), "")


def _sudoku_places(text: str) -> Iterator[str]:
  """Yield the text of a code block in the answer, the answer, what follows it, and rows of digits."""
  _, is_open, answer = text.partition("<answer>")
  if is_open:
    yield from (match[1] for match in (_FENCED.search(answer),) if match)
    end = _END_OR_CLOSED.search(answer)
    yield answer[: end.start()] if end else ""
  yield _END.split(text.partition("</answer>")[2].lstrip(), maxsplit=1)[0]
  for pattern in (_ROWS_BEFORE_CLOSED, _ROWS_ALONE):
    yield from (match[1] for match in (pattern.search(text),) if match)


def _read_grid(question: str) -> str:
  if len(question) >= CELLS and question[:CELLS].isdigit():
    return question[:CELLS]
  match = re.search(r"Sudoku puzzle: ([0-9]{16})", question)
  if match is None:
    raise ValueError(f"no puzzle of {CELLS} digits in the question {question!r}")
  return match[1]


def _first_box_number(text: str) -> float | None:
  for match in _BOX.finditer(text):
    content = match[1].strip()
    if content.strip("."):
      number = _number(content, last=False)
      if number is not None:
        return number
  return None


def _number(text: str, *, last: bool) -> float | None:
  """Read the whole text as a float, or else the first or last number in it."""
  try:
    return float(text)
  except ValueError:
    found = _NUMBER.findall(text)
    return float(found[-1 if last else 0]) if found else None


def _first_block(text: str) -> str | None:
  start = text.find("<answer>")
  stop = text.find("</answer>", start) if start >= 0 else -1
  return text[start + len("<answer>") : stop].strip() if stop >= 0 else None


def _read_puzzle(question: str) -> tuple[list[int], int | None]:
  numbers = re.search(r"Numbers: \[([\d, ]+)\]", question, re.IGNORECASE)
  target = re.search(r"Target: (\d+)", question, re.IGNORECASE)
  return [int(n) for n in numbers[1].split(",")] if numbers else [], int(target[1]) if target else None


GRADERS: dict[str, Callable[[str, str, Any], Grade]] = {
  "gsm8k": grade_gsm8k,
  "math": grade_math,
  "countdown": grade_countdown,
  "sudoku": grade_sudoku,
}
"""By task: (generation with its end tokens, question, gold answer) -> Grade."""
