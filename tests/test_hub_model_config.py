"""config.json of a checkpoint: every field there and back, and entries that are missing, wrong or not supported."""

import dataclasses

import pytest
from recorded_models import TINY, settings

from dmpo_jax.hub.families import FAMILIES, family_of, natural_family
from dmpo_jax.hub.layout import checkpoint_places
from dmpo_jax.hub.model_config import model_config_from_hf, model_config_to_hf


def test_config_fields():
  hf = settings("m1_base")
  config = model_config_from_hf(hf, remat="full")
  assert (config.vocab_size, config.embedding_size, config.num_layers) == (300, 320, 3)
  assert (config.rope_theta, config.rms_norm_eps, config.remat) == (500_000.0, 1e-5, "full")
  assert (config.mask_token_id, config.eos_token_id, config.pad_token_id) == (296, 290, 290)
  assert model_config_from_hf({**hf, "n_kv_heads": None}).num_kv_heads == 4
  assert model_config_from_hf({**hf, "n_kv_heads": None, "multi_query_attention": True}).num_kv_heads == 1
  assert model_config_from_hf({**hf, "mlp_hidden_size": None}).mlp_hidden_size == 256
  assert model_config_from_hf({**hf, "embedding_size": None}).embedding_size == 300
  assert model_config_from_hf(hf | model_config_to_hf(config, "llada"), remat="full") == config
  assert model_config_from_hf(model_config_to_hf(config, "llada"), remat="full") == config
  with pytest.raises(ValueError, match=r"config.json of the checkpoint has no n_layers, mask_token_id"):
    model_config_from_hf({key: hf[key] for key in hf if key not in ("n_layers", "mask_token_id")})
  with pytest.raises(ValueError, match="'alibi': True"):
    model_config_from_hf({**hf, "alibi": True})


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize(
  "changes", [{}, {"qkv_bias": True}, {"embedding_size": 29, "num_kv_heads": 4}, {"head_dim": 6}]
)
def test_every_field_survives_the_way_there_and_back(family, changes):
  """Padded ids stay padded ids, in Dream's config.json too, whose `vocab_size` is the table's rows."""
  config = dataclasses.replace(TINY, shift_logits=family == "dream", **changes)
  hf = model_config_to_hf(config, natural_family(config))
  assert model_config_from_hf(hf) == config
  assert ("head_dim" in hf) == ("head_dim" in changes)
  places = checkpoint_places(config, family)
  table = places[f"{FAMILIES[family].embedding}.weight"].shape
  assert hf["vocab_size" if family == "dream" else "embedding_size"] == table[0]


def test_a_family_is_one_entry(monkeypatch):
  own = dataclasses.replace(FAMILIES["llada"], model_type="Other-MDM", architecture="OtherModel")
  monkeypatch.setitem(FAMILIES, "other", own)
  hf = model_config_to_hf(TINY, "other")
  assert (hf["model_type"], hf["architectures"]) == ("Other-MDM", ["OtherModel"])
  assert family_of(hf) == "other"
  assert model_config_from_hf(hf) == TINY


def test_biases_of_either_family():
  hf = settings("m2_gqa")
  config = model_config_from_hf(hf | {"include_qkv_bias": True})
  assert config.qkv_bias
  assert "model.transformer.blocks.1.k_proj.bias" in checkpoint_places(config, "llada")
  assert not model_config_from_hf(hf | {"include_qkv_bias": None}).qkv_bias


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(mask_token_id=None, eos_token_id=[1, 2]), r"mask_token_id=null where an .* needed; .*eos_token_id=\[1, 2\]"),
    (dict(vocab_size=None, rope_theta=None), r"vocab_size=null where a positive integer.*rope_theta=null"),
    (dict(rms_norm_eps="1e-5", n_heads=0), r"n_heads=0 where a positive integer.*rms_norm_eps=\"1e-5\""),
    (dict(n_layers=2.0, d_model="64", weight_tying=1), r"d_model=\"64\" .*n_layers=2.0 .*weight_tying=1 where true or"),
    (dict(n_kv_heads=0, pad_token_id=-1), r"n_kv_heads=0 where a positive .*pad_token_id=-1"),
    (dict(mlp_hidden_size=None, mlp_ratio=...), "has mlp_hidden_size=null where a positive integer is needed"),
    (dict(mlp_hidden_size=None, mlp_ratio=2.3), "mlp_ratio=2.3 times 64 is not a whole number; give mlp_hidden_size"),
    (dict(multi_query_attention=True), "n_kv_heads=4 contradicts multi_query_attention, which means 1"),
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
    model_config_from_hf(hf)


def test_a_ratio_gives_a_whole_number():
  size = model_config_from_hf(settings("m1_base") | dict(mlp_hidden_size=None, mlp_ratio=2.5)).mlp_hidden_size
  assert (size, type(size)) == (160, int)
