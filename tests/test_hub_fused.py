"""Adapters on a tensor of queries, keys and values together (LLaDA2): both forms there and back, what they compute."""

import json
import pathlib

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from dmpo_jax.hub import convert, layout, pretrained
from dmpo_jax.hub.export import Source, export_adapter
from dmpo_jax.hub.model_config import model_config_from_hf
from dmpo_jax.models.lora import LoraConfig
from dmpo_jax.run.params import SavedParams

FOLDER = pathlib.Path(__file__).parent / "goldens" / "blocks" / "l2_shared2_bias"
CONFIG = model_config_from_hf(json.loads((FOLDER / "config.json").read_text()))
FUSED = "base_model.model.model.layers.{}.attention.query_key_value.lora_{}.weight"
WIDTHS = [48, 48, 48]  # of queries, keys and values
ABOUT = {"peft_type": "LORA", "r": 2, "lora_alpha": 4.0}
PATTERNS = {"rank_pattern": {"query_key_value": 6}, "alpha_pattern": {"query_key_value": 12.0}}


def draw(rank, is_stacked):
  """Adapters on queries, keys and values, and on attention's output, as PEFT has them."""
  rng, tensors = np.random.default_rng(0), {}
  for layer in range(CONFIG.num_layers):
    a, b = rng.normal(size=(rank, 40)), rng.normal(size=(sum(WIDTHS), rank))
    if is_stacked:
      a, parts = rng.normal(size=(3 * rank, 40)), np.split(b, 3)
      b = np.concatenate([np.pad(part, ((0, 0), (rank * i, rank * (2 - i)))) for i, part in enumerate(parts)])
    tensors |= {FUSED.format(layer, "A"): a, FUSED.format(layer, "B"): b}
    dense = FUSED.format(layer, "{}").replace("query_key_value", "dense")
    tensors |= {dense.format("A"): rng.normal(size=(rank, 48)), dense.format("B"): rng.normal(size=(40, rank))}
  return {name: array.astype(np.float32) for name, array in tensors.items()}


def to_ours(tmp_path, tensors, about):
  """Convert adapters; give the export's source."""
  source, base, out = (epath.Path(tmp_path / name) for name in ("peft", "base", "out"))
  source.mkdir()
  base.mkdir()
  save_file(tensors, source / "adapter_model.safetensors")
  (source / "adapter_config.json").write_text(json.dumps(about))
  pretrained.write_model(base, "llada2_moe", CONFIG, "")
  convert.convert_adapter(source, base, out)
  lora = pretrained.read_adapter(out)
  assert lora is not None
  config = pretrained.read_model(base).model_config(lora=lora)
  return Source(config, "llada2_moe", None, SavedParams(out))


@pytest.mark.parametrize("is_stacked", [False, True])
def test_both_forms_come_back_and_are_the_same_products(tmp_path, is_stacked):
  tensors, about = draw(2, is_stacked), ABOUT | (PATTERNS if is_stacked else {})
  source = to_ours(tmp_path, tensors, about)
  assert source.config.lora == LoraConfig(2, 4.0, 0.0, ("q_proj", "k_proj", "v_proj", "attn_out"))
  ours = dict(layout.to_arrays(source.policy.load, layout.adapter_places(source.config, "llada2_moe")))
  for layer in range(CONFIG.num_layers):
    names = [f"{FUSED.format(layer, '{}')}#{part}" for part in ("q_proj", "k_proj", "v_proj")]
    found = np.concatenate([ours[name.format("B")] @ ours[name.format("A")] for name in names])
    wanted = tensors[FUSED.format(layer, "B")] @ tensors[FUSED.format(layer, "A")]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)

  back = epath.Path(tmp_path / "back")
  export_adapter(source, back)
  written = load_file(back / "adapter_model.safetensors")
  assert written.keys() == tensors.keys()
  for name, array in tensors.items():
    np.testing.assert_array_equal(written[name], array)
  settings = json.loads((back / "adapter_config.json").read_text())
  assert {key: settings.get(key) for key in PATTERNS} == (PATTERNS if is_stacked else dict.fromkeys(PATTERNS))
  assert settings["target_modules"] == r".*model\.layers\.\d+\.(attention\.query_key_value|attention\.dense)"


def test_adapters_on_some_of_the_parts_keep_their_targets(tmp_path):
  tensors = draw(2, is_stacked=True)
  for name, array in tensors.items():  # those of the keys are not there
    if "query_key_value.lora_A" in name:
      array[2:4] = 0
    if "query_key_value.lora_B" in name:
      array[:, 2:4] = 0
  source = to_ours(tmp_path, tensors, ABOUT | PATTERNS)
  assert source.config.lora.targets == ("q_proj", "v_proj", "attn_out")
  export_adapter(source, epath.Path(tmp_path / "back"))
  written = load_file(tmp_path / "back" / "adapter_model.safetensors")
  for name, array in tensors.items():
    np.testing.assert_array_equal(written[name], array)


@pytest.mark.parametrize(("change", "about", "message"), [
  ((slice(None), 0, 1.0), ABOUT | PATTERNS, "must each have their own columns"),
  ((slice(None), 0, 1.0), ABOUT | {"r": 4}, r"the rank must be 4, or 12 for 3 adapters"),
])  # fmt: skip
def test_other_forms_are_refused(tmp_path, change, about, message):
  tensors = draw(2, is_stacked=True)
  rows, column, value = change
  tensors[FUSED.format(0, "B")][rows, column] = value
  with pytest.raises(ValueError, match=message):
    to_ours(tmp_path, tensors, about)
