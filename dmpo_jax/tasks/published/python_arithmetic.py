"""The value that Python gives an arithmetic expression, without executing it. The published code uses `eval` for this.

Whole numbers, floats, + - * / // **, signs and parentheses, with Python's types: 7/2 is a float, (-8)**0.5 is complex.
Text is parsed, never executed, and work is bounded: a power or product with too many digits has no value.
"""

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

MAX_LENGTH = 1000  # characters; longer expressions have no value
MAX_BITS = 1 << 18  # of an intermediate whole number

_CHARACTERS = re.compile(r"[\d+\-*/().\s]+\Z")
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
  ast.FloorDiv: operator.floordiv,
  ast.Pow: operator.pow,
}
_UNARY: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}

Number = int | float | complex


def numbers_in(text: str) -> list[int] | None:
  """Return the runs of decimal digits (of any script) in a text as numbers; None if one is too long for `int`."""
  try:
    return [int(run) for run in re.findall(r"\d+", text)]
  except ValueError:
    return None


def evaluate(text: str) -> Number | None:
  """Return the value of an expression; None if `eval` would raise or give no number, or if a bound is exceeded."""
  if len(text) > MAX_LENGTH or not _CHARACTERS.match(text):
    return None
  try:
    return _value(ast.parse(text.lstrip(" \t"), mode="eval").body)
  except (SyntaxError, ValueError, ArithmeticError, TypeError, RecursionError, MemoryError):
    return None


def _value(node: ast.expr) -> Number:
  signs = []
  while isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:  # a loop, not recursion, as there may be hundreds
    signs.append(_UNARY[type(node.op)])
    node = node.operand
  value = _unsigned_value(node)
  for sign in signs:
    value = sign(value)
  return value


def _unsigned_value(node: ast.expr) -> Number:
  if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
    return node.value
  if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
    left, right = _value(node.left), _value(node.right)
    if _bits(node.op, left, right) > MAX_BITS:
      raise OverflowError("more digits than are computed here")
    return _BINARY[type(node.op)](left, right)
  raise TypeError(f"{type(node).__name__} is no arithmetic")


def _bits(op: ast.operator, left: Number, right: Number) -> int:
  """Return an upper bound on the bits of a whole result; 0 for a float result, whose size is fixed."""
  if not isinstance(left, int) or not isinstance(right, int):
    return 0
  if isinstance(op, ast.Pow):
    return left.bit_length() * max(right, 0) if abs(left) > 1 else 0
  return left.bit_length() + right.bit_length()
