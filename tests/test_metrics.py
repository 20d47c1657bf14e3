"""The record of a run: every step once, whatever happened between, in metrics.jsonl and in TensorBoard."""

import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from dmpo_jax import metrics
from dmpo_jax import progress as progress_lib


def rows(workdir):
  return [json.loads(line, parse_constant=pytest.fail) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def tensorboard(workdir):
  """{tag: [(step, value), ...]} of all event files."""
  from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
  from tensorboard.util import tensor_util

  found = {}
  for path in sorted((workdir / "tensorboard").iterdir()):
    for event in EventFileLoader(str(path)).Load():
      for value in event.summary.value:
        found.setdefault(value.tag, []).append((event.step, tensor_util.make_ndarray(value.tensor).item()))
  return found


def test_rows_are_flat_json_lines_with_null_for_what_is_not_finite(tmp_path):
  with metrics.Metrics(tmp_path) as log:
    log.write("train", 0, {"loss": math.nan, "reward": jnp.float32(0.5), "rate": np.float64(-math.inf), "count": 3})
  (row,) = rows(tmp_path)
  assert row.pop("time") > 1e9
  assert row == {"phase": "train", "step": 0, "loss": None, "reward": 0.5, "rate": None, "count": 3.0}


def test_a_resumed_run_has_every_step_once(tmp_path):
  with metrics.Metrics(tmp_path) as log:
    log.write("warm_start", 1, {"loss": 9.0})
    log.write("warm_start", 2, {"loss": math.nan})
    for step in range(5):
      log.write("train", step, {"loss": float(step)})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"phase": "train", "ste')  # killed in the middle of a line
  with metrics.Metrics(tmp_path) as log:  # goes on from a checkpoint after step 2
    log.forget("train", after=2)
    for step in (3, 4, 5):
      log.write("train", step, {"loss": 10.0 + step})
  assert [(row["phase"], row["step"], row["loss"]) for row in rows(tmp_path)] == [
    *[("warm_start", 1, 9.0), ("warm_start", 2, None)],
    *[
      ("train", 0, 0.0),
      ("train", 1, 1.0),
      ("train", 2, 2.0),
      ("train", 3, 13.0),
      ("train", 4, 14.0),
      ("train", 5, 15.0),
    ],
  ]
  found = tensorboard(tmp_path)
  assert found.keys() == {"train/loss", "warm_start/loss"}
  assert found["train/loss"] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0), (5, 15.0)]
  assert found["warm_start/loss"][0] == (1, 9.0)
  assert math.isnan(found["warm_start/loss"][1][1])


def test_a_start_that_writes_nothing_leaves_the_record_alone(tmp_path):
  with metrics.Metrics(tmp_path) as log:
    log.write("train", 0, {"loss": 1.0})
  before = (tmp_path / "metrics.jsonl").read_text(), sorted((tmp_path / "tensorboard").iterdir())
  with metrics.Metrics(tmp_path) as log:
    log.forget("train", after=0)
  assert before == ((tmp_path / "metrics.jsonl").read_text(), sorted((tmp_path / "tensorboard").iterdir()))


def test_a_second_row_of_a_step_is_refused(tmp_path):
  with metrics.Metrics(tmp_path) as log:
    log.write("train", 3, {"loss": 1.0})
    with pytest.raises(ValueError, match="phase train, step 3: its rows go up to 3"):
      log.write("train", 3, {"loss": 1.0})
    log.write("warm_start", 3, {"loss": 1.0})


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr("jax.process_index", lambda: 1)
  with metrics.Metrics(tmp_path) as log:
    log.forget("train", after=0)
    log.write("train", 0, {"loss": 1.0})
  metrics.write_result(tmp_path, {"a": 1})
  metrics.write_parameter_overview(tmp_path, {"a": jnp.ones(2)})
  assert not list(tmp_path.iterdir())


def test_result_comes_back(tmp_path):
  assert metrics.read_result(tmp_path) is None
  metrics.write_result(tmp_path, {"rate": np.float32(0.5), "bad": math.inf, "interval": (0.25, jnp.float32(1.0))})
  assert metrics.read_result(tmp_path) == {"rate": 0.5, "bad": None, "interval": [0.25, 1.0]}
  assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_parameter_overview_counts_the_parameters(tmp_path):
  params = {"block": {"kernel": jnp.ones((3, 4), jnp.bfloat16)}, "scale": jnp.ones(5)}
  table = metrics.write_parameter_overview(tmp_path, params)
  assert "block/kernel" in table
  assert "Total: 17" in table
  assert (tmp_path / "parameters.txt").read_text() == table + "\n"


def line_by_line(monkeypatch, seconds, total=4, done=0, **console):
  """The output of a Progress whose steps take `seconds` each."""
  now = [0.0]
  monkeypatch.setattr(progress_lib.time, "monotonic", lambda: now[0])
  output = io.StringIO()
  with progress_lib.Progress("warm_start", total, done=done, console=Console(file=output, width=100, **console)) as bar:
    for step in range(done, total):
      now[0] += seconds
      bar.advance(reward_mean=0.25 * step, tokens_per_second_sample=12345.6, seconds_sample=1.0)
  return output.getvalue()


def test_progress_without_a_terminal_prints_a_line_now_and_then(monkeypatch):
  lines = line_by_line(monkeypatch, seconds=3, total=9).splitlines()
  assert lines == [
    "warm start 1/9  reward 0.000  tokens/s 12,346",
    "warm start 5/9  reward 1.000  tokens/s 12,346  0:12 left",
    "warm start 9/9  reward 2.000  tokens/s 12,346  0:00 left",
  ]


def test_progress_of_a_resumed_run_counts_on(monkeypatch):
  first, second, _ = line_by_line(monkeypatch, seconds=3700, total=9, done=6).splitlines()
  assert first == "warm start 7/9  reward 1.500  tokens/s 12,346"
  assert second == "warm start 8/9  reward 1.750  tokens/s 12,346  1:01:40 left"


def test_progress_on_a_terminal_is_one_line_redrawn(monkeypatch):
  text = line_by_line(monkeypatch, seconds=3, force_terminal=True)
  assert "4/4" in text
  assert "reward 0.750" in text
  assert "tokens/s 12,346" in text


def test_progress_is_quiet_elsewhere(monkeypatch, capsys):
  monkeypatch.setattr("jax.process_index", lambda: 1)
  with progress_lib.Progress("train", 2) as bar:
    bar.advance(loss=1.0)
  assert capsys.readouterr().out == ""
