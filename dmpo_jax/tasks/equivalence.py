"""Whether two LaTeX answers are equivalent: as text, as numbers, or by math-verify, which uses sympy.

math-verify may take arbitrarily long, and its time limits work only in a main thread. They are off here; `grading.py`
runs this in worker processes with a time limit.
"""

import cmath
import functools
import logging
import zlib
from types import ModuleType
from typing import Any

from dmpo_jax.tasks import answers
from dmpo_jax.tasks.published import latex

MAX_LENGTH = 400  # characters; longer answers are compared as text only

_TYPICAL = (  # typical answers
  *(
    "\\frac{\\sqrt{3}}{2}",
    "(3, \\frac{\\pi}{2})",
    "(-\\infty, 2] \\cup [3, 5)",
    "x^2 - 2x + 1",
    "x = 5",
    "2{,}000",
    "-7i",
  ),
  *(
    "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
    "\\text{no}",
    "1,2,3",
    "11\\sqrt{2} + 1",
    "\\{1, 2\\}",
    "10^\\circ",
    "ab",
  ),
)


@functools.lru_cache(maxsize=1 << 16)
def are_equal(answer: str, gold: str) -> bool:
  """Whether an answer is equivalent to the gold answer. Equal text and numbers need no algebra."""
  if _form(answer) == _form(gold):
    return True
  if answers.is_number(answer) and answers.is_number(gold):
    return answers.read_number(answer) == answers.read_number(gold)
  if max(len(answer), len(gold)) > MAX_LENGTH:
    return False
  return _verify(answer, gold)


def warm_up() -> None:
  """Import and build what the first comparisons would."""
  for text in _TYPICAL:
    _verify(text, "\\frac{x}{2}")


def _form(text: str) -> str:
  try:
    return latex.normalize(text)
  except latex.Unnormalizable:
    return text


def _verify(answer: str, gold: str) -> bool:
  if not any("%" in text for text in (answer, gold)) and _surely_differ(_parse(answer), _parse(gold)):
    return False
  return _library().verify(list(_parse(gold)), list(_parse(answer)), timeout_seconds=None)


def _surely_differ(answer: tuple, gold: tuple) -> bool:
  """Whether two expressions have clearly different values. This avoids an attempt to simplify their difference.

  Both must have the same symbols, or one none, as a word may have been parsed as a product of letters. Each symbol gets
  a value from its lowercase name, as the library compares them in lowercase. The library handles percentages.
  """
  import sympy

  pair = [*answer[:1], *gold[:1]]
  if len(pair) < 2 or not all(isinstance(expression, sympy.Expr) for expression in pair):
    return False
  names = [{str(symbol).lower() for symbol in expression.free_symbols} for expression in pair]
  if names[0] != names[1] and all(names):
    return False
  left, right = map(_value, pair)
  return left is not None and right is not None and abs(left - right) > 1e-3 * (1 + abs(right))


def _value(expression: Any) -> complex | None:
  """Return the value of a sympy expression with fixed values for its symbols; None if it is not finite."""
  symbols = {s: 1.1 + zlib.crc32(str(s).lower().encode()) % 997 / 997 for s in expression.free_symbols}
  try:
    value = complex(expression.subs(symbols).evalf(15))
  except (TypeError, ValueError, ArithmeticError):
    return None
  return value if cmath.isfinite(value) else None


@functools.lru_cache(maxsize=1 << 14)
def _parse(text: str) -> tuple:
  return tuple(_library().parse(f"\\boxed{{{text}}}", parsing_timeout=None))


@functools.cache
def _library() -> ModuleType:
  import math_verify  # imported here, as sympy takes half a second and few workers need it

  logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its time limits are off
  return math_verify
