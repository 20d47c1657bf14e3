"""Whether two LaTeX answers mean the same: by text form, as numbers, or by math-verify, which needs sympy.

math-verify may take arbitrarily long on some input and its own time limits hold in a main thread only; they are off
here, and `grading.py` runs this in worker processes that are killed in time.
"""

import functools
import logging
from types import ModuleType

from dmpo_jax.tasks import answers
from dmpo_jax.tasks.published import latex

MAX_LENGTH = 400  # characters of an answer that are read as mathematics


@functools.lru_cache(maxsize=1 << 16)
def are_equal(answer: str, gold: str) -> bool:
  """Whether an answer means what the gold answer does. Text decides where it is equal; numbers need no algebra."""
  if _form(answer) == _form(gold):
    return True
  if answers.is_number(answer) and answers.is_number(gold):
    return answers.read_number(answer) == answers.read_number(gold)
  if max(len(answer), len(gold)) > MAX_LENGTH:
    return False
  return _verify(answer, gold)


def warm_up() -> None:
  """Import and compile what the first comparison would."""
  _verify("x+1", "x+2")


def _form(text: str) -> str:
  try:
    return latex.normalize(text)
  except latex.Unnormalizable:
    return text


def _verify(answer: str, gold: str) -> bool:
  library = _library()
  return library.verify(list(_parse(gold)), list(_parse(answer)), timeout_seconds=None)


@functools.lru_cache(maxsize=1 << 14)
def _parse(text: str) -> tuple:
  return tuple(_library().parse(f"\\boxed{{{text}}}", parsing_timeout=None))


@functools.cache
def _library() -> ModuleType:
  import math_verify  # here, because sympy takes half a second and only some workers need it

  logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # that its time limits are off
  return math_verify
