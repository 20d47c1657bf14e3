"""Damage to saved files: every flipped bit is noticed, or changes nothing."""

import hashlib
import json
import pathlib
import random
import re
import shutil

import jax
import numpy as np
import pytest
import xxhash
from etils import epath
from test_checkpoints import assert_same, make_experience, make_state, restore

from dmpo_jax import digests, sharding
from dmpo_jax.files import Unreadable
from dmpo_jax.run.checkpoints import Checkpoints
from dmpo_jax.run.params import identity, load_params, read_metadata, save_params

NUM_FLIPS = 60


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture
def params(mesh, tmp_path):
  """The folder of saved parameters."""
  save_params(tmp_path / "policy", make_state(mesh).trainable)
  return tmp_path / "policy"


def load(path, mesh):
  return load_params(path, sharding.abstract(make_state(mesh).trainable))


def files_of(folder):
  return sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())


def flips(folder, seed=0):
  """Flip one random bit of one random file after the other, each mended again before the next."""
  rng, paths = random.Random(seed), [path for path in files_of(folder) if path.stat().st_size]
  for turn in range(NUM_FLIPS):
    path = paths[turn % len(paths)]
    whole = path.read_bytes()
    bit = rng.randrange(8 * len(whole))
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(damaged))
    yield path, bit
    path.write_bytes(whole)


def test_every_bit_that_flips_in_saved_parameters_is_noticed_or_harmless(params, mesh):
  whole, noticed = make_state(mesh).trainable, set()
  for path, bit in flips(params):
    try:
      assert_same(load(params, mesh), whole)
    except Unreadable:
      noticed.add((path, bit))
  unnoticed = {path.name for path, bit in flips(params) if (path, bit) not in noticed}
  assert unnoticed <= {"_CHECKPOINT_METADATA", "commit_success.txt"}, "nothing of the arrays is in these"
  assert_same(load(params, mesh), whole)


@pytest.mark.slow
def test_every_bit_that_flips_in_the_newest_checkpoint_is_noticed_or_harmless(mesh, tmp_path):
  with Checkpoints(tmp_path / "whole", keep=2) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, make_state(mesh, step), make_experience(mesh), {"buffer": step})
  noticed = 0
  for path, _ in flips(tmp_path / "whole" / "2"):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    step, state, experience, progress, _ = restore(tmp_path / "run", mesh)
    assert_same((state, experience), (make_state(mesh, step), make_experience(mesh)))
    assert progress == {"buffer": step}
    assert (tmp_path / "run" / "2.damaged").exists() == (step == 1)
    assert step == 1 or path.name in ("_CHECKPOINT_METADATA", "commit_success.txt")
    noticed += step == 1
  assert noticed > NUM_FLIPS // 2


def test_a_description_that_orbax_cannot_list_is_damage_like_any_other(mesh, tmp_path):
  with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, make_state(mesh, step), None, {"buffer": step})
  path = tmp_path / "run" / "2" / "_CHECKPOINT_METADATA"
  path.write_text(path.read_text().replace("init_timestamp", "init_timastamp"))
  step, state, *_ = restore(tmp_path / "run", mesh)
  assert_same(state, make_state(mesh, step))


def test_the_error_names_the_file_and_what_would_do(params, mesh):
  (data,) = [path for path in files_of(params) if path.stat().st_size > 10_000]
  content = bytearray(data.read_bytes())
  content[5_000] ^= 1
  data.write_bytes(bytes(content))
  with pytest.raises(Unreadable, match=re.escape(f"{data} has changed") + ".*replace it by a copy"):
    load(params, mesh)
  data.unlink()
  with pytest.raises(Unreadable, match=re.escape(str(data)) + " is missing"):
    load(params, mesh)


def test_digests_that_are_lost_are_not_taken_for_those_of_an_earlier_version(params, mesh):
  (params / digests.DIGESTS).unlink()
  with pytest.raises(Unreadable, match=r"digests\.json is missing"):
    load(params, mesh)


def test_what_was_said_of_parameters_is_not_taken_for_something_else(mesh, tmp_path):
  save_params(tmp_path / "policy", make_state(mesh).trainable, {"buffers": 20})
  assert read_metadata(tmp_path / "policy") == {"buffers": 20}
  path = tmp_path / "policy" / "_CHECKPOINT_METADATA"
  path.write_text(path.read_text().replace('"buffers": 20', '"buffers": 21'))
  for read in (read_metadata, lambda path: load(path, mesh)):
    with pytest.raises(Unreadable, match="_CHECKPOINT_METADATA has changed since it was written"):
      read(tmp_path / "policy")


def test_what_an_earlier_version_saved_is_loaded_and_keeps_its_identity(params, mesh):
  saved_with_digests = identity(params)
  (params / digests.DIGESTS).unlink()
  about = json.loads((params / "_CHECKPOINT_METADATA").read_text())
  (params / "_CHECKPOINT_METADATA").write_text(json.dumps(about | {"custom_metadata": {}}))
  assert_same(load(params, mesh), make_state(mesh).trainable)
  index = [(params / name).read_bytes() for name in ("_METADATA", "manifest.ocdbt")]
  assert identity(params) == hashlib.sha256(b"".join(index)).hexdigest()[:16] != saved_with_digests


def test_the_identity_is_that_of_the_content(params, mesh, tmp_path):
  shutil.copytree(params, tmp_path / "copy")
  assert identity(tmp_path / "copy") == identity(params)
  (data,) = [path for path in files_of(params) if path.stat().st_size > 10_000]
  data.write_bytes(data.read_bytes()[::-1])
  digests.write(epath.Path(params))
  assert identity(params) != identity(tmp_path / "copy")


def test_a_save_whose_digests_cannot_be_written_leaves_no_checkpoint(mesh, tmp_path, monkeypatch):
  with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
    checkpoints.save(1, make_state(mesh, 1), None, {"buffer": 1})
    checkpoints.wait()

    def fail(*args):
      raise OSError("the disk is full")

    monkeypatch.setattr(digests, "write", fail)
    checkpoints.save(2, make_state(mesh, 2), None, {"buffer": 2})
    with pytest.raises(OSError, match=r"the disk is full.*the one of step 1 is intact"):
      checkpoints.wait()
    monkeypatch.undo()
  assert restore(tmp_path / "run", mesh)[0] == 1


def test_processes_that_see_the_same_files_share_them_evenly(monkeypatch):
  entries = {f"file{i}": (size, "") for i, size in enumerate([700, 300, 200, 200, 100, 0, 5])}
  stamps = ["bucket"] * 3 + ["own disk"]
  shares = []
  for process in range(4):
    monkeypatch.setattr(jax, "process_index", lambda process=process: process)
    shares.append(digests._share(entries, stamps))
  assert sorted(name for share in shares[:3] for name in share) == sorted(entries)
  assert [sum(size for size, _ in share.values()) for share in shares] == [700, 405, 400, 1505]
  assert shares[3].keys() == entries.keys()  # nobody else reads its copy


def test_a_file_of_many_pieces_has_the_digest_of_its_bytes(tmp_path, monkeypatch):
  content = np.random.default_rng(0).bytes(1000)
  (tmp_path / "data").write_bytes(content)
  monkeypatch.setattr(digests, "_PIECE", 64)
  digests.write(epath.Path(tmp_path))
  (entry,) = json.loads((tmp_path / digests.DIGESTS).read_text())["files"].items()
  assert entry == ("data", {"bytes": 1000, "digest": xxhash.xxh3_128(content).hexdigest()})
