"""A user's own task: a Python file, or prompts and answers as JSON lines."""

import json

import numpy as np
import pytest

from dmpo_jax.tasks import make_task, user
from dmpo_jax.tasks.base import MAX_REWARD, NotANumber, finite_number

PYTHON = """
def records(split):
  return [{"n": n} for n in (range(8) if split == "train" else range(8, 10))]

def prompt(record):
  return f"say {record['n']}"

def reward(record, completion):
  return 1.0 if completion == str(record["n"]) else 0.0
"""


def load(path, grader="exact"):
  return make_task(str(path), options={"grader": grader}, prompt="default", rewards="default", grader="default")


@pytest.fixture
def python_file(tmp_path):
  def write(text):
    path = tmp_path / f"task_{abs(hash(text))}.py"
    path.write_text(text)
    return path

  return write


def test_a_python_file_is_a_task(python_file):
  task = load(python_file(PYTHON))
  (first, second) = task.records("test")
  assert task.prompt(first) == "say 8"
  assert task.reward(first, "8") == 1
  assert task.grade(first, "8").is_correct
  assert not task.grade(second, "8").is_correct
  assert not task.is_bounded
  with pytest.raises(ValueError, match=r"defines no demonstration.*warm_start.updates"):
    task.demonstration(first, np.random.default_rng(0))


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    (("def reward", "def rewards"), "no function reward"),
    (("def prompt", "def prompt(:"), "cannot be imported"),
  ],
)
def test_a_file_that_is_no_task_is_refused(python_file, change, reason):
  with pytest.raises(ValueError, match=reason):
    load(python_file(PYTHON.replace(*change)))


def test_records_that_cannot_be_used_are_all_listed(python_file):
  task = load(
    python_file(PYTHON.replace('{"n": n} for n', '(n if n == 3 else {"m": n} if n == 5 else {"n": n}) for n'))
  )
  with pytest.raises(ValueError, match=r"2 rows cannot be used\n  record 3: 3 is not a dict\n  record 5: KeyError"):
    task.records("train")


def rows_file(tmp_path, rows):
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def test_json_lines_are_a_task(tmp_path):
  rows = [{"prompt": f"what is {n}", "answer": n} for n in range(200)]
  task = load(rows_file(tmp_path, rows), "number")
  train, test = task.records("train"), task.records("test")
  assert len(train) + len(test) == 200
  assert 5 < len(test) < 50
  assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
  record = next(row for row in train if row["answer"] == "50")
  assert task.reward(record, "<answer>it is 50.</answer>") == 1
  assert task.reward(record, "50.0") == 1
  assert task.reward(record, "51") == 0
  assert task.is_bounded


@pytest.mark.parametrize(
  ("grader", "answer", "gold"), [("exact", "The  cat", "the cat"), ("number", "$1,000", "1000"), ("math", "0.5", "1/2")]
)
def test_graders_by_name(grader, answer, gold):
  assert user.GRADERS[grader](answer, gold)
  assert not user.GRADERS[grader](answer, gold + "1")


def test_rows_that_cannot_be_used_are_all_listed(tmp_path):
  rows = [
    {"prompt": "a", "answer": "3"},
    {"prompt": "b"},
    {"prompt": "", "answer": "3"},
    {"prompt": "c", "answer": "d"},
  ]
  task = load(rows_file(tmp_path, rows), "number")
  with pytest.raises(
    ValueError, match=r"3 rows.*\n  row 2: no field 'answer'.*\n  row 3: .*empty\n  row 4: .*no number"
  ):
    task.records("train")


def test_a_grader_that_does_not_exist_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"task.user.grader='exakt': must be one of exact, number, math"):
    load(rows_file(tmp_path, []), "exakt")


def test_a_reward_is_a_number_that_float32_can_square():
  assert (finite_number(np.float32(0.5)), finite_number(True), finite_number(-MAX_REWARD)) == (0.5, 1.0, -MAX_REWARD)
  assert np.isfinite(np.float32(MAX_REWARD) ** 2)
  for value in (1e16, -1e39, 10**400, float("inf"), "1.0", None, [1.0]):
    with pytest.raises(NotANumber):
      finite_number(value)
