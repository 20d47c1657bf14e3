"""A checkpoint's config.json and our ModelConfig, in both directions."""

from collections.abc import Mapping
from typing import Any

from dmpo_jax.hub.entries import ANYTHING, FLAG, ID, POSITIVE, SIZE, check_entries
from dmpo_jax.hub.families import FAMILIES, Family, family_of
from dmpo_jax.models.transformer import ModelConfig

HEAD_DIM = "head_dim"  # the published code does not know it: a key only where it is not hidden size / heads
WHERE = "config.json of the checkpoint"
_NEEDED = dict(
  **dict.fromkeys(("d_model", "num_layers", "num_heads", "mlp_hidden_size"), SIZE),
  weight_tying=FLAG,
  mask_token_id=ID,
  eos_token_id=ID,
  rope_theta=POSITIVE,
  rms_norm_eps=POSITIVE,
)
_OPTIONAL = dict(num_kv_heads=SIZE, vocab_size=SIZE, embedding_size=SIZE, qkv_bias=FLAG, pad_token_id=ID)


def model_config_from_hf(config: Mapping[str, Any], **own: Any) -> ModelConfig:
  """Translate a checkpoint's config.json.

  Args:
    own: fields of ModelConfig that a checkpoint does not decide (dtype, remat, lora, ...).

  Raises:
    ValueError: an entry is missing or of the wrong kind, or the model does not support an option.
  """
  family = FAMILIES[family_of(config)]
  _check(config, family)
  fields: dict[str, Any] = {field: config.get(key) for field, key in family.keys.items()} | {
    "head_dim": config.get(HEAD_DIM)
  }
  defaults = {
    **dict.fromkeys(("vocab_size", "embedding_size"), config["vocab_size"]),
    "num_kv_heads": fields["num_heads"],
    "pad_token_id": fields["eos_token_id"],
    "head_dim": 0,
    **family.defaults,
  }
  fields |= {field: value for field, value in defaults.items() if fields[field] is None}
  fields |= {"mlp_hidden_size": _mlp_hidden_size(config, family)}
  fields |= {field: float(fields[field]) for field in ("rope_theta", "rms_norm_eps")}
  if config.get(family.is_multi_query):
    fields["num_kv_heads"] = _one_kv_head(config, family)
  return ModelConfig(**fields, **family.model, **own)


def model_config_to_hf(config: ModelConfig, name: str) -> dict[str, Any]:
  """Write a config.json for a model of ours, in the layout of the family `name`."""
  family = FAMILIES[name]
  own = {} if config.head_dim * config.num_heads == config.d_model else {HEAD_DIM: config.head_dim}
  return {
    "model_type": family.model_type,
    "architectures": [family.architecture],
    "auto_map": dict(family.code),
    "use_cache": False,
    **family.fixed,
    **family.written,
    **{key: getattr(config, field) for field, key in family.keys.items()},
    **own,
  }


def _check(config: Mapping[str, Any], family: Family) -> None:
  """Check that the entries are there, of the right kind and supported."""
  needed = {family.keys[field]: kind for field, kind in _NEEDED.items()}
  width = family.keys["mlp_hidden_size"]
  if config.get(width) is None and family.mlp_ratio in config:
    del needed[width]
    needed[family.mlp_ratio] = POSITIVE
  needed |= dict.fromkeys(family.stated, ANYTHING) | {"vocab_size": SIZE}
  optional = {family.keys[field]: kind for field, kind in _OPTIONAL.items()} | {HEAD_DIM: SIZE}
  if family.is_multi_query:
    optional[family.is_multi_query] = FLAG
  check_entries(config, WHERE, needed=needed, optional=optional)
  other = {key: config[key] for key, value in family.fixed.items() if config.get(key, value) not in (value, None)}
  if other:
    supported = {key: family.fixed[key] for key in other}
    raise ValueError(f"{WHERE}: {other} is not supported; it must be {supported}")


def _mlp_hidden_size(config: Mapping[str, Any], family: Family) -> int:
  key, ratio, width = family.keys["mlp_hidden_size"], family.mlp_ratio, config[family.keys["d_model"]]
  if config.get(key) is not None:
    return config[key]
  size = config[ratio] * width
  if size != int(size):
    raise ValueError(f"{WHERE}: {ratio}={config[ratio]} times {width} is not a whole number; give {key}")
  return int(size)


def _one_kv_head(config: Mapping[str, Any], family: Family) -> int:
  key = family.keys["num_kv_heads"]
  if config.get(key) not in (None, 1):
    raise ValueError(
      f"{WHERE}: {key}={config[key]} contradicts {family.is_multi_query}, which means 1; set the latter to null if the "
      "checkpoint has several kv heads"
    )
  return 1
