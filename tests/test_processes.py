"""Several processes as one: every row belongs to one of them, and nobody waits for another for ever."""

import json
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hosts import run_hosts
from programs import ROOT, finish, free_address, start

from dmpo_jax import processes
from dmpo_jax.processes import HostShare, gather_texts

COUNTS, NUMS = (1, 2, 3, 4, 7, 32, 64), (0, 1, 2, 5, 16, 32, 100)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("num", NUMS)
def test_rows_are_divided_evenly_and_in_order(num, count):
  shares = [HostShare(num, index, count).mine for index in range(count)]
  assert [row for share in shares for row in range(num)[share]] == list(range(num))
  assert all(0 <= share.start <= share.stop <= num for share in shares)
  sizes = [share.stop - share.start for share in shares]
  assert max(sizes) - min(sizes) <= 1
  assert sizes[0] == max(sizes)  # the process that writes the log has something to say if any has


@pytest.mark.parametrize("count", [1, 4, 32, 64])
@pytest.mark.parametrize("num", [0, 1, 5, 32, 100])
def test_every_process_gathers_all_rows_and_texts(monkeypatch, num, count):
  rows, texts = np.arange(num * 6, dtype=np.int32).reshape(num, 2, 3), [f"{row} \0 ä" for row in range(num)]

  def gather(index):
    share = HostShare(num)
    return share.gather(rows[share.mine]), gather_texts(texts[share.mine], "texts")

  for got_rows, got_texts in run_hosts(monkeypatch, count, gather):
    np.testing.assert_array_equal(got_rows, rows)
    assert got_rows.dtype == rows.dtype
    assert got_texts == texts


JOB = """
import sys, threading, time
from dmpo_jax import processes
from dmpo_jax.processes import Absent, Stopped, meet, poll

address, index, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
processes.JOIN_SECONDS = 60
"""


def run_job(count, program, num_started=None, **environment):
  """Run a program in the processes of a job, as many of them as are started; return how each ended."""
  address = free_address()
  command = [sys.executable, "-c", JOB + textwrap.dedent(program), address]
  started = [
    subprocess.Popen(
      [*command, str(index), str(count)],
      cwd=ROOT,
      env={**os.environ, "XLA_FLAGS": "", **environment},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(num_started or count)
  ]
  return [finish(process, timeout=120) for process in started]


@pytest.mark.slow
def test_an_absent_process_is_named_and_the_others_end(tmp_path):
  program = """
  assert processes.join(address, count, index, heartbeat_seconds=30)
  meet("the beginning", 60)
  if index == 1:
    time.sleep(100)
  try:
    meet("the end", 2)
  except Absent as absent:
    processes.fail(processes.ABANDONED, str(absent))
  """
  # A proxy that nobody answers at: gRPC would ask it for process 0.
  dead = dict.fromkeys(("https_proxy", "http_proxy", "grpc_proxy"), "http://127.0.0.1:9")
  done = run_job(3, program, **dead)
  assert [process.returncode for process in done] == [76, 76, 76], done
  named = (
    f"of 3 processes, process 1 on {os.uname().nodename} (last at 'the beginning') did not come to 'the end' within"
  )
  for process in (done[0], done[2]):
    assert f"{named} 2 s\n" in process.stderr
  assert re.search(f"stopped in process 1 by process [02], which has said: {re.escape(named)} 2 s\n", done[1].stderr)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_fails_alone_ends_all_with_its_code(index):
  program = f"""
  processes.join(address, count, index, heartbeat_seconds=30)
  meet("the beginning", 60)
  if index == {index}:
    processes.fail(1, "stopped: the disk is full")
  if index == 2:
    time.sleep(100)  # as in a program of the devices
  meet("an update", 100)
  """
  done = run_job(3, program)
  assert [process.returncode for process in done] == [1, 1, 1], done
  for number, process in enumerate(done):
    own = f"stopped in process {{}} by process {index}, which has said: ".format(number) if number != index else ""
    assert f"{own}stopped: the disk is full\n" in process.stderr


@pytest.mark.slow
def test_who_is_abandoned_ends_with_the_code_of_whoever_failed():
  """Collectives of a CPU break at once, before the words of the process that failed are there."""
  program = """
  processes.join(address, count, index, heartbeat_seconds=30)
  meet("the beginning", 60)
  if index == 1:
    time.sleep(1.0)
    processes.fail(1, "stopped: out of device memory")
  processes.fail(processes.ABANDONED, "stopped: the connection was closed by the peer")
  """
  done = run_job(2, program)
  assert [process.returncode for process in done] == [1, 1], done
  said = "stopped in process 0 by process 1, which has said: stopped: out of device memory"
  assert done[0].stderr.endswith(f"stopped: the connection was closed by the peer\n{said}\n")


def test_what_one_process_finds_stops_all_of_them_at_one_point():
  program = """
  processes.join(address, count, index, heartbeat_seconds=30)
  assert meet("notes", 60, "one says so" if index else "") == {1: "one says so"}
  assert meet("notes", 60) == {}
  own = {"same": [1, "ä"], "x": index, f"only {index}": None}
  assert processes.differing("settings", own) == [
    "only 0 is None in process 0 and 'absent' in process 1",
    "only 1 is 'absent' in process 0 and None in process 1",
    "x is 0 in process 0 and 1 in process 1",
  ]
  for step in range(3):
    if (index, step) == (1, 1):
      finds = threading.Thread(target=processes.stop_job, args=("the lock is gone",))
      finds.start()
      finds.join()
    try:
      poll("the next step")
    except Stopped as stopped:
      print(step, stopped)
      sys.exit(1)
  """
  done = run_job(2, program)
  assert [(process.returncode, process.stdout) for process in done] == [(1, "1 the lock is gone\n")] * 2, done


@pytest.mark.slow
def test_work_that_may_take_long_is_no_stall():
  program = """
  processes.STALL_SECONDS = 2.0
  processes.join(address, count, index, heartbeat_seconds=30)
  meet("the beginning", 60)
  with processes.working(30):
    time.sleep(6)
  meet("the end", 60)
  """
  done = run_job(2, program)
  assert [process.returncode for process in done] == [0, 0], done


@pytest.mark.slow
def test_a_process_that_meets_nobody_ends():
  program = """
  processes.STALL_SECONDS = 6.0
  processes.join(address, count, index, heartbeat_seconds=30)
  meet("the beginning", 60)
  time.sleep(1)
  meet("an update", 60)
  time.sleep(60)  # as in a program of the devices
  """
  for done in run_job(2, program):
    assert done.returncode == 76
    assert "nothing has gone on for 6 s since 'an update'" in done.stderr


def test_processes_that_do_not_find_each_other_say_so():
  program = """
  processes.JOIN_SECONDS = 3
  processes.join(address, count, index, heartbeat_seconds=30)
  """
  (done,) = run_job(2, program, num_started=1)
  assert done.returncode == 76
  assert "stopped in process 0: the 2 processes of the job have not found each other within 3 s" in done.stderr


def test_a_process_alone_meets_nobody():
  assert processes.meet("the end", note="a note") == {0: "a note"}
  assert processes.meet("the end") == {}
  assert processes.differing("settings", {"a": 1}) == []
  processes.stop_job("enough")
  with pytest.raises(processes.Stopped, match="enough"):
    processes.poll("the next step")
  processes.poll("the next step")


@pytest.mark.slow
def test_four_processes_train_on_two_prompts_as_one_does(tmp_path):
  own = ("--config=tests/tiny.py", "--config.warm_start.updates=0", "--config.train.num_buffers=1")
  own += ("--config.rollout.num_prompts=2", "--config.train.microbatch_prompts=0", "--config.eval.num_prompts=1")
  four, one = tmp_path / "four", tmp_path / "one"
  program = (ROOT / "launch" / "pods" / "local.sh", "-n", "4", "-r", "0", "--")
  done = start(*own, f"--workdir={four}", devices=1, program=program)
  assert done.returncode == 0, done.stderr[-3000:]
  done = start(*own, f"--workdir={one}", devices=4)
  assert done.returncode == 0, done.stderr[-3000:]
  wanted, got = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, four))
  assert [row["step"] for row in got] == [row["step"] for row in wanted] == [0, 1]
  for name in ("reward_mean", "sampled_nll", "completion_length", "unique_rollouts"):
    assert got[1][name] == pytest.approx(wanted[1][name], rel=1e-4)
  assert got[1]["graded_per_second"] > 0
  generations = [(run / "generations" / "000000.jsonl").read_text().splitlines() for run in (four, one)]
  assert [len(lines) for lines in generations] == [1, 1]
