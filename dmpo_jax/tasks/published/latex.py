r"""The published reading of LaTeX answers: which \boxed{} counts, and how text is normalised before it is compared.

The normalisation is that of the MATH data set (Hendrycks et al., arXiv 2103.03874): text replacements, no algebra.
"""

import re
from typing import Any

_BOXED, _BOXED_SPACE, _FBOX = r"\boxed", r"\boxed ", r"\fbox"

_DROPPED_LATE = ("^{\\circ}", "^\\circ", "\\$")  # degrees, dollars
_REPLACED = (
  ("\n", ""),
  ("\\!", ""),
  ("\\\\", "\\"),
  ("tfrac", "frac"),
  ("dfrac", "frac"),
  ("\\left", ""),
  ("\\right", ""),
  *((text, "") for text in _DROPPED_LATE),
)


class Unnormalizable(ValueError):
  """The published normalisation fails on this text; answers are then compared unchanged."""


def last_boxed(text: str) -> str | None:
  r"""Return the last box of a text with its command; the whole text without a box, None if the box is not closed.

  A `\boxed ` with a space takes precedence, and its answer ends at the next dollar sign. Other boxes end at the brace
  that balances those since their command.
  """
  if _BOXED_SPACE in text:
    return _BOXED_SPACE + text.rpartition(_BOXED_SPACE)[2].partition("$")[0]
  start = text.rfind(_BOXED)
  if start < 0:
    start = text.rfind(_FBOX)
  if start < 0:
    return text
  depth = 0
  for brace in re.finditer(r"[{}]", text[start:]):
    depth += 1 if brace[0] == "{" else -1
    if depth == 0 and brace[0] == "}":
      return text[start : start + brace.end()]
  return None


def unbox(box: str) -> str:
  r"""Return the content of a box from `last_boxed`; other text is returned unchanged.

  Raises:
    Unnormalizable: `\boxed ` is in the text, but not at its beginning.
  """
  if _BOXED_SPACE in box:
    if not box.startswith(_BOXED_SPACE):
      raise Unnormalizable(box)
    return box.removeprefix(_BOXED_SPACE)
  opening = _BOXED + "{"
  return box[len(opening) : -1] if box.startswith(opening) and box.endswith("}") else box


def boxed_answer(text: str) -> str | None:
  """Return the content of the last box; the whole text without a box, None if the box is not closed."""
  box = last_boxed(text)
  return None if box is None else unbox(box)


def are_equivalent(answer: Any, gold: Any) -> bool:
  """Whether two answers are equal once normalised; as numbers if one is a float, unchanged if normalising fails."""
  if isinstance(answer, float) or isinstance(gold, float):
    try:
      return abs(float(answer) - float(gold)) < 1e-6
    except (TypeError, ValueError, OverflowError):
      return False
  if answer is None or gold is None:
    return answer is gold
  try:
    return normalize(answer) == normalize(gold)
  except (Unnormalizable, AttributeError):  # AttributeError: not a text
    return answer == gold


def normalize(text: str) -> str:
  """Return the text form of an answer.

  Raises:
    Unnormalizable: the published code fails on this text.
  """
  for old, new in _REPLACED:
    text = text.replace(old, new)
  text = drop_units(text).replace("\\%", "")
  text = text.replace(" .", " 0.").replace("{.", "{0.")
  if not text:
    return text
  if text[0] == ".":
    text = "0" + text
  name, *values = text.split("=")
  if len(values) == 1 and len(name) <= 2:  # as in "x = 5"
    text = values[0]
  text = brace_fractions(brace_roots(text).replace(" ", ""))
  return slash_to_fraction(r"\frac{1}{2}" if text == "0.5" else text)


def drop_units(text: str) -> str:
  r"""Drop what begins with `\text{ `; two of them are too many.

  Raises:
    Unnormalizable: there are two.
  """
  if text.count("\\text{ ") > 1:
    raise Unnormalizable(text)
  return text.partition("\\text{ ")[0]


def brace_roots(text: str) -> str:
  r"""Turn `\sqrt3` into `\sqrt{3}`.

  Raises:
    Unnormalizable: nothing follows a `\sqrt`.
  """
  first, *others = text.split("\\sqrt")
  return first + "".join("\\sqrt" + (part if _head(part) == "{" else f"{{{part[0]}}}{part[1:]}") for part in others)


def brace_fractions(text: str) -> str:
  r"""Turn `\frac12` and `\frac1{2}` into `\frac{1}{2}`; a text with a `\frac` of one character stays as it is.

  Raises:
    Unnormalizable: nothing follows a `\frac`.
  """
  first, *others = text.split("\\frac")
  done = first
  for part in others:
    if _head(part) != "{":
      if len(part) < 2:
        return text
      numerator, denominator, rest = part[0], part[1], part[2:]
      part = f"{{{numerator}}}" + (part[1:] if denominator == "{" else f"{{{denominator}}}{rest}")
    done += "\\frac" + part
  return done


def slash_to_fraction(text: str) -> str:
  r"""Turn `1/2`, two plain whole numbers, into `\frac{1}{2}`.

  Raises:
    Unnormalizable: there is one slash, and not a whole number on each side.
  """
  parts = text.split("/")
  if len(parts) != 2:
    return text
  try:
    a, b = map(int, parts)
    is_plain = text == f"{a}/{b}"
  except ValueError as error:
    raise Unnormalizable(text) from error
  return f"\\frac{{{a}}}{{{b}}}" if is_plain else text


def _head(part: str) -> str:
  if not part:
    raise Unnormalizable("a command without its argument")
  return part[0]
