"""Checkpoints and adapters of Hugging Face's layout: there and back, and what does not fit."""

import dataclasses

import numpy as np
import pytest
from recorded_models import TINY, settings, tensors

from dmpo_jax.hub import convert


@pytest.mark.parametrize("name", ["m2_gqa", "m3_tied", "m4_bf16"])
def test_there_and_back(name):
  stored = tensors(name)
  own = dict(param_dtype="bfloat16") if name == "m4_bf16" else {}
  config = convert.model_config_from_hf(settings(name), **own)
  params = convert.params_from_hf(stored, config)
  assert ("head" in params) == (not config.weight_tying)
  back = convert.params_to_hf(params, config)
  assert set(back) == set(stored)
  for key, array in stored.items():
    assert back[key].dtype == array.dtype
    np.testing.assert_array_equal(back[key], array)


def test_kernels_are_input_first():
  stored = tensors("m2_gqa")
  params = convert.params_from_hf(stored, convert.model_config_from_hf(settings("m2_gqa")))
  gate = stored["model.transformer.blocks.1.ff_proj.weight"]
  np.testing.assert_array_equal(params["blocks"]["ff_proj"]["kernel"][1], gate.T)


def test_tensors_that_do_not_fit_are_named():
  stored = tensors("m3_tied")
  config = convert.model_config_from_hf(settings("m3_tied"))
  missing = {key: array for key, array in stored.items() if "blocks.1.k_proj" not in key}
  with pytest.raises(ValueError, match=r"1 missing \(model.transformer.blocks.1.k_proj.weight\)"):
    convert.params_from_hf(missing, config)
  with pytest.raises(ValueError, match=r"1 unknown \(model.extra\)"):
    convert.params_from_hf({**stored, "model.extra": np.zeros(1)}, config)
  short = {**stored, "model.transformer.ln_f.weight": np.zeros(3, np.float32)}
  with pytest.raises(
    ValueError, match=r"1 misshapen \(model.transformer.ln_f.weight has \[3\], the config asks for \[32\]"
  ):
    convert.params_from_hf(short, config)


def test_config_fields():
  hf = settings("m1_base")
  config = convert.model_config_from_hf(hf, remat="full")
  assert (config.vocab_size, config.embedding_size, config.num_layers) == (300, 320, 3)
  assert (config.rope_theta, config.rms_norm_eps, config.remat) == (500_000.0, 1e-5, "full")
  assert (config.mask_token_id, config.eos_token_id, config.pad_token_id) == (296, 290, 290)
  assert convert.model_config_from_hf({**hf, "n_kv_heads": None}).num_kv_heads == 4
  assert convert.model_config_from_hf({**hf, "n_kv_heads": None, "multi_query_attention": True}).num_kv_heads == 1
  assert convert.model_config_from_hf({**hf, "mlp_hidden_size": None}).mlp_hidden_size == 256
  assert convert.model_config_from_hf({**hf, "embedding_size": None}).embedding_size == 300
  assert convert.model_config_from_hf(hf | convert.model_config_to_hf(config, "llada"), remat="full") == config
  assert convert.model_config_from_hf(convert.model_config_to_hf(config, "llada"), remat="full") == config
  with pytest.raises(ValueError, match=r"config.json of the checkpoint has no n_layers, mask_token_id"):
    convert.model_config_from_hf({key: hf[key] for key in hf if key not in ("n_layers", "mask_token_id")})
  with pytest.raises(ValueError, match="'alibi': True"):
    convert.model_config_from_hf({**hf, "alibi": True})


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}, {"embedding_size": 29, "num_kv_heads": 4}])
def test_every_field_survives_the_way_there_and_back(family, changes):
  """Padded ids stay padded ids, in Dream's config.json too, whose `vocab_size` is the table's rows."""
  config = dataclasses.replace(TINY, shift_logits=family == "dream", **changes)
  hf = convert.model_config_to_hf(config, convert.natural_family(config))
  assert convert.model_config_from_hf(hf) == config
  places = convert.checkpoint_places(config, family)
  table = places[f"{convert.FAMILIES[family].embedding}.weight"].shape
  assert hf["vocab_size" if family == "dream" else "embedding_size"] == table[0]


def test_a_family_is_one_entry(monkeypatch):
  own = dataclasses.replace(convert.FAMILIES["llada"], model_type="Other-MDM", architecture="OtherModel")
  monkeypatch.setitem(convert.FAMILIES, "other", own)
  hf = convert.model_config_to_hf(TINY, "other")
  assert (hf["model_type"], hf["architectures"]) == ("Other-MDM", ["OtherModel"])
  assert convert.family_of(hf) == "other"
  assert convert.model_config_from_hf(hf) == TINY


def test_biases_of_either_family():
  hf = settings("m2_gqa")
  config = convert.model_config_from_hf(hf | {"include_qkv_bias": True})
  assert config.qkv_bias
  assert "model.transformer.blocks.1.k_proj.bias" in convert.checkpoint_places(config, "llada")
  assert not convert.model_config_from_hf(hf | {"include_qkv_bias": None}).qkv_bias


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(mask_token_id=None, eos_token_id=[1, 2]), r"mask_token_id=null where an .* needed; .*eos_token_id=\[1, 2\]"),
    (dict(vocab_size=None, rope_theta=None), r"vocab_size=null where a positive integer.*rope_theta=null"),
    (dict(rms_norm_eps="1e-5", n_heads=0), r"n_heads=0 where a positive integer.*rms_norm_eps=\"1e-5\""),
    (dict(n_layers=2.0, d_model="64", weight_tying=1), r"d_model=\"64\" .*n_layers=2.0 .*weight_tying=1 where true or"),
    (dict(n_kv_heads=0, pad_token_id=-1), r"n_kv_heads=0 where a positive .*pad_token_id=-1"),
    (dict(mlp_hidden_size=None, mlp_ratio=...), "has mlp_hidden_size=null where a positive integer is needed"),
    (dict(mlp_hidden_size=None, mlp_ratio=2.3), "mlp_ratio=2.3, of 64 no whole number: give mlp_hidden_size"),
    (dict(multi_query_attention=True), "n_kv_heads=4 and multi_query_attention, which means 1"),
    (dict(rope_scaling={"type": "linear"}), "'rope_scaling': {'type': 'linear'}} is not supported"),
    (
      dict.fromkeys(("rope", "activation_type", "layer_norm_type", "block_type"), ...),
      "has no activation_type, block_",
    ),
    (dict(rope=None), "has rope=null where a value is needed"),
  ],
)
def test_entries_that_cannot_be_are_all_named(change, message):
  hf = {key: value for key, value in (settings("m1_base") | change).items() if value is not ...}
  with pytest.raises(ValueError, match=f"config.json of the checkpoint.*{message}"):
    convert.model_config_from_hf(hf)


def test_a_ratio_gives_a_whole_number():
  size = convert.model_config_from_hf(settings("m1_base") | dict(mlp_hidden_size=None, mlp_ratio=2.5)).mlp_hidden_size
  assert (size, type(size)) == (160, int)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(init_lora_weights="pissa_niter_4"), "'init_lora_weights': 'pissa_niter_4'} is not supported"),
    (dict(init_lora_weights="olora"), "olora"),
    (dict(alora_invocation_tokens=[1]), r"'alora_invocation_tokens': \[1\]"),
    (
      dict(arrow_config={"top_k": 1}, use_qalora=True, use_bdlora={"nblocks": 2}),
      "arrow_config.*use_bdlora.*use_qalora",
    ),
    (dict(modules_to_save=["wte"]), "modules_to_save"),
    (dict(r=None, lora_alpha="2"), r"adapter_config.json has r=null .*lora_alpha=\"2\" where a positive number"),
    (dict(r=..., lora_dropout=1), "adapter_config.json has no r; has lora_dropout=1 where"),
    (dict(modules_to_save=[], rank_pattern=None, use_bdlora={}, init_lora_weights="eva", lora_dropout=None), None),
    (dict(init_lora_weights=False), None),
  ],
)
def test_kinds_of_adapters(change, message):
  about = {key: value for key, value in (settings("adapter") | change).items() if value is not ...}
  if message is None:
    assert convert.lora_config_from_peft(about, tensors("adapter")).rank == 4
    return
  with pytest.raises(ValueError, match=message):
    convert.lora_config_from_peft(about, tensors("adapter"))


def test_adapters_there_and_back():
  stored = tensors("adapter")
  lora = convert.lora_config_from_peft(settings("adapter"), stored)
  assert (lora.rank, lora.alpha, lora.dropout) == (4, 2.0, 0.05)
  assert lora.targets == ("q_proj", "k_proj", "v_proj", "up_proj")  # the others that it names do not exist
  config = convert.model_config_from_hf(settings("m2_gqa"), lora=lora)
  adapters = convert.adapters_from_peft(stored, config)
  assert adapters["blocks"]["k_proj"]["B"].shape == (2, 4, 16)
  back = convert.adapters_to_peft(adapters, config)
  assert set(back) == set(stored)
  for key, array in stored.items():
    np.testing.assert_array_equal(back[key], array)
  about = convert.lora_config_to_peft(lora, "llada", "base")
  assert convert.lora_config_from_peft(about, stored) == lora
  with pytest.raises(ValueError, match=r"the adapter is on \['gate_proj'\]"):
    convert.lora_config_from_peft(settings("adapter"), ["model.layers.0.mlp.gate_proj.lora_A.weight"])
  with pytest.raises(ValueError, match="use_rslora"):
    convert.lora_config_from_peft({**settings("adapter"), "use_rslora": True}, stored)
