"""The record of a run: every step once, whatever happened between, in metrics.jsonl, TensorBoard, W&B."""

import importlib.machinery
import importlib.util
import json
import math
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from dmpo_jax.config import ConfigError, validate
from dmpo_jax.run import metrics


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
    with pytest.raises(ValueError, match="phase train, step 3: there are rows up to step 3"):
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
  result = {"objective": "dmpo", "buffers": 3, "base": {}, "last": {}, "best": {}, "evaluations": {}}
  figures = {"rate": np.float32(0.5), "bad": math.inf, "interval": (0.25, jnp.float32(1.0))}
  metrics.write_result(tmp_path, result | figures)
  assert metrics.read_result(tmp_path) == result | {"rate": 0.5, "bad": None, "interval": [0.25, 1.0]}
  assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_parameter_overview_counts_the_parameters(tmp_path):
  params = {"block": {"kernel": jnp.ones((3, 4), jnp.bfloat16)}, "scale": jnp.ones(5)}
  table = metrics.write_parameter_overview(tmp_path, params)
  assert "block/kernel" in table
  assert "Total: 17" in table
  assert (tmp_path / "parameters.txt").read_text() == table + "\n"


class FakeWandb(types.ModuleType):
  """Stands in for the package: records what it is asked."""

  class Error(Exception):
    pass

  def __init__(self, refuses=False):
    super().__init__("wandb")
    self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    self.refuses, self.calls = refuses, []

  def __getattr__(self, name):  # what a run is asked for, and `init`, which gives one
    if name.startswith("__"):
      raise AttributeError(name)

    def call(*args, **keywords):
      self.calls.append((name, args, keywords))
      if name == "init" and self.refuses:
        raise self.Error("no API key")
      return self

    return call


@pytest.fixture
def wandb(monkeypatch):
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", fake)
  return fake


def begin(workdir):
  return metrics.Metrics(workdir, wandb_project="sums", config={"seed": 3})


def test_weights_and_biases_get_every_row_under_one_run(tmp_path, wandb):
  with begin(tmp_path) as log:
    log.write("warm_start", 1, {"loss": 9.0})
    log.write("train", 0, {"eval_solve_rate": 0.25})
  with begin(tmp_path) as log:
    log.forget("train", after=0)
    log.write("train", 1, {"loss": math.nan})
  inits = [keywords for name, _, keywords in wandb.calls if name == "init"]
  assert inits[0] == inits[1]
  assert (inits[0]["project"], inits[0]["config"], inits[0]["resume"]) == ("sums", {"seed": 3}, "allow")
  assert inits[0]["id"] == (tmp_path / "wandb_id.txt").read_text().strip()
  logged = [(args[0], keywords) for name, args, keywords in wandb.calls if name == "log"]
  assert logged[:2] == [
    ({"warm_start/step": 1, "warm_start/loss": 9.0}, {"step": 0}),
    ({"train/step": 0, "train/eval_solve_rate": 0.25}, {"step": 1}),
  ]
  assert logged[2][1] == {"step": 2}
  assert math.isnan(logged[2][0]["train/loss"])
  assert ("define_metric", ("train/*",), {"step_metric": "train/step"}) in wandb.calls
  assert [keywords for name, _, keywords in wandb.calls if name == "finish"] == [{"exit_code": 0}] * 2


def test_a_run_that_fails_is_told_as_failed(tmp_path, wandb):
  with pytest.raises(KeyboardInterrupt), begin(tmp_path):
    raise KeyboardInterrupt
  assert wandb.calls[-1] == ("finish", (), {"exit_code": 1})


def test_weights_and_biases_are_asked_by_process_0_alone_and_only_where_wanted(tmp_path, wandb, monkeypatch):
  with metrics.Metrics(tmp_path) as log:
    log.write("train", 0, {"loss": 1.0})
  monkeypatch.setattr("jax.process_index", lambda: 1)
  with begin(tmp_path) as log:
    log.write("train", 0, {"loss": 1.0})
  assert wandb.calls == []
  assert not (tmp_path / "wandb_id.txt").exists()


def test_weights_and_biases_that_cannot_be_used_are_one_clear_error(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", FakeWandb(refuses=True))
  with pytest.raises(ConfigError, match=r"(?s)log\.wandb_project = 'sums'.*no API key.*WANDB_MODE=offline"):
    begin(tmp_path)
  monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
  with pytest.raises(ConfigError, match=r"log\.wandb_project = 'sums'.*pip install wandb"):
    begin(tmp_path)


def test_weights_and_biases_are_asked_for_only_where_they_are_installed(monkeypatch):
  config = base.get_config()
  config.log.wandb_project = "sums"
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=r"config\.log\.wandb_project = 'sums'.*pip install wandb"):
    validate(config)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
  validate(config)
