"""Texts of a run as HTML: code in its colours, and the cells of a Sudoku as its grid. All of it is escaped."""

import re

import pygments
import pygments.formatters
import pygments.lexers
from markupsafe import Markup, escape
from pygments.util import ClassNotFound

from dmpo_jax.run import grids
from dmpo_jax.run.report.runs import Row

FENCED = re.compile(r"^(```[^\n]*\n)(.*?)(^```[ ]*)$", re.S | re.M)
_FORMATTER = pygments.formatters.HtmlFormatter(nowrap=True, classprefix="code-")


def show_code(text: str, is_code: bool = False) -> Markup:
  """Write a text with its fenced code in colours; `is_code`: without a fence all of it is Python."""
  if is_code and "```" not in text:
    return _coloured(text, "python")
  shown, end = Markup(""), 0
  for found in FENCED.finditer(text):
    head, code, fence = found.groups()
    language = head.strip().removeprefix("```").strip() or "python"
    shown += escape(text[end : found.start()] + head) + _coloured(code, language) + escape(fence)
    end = found.end()
  return shown + escape(text[end:])


def _coloured(text: str, language: str) -> Markup:
  try:
    lexer = pygments.lexers.get_lexer_by_name(language, stripnl=False, ensurenl=False)
  except ClassNotFound:
    return escape(text)
  return Markup(pygments.highlight(text, lexer, _FORMATTER).removesuffix("\n") + "\n" * text.endswith("\n"))


def show_grid(line: Row) -> Markup | None:
  """Draw the answer of a generation as the grid of its Sudoku; None where it is none."""
  grid, answer = grids.of_record(line.get("record")), line.get("extracted")
  if grid is None or not isinstance(answer, str) or len(answer) != len(grid.puzzle):
    return None
  wrong = grid.find_wrong(answer)
  cells = [
    Markup('<span class="{}">{}</span>').format(" ".join(_classes(grid, index, index in wrong)), digit)
    for index, digit in enumerate(answer)
  ]
  label = f"Sudoku, {len(wrong)} cells wrong"
  return Markup('<p class="grid small" style="--side: {}" role="img" aria-label="{}">{}</p>').format(
    grid.side, label, Markup("").join(cells)
  )


def _classes(grid: grids.Grid, index: int, is_wrong: bool) -> list[str]:
  row, column = divmod(index, grid.side)
  found = {
    "given": grid.puzzle[index] != "0",
    "wrong": is_wrong,
    "left": column % grid.box == 0 and column > 0,
    "top": row % grid.box == 0 and row > 0,
  }
  return ["token", *(name for name, is_so in found.items() if is_so)]
