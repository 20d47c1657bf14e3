"""GSM8K and MATH: rows, prompts, rewards by both sets, and files that are partial, altered or absent."""

import hashlib
import json

import numpy as np
import pytest

from dmpo_jax.tasks import TASKS, make_task, sources
from dmpo_jax.tasks.base import split_reward
from dmpo_jax.tasks.gsm8k import GSM8K
from dmpo_jax.tasks.maths import Math
from dmpo_jax.tasks.published import RANGES

ROW = {"question": "What is 1,000 + $234?", "answer": "It is 1000 + 234 = <<1000+234=1234>>1234\n#### 1,234"}
RNG = np.random.default_rng(0)


def gsm8k(**choices):
  return GSM8K(**choices), GSM8K.read_row(ROW)


def worth(task, record, completion):
  return split_reward(task.reward(record, completion), task.reward_parts)[0]


def test_numbers_are_compared_as_numbers():
  task, record = gsm8k()
  for answer in ("1234", "1,234", "$1234.00", "1234 dollars", "1000 + 234 = 1,234", "\\boxed{1,234}"):
    assert task.grade(record, f"<answer>{answer}</answer>").is_correct, answer
  for answer in ("1", "234", "", "1,235", "\\boxed{1}"):
    assert not task.grade(record, f"<answer>{answer}</answer>").is_correct, answer


def test_default_rewards_are_what_their_description_says():
  task, record = gsm8k()
  right = "<reasoning>\nfirst\nthen\n</reasoning>\n<answer>\n1234\n</answer>"
  assert worth(task, record, right) == 4
  assert worth(task, record, right.replace("1234", "7")) == 2
  assert worth(task, record, "1234") == 0
  assert worth(task, record, "\\boxed{1234}") == 2.5
  assert worth(task, record, right + "x" * 1000) == pytest.approx(2 + 0 + 0.5)
  assert task.reward(record, right.replace("1234", "7")) == {"correct": 0, "form": 2}


def test_published_rewards_and_grader_keep_their_oddities():
  task, record = gsm8k(rewards="published", grader="published")
  assert (
    worth(task, record, "<reasoning>a</reasoning><answer>1234</answer>") == 1.0
  )  # soft form and digits; not "1,234"
  assert task.reward(record, "<reasoning>a</reasoning><answer>1</answer>") == {
    "xmlcount": 0, "soft_format": 0.5, "strict_format": 0, "int": 0.5, "correctness": 0,
  }  # fmt: skip
  assert task.grade(record, "<answer>1,234</answer>").extracted == 234
  assert not task.grade(record, "<answer>1,234</answer>").is_correct
  assert task.grade(record, "\\boxed{1234} no, \\boxed{5}").is_correct


def test_the_published_grader_calls_nothing_right_where_the_gold_answer_is_negative():
  row = {"question": "How cold is it?", "answer": "2 - 12 = -10\n#### -10"}
  for grader, is_right in (("default", True), ("published", False)):
    task = GSM8K(grader=grader)
    record = task.read_row(row)
    for answer in ("<answer>-10</answer>", "\\boxed{-10}"):
      assert task.grade(record, answer).is_correct == is_right
    assert not task.grade(record, "<answer>10</answer>").is_correct
  positive = GSM8K(grader="published")
  assert positive.grade(positive.read_row(row | {"answer": "#### 0"}), "<answer>0</answer>").is_correct


def test_demonstrations_have_the_form_of_the_prompt_and_are_right():
  for name in GSM8K.PROMPTS:
    task, record = gsm8k(prompt_name=name)
    text = task.demonstration(record, RNG)
    assert "<<" not in text
    assert worth(task, record, text) == 4
    assert (
      task.prefill + text
      == "<reasoning>\nIt is 1000 + 234 = 1234\n</reasoning>\n<answer>\n"
      + ("\\boxed{1,234}" if name == "published_eval" else "1,234")
      + "\n</answer>"
    )
    assert task.prompt(record).endswith(ROW["question"])


def test_math_is_compared_as_mathematics_or_as_the_published_text():
  record = Math.read_row({"problem": "x?", "answer": "\\frac{639}{40}"})
  text = "<reasoning>\na\n</reasoning>\n<answer>\n\\boxed{15.975}\n</answer>"
  assert worth(Math(), record, text) == 3
  assert worth(Math(rewards="published"), record, text) == 1
  assert worth(Math(rewards="published"), record, text.replace("15.975", "\\frac{639}{40}")) == 3
  assert not Math(grader="published").grade(record, text).is_correct
  assert not Math().is_bounded
  assert Math(rewards="published", grader="published").is_bounded


@pytest.mark.parametrize("name", RANGES)
def test_published_prompts_ask_for_tags_and_begin_the_answer_in_the_evaluation(name):
  prompts = TASKS[name].PROMPTS
  assert {"default", "published_train", "published_eval"} <= set(prompts)
  assert prompts["published_train"].prefill == prompts["default"].prefill == ""
  assert prompts["published_eval"].prefill == "<reasoning>"
  for prompt in ("default", "published_train", "published_eval"):
    assert "<reasoning>" in prompts[prompt].text
    assert "<answer>" in prompts[prompt].text


def test_a_choice_that_does_not_exist_is_named():
  with pytest.raises(ValueError, match=r"task.prompt='bare': must be one of default, published_train, published_eval"):
    make_task("gsm8k", options={}, prompt="bare", rewards="default", grader="default")


# Files


def lines(*rows):
  return b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n"


def test_every_row_that_cannot_be_used_is_listed():
  content = lines(
    ROW, b"{", b'["a"]', {"question": "a"}, {"question": " ", "answer": "#### 3"}, {"question": "a", "answer": "3"},
    b'{"question": "\xff"}', {"question": 3, "answer": "#### 3"},
  )  # fmt: skip
  records, problems = sources.read_rows(content, GSM8K.read_row)
  assert len(records) == 1
  reasons = ["not JSON", "not an object", "no field 'answer'", "is empty", "not in ####", "not UTF-8", "not a text"]
  for number, (problem, reason) in enumerate(zip(problems, reasons, strict=True), start=2):
    assert problem.startswith(f"row {number}: ")
    assert reason in problem


def test_a_test_file_by_path_lists_its_bad_rows(tmp_path):
  path = tmp_path / "problems.jsonl"
  path.write_bytes(lines({"problem": "x?", "answer": "{1"}, {"problem": "", "answer": "1"}))
  with pytest.raises(ValueError, match=r"2 rows cannot be used\n  row 1: .*braces.*\n  row 2: .*empty"):
    Math().read_published(path)


def source(content=None):
  digest = hashlib.sha256(content or lines(ROW)).hexdigest()
  return sources.Source("rows.jsonl", "http://127.0.0.1:9/rows.jsonl", (digest,))


def test_a_published_file_is_taken_by_its_checksum(tmp_path):
  (tmp_path / "rows.jsonl").write_bytes(lines(ROW))
  assert sources.read_source(source(), str(tmp_path), GSM8K.read_row) == [GSM8K.read_row(ROW)]


def test_a_partial_file_is_an_error_that_says_what_would_do(tmp_path):
  (tmp_path / "rows.jsonl").write_bytes(lines(ROW)[:-20])
  with pytest.raises(
    ValueError, match=r"partial or altered.*get http.*as rows.jsonl.*task.data_dir(.|\n)*row 1: not JSON"
  ):
    sources.read_source(source(), str(tmp_path), GSM8K.read_row)


def test_an_absent_file_and_an_absent_network_say_which_file_to_put_where(tmp_path):
  for data_dir in (str(tmp_path), ""):
    with pytest.raises(ValueError, match=r"get http://127.0.0.1:9/rows.jsonl and put it into a folder as rows.jsonl"):
      sources.read_source(source(), data_dir, GSM8K.read_row)
