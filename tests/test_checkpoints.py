"""Checkpoints: what comes back, onto which devices, and what happens to half-written and damaged ones."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dmpo_jax import sharding
from dmpo_jax.run.checkpoints import Checkpoints
from dmpo_jax.run.params import identity, load_params, read_metadata, save_params
from dmpo_jax.structs import Experience, Prompts, TrainState


def make_state(mesh, seed=0):
  rows = NamedSharding(mesh, PartitionSpec("fsdp"))
  key = jax.random.key(seed)
  params = {"block": {"kernel": jax.device_put(jax.random.normal(key, (512, 16)), rows)}, "scale": jnp.ones(3)}
  params = jax.tree.map(lambda x: jax.device_put(x, rows if x.ndim == 2 else sharding.replicated(mesh)), params)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  counts = [jax.device_put(jnp.int32(count), sharding.replicated(mesh)) for count in (seed, 1, 2)]
  return TrainState(counts[0], params, optimizer.init(params), num_skipped=counts[1], num_skipped_in_a_row=counts[2])


def make_experience(mesh):
  p, g, q, c = 2, 3, 4, 5
  real, flags = jnp.arange(p * g, dtype=jnp.float32).reshape(p, g), jnp.ones((p, g), bool)
  prompts = Prompts(jnp.ones((p, q), jnp.int32), jnp.ones((p, q), bool), jnp.array([7, 2**32 - 1], jnp.uint32))
  completion = jnp.arange(p * g * c, dtype=jnp.int32).reshape(p, g, c)
  experience = Experience(
    prompts, completion, completion > 3, real, flags, -real, real * 2, real / 3, real / 4, completion,
    reward_parts=jnp.stack([real / 2, real / 2], -1),
  )  # fmt: skip
  return jax.device_put(experience, sharding.replicated(mesh))


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(data=2, fsdp=4)


@pytest.fixture
def saved(mesh, tmp_path):
  """Three saves of which two are kept: step 2 with a live buffer, step 3 without."""
  checkpoints = Checkpoints(tmp_path / "run", keep=2)
  for step in (1, 2, 3):
    checkpoints.save(step, make_state(mesh, step), make_experience(mesh) if step == 2 else None, {"buffer": step})
  checkpoints.close()
  return tmp_path / "run"


def restore(directory, mesh):
  with Checkpoints(directory, keep=2) as checkpoints:
    return checkpoints.restore_latest(sharding.abstract(make_state(mesh)))


def test_nothing_saved_is_none(mesh, tmp_path):
  assert restore(tmp_path / "new", mesh) is None


def test_the_newest_comes_back_on_any_mesh(saved, mesh):
  assert sorted(path.name for path in saved.iterdir() if path.name.isdigit()) == ["2", "3"]
  for other in (mesh, sharding.make_mesh(devices=jax.devices()[:1]), sharding.make_mesh(fsdp=8)):
    step, state, experience, progress, drawn = restore(saved, other)
    assert (step, experience, progress, drawn) == (3, None, {"buffer": 3}, None)
    assert_same(state, make_state(mesh, 3))
    assert state.trainable["block"]["kernel"].sharding.mesh.shape == other.shape


def test_it_comes_back_under_another_dtype_policy(saved, mesh):
  wanted = make_state(mesh, 3).trainable
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wanted)
  abstract = sharding.abstract(make_state(mesh).replace(trainable=half))
  with Checkpoints(saved, keep=2) as checkpoints:
    assert_same(checkpoints.restore_latest(abstract).state.trainable, half)


def test_relative_workdirs_work(mesh, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  checkpoints = Checkpoints("runs/one", keep=1)
  checkpoints.save(4, make_state(mesh), None, {})
  checkpoints.close()
  step, state, _, progress, _ = restore("runs/one", mesh)
  assert (step, progress) == (4, {})
  assert_same(state, make_state(mesh))


def names(folder):
  return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_a_step_is_saved_again_where_there_is_more_to_keep(mesh, tmp_path):
  """The same is not; nor after a restart. The earlier one goes when the fuller one stands."""
  state, experience, folder = make_state(mesh), make_experience(mesh), tmp_path / "run"
  with Checkpoints(folder, keep=1) as checkpoints:
    for _ in range(2):
      checkpoints.save(4, state, None, {"loss": float("nan")})
    checkpoints.wait()
    assert names(folder) == ["4"]
    checkpoints.save(4, state, experience, {"loss": float("nan")})
    checkpoints.wait()
    assert names(folder) == ["4.1"]
  with Checkpoints(folder, keep=1) as checkpoints:
    restored = checkpoints.restore_latest(sharding.abstract(state))
    assert restored.step == 4
    assert_same(restored.experience, experience)
    checkpoints.save(4, state, experience, restored.progress)
    checkpoints.wait()
    assert names(folder) == ["4.1"]
    checkpoints.save(4, state, experience, {"loss": 1.0})
  assert names(folder) == ["4.2"]
  assert restore(folder, mesh).progress == {"loss": 1.0}


def test_some_steps_are_kept_however_old(mesh, tmp_path):
  with Checkpoints(tmp_path / "run", keep=1) as checkpoints:
    checkpoints.keep_steps(frozenset({2}))
    for step in (1, 2, 3, 4):
      checkpoints.save(step, make_state(mesh, step), None, {})
    checkpoints.wait()
    assert names(tmp_path / "run") == ["2", "4"]
    abstract = sharding.abstract(make_state(mesh))
    assert_same(checkpoints.restore_state(2, abstract), make_state(mesh, 2))
    assert checkpoints.restore_state(3, abstract) is None


def test_a_save_survives_the_donation_of_its_arrays(mesh, tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=1)
  state = make_state(mesh, 5)
  checkpoints.save(1, state, None, {})
  spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
  for _ in range(5):
    state = spoil(state)
  checkpoints.close()
  assert_same(restore(tmp_path, mesh)[1], make_state(mesh, 5))


def largest_file(folder):
  return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(folder):
  path = largest_file(folder / "state")
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_a_file(folder):
  largest_file(folder / "state").unlink()


def truncate_progress(folder):
  (folder / "progress" / "metadata").write_text('{"prog')


@pytest.mark.parametrize("damage", [truncate, lose_a_file, truncate_progress])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(saved, mesh, damage, caplog):
  damage(saved / "3")
  step, state, experience, progress, _ = restore(saved, mesh)
  assert (step, progress) == (2, {"buffer": 2})
  assert_same(state, make_state(mesh, 2))
  assert_same(experience, make_experience(mesh))
  assert "checkpoint 3 is damaged" in caplog.text
  assert (saved / "3.damaged").exists()
  assert not (saved / "3").exists()
  with Checkpoints(saved, keep=2) as checkpoints:  # and its step can be saved again
    checkpoints.save(3, make_state(mesh, 9), None, {})
  assert_same(restore(saved, mesh)[1], make_state(mesh, 9))


def test_a_missing_buffer_is_damage(saved, mesh):
  (saved / "3").rename(saved.parent / "elsewhere")
  (saved / "2" / "experience").rename(saved.parent / "experience")
  with pytest.raises(ValueError, match=r"no checkpoint in .* can be read"):
    restore(saved, mesh)
  assert (saved / "2").exists()  # nothing is touched when nothing can be read


def test_half_written_folders_are_no_checkpoints(saved, mesh):
  (saved / "9.orbax-checkpoint-tmp-1" / "state").mkdir(parents=True)
  (saved / "8").mkdir()  # a folder that no save finished
  assert restore(saved, mesh)[0] == 3
  assert not (saved / "9.orbax-checkpoint-tmp-1").exists()


def test_params_come_back_on_any_mesh_and_can_be_replaced(mesh, tmp_path):
  for seed in (0, 1):
    save_params(tmp_path / "policy", make_state(mesh, seed).trainable)
  other = make_state(sharding.make_mesh(fsdp=2, devices=jax.devices()[:2])).trainable
  params = load_params(tmp_path / "policy", sharding.abstract(other))
  assert_same(params, make_state(mesh, 1).trainable)
  assert params["block"]["kernel"].sharding == other["block"]["kernel"].sharding


def test_parameters_are_known_by_their_index(mesh, tmp_path):
  for name, seed in (("first", 1), ("second", 2)):
    save_params(tmp_path / name, make_state(mesh, seed).trainable)
  shutil.copytree(tmp_path / "first", tmp_path / "copy")
  assert identity(tmp_path / "first") == identity(tmp_path / "copy") != identity(tmp_path / "second")


def test_what_made_parameters_is_saved_with_them(mesh, tmp_path):
  for name, about in (("first", {"buffers": 22, "base": "abc"}), ("second", None)):
    save_params(tmp_path / name, make_state(mesh, 1).trainable, about)
  assert read_metadata(tmp_path / "first") == {"buffers": 22, "base": "abc"}
  assert read_metadata(tmp_path / "second") == {}
  save_params(tmp_path / "first", make_state(mesh, 1).trainable, {"buffers": 23})
  assert read_metadata(tmp_path / "first") == {"buffers": 23}


def test_params_of_another_model_are_refused(mesh, tmp_path):
  params = make_state(mesh).trainable
  save_params(tmp_path / "policy", params)
  with pytest.raises(ValueError, match=r"scale: saved \(3,\), the model has nothing"):
    load_params(tmp_path / "policy", sharding.abstract({"block": params["block"]}))
  with pytest.raises(ValueError, match=r"scale: saved \(3,\), the model has \(4,\)"):
    load_params(tmp_path / "policy", sharding.abstract(params | {"scale": jnp.ones(4)}))
  with pytest.raises(ValueError, match="no parameters there"):
    load_params(tmp_path / "nowhere", sharding.abstract(params))


TWO_PROCESSES = """
  import sys
  import jax, numpy as np, orbax.checkpoint as ocp
  jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[1]))
  from test_checkpoints import Checkpoints, make_experience, make_state, sharding
  mesh = sharding.make_mesh(fsdp=8)
  whole = ocp.StandardCheckpointHandler.restore

  def damaged(self, directory, *args, **keywords):
    if directory.parent.name == "3" and jax.process_index() == 1:
      raise ValueError("what this process would read is damaged")
    return whole(self, directory, *args, **keywords)

  ocp.StandardCheckpointHandler.restore = damaged
  checkpoints = Checkpoints(sys.argv[3], keep=2)
  buffer = make_experience(mesh)
  step, restored, _, progress, _ = checkpoints.restore_latest(sharding.abstract(make_state(mesh)))
  assert step == 2 and progress == {"buffer": 2}, (step, progress)
  local = buffer.replace(reward=jax.numpy.asarray(np.asarray(buffer.reward)))  # each process has it whole
  checkpoints.save(5, restored, local, {"by": "two"})
  checkpoints.close()
"""


@pytest.mark.slow
def test_two_processes_agree_on_damage_that_one_of_them_finds_and_save_together(saved, mesh, tmp_path):
  script = tmp_path / "two.py"
  script.write_text(textwrap.dedent(TWO_PROCESSES))
  here = pathlib.Path(__file__).parent
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
  }
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  commands = [[sys.executable, str(script), str(process), address, str(saved)] for process in (0, 1)]
  running = [subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]
  errors = [process.communicate(timeout=120)[1] for process in running]
  assert [process.returncode for process in running] == [0, 0], "\n".join(errors)
  assert (saved / "3.damaged").exists()
  step, state, experience, progress, _ = restore(saved, mesh)
  assert (step, progress) == (5, {"by": "two"})
  assert_same(state, make_state(mesh, 2))
  assert_same(experience, make_experience(mesh))
  listed = json.loads((saved / "5" / "state" / "digests.json").read_text())["files"]
  there = {
    str(path.relative_to(saved / "5" / "state")) for path in (saved / "5" / "state").rglob("*") if path.is_file()
  }
  assert set(listed) == there - {
    "digests.json",
    "commit_success.txt",
  }  # each process digested its own, none are left over
  assert {"ocdbt.process_0/manifest.ocdbt", "ocdbt.process_1/manifest.ocdbt"} <= set(listed)
  path = saved / "5" / "state" / "ocdbt.process_1" / "manifest.ocdbt"
  path.write_bytes(path.read_bytes()[::-1])
  assert restore(saved, mesh)[0] == 2
