"""Sudoku as a grid: which cells of an answer are wrong, with the solution known and unknown."""

import pytest

from dmpo_jax.run import grids

PUZZLE, SOLUTION = "1430000041203004", "1432234141233214"
NINE = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"


@pytest.mark.parametrize("solution", [SOLUTION, ""])
def test_cells_that_are_wrong(solution):
  grid = grids.Grid(PUZZLE, solution)
  assert (grid.side, grid.box) == (4, 2)
  assert grid.find_wrong(SOLUTION) == []
  assert grid.find_wrong([None] * 16) == []
  assert grid.find_wrong(SOLUTION[:3] + "0" + SOLUTION[4:]) == [3]  # left blank
  assert 0 in grid.find_wrong("2" + SOLUTION[1:])  # a given digit


def test_a_repeated_digit_is_wrong_wherever_it_stands():
  """Of an unknown solution: in a row, in a column, and in a box alone."""
  grid = grids.Grid("0" * 16)
  for one, other in ((0, 3), (0, 12), (0, 5)):
    cells = [None] * 16
    cells[one] = cells[other] = "1"
    assert grid.find_wrong(cells) == [one, other]
  apart = [None] * 16
  apart[0] = apart[6] = "1"
  assert grid.find_wrong(apart) == []


def test_a_puzzle_is_found_in_records_and_prompts():
  assert grids.in_prompt(f"({PUZZLE}=") == grids.Grid(PUZZLE)
  assert grids.in_prompt(f"Solve {NINE}, please").box == 3
  for text in ("1 + 1 = 2", f"{PUZZLE} or {PUZZLE}", PUZZLE[:15]):
    assert grids.in_prompt(text) is None
  assert grids.of_record({"puzzle": PUZZLE, "solution": SOLUTION}) == grids.Grid(PUZZLE, SOLUTION)
  for record in (
    None,
    {"puzzle": PUZZLE},
    {"puzzle": PUZZLE, "solution": NINE},
    {"puzzle": 16 * "x", "solution": 16 * "x"},
  ):
    assert grids.of_record(record) is None
