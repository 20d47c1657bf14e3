"""Runs that are killed, preempted, locked out, or left without a disk or a partner: nothing is lost."""

import json
import platform
import re
import resource
import signal
import sys
import time

import jax
import numpy as np
import pytest
from programs import ROOT, begin, finish, free_address, start, wait_for
from remains import policy_of

TINY = "--config=tests/tiny.py"
ENDLESS = "--config.train.num_buffers=100000"


def rows_of(workdir, phase="train"):
  """The metrics of a phase."""
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  rows = [json.loads(line) for line in lines if line.endswith("\n")]
  return [row for row in rows if row["phase"] == phase]


def saved_steps(workdir):
  """Steps of the whole checkpoints of the training proper."""
  return [int(path.name) for path in (workdir / "checkpoints" / "train").iterdir() if path.name.isdigit()]


@pytest.mark.slow
def test_killed_runs_end_bit_for_bit_as_if_left_alone(tmp_path):
  pipelined = "--config.rollout.pipelined=True"  # a kill may then find a buffer in use and one that is still graded
  done = start("--kills=5", f"--workdir={tmp_path / 'soak'}", "--", TINY, pipelined, module="launch.soak")
  assert done.returncode == 0, done.stdout + done.stderr
  assert "5 kills survived" in done.stdout


@pytest.mark.slow
def test_a_workdir_has_one_run_and_an_interrupt_saves_it(tmp_path):
  """Ctrl+C becomes the SIGTERM by which clusters give notice."""
  workdir = tmp_path / "run"
  command = (TINY, f"--workdir={workdir}")
  process = begin(*command, ENDLESS)
  wait_for(lambda: len(rows_of(workdir)) > 2, process)
  second = start(*command, ENDLESS)
  assert second.returncode == 2
  assert re.search(rf"in use by another run, process {process.pid} on ", second.stderr)
  process.send_signal(signal.SIGINT)
  done = finish(process, timeout=60)
  assert done.returncode == 75, done.stderr[-2000:]
  assert "interrupted: saving after this microbatch" in done.stderr
  assert "everything is saved; re-running the command" in done.stderr
  buffers = rows_of(workdir)[-1]["step"]
  assert max(saved_steps(workdir)) in (2 * buffers, 2 * buffers + 1)  # not an update was lost
  done = start(*command, f"--config.train.num_buffers={buffers + 2}")
  assert done.returncode == 0, done.stderr[-2000:]
  assert [row["step"] for row in rows_of(workdir)] == list(range(buffers + 3))
  assert len((workdir / "starts.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(tmp_path):
  workdir = tmp_path / "run"
  command = (TINY, f"--workdir={workdir}", "--config.warm_start.updates=0")
  assert start(*command, "--config.train.num_buffers=1").returncode == 0
  limit = 16 * 1024  # bytes of a file, as if there were no more room
  full = start(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
  assert full.returncode == 1, full.stderr[-2000:]
  assert "a checkpoint could not be written" in full.stderr
  intact = re.search(r"the one of step (\d+) is intact", full.stderr)  # small files may have fitted once or twice
  assert int(intact[1]) in saved_steps(workdir)
  done = start(*command)
  assert done.returncode == 0, done.stderr[-2000:]
  assert [row["step"] for row in rows_of(workdir)] == [0, 1, 2, 3]


def begin_two(*args):
  """Start a job of two processes with two devices each."""
  job = (f"--coordinator={free_address()}", "--num_processes=2", "--heartbeat_seconds=10")
  return [begin(*args, *job, f"--process_id={process}", devices=2) for process in (0, 1)]


@pytest.mark.slow
def test_processes_of_different_commands_do_not_begin(tmp_path):
  job = (f"--coordinator={free_address()}", "--num_processes=2")
  both = [
    begin(
      TINY, f"--workdir={tmp_path}/run", f"--config.train.num_buffers={3 + process}", *job, f"--process_id={process}"
    )
    for process in (0, 1)
  ]
  for number, process in enumerate(both):
    done = finish(process)
    assert done.returncode == 2, done.stderr
    said = f"error in process {number}: the processes of the job were given different commands:\n"
    assert said + "  config.train.num_buffers is 3 in process 0 and 4 in process 1\n" in done.stderr
  assert not (tmp_path / "run").exists()


LATE = """
import sys, time
from dmpo_jax.config import command
from dmpo_jax import main, processes, train
processes.meet.__defaults__ = (40.0, "")  # seconds of patience
learn, index = train.Now.learn, int(sys.argv[-1].partition("=")[2])

def late(now, phase):
  if index == 1 and now.position.buffer == 1:
    print("asleep", flush=True)
    time.sleep(3600)
  learn(now, phase)

train.Now.learn = late
command.run(main.main)
"""


@pytest.mark.slow
def test_one_late_host_does_not_hold_the_others(tmp_path):
  own = (TINY, "--config.warm_start.updates=0", ENDLESS, f"--workdir={tmp_path}/run")
  job = (f"--coordinator={free_address()}", "--num_processes=2")
  program = (sys.executable, "-c", LATE)
  both = [begin(*own, *job, f"--process_id={process}", program=program) for process in (0, 1)]
  try:
    done = finish(both[0], timeout=300)
  finally:
    both[1].kill()
  assert done.returncode == 76, done.stderr[-3000:]
  late = f"process 1 on {platform.node()} (last at 'completions are graded')"
  said = f"stopped in process 0: of 2 processes, {late} did not come to 'the next step' within 40 s; its log"
  assert said in done.stderr, done.stderr[-3000:]
  assert "asleep" in finish(both[1]).stdout


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_processes_equal_one_and_stop_when_one_of_them_dies(tmp_path):
  workdir = tmp_path / "two"
  mesh = ("--config.sharding.data=1", "--config.sharding.fsdp=2", "--config.sharding.tensor=2")
  # From parameters at random, without a baseline: it would leave nothing to learn where all rewards are the same.
  own = (TINY, *mesh, "--config.warm_start.updates=0", "--config.objective.wdce.baseline=none")
  own += ("--config.rollout.pipelined=True", "--config.sharding.rollout.data=2", "--config.sharding.rollout.fsdp=1")
  both = begin_two(*own, f"--workdir={workdir}", ENDLESS)
  wait_for(lambda: len(rows_of(workdir)) > 1, both[0], timeout=300)
  both[1].kill()
  killed_at = time.monotonic()
  done = finish(both[0], timeout=60)
  assert done.returncode not in (0, None)
  assert time.monotonic() - killed_at < 60
  assert "Task 1 heartbeat timeout" in done.stderr, done.stderr[-3000:]
  buffers = f"--config.train.num_buffers={rows_of(workdir)[-1]['step'] + 1}"
  both = (ROOT / "launch" / "pods" / "local.sh", "-n", "2", "-r", "0", "--")
  done = start(*own, f"--workdir={workdir}", buffers, devices=2, program=both)
  assert done.returncode == 0, done.stderr[-3000:]
  alone = tmp_path / "one"
  done = start(*own, f"--workdir={alone}", buffers, devices=4)
  assert done.returncode == 0, done.stderr[-3000:]
  wanted, got = rows_of(alone), rows_of(workdir)
  assert [row["step"] for row in got] == [row["step"] for row in wanted]
  assert got[-1]["grad_norm"] > 0
  assert got[0]["eval_reward_mean"] == pytest.approx(wanted[0]["eval_reward_mean"])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), policy_of(workdir), policy_of(alone)
  )
