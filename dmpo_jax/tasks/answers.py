r"""Finds and reads the answer in a completion: tags, boxes and numbers, in time linear in the length of the text.

    <reasoning>
    any text
    </reasoning>
    <answer>
    18                 or \boxed{18}
    </answer>

The last answer counts, as a model may correct itself.
"""

import re
from fractions import Fraction

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
MAX_DIGITS = 40  # of a number; longer ones are not read

_BLOCKS = re.compile(r"\s*<reasoning>(.*)</reasoning>\s*<answer>(.*)</answer>\s*", re.DOTALL)
_LINES = re.compile(r"\s*<reasoning>\n.*\n</reasoning>\n<answer>\n.*\n</answer>\s*", re.DOTALL)

# text that may stand in or before a number without changing its value
_NOISE = re.compile(r"\\[!,;: ]|\\left|\\right|\\[$%]|[$£€¥₹{}]|\\(?:text|mathrm|mbox)\b|\*\*|__|`")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?[0-9.,]+)\s*\}\s*\{\s*([0-9.,]+)\s*\}")
_NUMBER = re.compile(
  r"(?P<sign>(?<![0-9)\]])-\s*)?"
  r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])|[0-9]+)?(?P<part>\.[0-9]+)?"
  r"(?:(?<=[0-9])\s*/\s*(?P<below>[0-9]+)(?![0-9.]))?"
)


def last_block(text: str) -> str | None:
  """Return the text after the last <answer>, up to its end tag if there is one; None if there is no <answer>."""
  _, tag, rest = text.rpartition("<answer>")
  return rest.partition("</answer>")[0].strip() if tag else None


def last_box(text: str) -> str | None:
  r"""Return the content of the last complete `\boxed{...}` or `\fbox{...}` of a text; None if there is none."""
  opened: list[int | None] = []  # for each open brace, the start of its box's content; None: not a box
  best, box = -1, None
  for match in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]", text):
    if match[0] == "}":
      start = opened.pop() if opened else None
      if start is not None and start > best:  # the innermost of nested boxes
        best, box = start, text[start : match.start()]
    elif match[0].endswith("{") and match[0] != "\\{":
      opened.append(match.end() if len(match[0]) > 1 else None)
  return None if box is None else box.strip()


def final_answer(text: str) -> str | None:
  """Return the last answer: the box in the last answer block, or the whole block, or else the last box of the text."""
  block = last_block(text)
  box = last_box(block or text)
  return block if box is None else box


def read_number(text: str | None) -> Fraction | None:
  """Read the number in an answer; None if there is none.

  In an equation the right side counts. A number at its beginning counts, with or without units; otherwise the last one.
  Thousands separators, currencies, LaTeX, a final full stop, signs, decimals and fractions a/b are understood.
  """
  if text is None:
    return None
  side = _plain(text).rpartition("=")[2].strip(" \t\r\n~≈:")
  found = [match for match in _NUMBER.finditer(side) if match["whole"] or match["part"]]
  if not found:
    return None
  return _to_fraction(found[0] if found[0].start() == 0 else found[-1])


def is_number(text: str | None) -> bool:
  """Whether an answer is a number alone, except for a currency, a percent sign or a full stop."""
  if text is None:
    return False
  match = _NUMBER.fullmatch(_plain(text).strip().rstrip(".%").rstrip())
  return match is not None and _to_fraction(match) is not None


def _plain(text: str) -> str:
  """Remove text that does not change the value of numbers."""
  return _NOISE.sub("", _FRACTION.sub(r" \1/\2 ", text).replace("{,}", ",").replace("\u2212", "-"))


def _to_fraction(match: re.Match[str]) -> Fraction | None:
  digits = (match["whole"] or "0").replace(",", "") + (match["part"] or "")
  below = int(match["below"][:MAX_DIGITS]) if match["below"] else 1
  if not (match["whole"] or match["part"]) or len(digits) > MAX_DIGITS or below == 0:
    return None
  return Fraction(digits) / (-below if match["sign"] else below)


def has_blocks(text: str) -> bool:
  """Whether a text is a reasoning block and an answer block, with each tag once and only white space around them."""
  return all(text.count(tag) == 1 for tag in TAGS) and _BLOCKS.fullmatch(text) is not None


def has_lines(text: str) -> bool:
  """Whether a text is the two blocks, with each tag on its own line and content between the tags."""
  return has_blocks(text) and _LINES.fullmatch(text) is not None


def tag_score(text: str) -> float:
  """Return the share of the four tags that occur once, minus 0.008 per character after the last tag; in [0, 1]."""
  count = sum(text.count(tag) == 1 for tag in TAGS) / len(TAGS)
  after = len(text.rpartition("</answer>")[2].strip()) if "</answer>" in text else 0
  return max(count - 0.008 * after, 0.0)


def wrap(reasoning: str, answer: str) -> str:
  """Write a completion in the form that the prompts ask for."""
  return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"
