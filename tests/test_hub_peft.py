"""PEFT's adapters: their settings and tensors there and back, and kinds that are not supported."""

import numpy as np
import pytest
from recorded_models import adapters_of, reader, settings, tensors

from dmpo_jax.hub.layout import adapter_places, to_tensors
from dmpo_jax.hub.model_config import model_config_from_hf
from dmpo_jax.hub.peft import lora_config_from_peft, lora_config_to_peft


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
  written = {key: value for key, value in (settings("adapter") | change).items() if value is not ...}
  if message is None:
    assert lora_config_from_peft(written, tensors("adapter")).rank == 4
    return
  with pytest.raises(ValueError, match=message):
    lora_config_from_peft(written, tensors("adapter"))


def test_adapters_there_and_back():
  stored = tensors("adapter")
  lora = lora_config_from_peft(settings("adapter"), stored)
  assert (lora.rank, lora.alpha, lora.dropout) == (4, 2.0, 0.05)
  assert lora.targets == ("q_proj", "k_proj", "v_proj", "up_proj")  # the others that it names do not exist
  config = model_config_from_hf(settings("m2_gqa"), lora=lora)
  adapters = adapters_of(stored, config)
  assert adapters["blocks"]["k_proj"]["B"].shape == (2, 4, 16)
  back = dict(to_tensors(reader(adapters), adapter_places(config, "llada")))
  assert set(back) == set(stored)
  for key, array in stored.items():
    np.testing.assert_array_equal(back[key], array)
  written = lora_config_to_peft(lora, "llada", "base")
  assert lora_config_from_peft(written, stored) == lora
  with pytest.raises(ValueError, match=r"the adapter is on \['gate_proj'\]"):
    lora_config_from_peft(settings("adapter"), ["model.layers.0.mlp.gate_proj.lora_A.weight"])
  with pytest.raises(ValueError, match="use_rslora"):
    lora_config_from_peft({**settings("adapter"), "use_rslora": True}, stored)
