"""The published rewards under their published names: functions of a completion and of what grading needs.

The gold answer of GSM8K is the text after ####, unchanged. That of MATH is a solution with the answer in a box.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from dmpo_jax.tasks.published import latex, python_arithmetic

CELLS = 16  # of a Sudoku

_STRICT = re.compile(r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$")  # no DOTALL: `.` ends at a newline
_SOFT = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>")


def after_answer_tag(text: str) -> str:
  """Return the text after the last <answer>, or all of it without one, up to the next </answer>."""
  return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()


def last_answer_block(text: str) -> str | None:
  """Return the content of the last closed <answer>...</answer>, with blocks matched from left to right."""
  block, end = None, 0
  while True:
    start = text.find("<answer>", end)
    stop = text.find("</answer>", start + len("<answer>")) if start >= 0 else -1
    if stop < 0:
      return block
    block, end = text[start + len("<answer>") : stop].strip(), stop + len("</answer>")


def hash_answer(text: str) -> str | None:
  """Return the text between the first and second #### of a GSM8K solution; None without ####."""
  parts = text.split("####")
  return parts[1].strip() if len(parts) > 1 else None


def count_xml(text: str) -> float:
  """Return 0.125 for each tag that occurs once in the form asked for, minus 0.001 per character after the last tag."""
  count = 0.0
  for tag in ("<reasoning>\n", "\n</reasoning>\n"):
    count += 0.125 * (text.count(tag) == 1)
  if text.count("\n<answer>\n") == 1:
    count += 0.125
    count -= len(text.split("\n</answer>\n")[-1]) * 0.001
  if text.count("\n</answer>") == 1:
    count += 0.125
    count -= (len(text.split("\n</answer>")[-1]) - 1) * 0.001
  return count


def xmlcount_reward_func(completion: str, **kwargs: Any) -> float:
  """See `count_xml`; at most 0.5, and negative if a long text follows the answer."""
  return count_xml(completion)


def soft_format_reward_func(completion: str, **kwargs: Any) -> float:
  """Return 0.5 for both blocks in order at the beginning, with no newline inside either."""
  return 0.5 if _SOFT.match(completion) else 0.0


def strict_format_reward_func(completion: str, **kwargs: Any) -> float:
  """Return 0.5 for both blocks and nothing else, with tags on their own lines and one line inside each."""
  return 0.5 if _STRICT.match(completion) else 0.0


def int_reward_func(completion: str, **kwargs: Any) -> float:
  """Return 0.5 if the answer consists of digits (of any script, including superscripts)."""
  return 0.5 if after_answer_tag(completion).isdigit() else 0.0


def reward_len(completion: str, **kwargs: Any) -> int:
  """Return minus the length in characters."""
  return -len(completion)


def correctness_reward_func(completion: str, *, answer: str | None, **kwargs: Any) -> float:
  """GSM8K: return 2 if the answer equals the gold answer character for character."""
  return 2.0 if after_answer_tag(completion) == answer else 0.0


def correctness_reward_func_math(completion: str, *, answer: str, **kwargs: Any) -> float:
  """MATH: return 2 if the last box, or the whole text without one, has the same text form as the gold answer.

  Raises:
    TypeError: the box of the gold answer is never closed.
  """
  gold = latex.boxed_answer(answer)
  if gold is None:
    raise TypeError(f"the gold answer has a box that is not closed: {answer!r}")
  found = latex.boxed_answer(completion)
  return 2.0 if latex.are_equivalent(completion if found is None else found, gold) else 0.0


def boxed_and_answer_tags_format_reward(completion: str, **kwargs: Any) -> float:
  r"""MATH: return 0.5 for an <answer>, plus 0.5 for a \boxed in the first one (without one, in the text), else 0.25."""
  _, tag, rest = completion.partition("<answer>")
  answer = rest.partition("<answer>")[0].partition("</answer>")[0] if tag else completion
  return 0.5 * ((1.0 if tag else 0.0) + (1.0 if "\\boxed" in answer else 0.5))


def countdown_reward_func(completion: str, *, target: float, numbers: Sequence[int], **kwargs: Any) -> float:
  """Countdown: return 1 for an expression that uses each number once and hits the target, 0.1 for any tagged answer."""
  equation = last_answer_block(completion)
  if equation is None:
    return 0
  if not uses_each_once(equation, numbers):
    return 0.1
  return 1.0 if is_close(python_arithmetic.evaluate(equation), target) else 0.1


def uses_each_once(equation: str, numbers: Sequence[int]) -> bool:
  """Whether the numbers in an expression are the given ones, each once."""
  try:
    used = python_arithmetic.numbers_in(equation)
    return used is not None and sorted(used) == sorted(numbers)
  except TypeError:  # `numbers` has other values than numbers
    return False


def is_close(value: python_arithmetic.Number | None, target: float) -> bool:
  """Whether a value is within 1e-5 of the target."""
  try:
    return value is not None and abs(value - target) < 1e-5
  except (TypeError, OverflowError):
    return False


def sudoku_digits(text: str) -> str | None:
  """Return the digits of the last answer block; None without one."""
  block = last_answer_block(text)
  return None if block is None else "".join(filter(str.isdigit, block))


def count_right_cells(answer: str, puzzle: str, solution: str) -> tuple[int, int]:
  """Return the number of correct blank cells, and of blank cells. A short answer is filled up with 0."""
  cells = answer[:CELLS].ljust(CELLS, "0")
  blanks = [index for index in range(CELLS) if puzzle[index] == "0"]
  return sum(cells[index] == solution[index] for index in blanks), len(blanks)


def sudoku_reward_func(completion: str, *, puzzle: str, solution: str, **kwargs: Any) -> float:
  """Sudoku: return the share of correct blank cells; 0 for a puzzle without blank cells."""
  digits = sudoku_digits(completion)
  if not digits:
    return 0.0
  right, blanks = count_right_cells(digits, puzzle, solution)
  return right / blanks if blanks else 0.0


Reward = Callable[..., float]

REWARDS: dict[str, Reward] = {
  function.__name__: function
  for function in (
    xmlcount_reward_func,
    soft_format_reward_func,
    strict_format_reward_func,
    int_reward_func,
    reward_len,
    correctness_reward_func,
    correctness_reward_func_math,
    boxed_and_answer_tags_format_reward,
    countdown_reward_func,
    sudoku_reward_func,
  )
}
"""All published rewards by name."""

TRAINED_WITH: dict[str, dict[str, Reward]] = {
  "gsm8k": {
    "xmlcount": xmlcount_reward_func,
    "soft_format": soft_format_reward_func,
    "strict_format": strict_format_reward_func,
    "int": int_reward_func,
    "correctness": correctness_reward_func,
  },
  "math": {"correctness": correctness_reward_func_math, "format": boxed_and_answer_tags_format_reward},
  "countdown": {"countdown": countdown_reward_func},
  "sudoku": {"sudoku": sudoku_reward_func},
}
"""The rewards that each task is trained with, by what metrics call them; their sum is the reward."""


RANGES: dict[str, tuple[float, float]] = {
  "gsm8k": (-math.inf, 3.5),  # text after the answer costs without limit; strict and soft format exclude each other
  "math": (0.25, 3.0),
  "countdown": (0.0, 1.0),
  "sudoku": (0.0, 1.0),
}
"""Bounds of their sum."""


def score(task: str, completion: str, **kwargs: Any) -> dict[str, float]:
  """Return each of the rewards that `task` is trained with."""
  return {name: float(reward(completion, **kwargs)) for name, reward in TRAINED_WITH[task].items()}
