"""SDAR's checkpoints: every tensor of the published ones, and a small one there and back."""

import dataclasses
import gzip
import json
import pathlib

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from dmpo_jax.hub import convert, layout
from dmpo_jax.hub.export import ModelExport, how_to_load
from dmpo_jax.hub.model_config import model_config_from_hf, model_config_to_hf
from launch import export_hf

FOLDER = pathlib.Path(__file__).parent / "goldens" / "blocks"
PUBLISHED = json.loads((FOLDER / "sdar_4b_config.json").read_text())


def test_the_published_tensors_are_all_accounted_for():
  """Names and bytes are those of SDAR-4B-Chat's index."""
  config = model_config_from_hf(PUBLISHED)
  assert (config.block_length, config.mask_token_id, config.eos_token_id) == (4, 151669, 151643)
  assert (config.qk_norm, config.weight_tying, config.shift_logits, config.head_dim) == (True, False, False, 128)
  places = layout.checkpoint_places(config, "sdar")
  names = gzip.decompress((FOLDER / "sdar_4b_tensors.txt.gz").read_bytes()).decode().split("\n")
  assert sorted(places) == names
  assert sum(2 * np.prod(place.torch_shape) for place in places.values()) == 8_822_848_512
  assert model_config_from_hf(model_config_to_hf(config, "sdar")) == config


@pytest.mark.parametrize(("change", "message"), [("block_size", "block_size"), ("mask_token_id", "mask_token_id")])
def test_a_block_size_and_a_mask_must_be_stated(change, message):
  with pytest.raises(ValueError, match=message):
    model_config_from_hf({key: value for key, value in PUBLISHED.items() if key != change})


def test_attention_that_a_family_does_not_have_is_not_written():
  config = model_config_from_hf(PUBLISHED)
  with pytest.raises(ValueError, match=r"model.block_length=0: no checkpoint of the family sdar"):
    model_config_to_hf(dataclasses.replace(config, block_length=0), "sdar")
  with pytest.raises(ValueError, match=r"model.block_length=4: no checkpoint of the family dream"):
    model_config_to_hf(config, "dream")


def test_there_and_back_bit_for_bit(tmp_path):
  stored = load_file(FOLDER / "sd_gqa" / "model.safetensors")
  config = json.loads((FOLDER / "sd_gqa" / "config.json").read_text())
  source, out, back = (epath.Path(tmp_path / name) for name in ("hf", "out", "back"))
  source.mkdir()
  save_file(stored, source / "model.safetensors")
  (source / "config.json").write_text(json.dumps(config))
  convert.convert_model(source, out)
  ModelExport(export_hf.find_model(out), "same").write(back, 10**9)
  written = {}
  for path in back.glob("*.safetensors"):
    written |= load_file(path)
  assert written.keys() == stored.keys()
  for name, array in stored.items():
    np.testing.assert_array_equal(written[name], array)
  after = json.loads((back / "config.json").read_text())
  assert {key: after.get(key) for key in config} == config
  found = export_hf.find_model(out)
  other = dataclasses.replace(found.config, block_length=8)  # as a run may have trained it
  ModelExport(found._replace(config=other), "same").write(epath.Path(tmp_path / "other"), 10**9)
  assert json.loads((tmp_path / "other" / "config.json").read_text())["block_size"] == 8
  assert "AutoModelForCausalLM.from_pretrained" in how_to_load(found, back)  # SDAR's AutoModel has no head
