"""Knights and knaves: statements by hand, one solution by enumeration, splits that renaming does not cross."""

import itertools
import json

import numpy as np
import pytest

from dmpo_jax.tasks import TASKS, Task
from dmpo_jax.tasks.base import split_reward
from dmpo_jax.tasks.knights import NAMES, Knights, draw_statement, in_words, is_true, shape, solutions

TASK = Knights(min_people=2, max_people=4)
WORDED = Knights(min_people=2, max_people=4, prompt_name="default")
RECORD = {"statements": ["+1*-3", "-1/-3", "1=2"], "solution": "010"}
RNG = np.random.default_rng(0)


def test_it_is_registered_and_keeps_the_interface():
  assert TASKS["knights"] is Knights
  assert isinstance(TASK, Task)


@pytest.mark.parametrize(
  ("statement", "true_for", "words"),
  [
    ("+2", "01 11", "Bob is a knight."),
    ("-1", "00 01", "Ann is a knave."),
    ("+1*-2", "10", "Ann is a knight and Bob is a knave."),
    ("-1/-2", "00 01 10", "Ann is a knave or Bob is a knave."),
    ("1=2", "00 11", "Ann and Bob are of the same kind."),
    ("1-2", "01 10", "Ann and Bob are of different kinds."),
  ],
)
def test_statements_by_hand(statement, true_for, words):
  found = [f"{a}{b}" for a, b in itertools.product((0, 1), repeat=2) if is_true(statement, (bool(a), bool(b)))]
  assert " ".join(found) == true_for
  assert in_words(statement) == words


def test_solutions_by_hand():
  # Smullyan's: "We are both knaves" makes the speaker a knave and the other a knight
  assert solutions(["-1*-2", "+2"]) == ["01"]
  assert solutions(["-1", "+1"]) == []  # nobody can call himself a knave
  assert solutions(["+2", "+1"]) == ["00", "11"]
  assert solutions(RECORD["statements"]) == [RECORD["solution"]]


def naive(statements, kinds):
  """Whether kinds fit, by the words of the statements."""
  kind = dict(zip(NAMES, kinds, strict=False))

  def holds(text):
    if " are of " in text:
      pair = [kind[name] for name in text.split(" are of ")[0].split(" and ")]
      return (pair[0] == pair[1]) == ("the same kind" in text)
    joint = any if " or " in text else all
    claims = text.rstrip(".").replace(" or ", " and ").split(" and ")
    return joint(kind[claim.split()[0]] == claim.split()[-1] for claim in claims)

  return all(holds(in_words(text)) == (kind[name] == "knight") for name, text in zip(NAMES, statements, strict=False))


def test_generated_puzzles_are_different_and_have_one_solution():
  records = list(TASK.generate("train", 120, 3))
  assert len({tuple(record["statements"]) for record in records}) == 120
  assert {TASK.difficulty(record) for record in records} == {2, 3, 4}
  for record in records:
    people = len(record["statements"])
    fitting = [k for k in itertools.product(("knave", "knight"), repeat=people) if naive(record["statements"], k)]
    assert [tuple(["knave", "knight"][int(digit)] for digit in record["solution"])] == fitting


def test_no_test_puzzle_is_a_training_puzzle_with_other_names():
  def renamed(statements, order):
    """The puzzle in which person i has the number order[i] + 1."""
    to = {str(person + 1): str(number + 1) for person, number in enumerate(order)}
    texts = ["".join(to.get(letter, letter) for letter in text) for text in statements]
    return tuple(text for _, text in sorted(zip(order, texts, strict=True)))

  task = Knights(min_people=3, max_people=3)
  train = {tuple(record["statements"]) for record in task.generate("train", 400, 0)}
  for record in task.generate("test", 20, 0):
    for order in itertools.permutations(range(3)):
      assert renamed(record["statements"], order) not in train
      assert shape(renamed(record["statements"], order)) == shape(record["statements"])


def test_generation_is_a_function_of_its_arguments_and_of_this_version():
  first = list(TASK.generate("train", 40, 0))
  assert first == list(itertools.islice(TASK.generate("train", 80, 0), 40))
  assert first != list(TASK.generate("train", 40, 1))
  assert Knights.version == "1.0.0"  # raise it if what follows is meant to change
  assert next(TASK.generate("train", 1, 0)) == RECORDED["train"]
  assert next(TASK.generate("test", 1, 0)) == RECORDED["test"]


RECORDED = {
  "train": {"statements": ["-1/-3", "-3", "-1", "-2*+3"], "solution": "1100"},
  "test": {"statements": ["-2", "2=3", "-1/-3"], "solution": "011"},
}


def test_too_many_puzzles_and_bad_options_are_refused():
  with pytest.raises(ValueError, match=r"task.num_train=900.*2 people after.*raise task.knights.min_people"):
    list(Knights(min_people=2, max_people=2).generate("train", 900, 0))
  with pytest.raises(ValueError, match=r"min_people=1.*\n.*demo_wrong=2"):
    Knights(min_people=1, max_people=2, demo_wrong=2)


@pytest.mark.parametrize(
  ("bare", "worded", "parts"),
  [
    ("010", "Ann is a knave, Bob is a knight, Cleo is a knave", (1.0, 0.2)),
    (" 0 1\n0", "cleo: KNAVE; ann - knave. Bob (a knight)", (1.0, 0.2)),
    ("011", "Ann is a knave, Bob is a knight, and Cleo is a knight.", (0.0, 0.2 * 2 / 3)),
    ("01", "Ann is a knave, Bob is a knight", (0.0, 0.0)),
    ("0101", "Ann: knave, Bob: knight, Cleo: knave, Dan: knight", (0.0, 0.0)),
    ("012", "Ann: knave, Bob: knight, Cleo: knave, Cleo: knight", (0.0, 0.0)),  # both cannot be
    ("", "", (0.0, 0.0)),
  ],
)
def test_rewards_by_hand(bare, worded, parts):
  for task, text in ((TASK, bare), (WORDED, f"<reasoning>\na\n</reasoning>\n<answer>\n{worded}\n</answer>")):
    assert tuple(task.reward(RECORD, text).values()) == pytest.approx(parts)
    assert task.grade(RECORD, text).is_correct == (parts[0] == 1)


def test_prompts_and_demonstrations():
  assert TASK.prompt(RECORD) == "(+1*-3,-1/-3,1=2="
  assert 'You meet Ann, Bob and Cleo.\n\nAnn says: "Ann is a knight and Cleo is a knave."\nBob' in WORDED.prompt(RECORD)
  for task in (TASK, WORDED):
    assert split_reward(task.reward(RECORD, task.demonstration(RECORD, RNG)), task.reward_parts)[0] == 1.2
    wrong = Knights(min_people=2, max_people=3, demo_wrong=1.0, prompt_name=task.prompt_name)
    assert not task.grade(RECORD, wrong.demonstration(RECORD, RNG)).is_correct
    assert task.grade(RECORD, wrong.only_correct().demonstration(RECORD, RNG)).is_correct
    assert task.grade(RECORD, task.demonstration(RECORD, RNG)).is_formatted


def test_a_drawn_statement_is_about_these_people_and_not_the_speaker_alone():
  for people in (2, 5, 8):
    for _ in range(200):
      text = draw_statement(1, people, RNG)
      numbers = {int(letter) for letter in text if letter.isdigit()}
      assert numbers <= set(range(1, people + 1))
      assert numbers != {2}


def test_a_file_of_puzzles_lists_its_bad_rows(tmp_path):
  path = tmp_path / "puzzles.jsonl"
  rows = [RECORD["statements"], ["+2", "+1"], ["+3", "-1"], ["?", "-1"], ["-1"], "-2"]
  path.write_text("".join(json.dumps({"statements": row}) + "\n" for row in rows))
  with pytest.raises(ValueError, match=r"5 rows(.|\n)*2 solutions(.|\n)*person 3(.|\n)*'\?' is no(.|\n)*1 statements"):
    TASK.read_published(path)
  path.write_text(json.dumps({"statements": RECORD["statements"]}))
  assert TASK.read_published(path) == [RECORD]
