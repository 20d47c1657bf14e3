"""Safetensors folders: whole and sharded, by rows, and every way in which they can be broken."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from dmpo_jax.hub.shards import Shards, read_header, write_file, write_shards


def some_tensors():
  rng = np.random.default_rng(0)
  tensors = {f"layer.{i}": rng.normal(size=(4, 6)).astype(np.float32) for i in range(5)}
  return tensors | {"half": rng.normal(size=(3, 2)).astype(ml_dtypes.bfloat16), "one": np.ones(3, np.float16)}


@pytest.fixture(scope="module")
def tensors():
  return some_tensors()


@pytest.fixture
def folder(tmp_path, tensors):
  """Three shards: 200 bytes hold two layers."""
  names = write_shards(epath.Path(tmp_path), sizes(tensors), tensors.items(), 200)
  assert len(names) == 4
  return tmp_path


def sizes(tensors):
  return {name: array.nbytes for name, array in tensors.items()}


def test_written_and_read_again(folder, tensors):
  shards = Shards(folder)
  assert set(shards) == set(tensors)
  for name, array in tensors.items():
    assert shards[name].dtype == array.dtype
    np.testing.assert_array_equal(shards[name], array)
  np.testing.assert_array_equal(shards.read_rows("layer.3", 1, 3), tensors["layer.3"][1:3])


def test_the_format_is_the_librarys(folder, tensors):
  read = {}
  for path in folder.glob("*.safetensors"):
    read |= load_file(path)
  for name, array in tensors.items():
    np.testing.assert_array_equal(read[name], array)
  index = json.loads((folder / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
  assert set(index["weight_map"]) == set(tensors)


def test_files_are_as_readable_as_others_and_tensors_are_aligned(folder):
  mask = os.umask(0o022)
  try:
    odd = {"bytes": np.ones(3, np.float16), "wide": np.arange(2.0), "none": np.zeros((0, 4), np.float32)}
    write_file(epath.Path(folder / "odd.safetensors"), odd)
  finally:
    os.umask(mask)
  path = folder / "odd.safetensors"
  assert path.stat().st_mode & 0o777 == 0o644
  for name, array in load_file(path).items():
    np.testing.assert_array_equal(array, odd[name])
  assert [(name, tensor.start % 8) for name, tensor in read_header(epath.Path(path)).items()] == [
    ("wide", 0), ("none", 0), ("bytes", 0)
  ]  # fmt: skip


def test_one_shard_has_no_index(tmp_path, tensors):
  assert write_shards(epath.Path(tmp_path), sizes(tensors), tensors.items(), 10**6) == ["model.safetensors"]
  np.testing.assert_array_equal(Shards(tmp_path)["half"], tensors["half"])


def cut(path, size):
  path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("size", [0, 5, 40, -1, -90])
def test_a_shard_that_is_cut_off_is_named(folder, size):
  path = folder / "model-00002-of-00003.safetensors"
  cut(path, size)
  with pytest.raises(ValueError, match=r"model-00002-of-00003.safetensors is (cut off|no safetensors)"):
    Shards(folder)


def test_other_damage_is_named(folder):
  path = folder / "model-00002-of-00003.safetensors"
  whole = path.read_bytes()
  path.write_bytes(whole + b"more")
  with pytest.raises(ValueError, match="cut off or damaged"):
    Shards(folder)
  path.write_bytes(whole[:8] + b"?" * 20 + whole[28:])
  with pytest.raises(ValueError, match="its header cannot be read"):
    Shards(folder)
  path.unlink()
  with pytest.raises(ValueError, match=r"shards that are missing: model-00002-of-00003.safetensors"):
    Shards(folder)
  index = folder / "model.safetensors.index.json"
  index.write_text("[")
  with pytest.raises(ValueError, match="is not an index of shards"):
    Shards(folder)
  index.unlink()
  with pytest.raises(ValueError, match=r"holds neither model.safetensors nor model.safetensors.index.json"):
    Shards(folder)
  (folder / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(ValueError, match=r"pytorch_model.bin cannot be read: have transformers save it again"):
    Shards(folder)


def test_an_index_that_the_shards_contradict(folder):
  path = folder / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  index["weight_map"]["layer.0"] = "model-00003-of-00003.safetensors"
  path.write_text(json.dumps(index))
  with pytest.raises(ValueError, match=r"places layer.0 in model-00003-of-00003.safetensors, which does not hold it"):
    Shards(folder)


def rewrite(path, change):
  """Change the header of a file."""
  data = path.read_bytes()
  length = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + length])
  change(header)
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_files_that_the_index_does_not_list(folder, tensors):
  save_file({"foreign": tensors["one"]}, folder / "model-00004-of-00003.safetensors")
  with pytest.raises(
    ValueError, match=r"has model-00004-of-00003.safetensors, but model.safetensors.index.json does not list"
  ):
    Shards(folder)
  (folder / "model.safetensors.index.json").unlink()
  save_file({"foreign": tensors["one"]}, folder / "model.safetensors")
  with pytest.raises(ValueError, match=r"has model-00001-of-00003.safetensors, model-00002"):
    Shards(folder)


@pytest.mark.parametrize(("first", "second"), [(1, 2), (1, 3), (2, 3)])
def test_tensors_in_two_shards(folder, first, second):
  files = [folder / f"model-0000{number}-of-00003.safetensors" for number in (first, second)]
  one, other = (load_file(file) for file in files)
  name = next(iter(one))
  save_file(other | {name: one[name]}, files[1])
  with pytest.raises(ValueError, match=rf"{name} is in {files[0].name} and in {files[1].name} \(1 such\)"):
    Shards(folder)


def test_tensors_that_the_index_does_not_list(folder, tensors):
  path = folder / "model-00003-of-00003.safetensors"
  save_file(load_file(path) | {"foreign": tensors["one"]}, path)
  with pytest.raises(ValueError, match=r"does not list foreign, which is in model-00003-of-00003.safetensors"):
    Shards(folder)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"foreign": 3}}))
  with pytest.raises(ValueError, match="is not an index of shards: it places foreign in 3, which is no file name"):
    Shards(folder)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda header: header["b"].update(data_offsets=header["a"]["data_offsets"]), "b begins at byte"),
    (lambda header: header["a"].update(data_offsets=[8, 24]), "b begins at byte|a begins at byte"),
    (lambda header: header["a"].update(data_offsets=[-8, 8]), r"a has the shape \[4\] and the data_offsets \[-8, 8\]"),
    (lambda header: header["a"].update(data_offsets=[0]), r"a has the shape \[4\] and the data_offsets \[0\]"),
    (lambda header: header["a"].update(shape=[-2, -2]), r"a has the shape \[-2, -2\]"),
    (lambda header: header["a"].update(shape=4), "a has the shape 4"),
    (lambda header: header.pop("b"), "its header describes"),
    (lambda header: header.pop("a"), "b begins at byte"),
    (lambda header: header.update(a=3), "its header cannot be read"),
  ],
)
def test_headers_that_would_give_other_numbers(tmp_path, change, message):
  path = tmp_path / "model.safetensors"
  save_file({"a": np.arange(4, dtype=np.float32), "b": np.ones(4, np.float32)}, path)
  rewrite(path, lambda header: None)
  assert set(Shards(tmp_path)) == {"a", "b"}
  rewrite(path, change)
  with pytest.raises(ValueError, match=rf"model.safetensors.*{message}"):
    Shards(tmp_path)


def test_integers_are_no_weights(tmp_path):
  save_file({"codes": np.arange(4, dtype=np.int8)}, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match="codes has the dtype I8"):
    Shards(tmp_path)
