"""Qwen3, Qwen2 and Llama as diffusion models: recorded logits, and every tensor there and back."""

import dataclasses
import importlib.util
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from programs import ROOT
from recorded_models import FOLDER, TINY, compiled, load_converted, recorded, settings, tensors
from safetensors.numpy import load_file, save_file

from dmpo_jax.hub import convert, layout, pretrained
from dmpo_jax.hub.export import ModelExport
from dmpo_jax.hub.families import FAMILIES, family_of, natural_family
from dmpo_jax.hub.model_config import model_config_from_hf, model_config_to_hf
from dmpo_jax.hub.peft import lora_config_from_peft, lora_config_to_peft
from dmpo_jax.models.lora import LoraConfig
from dmpo_jax.models.transformer import empty_kv_cache
from launch import export_hf

MASKS = {"a2d_qwen3": 141, "a2d_qwen3_bf16": 170, "a2d_qwen2": 152, "a2d_llama": 155}  # which no file of theirs has


def described(name, **changes):
  """Their config.json with a mask token."""
  return settings(name) | {"mask_token_id": MASKS[name]} | changes


def converted(tmp_path, name):
  source, out = tmp_path / "hf", epath.Path(tmp_path / "out")
  shutil.copytree(FOLDER / name, source)
  (source / "config.json").write_text(json.dumps(described(name)))
  convert.convert_model(epath.Path(source), out)
  return out


@pytest.mark.parametrize("name", MASKS)
def test_logits_are_the_recorded_ones_and_tensors_come_back(tmp_path, name):
  folder = converted(tmp_path, name)
  model, variables = load_converted(folder)
  run, arrays = compiled(model), recorded(name)

  def close(logits, wanted):
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=5e-4)

  close(run(variables, arrays["ids_0"]), arrays["logits_0"])
  in_order = jnp.broadcast_to(jnp.arange(arrays["pad_ids"].shape[1]), arrays["pad_ids"].shape)  # padding counts too
  padded = run(variables, arrays["pad_ids"], is_valid=arrays["pad_att2d"] > 0, positions=in_order)
  close(padded, arrays["pad_logits"])
  close(run(variables, arrays["pos_ids"], positions=arrays["pos_positions"]), arrays["pos_logits"])
  close(run(variables, arrays["m4_ids"], attention_mask=arrays["m4_mask"][:, 0]), arrays["m4_logits"])

  back = epath.Path(tmp_path / "back")
  ModelExport(export_hf.find_model(folder), "same").write(back, 40_000)
  written = {}
  for path in back.glob("*.safetensors"):
    written |= load_file(path)
  stored = tensors(name)
  assert written.keys() == stored.keys()
  for key, array in stored.items():
    assert written[key].dtype == array.dtype
    np.testing.assert_array_equal(written[key], array)
  config = json.loads((back / "config.json").read_text())
  assert config.pop("torch_dtype") == config["dtype"]
  assert config == described(name)


def test_a_tied_head_that_is_stored_too_is_left_out(tmp_path):
  """As in Qwen3-0.6B's file; and old files of Llama have the rotary frequencies."""
  source = tmp_path / "hf"
  shutil.copytree(FOLDER / "a2d_qwen3", source)
  (source / "config.json").write_text(json.dumps(described("a2d_qwen3")))
  stored = tensors("a2d_qwen3")
  more = {"lm_head.weight": stored["model.embed_tokens.weight"].copy()}
  more["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
  save_file(stored | more, source / "model.safetensors")
  count = convert.convert_model(epath.Path(source), epath.Path(tmp_path / "out")).num_parameters
  assert count == sum(array.size for array in stored.values())
  more["lm_head.weight"][70, 3] += 1
  save_file(stored | more, source / "model.safetensors")
  with pytest.raises(ValueError, match=r"lm_head.weight is not model.embed_tokens.weight, but tie_word_embeddings"):
    convert.convert_model(epath.Path(source), epath.Path(tmp_path / "other"))


@pytest.mark.parametrize("name", ["a2d_qwen3", "a2d_llama"])
def test_a_cached_suffix_is_what_it_was_in_the_whole_row(tmp_path, name):
  model, variables = load_converted(converted(tmp_path, name))
  run, tokens = compiled(model, "hidden"), recorded(name)["ids_0"]
  hidden, kv_cache = run(variables, tokens, kv_cache=empty_kv_cache(model.config, *tokens.shape))
  suffix, _ = run(variables, tokens[:, 5:], kv_cache=kv_cache, cache_start=5)
  np.testing.assert_allclose(suffix, hidden[:, 5:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "num_tensors"), [("llada_8b", 291), ("dream_7b", 339), ("a2d_qwen3_0.6b", 310)])
def test_the_published_checkpoints_are_those_of_our_configurations(name, num_tensors):
  hf = {"mask_token_id": 151669} | json.loads((FOLDER / "published" / f"{name}.json").read_text())
  config = model_config_from_hf(hf)
  assert len(layout.checkpoint_places(config, family_of(hf))) == num_tensors
  given = pretrained.filled(load_config(name)).model
  sizes = {field: given[field] for field in pretrained.FIELDS if given.get(field)}
  assert len(sizes) > 7
  assert {field: getattr(config, field) for field in sizes} == sizes


@pytest.mark.parametrize("name", ["diffucoder_7b_instruct", "dream_coder_7b"])
def test_descendants_of_dream_convert_by_their_own_config_json(tmp_path, name):
  """A small checkpoint with everything else of the published config.json, there and back."""
  published, dream = (json.loads((FOLDER / "published" / f"{each}.json").read_text()) for each in (name, "dream_7b"))
  assert model_config_from_hf(published) == model_config_from_hf(dream)
  sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
  small = published | sizes | dict(vocab_size=32, mask_token_id=28, eos_token_id=27, pad_token_id=27)
  source, out, back = (epath.Path(tmp_path / each) for each in ("hf", "out", "back"))
  source.mkdir()
  (source / "config.json").write_text(json.dumps(small))
  places, generator = layout.checkpoint_places(model_config_from_hf(small), "dream"), np.random.default_rng(0)
  stored = {key: generator.normal(size=place.torch_shape).astype(np.float32) for key, place in places.items()}
  save_file(stored, source / "model.safetensors")
  convert.convert_model(source, out)
  assert pretrained.read_model(out).family == "dream"
  ModelExport(export_hf.find_model(out), "same").write(back, 10**9)
  assert json.loads((back / "config.json").read_text()) == small | {"torch_dtype": "float32"}
  written = load_file(back / "model.safetensors")
  assert written.keys() == stored.keys()
  for key, array in stored.items():
    np.testing.assert_array_equal(written[key], array)


def test_blocks_of_a_dream_model_are_not_ignored():
  hf = json.loads((FOLDER / "published" / "dream_7b.json").read_text())
  with pytest.raises(ValueError, match="'block_size': 32} is not supported"):
    model_config_from_hf(hf | {"block_size": 32})


def load_config(name):
  """Load a configuration by its path, as the flag does."""
  spec = importlib.util.spec_from_file_location("a_config", ROOT / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


@pytest.mark.parametrize("name", MASKS)
def test_a_description_there_and_back(name):
  hf = described(name)
  config = model_config_from_hf(hf)
  family = family_of(hf)
  written = model_config_to_hf(config, family)
  assert model_config_from_hf(written) == config
  assert hf["model_type"] == f"a2d-{family}" == f"a2d-{written['model_type']}"
  assert "auto_map" not in written
  assert written["rope_scaling"] == hf["rope_scaling"]


def test_what_transformers_writes_since_its_version_5():
  hf = described("a2d_llama")
  rope = dict(rope_theta=hf.pop("rope_theta"), **hf.pop("rope_scaling"))
  config = model_config_from_hf(hf | {"rope_parameters": rope})
  assert (config.rope_theta, config.rope_scaling) == (500_000.0, (4.0, 1.0, 4.0, 32.0))
  plain = dict(rope_theta=7.0, rope_type="default")
  assert model_config_from_hf(hf | {"rope_parameters": plain}).rope_scaling == ()
  config = model_config_from_hf(hf | {"rope_parameters": plain})
  assert (config.rope_theta, config.rope_scaling) == (7.0, ())


def test_what_is_not_written_is_their_default():
  hf = {key: value for key, value in described("a2d_llama").items() if key not in ("head_dim", "rope_theta")}
  config = model_config_from_hf(hf)
  assert (config.head_dim, config.rope_theta) == (8, 10_000.0)
  hf = {key: value for key, value in described("a2d_qwen3").items() if key != "head_dim"}
  assert model_config_from_hf(hf).head_dim == 128


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("a2d_qwen3", dict(use_sliding_window=True, sliding_window=8), "'use_sliding_window': True"),
    ("a2d_qwen2", dict(layer_types=["full_attention", "sliding_attention"]), r"'layer_types': \['full_attention', 'sl"),
    ("a2d_llama", dict(sliding_window=4096), r"'sliding_window': 4096} is not supported; .*'sliding_window': None"),
    ("a2d_qwen2", dict(hidden_act="gelu"), "'hidden_act': 'gelu'.*'hidden_act': 'silu'"),
    ("a2d_qwen3", dict(attention_bias=True), "'attention_bias': True"),
    ("a2d_llama", dict(mlp_bias=True), "'mlp_bias': True"),
    ("a2d_llama", dict(partial_rotary_factor=0.5), "'partial_rotary_factor': 0.5"),
    ("a2d_llama", dict(quantization_config={"bits": 4}), "'quantization_config': {'bits': 4}"),
    ("a2d_qwen2", dict(rope_scaling={"type": "yarn", "factor": 4.0}), "rope_scaling={'type': 'yarn'.*rope_type llama3"),
    ("a2d_qwen2", dict(rope_scaling={"rope_type": "llama3", "factor": 4.0}), "with factor, low_freq_factor, high"),
    ("a2d_qwen3", dict(head_dim=0, shift_logits="yes"), 'head_dim=0 where a .*shift_logits="yes" where true or false'),
  ],
)
def test_what_changes_the_mathematics_is_refused_by_name(name, change, message):
  with pytest.raises(ValueError, match=f"config.json of the checkpoint.*{message}"):
    model_config_from_hf(described(name, **change))


def test_a_window_that_is_not_in_use_changes_nothing():
  hf = described("a2d_qwen2")
  assert model_config_from_hf(hf | dict(sliding_window=8)) == model_config_from_hf(hf)


def test_an_unknown_type_is_told_what_is_known():
  with pytest.raises(ValueError, match=r"model_type='gpt2' is not supported.* llada, Dream, sdar, "):
    family_of({"model_type": "gpt2"})


SCALING = (2.0, 1.0, 4.0, 8.0)


@pytest.mark.parametrize(
  ("changes", "family"),
  [
    ({}, "llada"),
    ({"shift_logits": True}, "dream"),
    ({"qk_norm": True}, "qwen3"),
    ({"rope_scaling": SCALING}, "llama"),
  ],
)
def test_a_model_from_scratch_is_exported_as_the_first_family_that_has_such(changes, family):
  config = dataclasses.replace(TINY, **changes)
  assert natural_family(config) == family
  assert model_config_from_hf(model_config_to_hf(config, family)) == config


def test_a_model_that_no_family_has_is_not_exported():
  with pytest.raises(ValueError, match="no family"):
    natural_family(dataclasses.replace(TINY, qk_norm=True, qkv_bias=True))


@pytest.mark.parametrize("name", ["a2d_qwen3", "a2d_qwen2", "a2d_llama"])
def test_adapters_have_the_familys_names(name):
  lora = LoraConfig(2, 4.0, 0.0, ("q_proj", "attn_out", "ff_out"))
  hf = described(name)
  config, family = model_config_from_hf(hf, lora=lora), family_of(hf)
  about = lora_config_to_peft(lora, family, "base")
  assert about["target_modules"] == ["q_proj", "o_proj", "down_proj"]
  places = layout.adapter_places(config, family)
  width = config.num_heads * config.head_dim
  assert places["base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"].shape == (width, 2)
  assert lora_config_from_peft(about, places, family) == lora


def test_every_family_names_all_modules():
  named = {name: set(family.modules) for name, family in FAMILIES.items()}
  assert named["qwen3"] - named["llama"] == {"q_norm", "k_norm"}
  assert named["llama"] == named["qwen2"] == named["dream"] == named["llada"]
