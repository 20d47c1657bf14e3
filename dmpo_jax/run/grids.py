"""Sudoku as a grid: what the report, the terminal and the film need to know of a puzzle and of its cells."""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

SIZES = (16, 81)  # cells


@dataclasses.dataclass(frozen=True)
class Grid:
  """A puzzle, row by row; 0 is a blank cell."""

  puzzle: str
  solution: str = ""  # "": unknown

  @property
  def side(self) -> int:
    """Cells of a row."""
    return math.isqrt(len(self.puzzle))

  @property
  def box(self) -> int:
    """Cells of a box's row."""
    return math.isqrt(self.side)

  def fits(self, pieces: Sequence[str]) -> bool:
    """Whether a completion's tokens are the cells: one character each, or a special token."""
    cells = pieces[: len(self.puzzle)]
    return len(cells) == len(self.puzzle) and all(len(piece) == 1 or piece.startswith("<") for piece in cells)

  @property
  def drawn(self) -> dict[str, str | int]:
    """What a page draws it by."""
    return {"puzzle": self.puzzle, "box": self.box}

  def find_wrong(self, cells: Sequence[str | None]) -> list[int]:
    """Return the cells that are not the solution's; None is undecided.

    Where the solution is unknown, these are cells that change a given digit, are no digit of the grid, or repeat one of
    their row, column or box.
    """
    decided = {index: cell for index, cell in enumerate(cells[: len(self.puzzle)]) if cell is not None}
    if self.solution:
      return [index for index, cell in decided.items() if cell != self.solution[index]]
    digits = {str(digit) for digit in range(1, self.side + 1)}
    where = {index: [(cell, *place) for place in self._places(index)] for index, cell in decided.items()}
    count = collections.Counter(itertools.chain.from_iterable(where.values()))
    return [
      index
      for index, cell in decided.items()
      if self.puzzle[index] not in ("0", cell) or cell not in digits or any(count[place] > 1 for place in where[index])
    ]

  def _places(self, index: int) -> list[tuple[str, int, int]]:
    """Name the row, the column and the box of a cell."""
    row, column = divmod(index, self.side)
    return [("row", row, 0), ("column", 0, column), ("box", row // self.box, column // self.box)]


def are_completed(task: str, prompt: str) -> bool:
  """Whether the completions of a task, with its prompt of this name, are the cells of a Sudoku, one token each."""
  return (task, prompt) == ("sudoku", "bare")


def of_record(record: object) -> Grid | None:
  """Return the puzzle of a record of the task Sudoku; None of any other record."""
  if not isinstance(record, Mapping):
    return None
  puzzle, solution = record.get("puzzle"), record.get("solution")
  if isinstance(puzzle, str) and isinstance(solution, str) and _are_digits((puzzle, solution)):
    return Grid(puzzle, solution) if len(puzzle) == len(solution) else None
  return None


def in_prompt(text: str) -> Grid | None:
  """Return the puzzle in a prompt, its only row of 16 or 81 digits; None if there is none."""
  found = [digits for digits in re.findall(r"\d+", text) if len(digits) in SIZES]
  return Grid(found[0]) if len(found) == 1 else None


def _are_digits(texts: Iterable[str]) -> bool:
  return all(len(text) in SIZES and text.isdecimal() for text in texts)
