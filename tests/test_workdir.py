"""A run's folder: who holds it, and what it says of every start."""

import json
import pathlib
import subprocess
import sys

import pytest
import tiny
from clu import metric_writers
from etils import epath

import dmpo_jax
from dmpo_jax import sharding
from dmpo_jax.config import ConfigError
from dmpo_jax.run import metrics, workdir
from dmpo_jax.run import workdir as workdir_lib


def test_the_folder_is_held_by_one_run_and_free_again(tmp_path):
  folder = epath.Path(tmp_path / "run")
  with workdir.alone_in(folder):
    with pytest.raises(ConfigError, match=r"in use by another run, process \d+ on "), workdir.alone_in(folder):
      pass
    assert (folder / workdir.LOCK).exists()
  with workdir.alone_in(folder):
    pass


def test_the_lock_of_a_process_that_died_is_taken_over(tmp_path):
  folder = epath.Path(tmp_path / "run")
  script = f"""
import os
from etils import epath
from dmpo_jax.run import workdir
with workdir.alone_in(epath.Path({str(folder)!r})):
  os._exit(9)
"""
  root = pathlib.Path(__file__).resolve().parent.parent
  done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
  assert done.returncode == 9, done.stderr
  assert (folder / workdir.LOCK).exists()
  with workdir.alone_in(folder):
    pass


def test_a_folder_that_cannot_be_made_is_a_mistake(tmp_path):
  (tmp_path / "file").write_text("")
  with (
    pytest.raises(ConfigError, match=r"cannot be written to .*another --workdir"),
    workdir.alone_in(epath.Path(tmp_path / "file" / "run")),
  ):
    pass


def test_what_runs_share_stands_beside_a_workdir_and_on_every_host_of_a_bucket(tmp_path, monkeypatch):
  assert workdir.folder_beside(epath.Path("/runs/one"), "data") == epath.Path("/runs/data")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert workdir.folder_beside(epath.Path("gs://bucket/run"), "data") == epath.Path(tmp_path / "dmpo_jax" / "data")
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", "/home/someone")
  assert workdir.folder_beside(epath.Path("gs://bucket"), "data") == epath.Path("/home/someone/.cache/dmpo_jax/data")


def test_a_bucket_holds_a_run(tmp_path, monkeypatch):
  """Everything but arrays, which TensorStore writes, on a local stand-in for the bucket."""

  def home(argument):
    return str(argument).replace("gs://bucket", str(tmp_path)) if "gs://" in str(argument) else argument

  def at_home(original, *args, **keywords):
    return original(*map(home, args), **{name: home(value) for name, value in keywords.items()})

  moved = ("copy", "exists", "isdir", "listdir", "makedirs", "mkdir", "open", "remove", "rename", "replace", "stat")
  monkeypatch.setattr(metrics, "_fresh_writer", lambda *args: metric_writers.LoggingWriter())
  monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)  # its own client passes the stand-in by
  folder = epath.Path("gs://bucket/run")
  (tmp_path / "run").mkdir()  # which a bucket does not need
  with epath.testing.mock_epath(**dict.fromkeys(moved, at_home)):
    workdir_lib.save_config(folder, tiny.config())
    workdir_lib.check_workdir(folder, tiny.config())
    workdir.announce_start(folder, tiny.config(), sharding.make_mesh(data=8))
    for step in (1, 2):
      with metrics.Metrics(folder) as rows:
        rows.write("train", step, {"loss": 0.5})
    result = {"objective": "dmpo", "buffers": 2, "base": {}, "last": {}, "best": {}, "evaluations": {}}
    metrics.write_result(folder, result)
    assert metrics.read_result(folder) == result
    with pytest.raises(ConfigError, match="another configuration"):
      workdir_lib.check_workdir(folder, tiny.config(seed=1))
  rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [1, 2]
  assert (tmp_path / "run" / workdir.STARTS).exists()


@pytest.mark.parametrize(
  "kept", ["base", "policy", "result.json", "checkpoints/train/0", "checkpoints/train/4.1.damaged"]
)
def test_what_a_run_has_finished_is_not_taken_over(tmp_path, kept):
  folder = epath.Path(tmp_path)
  workdir_lib.save_config(folder, tiny.config())
  (folder / kept).mkdir(parents=True)
  with pytest.raises(ConfigError, match="another configuration"):
    workdir_lib.check_workdir(folder, tiny.config(seed=1))
  workdir.take_over(folder, tiny.config(seed=1))
  assert (folder / kept).exists()


def test_a_start_that_finished_no_step_is_taken_over(tmp_path, capsys):
  """With nothing of it left; the same configuration goes on with what it has, such as half an evaluation."""
  folder = epath.Path(tmp_path)
  for name in ("generations", "tensorboard", "checkpoints/train/4.orbax-checkpoint-tmp-1"):
    (folder / name).mkdir(parents=True)
  (folder / "metrics.jsonl").write_text("{}\n")
  workdir_lib.save_config(folder, tiny.config())
  other = tiny.config(seed=1)
  workdir_lib.check_workdir(folder, other)
  with pytest.raises(ConfigError, match="another configuration"):
    workdir_lib.check_workdir(folder, other, mode="eval")
  workdir.take_over(folder, tiny.config(train__num_buffers=9))
  assert (folder / "generations").exists()
  workdir.take_over(folder, other)
  assert [path.name for path in folder.iterdir()] == ["config.json"]
  assert "ended before its first step" in capsys.readouterr().out


def test_every_start_leaves_a_line(tmp_path, capsys):
  folder = epath.Path(tmp_path)
  for _ in range(2):
    workdir.announce_start(folder, tiny.config(), sharding.make_mesh(data=2, fsdp=4))
  first, second = map(json.loads, (folder / workdir.STARTS).read_text().splitlines())
  assert first["devices"] == "8 x cpu"
  assert first["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
  assert first["config"] == second["config"]
  assert first["version"] == dmpo_jax.__version__
  assert set(first["versions"]) >= {"jax", "flax", "orbax-checkpoint"}
  assert "mesh data 2 fsdp 4 tensor 1" in capsys.readouterr().out
  few = tiny.config(sharding__fsdp=16)
  workdir.announce_start(folder, few, *sharding.make_meshes(**few.sharding.to_dict()))
  assert "mesh data 1 fsdp 8 (16 requested) tensor 1; dmpo_jax 0" in capsys.readouterr().out
