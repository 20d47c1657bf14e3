"""Parses arithmetic that a model wrote: whole numbers, + - * / and parentheses, with exact values.

Text is parsed, never executed. There is no power operator, and length, digits and nesting are limited, so that any text
takes well under a millisecond.

    sum     = product { ("+" | "-") product }
    product = factor { ("*" | "/") factor }
    factor  = "-" factor | "(" sum ")" | number
"""

import dataclasses
import re
from fractions import Fraction

MAX_LENGTH = 256  # characters
MAX_DIGITS = 12  # of a number
MAX_DEPTH = 32  # nested parentheses and signs

_TOKEN = re.compile(r"\s*(0|[1-9][0-9]*|[-+*/()])")


class NotArithmetic(ValueError):
  """The text is not a well-formed expression with a value, or exceeds the limits."""


@dataclasses.dataclass(frozen=True)
class Expression:
  """A parsed expression."""

  value: Fraction
  numbers: tuple[int, ...]  # its numbers, from left to right


def parse(text: str) -> Expression:
  """Parse an expression and compute its exact value.

  Raises:
    NotArithmetic: the syntax is wrong, it divides by zero, or it exceeds the limits above.
  """
  reader = _Reader(_tokenize(text))
  value = reader.sum(depth=0)
  if reader.next != "":
    raise NotArithmetic(f"{reader.next!r} after the end of the expression")
  return Expression(value, tuple(reader.numbers))


def _tokenize(text: str) -> list[str]:
  """Split the text into numbers and signs; the last token is ""."""
  if len(text) > MAX_LENGTH:
    raise NotArithmetic(f"{len(text)} characters, at most {MAX_LENGTH}")
  tokens, position, text = [], 0, text.rstrip()
  while position < len(text):
    match = _TOKEN.match(text, position)
    if match is None:
      raise NotArithmetic(f"unexpected text {text[position : position + 10]!r}")
    if len(match[1]) > MAX_DIGITS:
      raise NotArithmetic(f"a number of {len(match[1])} digits, at most {MAX_DIGITS}")
    tokens.append(match[1])
    position = match.end()
  return [*tokens, ""]


class _Reader:
  """Recursive descent over the tokens, with one method per grammar rule."""

  def __init__(self, tokens: list[str]):
    self.tokens = tokens
    self.position = 0
    self.numbers: list[int] = []

  @property
  def next(self) -> str:
    return self.tokens[self.position]

  def take(self) -> str:
    self.position += 1
    return self.tokens[self.position - 1]

  def sum(self, depth: int) -> Fraction:
    value = self.product(depth)
    while self.next in ("+", "-"):
      value = value + self.product(depth) if self.take() == "+" else value - self.product(depth)
    return value

  def product(self, depth: int) -> Fraction:
    value = self.factor(depth)
    while self.next in ("*", "/"):
      if self.take() == "*":
        value *= self.factor(depth)
        continue
      divisor = self.factor(depth)
      if divisor == 0:
        raise NotArithmetic("division by zero")
      value /= divisor
    return value

  def factor(self, depth: int) -> Fraction:
    if depth > MAX_DEPTH:
      raise NotArithmetic(f"nested deeper than {MAX_DEPTH}")
    token = self.take()
    if token == "-":
      return -self.factor(depth + 1)
    if token == "(":
      value = self.sum(depth + 1)
      if self.take() != ")":
        raise NotArithmetic("a parenthesis is not closed")
      return value
    if not token.isdigit():
      raise NotArithmetic(f"a number was expected, not {token!r}")
    self.numbers.append(int(token))
    return Fraction(int(token))
