"""A user's own task: a Python file, or prompts and answers as JSON lines."""

import json

import numpy as np
import pytest

from dmpo_jax.tasks import make_task, user
from dmpo_jax.tasks.base import MAX_REWARD, BadReward, finite_number, split_reward
from dmpo_jax.tasks.judge import judge

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
  assert judge(task, first, "8", True).reward == 1
  assert judge(task, first, "8", True).grade.is_correct
  assert not judge(task, second, "8", True).grade.is_correct
  assert not task.is_bounded
  with pytest.raises(ValueError, match=r"defines no demonstration.*warm_start.updates"):
    task.demonstration(first, np.random.default_rng(0))


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    (("def reward", "def rewards"), "no function reward"),
    (("def prompt", "def prompt(:"), "cannot be imported"),
    (("def prompt", "REWARD_PARTS = 'form'\n\ndef prompt"), "REWARD_PARTS must be a tuple of names .* not 'form'"),
    (("def prompt", "REWARD_PARTS = ('a b',)\n\ndef prompt"), "REWARD_PARTS must be a tuple of names"),
    (("def prompt", "REWARD_PARTS = ('a', 'a')\n\ndef prompt"), "REWARD_PARTS names a part twice"),
    (("def prompt", "REWARD_PARTS = ('mean',)\n\ndef prompt"), "REWARD_PARTS 'mean' is taken"),
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
  for completion, reward in (("<answer>it is 50.</answer>", 1), ("50.0", 1), ("51", 0)):
    verdict = judge(task, record, completion, True)
    assert (verdict.reward, verdict.grade.is_correct) == (reward, reward == 1)
  assert task.is_bounded


SYSTEM = {"role": "system", "content": "Be brief."}


def test_rows_and_files_may_have_conversations(tmp_path, python_file):
  rows = [{"messages": [SYSTEM, {"role": "user", "content": f"what is {n}"}], "answer": n} for n in range(200)]
  task = load(rows_file(tmp_path, rows), "number")
  train, test = task.records("train"), task.records("test")
  assert len(train) + len(test) == 200
  assert 5 < len(test) < 50
  assert task.prompt(test[0]) == test[0]["messages"]
  assert judge(task, test[0], test[0]["answer"], True).reward == 1
  messages = f"""[{SYSTEM}, {{"role": "user", "content": f"say {{record['n']}}"}}]"""
  task = load(python_file(PYTHON.replace("f\"say {record['n']}\"", messages)))
  assert task.prompt(task.records("test")[0]) == [SYSTEM, {"role": "user", "content": "say 8"}]


def said(role, content):
  return {"role": role, "content": content}


CHAT = [SYSTEM, said("user", "2 + 2?"), said("assistant", "4."), said("user", "Sure?"), said("assistant", "Yes: 4.")]


def test_every_turn_of_the_assistant_is_a_demonstration_of_what_stands_before_it(tmp_path):
  rows = [{"messages": CHAT}, {"messages": [said("assistant", "Hello."), *CHAT[1:3]], "answer": 4}]
  task = load(rows_file(tmp_path, rows))
  records = [record for split in ("train", "test") for record in task.records(split)]
  turns = {(len(task.prompt(record)), task.demonstration(record, np.random.default_rng(0))) for record in records}
  assert turns == {(2, "4."), (4, "Yes: 4.")}  # the greeting is no answer
  greeted = next(record for record in records if record["messages"][0]["content"] == "Hello.")
  assert task.prompt(greeted) == rows[1]["messages"][:2]
  last = next(record for record in records if len(record["messages"]) == 4)
  for record, completion, reward in ((greeted, "<answer>4</answer>", 1), (greeted, "4.", 0), (last, "yes: 4.", 1)):
    assert judge(task, record, completion, True).reward == reward


def test_a_chat_is_held_out_whole_and_like_its_first_prompt(tmp_path):
  texts = [f"what is {n}" for n in range(200)]
  plain = load(rows_file(tmp_path, [{"prompt": text, "answer": "1"} for text in texts]))
  held_out = [record["prompt"] for record in plain.records("test")]
  chats = load(rows_file(tmp_path, [{"messages": [said("user", text), *CHAT[2:]]} for text in texts]))
  records = chats.records("test")
  assert [record["messages"][0]["content"] for record in records[::2]] == held_out
  assert [len(record["messages"]) for record in records] == [1, 3] * len(held_out)
  assert chats.read_published(tmp_path / "rows.jsonl")[:2] == (chats.records("train") + records)[:2]


def test_a_row_may_have_a_worked_answer(tmp_path):
  row = {"prompt": "2 + 2?", "answer": 4, "demonstration": "Two and two are <answer>4</answer>"}
  (record,) = load(rows_file(tmp_path, [row]), "number").read_published(tmp_path / "rows.jsonl")
  assert load(tmp_path / "rows.jsonl").demonstration(record, np.random.default_rng(0)) == row["demonstration"]


def test_chats_that_cannot_be_learned_from_are_all_listed(tmp_path):
  rows = [
    {"messages": [said("assistant", "Hello.")]},
    {"messages": [said("user", "2 + 2?"), said("assistant", " ")]},
    {"messages": [said("user", "2 + 2?"), said("tool", "4"), said("assistant", "4")]},
    {"messages": [said("user", "2 + 2?"), said("assistant", "4")]},
  ]
  with pytest.raises(
    ValueError,
    match=r"4 rows.*\n  row 1: the assistant answers nothing in it\n  row 2: messages\[1\] is empty"
    r"\n  row 3: messages\[1\] must have a role.*\n  row 4: no field 'answer'",
  ):
    load(rows_file(tmp_path, rows), "number").records("train")


def test_a_row_with_one_user_message_is_held_out_like_its_text(tmp_path):
  texts = [f"what is {n}" for n in range(200)]
  plain = load(rows_file(tmp_path, [{"prompt": text, "answer": "1"} for text in texts]))
  held_out = [record["prompt"] for record in plain.records("test")]
  messages = [{"messages": [{"role": "user", "content": text}], "answer": "1"} for text in texts]
  chat = load(rows_file(tmp_path, messages))
  assert [record["messages"][0]["content"] for record in chat.records("test")] == held_out


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
    {"prompt": "c", "messages": [{"role": "user", "content": "c"}], "answer": "3"},
    {"messages": [{"role": "bot", "content": "c"}], "answer": "3"},
  ]
  task = load(rows_file(tmp_path, rows), "number")
  with pytest.raises(
    ValueError,
    match=r"5 rows.*\n  row 2: no field 'answer'.*\n  row 3: .*empty\n  row 4: .*no number"
    r"\n  row 5: .*give one of them\n  row 6: messages\[0\] must have a role",
  ):
    task.records("train")


def test_a_grader_that_does_not_exist_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"task.user.grader='exakt': must be one of exact, number, math"):
    load(rows_file(tmp_path, []), "exakt")


def test_a_reward_is_a_number_that_float32_can_square():
  assert (finite_number(np.float32(0.5)), finite_number(True), finite_number(-MAX_REWARD)) == (0.5, 1.0, -MAX_REWARD)
  assert np.isfinite(np.float32(MAX_REWARD) ** 2)
  for value in (1e16, -1e39, 10**400, float("inf"), "1.0", None, [1.0]):
    with pytest.raises(BadReward):
      finite_number(value)


PARTS = """
REWARD_PARTS = ("correct", "form")

def records(split):
  return [{"n": 7}]

def prompt(record):
  return "say 7"

def reward(record, completion):
  if completion == "no form":
    return {"correct": 1.0}
  if completion == "bad form":
    return {"correct": 1.0, "form": "0.5"}
  if completion == "number":
    return 0.0
  return {"form": 0.5 * completion.endswith("."), "correct": 2.0 * completion.startswith("7")}
"""


def test_a_reward_may_have_parts_whose_sum_it_is(python_file):
  task = load(python_file(PARTS))
  assert task.reward_parts == ("correct", "form")
  verdict = judge(task, {"n": 7}, "7.", True)
  assert (verdict.kind, verdict.reward, verdict.grade.is_correct) == ("graded", 2.5, True)
  assert list(verdict.parts.items()) == [("correct", 2.0), ("form", 0.5)]
  assert judge(task, {"n": 7}, "8", True).reward == 0
  assert not judge(task, {"n": 7}, "8", True).grade.is_correct


@pytest.mark.parametrize(
  ("completion", "problem"),
  [
    ("no form", "gave the parts ['correct'], not correct, form"),
    ("bad form", "gave '0.5', not one finite number (part 'form')"),
    ("number", "gave 0.0, not the parts correct, form"),
  ],
)
def test_a_reward_that_lacks_a_part_fails_and_says_so(python_file, completion, problem):
  verdict = judge(load(python_file(PARTS)), {"n": 7}, completion, True)
  assert (verdict.kind, verdict.reward, verdict.problem) == ("failed", 0.0, problem)


def test_parts_that_the_file_does_not_name_are_refused_with_the_line_to_add():
  with pytest.raises(BadReward, match=r"name them, as REWARD_PARTS = \('a', 'b'\)"):
    split_reward({"a": 1.0, "b": 2.0}, ())
