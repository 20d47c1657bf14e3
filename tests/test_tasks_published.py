"""The published rewards and graders, against what the published code gave for the same texts."""

import gzip
import json
import math
import pathlib
import time

import pytest

from dmpo_jax.tasks.published import GRADERS, REWARDS, TRAINED_WITH, latex, python_arithmetic, rewards, score

GOLDENS = pathlib.Path(__file__).parent / "goldens"
HELPERS = {
  "extract_xml_answer": rewards.after_answer_tag,
  "count_xml": rewards.count_xml,
  "extract_solution": rewards.last_answer_block,
  "extract_answer_sudoku": rewards.sudoku_digits,
  "extract_hash_answer": rewards.hash_answer,
  "validate_equation": rewards.uses_each_once,
  "evaluate_equation": python_arithmetic.evaluate,
  "last_boxed_only_string": latex.last_boxed,
  "remove_boxed": latex.unbox,
  "is_equiv": latex.are_equivalent,
  "strip_string": latex.normalize,
  "fix_fracs": latex.brace_fractions,
  "fix_sqrt": latex.brace_roots,
  "fix_a_slash_b": latex.slash_to_fraction,
  "remove_right_units": latex.drop_units,
}
NO_NUMBER = ("()", "...")  # to `eval` an empty tuple and Ellipsis; here, as in every use of it, no value


def recorded(name):
  text = gzip.decompress((GOLDENS / f"{name}.jsonl.gz").read_bytes()).decode()
  return [json.loads(line) for line in text.split("\n") if line]


def outcome(function, *args, **kwargs):
  """What a function returns, or {"error": the exception's name}, as it is recorded."""
  try:
    return function(*args, **kwargs)
  except Exception as error:
    return {"error": type(error).__name__}


def are_same(got, wanted):
  if isinstance(wanted, dict) and "repr" in wanted:  # a number that JSON does not have
    wanted = complex(wanted["repr"]) if wanted["type"] == "complex" else float(wanted["repr"])
  if isinstance(got, float) and isinstance(wanted, float):
    return math.isclose(got, wanted, rel_tol=0, abs_tol=1e-9) or (math.isnan(got) and math.isnan(wanted))
  return got == wanted


@pytest.mark.parametrize("task", TRAINED_WITH)
def test_every_reward_is_the_recorded_one(task):
  rows = [row for row in recorded("rewards") if row["task"] == task]
  assert len(rows) > 50
  wrong = [
    (name, row["completion"], wanted)
    for row in rows
    for name, wanted in (row["scores"] or {}).items()
    if not are_same(outcome(REWARDS[name], row["completion"], **row["kwargs"]), wanted)
  ]
  assert not wrong


@pytest.mark.parametrize("name", HELPERS)
def test_every_helper_gives_what_is_recorded(name):
  rows = [row for row in recorded("reward_helpers") if name in row["results"] and row["args"][0] not in NO_NUMBER]
  wrong = []
  for row in rows:
    got, wanted = outcome(HELPERS[name], *row["args"]), row["results"][name]
    have_failed = [isinstance(x, dict) and "error" in x for x in (got, wanted)]
    if not all(have_failed) and (any(have_failed) or not are_same(got, wanted)):
      wrong.append((row["args"], wanted, got))
  assert rows
  assert not wrong


def test_cells_of_a_sudoku_are_counted_as_recorded():
  rows = [row for row in recorded("reward_helpers") if "validate_sudoku_solution" in row["results"]]
  assert rows
  for row in rows:
    digits, solution, puzzle = row["args"]
    right, blanks = rewards.count_right_cells(digits or "", puzzle, solution)
    share = right / blanks if digits and blanks else 0.0
    assert are_same(share, row["results"]["validate_sudoku_solution"])


def test_a_half_alone_is_a_fraction_in_the_published_form():
  for text in ("0.5", ".5", "x = 0.5", "0.5\\%", "0. 5"):
    assert latex.normalize(text) == "\\frac{1}{2}", text
  for text in ("-0.5", "0.50", "0.25", "10.5", "(0.5,1)"):
    assert latex.normalize(text) == text
  for answer in ("0.5", "\\frac12", "1/2", "\\dfrac{1}{2}"):
    assert latex.are_equivalent(answer, "\\frac{1}{2}")
    assert GRADERS["math"](f"\\boxed{{{answer}}}", "?", "0.5").is_correct
  assert not GRADERS["math"]("\\boxed{0.50}", "?", "0.5").is_correct


@pytest.mark.parametrize("task", GRADERS)
def test_every_grade_is_the_recorded_one(task):
  rows = [row for row in recorded("graders") if row["task"] == task]
  assert len(rows) > 50
  for row in rows:
    generation = row["generations"] + "<|endoftext|>" * row.get("endoftext_run", 0)
    grade, wanted = GRADERS[task](generation, row["question"], row["ground_truth"]), row["expected"]
    assert are_same(grade.extracted, wanted["extracted"]), row
    if task == "sudoku":
      assert grade.cells == (wanted["correct_cells"], wanted["empty_cells"]), row
    else:
      assert grade.is_correct == wanted["correct"], row
    if "evaluation_result" in wanted:
      assert are_same(grade.value, wanted["evaluation_result"]), row


@pytest.mark.parametrize(
  "expression", ["9**9**9**9", "((9**9)**9)**9**9", "-" * 900 + "9**-9**9**9", "9**9**9**9**0.5"]
)
def test_power_towers_are_answered_at_once(expression):
  start = time.perf_counter()
  numbers = python_arithmetic.numbers_in(expression)
  parts = score("countdown", f"<answer>{expression}</answer>", target=3, numbers=numbers)
  assert time.perf_counter() - start < 0.1
  assert parts == {"countdown": 0.1}


def test_expressions_have_the_values_that_python_gives_them():
  values = {"7/2": 3.5, "-7//2": -4, "2**-1": 0.5, "1.5*2": 3.0, ".5": 0.5, "--3": 3, "2**3**2": 512, "9-(4-3)*2": 7}
  for text, value in values.items():
    assert python_arithmetic.evaluate(text) == value
  for text in ("1/0", "2(3)", "(1,2)", "1_0", "01", "1e3", "3 4", "", "1+" * 600 + "1", "0**-1", "1.0/0", "9.0**999"):
    assert python_arithmetic.evaluate(text) is None


def test_a_question_without_a_puzzle_is_an_error():
  with pytest.raises(ValueError, match="no puzzle of 16 digits"):
    GRADERS["sudoku"]("3142", "Solve this", "3142243142131324")
