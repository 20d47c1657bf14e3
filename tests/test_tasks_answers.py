"""Finding and reading answers: tags, boxes, numbers, and when two answers are the same mathematics."""

import time
from fractions import Fraction

import pytest

from dmpo_jax.tasks import answers, equivalence

GOOD = "<reasoning>\nso 3 + 4 = 7\nand more\n</reasoning>\n<answer>\n7\n</answer>"


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("18", 18),
    ("$18", 18),
    ("\\$1,234.50", Fraction(2469, 2)),
    ("1,234,567 people", 1_234_567),
    ("-5", -5),
    ("-$5.0", -5),
    ("\u22125", -5),
    ("18.", 18),
    (".5", Fraction(1, 2)),
    ("50%", 50),
    ("3/4", Fraction(3, 4)),
    ("\\frac{1}{2}", Fraction(1, 2)),
    ("the answer is 18 dollars", 18),
    ("18 dollars for 7 days", 18),
    ("3 + 15 = 18", 18),
    ("x = -2", -2),
    ("{1{,}000}", 1000),
    ("**42**", 42),
    ("18\\text{ cm}", 18),
    ("", None),
    ("none", None),
    ("1/0", None),
    ("9" * 50, None),
  ],
)
def test_numbers_are_read(text, value):
  assert answers.read_number(text) == value


def test_a_number_alone():
  assert all(map(answers.is_number, ("18", "$1,234", "-5.0", "50%", "18.", "\\frac{1}{2}")))
  assert not any(map(answers.is_number, ("18 dollars", "", None, "3 + 4", "x", "\u00b2")))


def test_the_last_answer_counts():
  assert answers.final_answer("\\boxed{3} or \\boxed{\\frac{1}{2}} or \\boxed{4") == "\\frac{1}{2}"
  assert answers.final_answer("\\boxed{3} <answer>7</answer> then <answer> \\boxed{8} </answer>") == "8"
  assert answers.final_answer("<answer>7</answer> then <answer> 9") == "9"
  assert answers.final_answer("\\boxed{3}<answer></answer>") == "3"
  assert answers.final_answer("\\boxed{\\boxed{5}}") == "5"
  assert answers.final_answer("just 5") is None


def test_forms():
  assert answers.has_blocks(GOOD)
  assert answers.has_lines(GOOD)
  assert answers.tag_score(GOOD) == 1
  one_line = GOOD.replace("\n", " ")
  assert answers.has_blocks(one_line)
  assert not answers.has_lines(one_line)
  assert not answers.has_blocks(GOOD + " Thank you.")
  assert answers.tag_score(GOOD + " Thank you.") == pytest.approx(1 - 0.008 * 10)
  assert not answers.has_blocks(GOOD + GOOD)
  assert answers.tag_score("<answer>7") == 0.25
  assert answers.has_blocks(answers.wrap("a", "b"))


@pytest.mark.parametrize(
  ("answer", "gold", "is_equal"),
  [
    ("0.5", "\\frac{1}{2}", True),
    ("\\dfrac12", "\\frac{1}{2}", True),
    ("10,080", "10080", True),
    ("x^2+2x", "2x+x^2", True),
    ("x = 4", "4", True),
    ("\\sqrt{242}", "11\\sqrt2", True),
    ("(3, \\pi/2)", "\\left( 3, \\frac{\\pi}{2} \\right)", True),
    ("Evelyn", "\\text{Evelyn}", True),
    ("50\\%", "50", True),
    ("2", "3", False),
    ("x^2", "x^3", False),
    ("(-\\infty, 0)", "(-\\infty, 0]", False),
    ("p-q", "q-p", False),
  ],
)
def test_the_same_mathematics(answer, gold, is_equal):
  assert equivalence.are_equal(answer, gold) == is_equal


def test_values_that_differ_are_never_called_different_where_the_library_sees_them_as_equal():
  for answer, gold in (
    ("\\frac{\\sqrt{8}}{2}", "\\sqrt{2}"),
    ("(x+1)^2", "x^2+2x+1"),
    ("3.0000001", "3"),
    ("r^2", "R^2"),
  ):
    parsed = equivalence._parse(answer), equivalence._parse(gold)
    assert not equivalence._surely_differ(*parsed)
  assert equivalence._surely_differ(equivalence._parse("x^2"), equivalence._parse("x^2+1"))


def test_reading_takes_time_in_proportion_to_the_text():
  start = time.perf_counter()
  for text in (
    "<answer>" * 20_000,
    "\\boxed{" * 20_000,
    "{" * 100_000,
    "1," * 50_000,
    "- " * 50_000,
    "\\frac{" * 20_000,
  ):
    answers.final_answer(text)
    answers.read_number(text)
    answers.tag_score(text)
    answers.has_lines(text)
  assert time.perf_counter() - start < 3
