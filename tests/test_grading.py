"""Grading in worker processes: what hangs, crashes or needs too much memory is worth 0, and takes nothing with it."""

import contextlib
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from hosts import run_hosts

from configs import base
from dmpo_jax import grading
from dmpo_jax.grading import Grades, Grading
from dmpo_jax.hub.tokenizer import load_tokenizer
from dmpo_jax.processes import HostShare
from dmpo_jax.tasks import Grade
from dmpo_jax.tasks.judge import judge
from dmpo_jax.tasks.sudoku import Sudoku

TASK = """
import os, signal, subprocess, sys, time

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
  if completion == "huge":
    return 10**400
  if completion == "long":
    return 10**5000
  if completion == "exit":
    raise SystemExit(4)
  if completion == "interrupt":
    raise KeyboardInterrupt
  if completion == "text":
    return "1.0"
  if completion == "close":
    os.closerange(3, 100)
  if completion.startswith("leave"):
    subprocess.Popen(["sleep", completion.split()[1]], start_new_session=True)
    if completion.endswith("and hang"):
      time.sleep(600)
    if completion.endswith("and die"):
      os._exit(3)
    return 1.0
  if completion == "tell":
    print("said on stderr", file=sys.stderr, flush=True)
    return 1.0
  print("said on stdout")
  return float(completion)
"""
KINDS = {"hang": "timeout", "die": "crash", "memory": "crash", "close": "crash"}
KINDS |= dict.fromkeys(["raise", "nan", "two", "huge", "long", "exit", "interrupt", "text"], "failed")


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
  path = tmp_path_factory.mktemp("grading") / "task.py"
  path.write_text(TASK)
  return dict(name=str(path), options={"grader": "exact"}, prompt="default", rewards="default", grader="default")


def test_nothing_that_a_reward_does_takes_the_run_with_it(spec, capfd):
  pool = Grading(spec, workers=2, seconds=1.0, memory_gb=2.0)
  texts = ["1", "hang", "2", "die", "3", "memory", "raise", "4", "nan", "two", "5"]
  texts += ["huge", "long", "exit", "interrupt", "text", "close"]
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


def test_what_a_reward_starts_ends_with_its_worker(spec):
  """In a session of its own too, whether the reward returns, hangs or ends its process."""
  pool = Grading(spec, workers=1, seconds=1.0)
  texts = [f"leave 98765.{number}{how}" for number, how in enumerate(["", " and hang", " and die", ""])]
  verdicts = pool.submit([{"n": 1}] * 4, texts, [True] * 4).result()
  assert [x.kind for x in verdicts] == ["graded", "timeout", "crash", "graded"]
  deadline = time.monotonic() + 10
  while (
    not _is_running("sleep 98765.3") and time.monotonic() < deadline
  ):  # the last may: its process begins when it can
    time.sleep(0.05)
  assert [text.split()[1] for text in texts if _is_running(f"sleep {text.split()[1]}")] == ["98765.3"]
  pool.close()
  assert not _is_running("sleep 98765")


def test_nothing_holds_the_stderr_of_a_run_that_was_killed(spec):
  """`main 2>&1 | tee log` ends with main."""
  program = f"""
from dmpo_jax.grading import Grading
import os, signal
Grading({spec!r}, workers=1, seconds=9.0).submit([{{"n": 1}}], ["leave 98764"], [True]).result()
print("graded", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)  # reads to the end
  assert (done.returncode, done.stdout) == (-signal.SIGKILL, "graded\n")
  deadline = time.monotonic() + 10
  while _is_running("sleep 98764") and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not _is_running("sleep 98764")


def test_a_killed_worker_is_a_crash_and_the_next_one_grades(spec):
  pool = Grading(spec, workers=1, seconds=30.0)
  pool.submit([{"n": 1}], ["1"], [True]).result()
  pending = pool.submit([{"n": 1}], ["hang"], [True])
  time.sleep(0.3)
  for worker in _workers():
    worker.kill()
  assert [x.kind for x in pending.result()] == ["crash"]
  assert [x.reward for x in pool.submit([{"n": 1}], ["7"], [True]).result()] == [7.0]
  pool.close()


def test_what_a_reward_writes_to_stderr_is_logged(spec, caplog):
  pool = Grading(spec, workers=1)
  pool.submit([{"n": 1}], ["tell"], [True]).result()
  pool.close()
  assert [record.message for record in caplog.records if "stderr" in record.message] == [
    "a reward's stderr: said on stderr"
  ]


def _is_running(command):
  found = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
  return any(" ".join(words).startswith(command) for words in found)


def test_a_reward_is_called_once_a_completion(tmp_path):
  path, calls = tmp_path / "counting.py", tmp_path / "calls"
  path.write_text(
    "def records(split): return [{'n': 1}]\ndef prompt(record): return 'x'\n"
    f"def reward(record, completion):\n  open({str(calls)!r}, 'a').write(completion + ' ')\n"
    "  return float(completion)\n"
  )
  spec = dict(name=str(path), options={"grader": "exact"}, prompt="default", rewards="default", grader="default")
  pool = Grading(spec, workers=1)
  verdicts = pool.submit([{"n": 1}] * 3, ["1", "0", "none"], [True] * 3).result()
  pool.close()
  assert [(x.kind, x.reward, x.grade.is_correct) for x in verdicts] == [
    ("graded", 1.0, True), ("graded", 0.0, False), ("failed", 0.0, False)
  ]  # fmt: skip
  assert calls.read_text() == "1 0 none "


def test_close_ends_workers_that_are_busy_and_drops_what_waits(spec):
  pool = Grading(spec, workers=2, seconds=60.0)
  pool.submit([{"n": 1}] * 2, ["1", "2"], [True] * 2).result()
  records = [{"n": number} for number in range(6)]
  pending = pool.submit(records, ["hang"] * 6, [True] * 6)
  time.sleep(0.5)
  start = time.monotonic()
  pool.close()
  assert time.monotonic() - start < 5
  assert [future.cancelled() for future in pending._futures].count(True) == 4
  assert not _workers()


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

  joined = Grades.join([part(1.0), part(2.0)], group_size=2)
  assert (joined.parts, joined.part_names) == (None, ())
  np.testing.assert_array_equal(joined.reward, [[1, 1], [2, 2]])
  np.testing.assert_array_equal(Grades.join([part(1.0), part(2.0)], group_size=4).reward, [[1, 1, 2, 2]])
  assert (joined.num_timeouts, joined.num_crashes, joined.per_second) == (2, 4, 10.0)


class Letters(Sudoku):
  """A task that rewards a completion's letters and its record; every third completion or so fails."""

  default_parts = ("letters", "record")

  def reward(self, record, completion):
    value = sum(map(ord, completion))
    return {"letters": float(value) if value % 3 else float("nan"), "record": 1000 * record["n"]}

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
    return Grades.join([wait() for wait in waits], group_size=2)

  plain = [
    [list(task.reward(record, tokenizer.decode(row.tolist())).values()) for row in rows]
    for record, rows in zip(records, completion, strict=True)
  ]
  parts = np.array(plain).reshape(num, 2, 2)
  reward = parts.sum(-1)
  for index, grades in enumerate(run_hosts(monkeypatch, count, grade_chunks)):
    np.testing.assert_array_equal(grades.reward, np.nan_to_num(reward))
    np.testing.assert_array_equal(grades.parts, np.where(np.isnan(reward)[..., None], 0, parts))
    assert grades.part_names == ("letters", "record")
    np.testing.assert_array_equal(grades.is_kept, ~np.isnan(reward))
    is_ended = (completion == tokenizer.eos_token_id).any(-1)
    np.testing.assert_array_equal(grades.is_solved, is_ended & ~np.isnan(reward))
    has_rows = any(range(size)[HostShare(size, index, count).mine] for size in (num // 2 * 2, num * 2 - num // 2 * 2))
    assert grades.per_second > 0 if has_rows else np.isnan(grades.per_second)
  pool.close()


def test_a_long_list_of_problems_is_counted_and_not_all_described(spec, caplog):
  verdicts = [grading.Verdict("failed", problem="gave nan")] * 9
  grading.log_problems(Grading(spec).task, verdicts, ["text"] * 9)
  assert len(caplog.records) == 6
  assert "and 4 more of 9" in caplog.text


def _workers():
  """The worker processes that live."""
  found = []
  for process in psutil.Process().children(recursive=True):
    with contextlib.suppress(psutil.Error):  # it ends meanwhile
      if "judge.serve" in " ".join(process.cmdline()):
        found.append(process)
  return found
