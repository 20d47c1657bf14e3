import itertools
import json
import logging
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmpo_jax.tasks import TASKS, Task, sudoku_grids
from dmpo_jax.tasks.sudoku import Sudoku, all_grids, has_one_solution, split_grids

TASK = Sudoku(min_blanks=4, max_blanks=10, demo_patience=11.0)
RECORD = {"puzzle": "3102200002100320", "solution": "3142243142131324"}


def is_filled_grid(text: str) -> bool:
  """The rules, written out: each row, column and box holds 1-4."""
  cells = np.array(list(map(int, text))).reshape(4, 4)
  boxes = [cells[i : i + 2, j : j + 2].ravel() for i in (0, 2) for j in (0, 2)]
  return all(sorted(unit) == [1, 2, 3, 4] for unit in (*cells, *cells.T, *boxes))


def count_solutions(puzzle: str) -> int:
  """Fill cell by cell and back-track: no table of grids."""
  if "0" not in puzzle:
    return int(is_filled_grid(puzzle))
  cell = puzzle.index("0")
  row, column = divmod(cell, 4)
  peers = {
    puzzle[i] for i in range(16) if i // 4 == row or i % 4 == column or (i // 8, i % 4 // 2) == (cell // 8, column // 2)
  }
  return sum(count_solutions(puzzle[:cell] + digit + puzzle[cell + 1 :]) for digit in "1234" if digit not in peers)


def test_it_is_registered_and_keeps_the_interface():
  assert TASKS["sudoku"] is Sudoku
  assert isinstance(TASK, Task)


def test_there_are_288_grids_and_all_keep_the_rules():
  texts = {"".join(map(str, grid)) for grid in all_grids().tolist()}
  assert len(texts) == 288
  assert all(map(is_filled_grid, texts))


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_share_no_solution(seed):
  train, test = split_grids("train", seed), split_grids("test", seed)
  assert (len(train), len(test)) == (240, 48)
  assert len(np.unique(np.concatenate([train, test]), axis=0)) == 288
  solutions = {split: {record["solution"] for record in TASK.generate(split, 300, seed)} for split in ("train", "test")}
  assert not solutions["train"] & solutions["test"]


def test_seeds_split_differently():
  assert not np.array_equal(split_grids("test", 0), split_grids("test", 1))


def test_generated_puzzles_are_different_and_have_one_solution():
  records = list(TASK.generate("train", 150, 3))
  assert len({record["puzzle"] for record in records}) == 150
  for record in records:
    assert 4 <= record["puzzle"].count("0") <= 10
    assert is_filled_grid(record["solution"])
    assert all(given in ("0", right) for given, right in zip(record["puzzle"], record["solution"], strict=True))
    assert count_solutions(record["puzzle"]) == 1


def test_every_number_of_blanks_comes_equally_often():
  counts = np.bincount([record["puzzle"].count("0") for record in TASK.generate("train", 2100, 0)], minlength=11)
  assert counts[:4].sum() == 0
  assert counts[4:].min() > 240  # 300 on average


def test_uniqueness_agrees_with_back_tracking():
  rng = np.random.default_rng(0)
  puzzles = np.where(rng.random((60, 16)) < 0.6, 0, all_grids()[rng.integers(288, size=60)])
  expected = [count_solutions("".join(map(str, puzzle))) == 1 for puzzle in puzzles.tolist()]
  assert has_one_solution(puzzles).tolist() == expected
  assert 0 < sum(expected) < 60


def test_generation_is_a_function_of_its_arguments():
  first = list(TASK.generate("train", 40, 0))
  assert first == list(itertools.islice(TASK.generate("train", 80, 0), 40))
  assert first != list(TASK.generate("train", 40, 1))


def test_generated_records_are_those_of_this_version():
  # If this fails and is meant to, raise Sudoku.version: prepared data of the old version must not be taken for new.
  assert Sudoku.version == "1.0.0"
  assert next(TASK.generate("train", 1, 0)) == RECORDED["train"]
  assert next(TASK.generate("test", 1, 0)) == RECORDED["test"]


RECORDED = {
  "train": {"puzzle": "0000231002403001", "solution": "4132231412433421"},
  "test": {"puzzle": "1300243100130020", "solution": "1342243142133124"},
}


def test_too_many_puzzles_are_refused():
  one_blank = Sudoku(min_blanks=1, max_blanks=1, demo_patience=11.0)
  with pytest.raises(ValueError, match=r"task.num_test=800.*after 768 puzzles"):
    list(one_blank.generate("test", 800, 0))


def test_all_bad_options_are_listed():
  with pytest.raises(ValueError, match=r"min_blanks=5.*max_blanks=13.*\n.*demo_patience=0"):
    Sudoku(min_blanks=5, max_blanks=13, demo_patience=0)


def test_demonstrations_leave_only_blank_cells_and_the_right_share():
  rng = np.random.default_rng(0)
  texts = [TASK.demonstration(RECORD, rng) for _ in range(500)]
  for text in texts:
    for shown, given_cell, right in zip(text, RECORD["puzzle"], RECORD["solution"], strict=True):
      assert shown == right or (shown == "0" and given_cell == "0")
  blanks = RECORD["puzzle"].count("0")
  assert np.mean([text.count("0") for text in texts]) / blanks == pytest.approx(0.5 * (blanks / 11) ** 4, abs=0.03)
  assert {TASK.only_correct().demonstration(RECORD, rng) for _ in range(20)} == {RECORD["solution"]}


# puzzle   3102 2000 0210 0320    8 blanks
# solution 3142 2431 4213 1324
@pytest.mark.parametrize(
  ("completion", "reward"),
  [
    ("3142243142131324", 1.0),
    ("3142 2431\n4213 1324\n", 1.0),  # white space is no cell
    ("3102200002100320", 0.0),  # the puzzle itself
    ("3142200002100320", 1 / 8),
    ("3132243142131324", 7 / 8),  # one blank wrong
    ("4142243142131324", 7 / 8),  # all blanks right, a given cell overwritten
    ("31422431421313241", 7 / 8),  # a cell too many
    ("314224314213132", 7 / 8),  # the last blank missing
    ("31422431", 0.0),  # half the grid: 4 blanks right, 4 given cells missing
    ("3142243142131", 5 / 8),  # 7 blanks right, 2 given cells missing
    ("", 0.0),
    ("no idea", 0.0),
    ("1111111111111111", 0.0),
    ("314x243142131324", 7 / 8),
  ],
)
def test_reward_by_hand(completion, reward):
  assert TASK.reward(RECORD, completion) == pytest.approx(reward)


@given(st.text(alphabet="01234x \n", max_size=20))
@settings(max_examples=300, deadline=None)
def test_reward_is_in_range_and_one_exactly_when_solved(completion):
  reward, grade = TASK.reward(RECORD, completion), TASK.grade(RECORD, completion)
  assert 0 <= reward <= 1
  assert math.isfinite(reward)
  assert (reward == 1) == grade.is_correct


@given(st.lists(st.sampled_from("01234"), min_size=8, max_size=8))
@settings(max_examples=100, deadline=None)
def test_with_given_cells_kept_reward_is_the_share_of_blanks_right(fill):
  cells = iter(fill)
  completion = "".join(next(cells) if cell == "0" else cell for cell in RECORD["puzzle"])
  right = sum(
    a == b for a, b, cell in zip(completion, RECORD["solution"], RECORD["puzzle"], strict=True) if cell == "0"
  )
  assert TASK.reward(RECORD, completion) == right / 8


def test_grade_says_what_was_taken_as_the_answer():
  assert TASK.grade(RECORD, " 3142 2431 4213 1324").extracted == RECORD["solution"]
  overwritten = TASK.grade(RECORD, "4" + RECORD["solution"][1:])
  assert not overwritten.is_correct


def test_published_file_is_read_as_text(tmp_path, caplog):
  path = tmp_path / "puzzles.csv"
  path.write_bytes(
    "\ufeffPuzzle,Solution\r\n3102200002100320,3142243142131324\r\n\r\n0140432014020000,2143432114323214".encode()
  )
  with caplog.at_level(logging.WARNING):
    records = TASK.read_published(path)
  assert records == [RECORD, {"puzzle": "0140432014020000", "solution": "2143432114323214"}]
  assert json.loads(json.dumps(records)) == records
  open_puzzles = sum(count_solutions(record["puzzle"]) != 1 for record in records)
  assert ("more than one solution" in caplog.text) == (open_puzzles > 0)


def test_published_file_with_several_solutions_warns(tmp_path, caplog):
  path = tmp_path / "puzzles.csv"
  path.write_text("Puzzle,Solution\n0000000000000000,3142243142131324\n")
  with caplog.at_level(logging.WARNING):
    TASK.read_published(path)
  assert "1 of 1 puzzles have more than one solution" in caplog.text


def test_all_bad_rows_are_listed(tmp_path):
  path = tmp_path / "puzzles.csv"
  rows = [
    "Puzzle,Solution",
    "3102200002100320,3142243142131324",
    "310220000210032,3142243142131324",
    "3102200002100325,3142243142131324",
    "3102200002100320,3142243142131342",
    "3142243142131324,3142243142131324",
    "4102200002100320,3142243142131324",
    "3102200002100320",
  ]
  path.write_text("\n".join(rows))
  with pytest.raises(ValueError, match="6 rows cannot be used") as caught:
    TASK.read_published(path)
  message = str(caught.value)
  reasons = ["not 16 digits", "not 16 digits", "not a filled", "no blank", "changes a given", "1 columns"]
  for number, reason in zip(range(3, 9), reasons, strict=True):
    assert any(line.strip().startswith(f"row {number}: ") and reason in line for line in message.splitlines())


@pytest.mark.parametrize(
  ("content", "reason"), [("a,b\n", "first row"), ("", "first row"), ("Puzzle,Solution\n", "no puzzle")]
)
def test_files_of_another_kind_are_refused(tmp_path, content, reason):
  path = tmp_path / "puzzles.csv"
  path.write_text(content)
  with pytest.raises(ValueError, match=reason):
    TASK.read_published(path)


def test_a_missing_file_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"task.eval_path=.*no such file"):
    TASK.read_published(tmp_path / "nothing.csv")


# 9x9

NINE = Sudoku(min_blanks=38, max_blanks=42, demo_patience=80.0, size=9)
HARD = "800000000003600000070090200050007000000045700000100030001000068008500010090000400"  # A. Inkala's, of 2012
SOLVED = "812753649943682175675491283154237896369845721287169534521974368438526917796318452"


def is_filled_nine(text):
  cells = np.array(list(map(int, text))).reshape(9, 9)
  boxes = [cells[i : i + 3, j : j + 3].ravel() for i in (0, 3, 6) for j in (0, 3, 6)]
  return all(sorted(unit) == list(range(1, 10)) for unit in (*cells, *cells.T, *boxes))


def test_search_solves_a_known_hard_puzzle_and_counts_solutions():
  assert sudoku_grids.solutions(list(map(int, HARD))) == [list(map(int, SOLVED))]
  assert len(sudoku_grids.solutions(list(map(int, "0" + HARD[1:])))) == 2  # it stops at two
  assert sudoku_grids.solutions(list(map(int, "88" + HARD[2:]))) == []
  assert sudoku_grids.is_filled(SOLVED)
  assert not sudoku_grids.is_filled("2" + SOLVED[1:])


def test_generated_puzzles_of_9x9_have_one_solution_and_splits_share_none():
  records = {split: list(NINE.generate(split, 8, 0)) for split in ("train", "test")}
  for split, found in records.items():
    assert found == list(NINE.generate(split, 8, 0))
    assert len({record["puzzle"] for record in found}) == 8
    for record in found:
      assert NINE.difficulty(record) == record["puzzle"].count("0") in range(38, 43)
      assert is_filled_nine(record["solution"])
      assert sudoku_grids.solutions(list(map(int, record["puzzle"]))) == [list(map(int, record["solution"]))]
  train, test = ({record["solution"] for record in found} for found in records.values())
  assert not train & test
  assert all(sudoku_grids.belongs_to(list(map(int, text)), "test", 0) for text in test)


def test_rewards_prompts_and_files_of_9x9(tmp_path):
  record = {"puzzle": HARD, "solution": SOLVED}
  assert NINE.reward(record, SOLVED) == 1
  assert NINE.reward(record, SOLVED[:-1] + "1") == pytest.approx(59 / 60)
  assert NINE.reward(record, SOLVED + "1") == pytest.approx(59 / 60)
  assert NINE.reward(record, HARD) == 0
  assert NINE.only_correct().demonstration(record, np.random.default_rng(0)) == SOLVED
  worded = Sudoku(min_blanks=38, max_blanks=42, demo_patience=80.0, size=9, prompt_name="default")
  assert "a 9x9 Sudoku as 81 digits" in worded.prompt(record)
  assert "each 3x3 box has the digits 1 to 9" in worded.prompt(record)
  path = tmp_path / "puzzles.csv"
  path.write_text(f"Puzzle,Solution\n{HARD},{SOLVED}\n")
  assert NINE.read_published(path) == [record]
  with pytest.raises(ValueError, match=r"row 2: the puzzle .* is not 16 digits 0-4"):
    TASK.read_published(path)
  with pytest.raises(ValueError, match=r"task.sudoku.size=5: must be 4 or 9"):
    Sudoku(min_blanks=4, max_blanks=5, demo_patience=1.0, size=5)
  with pytest.raises(ValueError, match=r"max_blanks=60(.|\n)*are rare(.|\n)*task.rewards='published': .* of 4x4"):
    Sudoku(min_blanks=4, max_blanks=60, demo_patience=1.0, size=9, rewards="published")
