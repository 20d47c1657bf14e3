"""Grading in worker processes: what hangs, crashes or needs too much memory is worth 0, and takes nothing with it."""

import time

import numpy as np
import pytest
from hosts import run_hosts

from configs import base
from dmpo_jax import grading
from dmpo_jax.grading import Grades, Grading
from dmpo_jax.processes import HostShare
from dmpo_jax.tasks import Grade
from dmpo_jax.tasks.judge import judge
from dmpo_jax.tasks.sudoku import Sudoku
from dmpo_jax.tokenizer import load_tokenizer

TASK = """
import os, signal, subprocess, time

def records(split):
  return [{"n": 1}]

def prompt(record):
  return "x"

def reward(record, completion):
  if completion == "hang":
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen(["sleep", "600"])
    while True:
      pass
  if completion == "die":
    os._exit(3)
  if completion == "memory":
    return float(len(bytearray(8 << 30)))
  if completion == "raise":
    raise KeyError("no such thing")
  if completion == "nan":
    return float("nan")
  if completion == "two":
    return [1.0, 2.0]
  print("said on stdout")
  return float(completion)
"""
KINDS = {"hang": "timeout", "die": "crash", "memory": "crash", "raise": "failed", "nan": "failed", "two": "failed"}


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
  path = tmp_path_factory.mktemp("grading") / "task.py"
  path.write_text(TASK)
  return dict(name=str(path), options={"grader": "exact"}, prompt="default", rewards="default", grader="default")


def test_nothing_that_a_reward_does_takes_the_run_with_it(spec, capfd):
  pool = Grading(spec, workers=2, seconds=1.0, memory_gb=2.0)
  texts = ["1", "hang", "2", "die", "3", "memory", "raise", "4", "nan", "two", "5"]
  start = time.monotonic()
  verdicts = pool.submit([{"n": 1}] * len(texts), texts, [True] * len(texts)).result()
  again = pool.submit([{"n": 1}], ["7"], [True]).result()  # the workers stand again
  assert time.monotonic() - start < 20
  pool.close()
  assert [x.kind for x in verdicts] == [KINDS.get(text, "graded") for text in texts]
  assert [x.reward for x in verdicts if x.kind == "graded"] == [1, 2, 3, 4, 5]
  assert all(x.reward == 0 and x.problem for x in verdicts if x.kind != "graded")
  assert again[0].reward == 7
  assert capfd.readouterr().out == ""


def test_close_ends_the_workers_at_once(spec):
  pool = Grading(spec, workers=1)
  pool.submit([{"n": 1}], ["1"], [True]).result()
  worker = pool._idle.get()
  pool._idle.put(worker)
  process = worker._process
  pool.close()
  assert process.poll() is not None


def test_a_worker_does_not_import_jax(tmp_path):
  path = tmp_path / "task.py"
  path.write_text(TASK.replace("  return float(completion)", "  import sys\n  return float('jax' in sys.modules)"))
  spec = dict(name=str(path), options={"grader": "exact"}, prompt="default", rewards="default", grader="default")
  pool = Grading(spec, workers=1)
  (verdict,) = pool.submit([{"n": 1}], ["1"], [True]).result()
  pool.close()
  assert (verdict.kind, verdict.reward) == ("graded", 0.0)


def test_the_reasons_are_given(spec):
  task = Grading(spec).task
  assert "no such thing" in judge(task, {"n": 1}, "raise", True).problem
  assert "nan" in judge(task, {"n": 1}, "nan", True).problem
  assert "[1.0, 2.0]" in judge(task, {"n": 1}, "two", True).problem


def test_grades_of_chunks_are_joined():
  def part(reward):
    array = np.full((1, 2), reward)
    return Grades(array, array > 0, array > 1, num_timeouts=1, num_crashes=2, per_second=10.0)

  joined = Grades.join([part(1.0), part(2.0)])
  np.testing.assert_array_equal(joined.reward, [[1, 1], [2, 2]])
  assert (joined.num_timeouts, joined.num_crashes, joined.per_second) == (2, 4, 10.0)


class Letters(Sudoku):
  """A task that rewards a completion's letters; every third completion or so fails."""

  def reward(self, record, completion):
    value = sum(map(ord, completion))
    return float(value + 1000 * record["n"]) if value % 3 else float("nan")

  def grade(self, record, completion, is_ended):
    return Grade(is_ended, completion)


@pytest.mark.parametrize("count", [1, 4, 32, 64])
@pytest.mark.parametrize("num", [0, 1, 5, 32, 100])
def test_hosts_without_rows_have_the_grades_of_all(monkeypatch, num, count):
  tokenizer = load_tokenizer("sentencepiece", base.get_config().tokenizer.path, is_chat=False)
  task, records = Letters(min_blanks=4, max_blanks=6, demo_patience=11.0), [{"n": row} for row in range(num)]
  completion = np.random.default_rng(num).integers(0, 20, (num, 2, 3))
  pool, chunks = Grading(task=task), [slice(0, num // 2), slice(num // 2, num)]

  def grade_chunks(_):
    waits = [grading.grade(pool, tokenizer, records[chunk], completion[chunk]) for chunk in chunks]
    return Grades.join([wait() for wait in waits])

  plain = [
    [task.reward(record, tokenizer.decode(row.tolist())) for row in rows]
    for record, rows in zip(records, completion, strict=True)
  ]
  reward = np.array(plain).reshape(num, 2)
  for index, grades in enumerate(run_hosts(monkeypatch, count, grade_chunks)):
    np.testing.assert_array_equal(grades.reward, np.nan_to_num(reward))
    np.testing.assert_array_equal(grades.is_kept, ~np.isnan(reward))
    is_ended = (completion == tokenizer.eos_token_id).any(-1)
    np.testing.assert_array_equal(grades.is_solved, is_ended & ~np.isnan(reward))
    has_rows = any(range(size)[HostShare(size, index, count).mine] for size in (num // 2, num - num // 2))
    assert grades.per_second > 0 if has_rows else np.isnan(grades.per_second)
  pool.close()


def test_a_long_list_of_problems_is_counted_and_not_all_described(spec, caplog):
  verdicts = [grading.Verdict("failed", problem="gave nan")] * 9
  grading.log_problems(Grading(spec).task, verdicts, ["text"] * 9)
  assert len(caplog.records) == 6
  assert "and 4 more of 9" in caplog.text
