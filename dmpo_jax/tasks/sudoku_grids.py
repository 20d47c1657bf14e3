"""9x9 Sudoku: filled grids, and puzzles with one solution, by search. (The 288 grids of 4x4 are listed in `sudoku.py`.)

A grid or puzzle is a list of 81 digits, row by row; 0 is a blank cell.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from dmpo_jax.tasks.base import Record, Split

CELLS = 81
MOST_BLANKS = 54  # random digging finds puzzles with so many blanks in a short time
_TEST_SHARE = 0.1  # of all filled grids
_AT_ONCE = 30  # cells that are dug before the first check, as nearly all such puzzles have one solution
_ALL = 0b111111111  # digit d is bit d - 1


@functools.cache
def _units() -> list[tuple[int, int, int]]:
  """Return row, column and box of each cell."""
  return [(cell // 9, cell % 9, cell // 27 * 3 + cell % 9 // 3) for cell in range(CELLS)]


def solutions(puzzle: Sequence[int], most: int = 2, order: Sequence[int] = tuple(range(9))) -> list[list[int]]:
  """Return up to `most` filled grids that agree with a puzzle.

  Args:
    order: in which digits are tried, less 1.
  """
  rows, columns, boxes, cells = [0] * 9, [0] * 9, [0] * 9, list(puzzle)
  for (row, column, box), digit in zip(_units(), cells, strict=True):
    bit = 1 << digit >> 1
    if bit & (rows[row] | columns[column] | boxes[box]):
      return []
    rows[row] |= bit
    columns[column] |= bit
    boxes[box] |= bit
  found: list[list[int]] = []

  def search() -> None:
    best, free, fewest = -1, 0, 10
    for cell, (row, column, box) in enumerate(_units()):
      if not cells[cell]:
        open_digits = _ALL & ~(rows[row] | columns[column] | boxes[box])
        count = open_digits.bit_count()
        if count < fewest:
          best, free, fewest = cell, open_digits, count
          if count < 2:
            break
    if best < 0:
      found.append(cells.copy())
      return
    row, column, box = _units()[best]
    for digit in order:
      bit = 1 << digit
      if free & bit and len(found) < most:
        cells[best] = digit + 1
        rows[row] ^= bit
        columns[column] ^= bit
        boxes[box] ^= bit
        search()
        cells[best] = 0
        rows[row] ^= bit
        columns[column] ^= bit
        boxes[box] ^= bit

  search()
  return found


def has_one_solution(puzzle: Sequence[int]) -> bool:
  """Whether exactly one filled grid agrees with a puzzle."""
  return len(solutions([int(digit) for digit in puzzle])) == 1


def is_filled(text: str) -> bool:
  """Whether a text is a filled grid."""
  is_whole = len(text) == CELLS and set(text) <= set("123456789")
  return is_whole and has_one_solution([int(digit) for digit in text])


def draw_grid(rng: np.random.Generator) -> list[int]:
  """Draw a filled grid: three boxes on the diagonal at random, the rest by search."""
  grid = [0] * CELLS
  for box in range(3):
    for place, digit in enumerate((rng.permutation(9) + 1).tolist()):
      grid[box * 30 + place // 3 * 9 + place % 3] = digit
  return solutions(grid, most=1, order=rng.permutation(9).tolist())[0]


def dig(grid: Sequence[int], blanks: int, rng: np.random.Generator) -> list[int] | None:
  """Blank cells in random order, each only if the puzzle keeps one solution; None if too few can be."""
  order, puzzle, num = rng.permutation(CELLS).tolist(), list(grid), 0
  for cell in order[: min(_AT_ONCE, blanks)]:
    puzzle[cell] = 0
    num += 1
  if not has_one_solution(puzzle):
    return None
  for cell in order[num:]:
    if num == blanks:
      break
    puzzle[cell] = 0
    if has_one_solution(puzzle):
      num += 1
    else:
      puzzle[cell] = grid[cell]
  return puzzle if num == blanks else None


def belongs_to(grid: Sequence[int], split: Split, seed: int) -> bool:
  """Assign a filled grid to a split by a hash, so that training never shows the solution of a test puzzle."""
  digest = hashlib.blake2b(repr((seed, list(grid))).encode(), digest_size=4).digest()
  return (int.from_bytes(digest, "big") < _TEST_SHARE * 2**32) == (split == "test")


def distinct_puzzles(split: Split, seed: int, blanks: int, rng: np.random.Generator) -> Iterator[Record]:
  """Yield different puzzles with this number of blanks and one solution, without end."""
  seen: set[str] = set()
  while True:
    grid = draw_grid(rng)
    puzzle = dig(grid, blanks, rng) if belongs_to(grid, split, seed) else None
    text = "".join(map(str, puzzle or ()))
    if text and text not in seen:
      seen.add(text)
      yield {"puzzle": text, "solution": "".join(map(str, grid))}
