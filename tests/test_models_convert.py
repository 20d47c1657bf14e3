"""Checkpoints and adapters of Hugging Face's layout: there and back, and what does not fit."""

import numpy as np
import pytest
from recorded_models import settings, tensors

from dmpo_jax.models import convert


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
