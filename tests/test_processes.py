"""Several processes as one: every row belongs to one of them, and those that have none lose and hold up nothing."""

import json

import numpy as np
import pytest
from hosts import run_hosts
from programs import ROOT, start

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
    return share.gather(rows[share.mine]), gather_texts(texts[share.mine])

  for got_rows, got_texts in run_hosts(monkeypatch, count, gather):
    np.testing.assert_array_equal(got_rows, rows)
    assert got_rows.dtype == rows.dtype
    assert got_texts == texts


@pytest.mark.slow
def test_four_processes_train_on_two_prompts_as_one_does(tmp_path):
  own = ("--config=tests/tiny.py", "--config.warm_start.updates=0", "--config.train.num_buffers=1")
  own += ("--config.rollout.num_prompts=2", "--config.train.microbatch_prompts=0", "--config.eval.num_prompts=1")
  four, one = tmp_path / "four", tmp_path / "one"
  program = (ROOT / "launch" / "local.sh", "-n", "4", "-r", "0", "--")
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
