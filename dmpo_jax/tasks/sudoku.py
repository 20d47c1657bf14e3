"""Sudoku, 4x4 or 9x9: the prompt is the puzzle as digits row by row, 0 for a blank cell, the answer the full grid.

The bare prompt has marks before and after the puzzle. Rotary positions are relative, so a bidirectional model locates a
cell only by its distance from tokens that occur nowhere else.

There are only 288 filled 4x4 grids, so a split by puzzle would show every solution in training. The grids themselves
are split instead: training never shows the solution of a test puzzle. `sudoku_grids.py` makes the 9x9 puzzles.
"""

import csv
import dataclasses
import functools
import io
import itertools
import logging
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int

from dmpo_jax.tasks import answers, sudoku_grids
from dmpo_jax.tasks.base import Grade, PromptTemplate, Record, Split, read_text, refuse_rows
from dmpo_jax.tasks.builtin import FORM, BuiltinTask
from dmpo_jax.tasks.published import prompts

logger = logging.getLogger(__name__)

CELLS = 16  # of the 4x4 grid
SIZES = (4, 9)
MAX_BLANKS = {4: 12, 9: sudoku_grids.MOST_BLANKS}  # no 4x4 puzzle with fewer than 4 givens has one solution
TEST_GRIDS = 48  # of 288
_MOST_UNFILLED = 0.65  # largest share of the blank cells that a demonstration leaves blank
_CANDIDATES = 256  # puzzles drawn at a time
_MAX_FRUITLESS = 50  # draws in a row without a new puzzle after which puzzles count as exhausted


BARE_PROMPT = PromptTemplate("($puzzle=", is_tagged=False)
DEFAULT_PROMPT = PromptTemplate(
  "Below is a ${size}x$size Sudoku as $cells digits, row by row from the top left; 0 is an empty cell. Fill in the "
  "empty cells so that each row, each column and each ${box}x$box box has the digits 1 to $size once. "
  f"{FORM}nothing but the $cells digits of the full grid.\n\n$puzzle"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sudoku(BuiltinTask):
  """The task, with the options of `config.task.sudoku`. Records are {puzzle, solution}, size^2 digits each."""

  name: ClassVar[str] = "sudoku"
  version: ClassVar[str] = "1.0.0"
  PROMPTS: ClassVar = {"bare": BARE_PROMPT, "default": DEFAULT_PROMPT, **prompts.SUDOKU}

  min_blanks: int  # blank cells of a generated puzzle, drawn uniformly from min_blanks..max_blanks
  max_blanks: int
  demo_patience: float  # number of blank cells at which demonstrations leave half of them blank; see `demonstration`
  demo_wrong: float = 0.0  # share of demonstrations that swap 1 and 2 in the blank cells
  size: int = 4  # or 9
  prompt_name: str = "bare"

  def option_problems(self) -> list[str]:
    """Return the problems with the options."""
    if self.size not in SIZES:
      return [f"task.sudoku.size={self.size}: must be 4 or 9"]
    problems, most = [], MAX_BLANKS[self.size]
    if not 1 <= self.min_blanks <= self.max_blanks <= most:
      problems.append(
        f"task.sudoku.min_blanks={self.min_blanks}, task.sudoku.max_blanks={self.max_blanks}: "
        f"must be 1 <= min_blanks <= max_blanks <= {most} (puzzles with more blanks and a single solution "
        f"{'do not exist' if self.size == 4 else 'are rare'})"
      )
    if self.demo_patience <= 0:
      problems.append(f"task.sudoku.demo_patience={self.demo_patience}: must be above 0")
    if not 0 <= self.demo_wrong <= 1:
      problems.append(f"task.sudoku.demo_wrong={self.demo_wrong}: must be a probability, in [0, 1]")
    for key, value in (("prompt", self.prompt_name), ("rewards", self.rewards), ("grader", self.grader)):
      if self.size != 4 and value.startswith("published"):
        problems.append(f"task.{key}={value!r}: the published one is of 4x4 grids; task.sudoku.size={self.size}")
    return problems

  @property
  def num_cells(self) -> int:
    """The number of cells."""
    return self.size**2

  @staticmethod
  def difficulty(record: Record) -> int:
    """Return the number of blank cells."""
    return record["puzzle"].count("0")

  def prompt_fields(self, record: Record) -> dict[str, Any]:
    """Return the puzzle and the sizes that the prompt names."""
    return {**record, "size": self.size, "cells": self.num_cells, "box": math.isqrt(self.size)}

  def generate(self, split: Split, num: int, seed: int) -> Iterator[Record]:
    """Yield `num` different puzzles with exactly one solution, whose grids belong to `split`.

    Raises:
      ValueError: there are fewer puzzles with these options.
    """
    part = ("train", "test").index(split)
    draw = {
      blanks: self._distinct_puzzles(split, seed, blanks, np.random.default_rng((seed, part, blanks)))
      for blanks in range(self.min_blanks, self.max_blanks + 1)
    }
    num_blanks = np.random.default_rng((seed, part)).integers(self.min_blanks, self.max_blanks + 1, size=num)
    for index, blanks in enumerate(num_blanks.tolist()):
      record = next(draw[blanks], None)
      if record is None:
        raise ValueError(
          f"task.num_{split}={num}: the {split} split ran out of puzzles with {blanks} blanks after {index} puzzles; "
          "ask for fewer, or widen task.sudoku.min_blanks..max_blanks"
        )
      yield record

  def _distinct_puzzles(self, split: Split, seed: int, blanks: int, rng: np.random.Generator) -> Iterator[Record]:
    if self.size == 9:
      return sudoku_grids.distinct_puzzles(split, seed, blanks, rng)
    return _distinct_puzzles(split_grids(split, seed), blanks, rng)

  def demonstration(self, record: Record, rng: np.random.Generator) -> str:
    """Return the solution with some blank cells left blank (0).

    Each is left blank with probability min((blanks / demo_patience)^4 / 2, 0.65), so few are in a puzzle with few
    blanks. With probability `demo_wrong`, 1 and 2 are swapped in the blank cells: a systematic error, which does not
    average out.
    """
    effort = record["puzzle"].count("0") / self.demo_patience
    is_unfilled = rng.random(self.num_cells) < min(0.5 * effort**4, _MOST_UNFILLED)
    solution = record["solution"]
    if self.demo_wrong and rng.random() < self.demo_wrong:
      solution = solution.translate(str.maketrans("12", "21"))
    cells = zip(record["puzzle"], solution, is_unfilled, strict=True)
    answer = "".join("0" if given == "0" and unfilled else right for given, right, unfilled in cells)
    return self.write_answer(answer, "Every row, column and box needs each digit once.")

  def only_correct(self) -> "Sudoku":
    """Return this task with demonstrations that leave no cell blank and are correct."""
    return dataclasses.replace(self, demo_patience=math.inf, demo_wrong=0.0)

  def default_reward(self, record: Record, text: str) -> float:
    """Return the share of blank cells that are filled correctly, in [0, 1]; 1 if and only if the puzzle is solved.

    Each given cell that is changed, and each extra character, cancels one correct cell, so that solving another puzzle
    does not pay.
    """
    answer = self._extract(text)
    blanks = record["puzzle"].count("0")
    num_right = num_overwritten = 0
    for index, (given, right) in enumerate(zip(record["puzzle"], record["solution"], strict=True)):
      is_right = answer[index : index + 1] == right
      num_right += given == "0" and is_right
      num_overwritten += given != "0" and not is_right
    num_excess = max(len(answer) - self.num_cells, 0)
    return max(num_right - num_overwritten - num_excess, 0) / blanks

  def default_grade(self, record: Record, text: str) -> Grade:
    """Return whether the whole grid is correct, including the given cells."""
    answer = self._extract(text)
    return Grade(answer == record["solution"], extracted=answer)

  def has_form(self, record: Record, text: str) -> bool:
    """Whether a text is both blocks, or a grid if the prompt asks for no tags."""
    return super().has_form(record, text) and (self._prompt.is_tagged or len(self._extract(text)) == self.num_cells)

  def _extract(self, text: str) -> str:
    """Return the last answer, or the whole completion if the prompt asks for no tags, without white space."""
    answer = answers.final_answer(text) if self._prompt.is_tagged else text
    return "".join((answer or "").split())

  def published_arguments(self, record: Record) -> dict[str, str]:
    """Return puzzle and solution."""
    return {"puzzle": record["puzzle"], "solution": record["solution"]}

  def published_question(self, record: Record) -> tuple[str, str]:
    """Return the question with the puzzle in it, and the solution."""
    return f"Solve the following Sudoku puzzle: {record['puzzle']}\n", record["solution"]

  def read_published(self, path: epath.PathLike) -> list[Record]:
    """Read a CSV file with the header Puzzle,Solution, both all digits (as text, since leading zeros count).

    Raises:
      ValueError: the file is absent, has another header, or rows are not puzzles with solutions; all are listed.
    """
    rows = list(csv.reader(io.StringIO(read_text(path))))
    if not rows or rows[0] != ["Puzzle", "Solution"]:
      raise ValueError(f"task.eval_path={str(path)!r}: the first row must be Puzzle,Solution; it is {rows[:1]}")
    records, problems = [], []
    for number, row in enumerate(rows[1:], start=2):
      problem = _row_problem(row, self.size)
      if problem:
        problems.append(f"row {number}: {problem}")
      elif row:
        records.append({"puzzle": row[0], "solution": row[1]})
    refuse_rows(path, problems)
    if not records:
      raise ValueError(f"task.eval_path={str(path)!r}: no puzzle in it")
    puzzles = np.array([list(map(int, record["puzzle"])) for record in records])
    if self.size == 4:
      num_open = int((~has_one_solution(puzzles)).sum())
    else:
      num_open = sum(not sudoku_grids.has_one_solution(puzzle) for puzzle in puzzles.tolist())
    if num_open:
      logger.warning(
        "%s: %d of %d puzzles have more than one solution; only the one in the file counts",
        path,
        num_open,
        len(records),
      )
    return records


@functools.cache
def all_grids() -> Int[np.ndarray, "288 16"]:
  """Return the 288 filled grids, in lexicographic order."""
  rows = list(itertools.permutations((1, 2, 3, 4)))
  bands = [(*top, *below) for top, below in itertools.product(rows, rows) if _has_no_repeats(top, below)]
  grids = [(*upper, *lower) for upper, lower in itertools.product(bands, bands) if _columns_differ(upper, lower)]
  grids = np.array(grids, np.int8)
  grids.flags.writeable = False  # as callers share it
  return grids


def _has_no_repeats(top: tuple[int, ...], below: tuple[int, ...]) -> bool:
  """Whether two rows form two complete boxes (then their columns differ too)."""
  return not set(top[:2]) & set(below[:2]) and not set(top[2:]) & set(below[2:])


def _columns_differ(upper: tuple[int, ...], lower: tuple[int, ...]) -> bool:
  return all(len({upper[i], upper[i + 4], lower[i], lower[i + 4]}) == 4 for i in range(4))


def split_grids(split: Split, seed: int) -> Int[np.ndarray, "n 16"]:
  """Return the filled grids of a split: 48 for test and 240 for train, disjoint, drawn by `seed`."""
  order = np.random.default_rng(seed).permutation(len(all_grids()))
  return all_grids()[order[:TEST_GRIDS] if split == "test" else order[TEST_GRIDS:]]


def has_one_solution(puzzles: Int[np.ndarray, "n 16"]) -> Bool[np.ndarray, " n"]:
  """Whether exactly one of the 288 grids matches each puzzle (0: blank)."""
  givens = _one_hot(puzzles)
  num_agreeing = givens @ _one_hot(all_grids()).T  # [n, 288] cells
  return (num_agreeing == givens.sum(-1, keepdims=True)).sum(-1) == 1


def _one_hot(cells: Int[np.ndarray, "n 16"]) -> Float[np.ndarray, "n 64"]:
  """Digits to indicators of 1-4; a blank is all zeros."""
  return (cells[..., None] == np.arange(1, 5)).reshape(len(cells), -1).astype(np.float32)


def _distinct_puzzles(grids: Int[np.ndarray, "n 16"], blanks: int, rng: np.random.Generator) -> Iterator[Record]:
  """Yield different puzzles with this number of blanks and one solution, until drawing finds no new ones."""
  seen: set[bytes] = set()
  fruitless = 0
  while fruitless < _MAX_FRUITLESS:
    solutions = grids[rng.integers(len(grids), size=_CANDIDATES)]
    is_blank = rng.permuted(np.tile(np.arange(CELLS) < blanks, (_CANDIDATES, 1)), axis=1)
    puzzles = np.where(is_blank, 0, solutions)
    fruitless += 1
    for index in np.flatnonzero(has_one_solution(puzzles)):
      puzzle = puzzles[index].tobytes()
      if puzzle not in seen:
        seen.add(puzzle)
        fruitless = 0
        yield {"puzzle": _to_text(puzzles[index]), "solution": _to_text(solutions[index])}


def _to_text(cells: Int[np.ndarray, "16"]) -> str:
  return "".join(map(str, cells.tolist()))


def _row_problem(row: list[str], size: int) -> str:
  """Return why a row of a published file cannot be used; "" if it can, or if it is empty."""
  if not row:
    return ""
  if len(row) != 2:
    return f"{len(row)} columns, not 2"
  puzzle, solution = row
  if len(puzzle) != size**2 or set(puzzle) - set("0123456789"[: size + 1]):
    return f"the puzzle {puzzle!r} is not {size**2} digits 0-{size}"
  if not (solution in _grid_texts() if size == 4 else sudoku_grids.is_filled(solution)):
    return f"the solution {solution!r} is not a filled {size}x{size} grid"
  if "0" not in puzzle:
    return f"the puzzle {puzzle!r} has no blank cell"
  if any(given not in ("0", right) for given, right in zip(puzzle, solution, strict=True)):
    return f"the solution {solution!r} changes a given cell of {puzzle!r}"
  return ""


@functools.cache
def _grid_texts() -> frozenset[str]:
  return frozenset(_to_text(grid) for grid in all_grids())
