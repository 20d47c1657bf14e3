"""A checkpoint's config.json and our ModelConfig, in both directions."""

from collections.abc import Mapping
from typing import Any

from dmpo_jax.hub.entries import ANYTHING, FLAG, FLAGS, ID, POSITIVE, SIZE, check_entries
from dmpo_jax.hub.families import FAMILIES, NEUTRAL, Family, family_of
from dmpo_jax.models.config import ModelConfig

HEAD_DIM = "head_dim"  # where a family does not read it, a key only if it is not hidden size / heads
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
END_IDS = ("pad_token_id", "eos_token_id")
UNSET_IF_0 = ("shared_expert_size", "clip_qkv")  # fields whose key is null where there is none
FLOATS = ("rope_theta", "rms_norm_eps", "clip_qkv", "expert_scale")
WHERE = "config.json of the checkpoint"
_NEEDED = dict(
  **dict.fromkeys(("d_model", "num_layers", "num_heads", "mlp_hidden_size"), SIZE),
  weight_tying=FLAG,
  mask_token_id=ID,
  eos_token_id=ID,
  rope_theta=POSITIVE,
  rms_norm_eps=POSITIVE,
)
EXPERT_SIZES = ("num_experts", "experts_per_token", "expert_size")
_OPTIONAL = dict(
  **dict.fromkeys(("num_kv_heads", "head_dim", "vocab_size", "embedding_size", "block_length"), SIZE),
  shared_expert_size=SIZE,
  **dict.fromkeys(("clip_qkv", "rotary_fraction", "expert_scale"), POSITIVE),
  **dict.fromkeys(("expert_groups", "expert_groups_per_token"), SIZE),
  **dict.fromkeys(("qk_norm", "out_bias", "expert_bias"), FLAG),
  expert_layers=FLAGS,
  qkv_bias=FLAG,
  shift_logits=FLAG,
  pad_token_id=ID,
)


def model_config_from_hf(config: Mapping[str, Any], **own: Any) -> ModelConfig:
  """Translate a checkpoint's config.json.

  Args:
    own: fields of ModelConfig that a checkpoint does not decide (dtype, remat, lora, ...).

  Raises:
    ValueError: an entry is missing or of the wrong kind, or the model does not support an option.
  """
  family, config = FAMILIES[family_of(config)], _with_rope_keys(config)
  _check(config, family)
  fields: dict[str, Any] = {"head_dim": config.get(HEAD_DIM)}
  fields |= {field: config.get(key) for field, key in family.keys.items()}
  if "rope_scaling" in family.keys:
    fields["rope_scaling"] = _rope_scaling(fields["rope_scaling"])
  if family.derived is not None:
    fields |= family.derived.read(config)
  defaults = {
    **dict.fromkeys(("vocab_size", "embedding_size"), config["vocab_size"]),
    "num_kv_heads": fields["num_heads"],
    **dict.fromkeys(("head_dim", "block_length"), 0),
    **family.defaults,
  }
  # one of the two may be all that is said, as in LLaDA2's
  defaults |= {a: fields[b] for a, b in (END_IDS, END_IDS[::-1]) if fields.get(b) is not None}
  fields |= {field: value for field, value in defaults.items() if fields.get(field) is None}
  fields |= {"mlp_hidden_size": _mlp_hidden_size(config, family)}
  fields |= {field: float(fields[field]) for field in FLOATS if field in fields}
  if "expert_layers" in fields:
    fields["expert_layers"] = tuple(map(float, fields["expert_layers"]))
  if config.get(family.is_multi_query):
    fields["num_kv_heads"] = _one_kv_head(config, family)
  return ModelConfig(**fields, **family.model, **own)


def model_config_to_hf(config: ModelConfig, name: str) -> dict[str, Any]:
  """Write a config.json for a model of ours, in the layout of the family `name`.

  Raises:
    ValueError: the model attends by blocks and the family does not, or the reverse.
  """
  family = FAMILIES[name]
  can_attend_so = "block_length" in family.keys if config.block_length else not family.has_blocks
  if not can_attend_so:
    raise ValueError(
      f"model.block_length={config.block_length}: no checkpoint of the family {name} attends so; such a model stays a "
      "checkpoint of ours"
    )
  for key in set(family.keys.values()):
    fields = [field for field, own in family.keys.items() if own == key]
    if len({getattr(config, field) for field in fields}) > 1:
      raise ValueError(
        f"model.{' and model.'.join(fields)} differ: checkpoints of the family {name} have one {key}; such a model "
        "stays a checkpoint of ours"
      )
  own = {} if config.head_dim * config.num_heads == config.d_model else {HEAD_DIM: config.head_dim}
  values = {key: getattr(config, field) for field, key in family.keys.items()}
  values |= {family.keys[field]: None for field in UNSET_IF_0 if field in family.keys and not getattr(config, field)}
  if "block_length" in family.keys and not config.block_length:
    del values[family.keys["block_length"]]
  if "expert_layers" in family.keys:
    values[family.keys["expert_layers"]] = [int(kind) for kind in config.expert_layers] or [1] * config.num_layers
  if "rope_scaling" in family.keys:
    values[family.keys["rope_scaling"]] = _rope_scaling_to_hf(config.rope_scaling)
  if family.derived is not None:
    values |= family.derived.write(config)
  return {
    "model_type": family.model_type,
    "architectures": [family.architecture],
    **({"auto_map": dict(family.code)} if family.code else {}),
    "use_cache": False,
    **family.fixed,
    **family.written,
    **values,
    **own,
  }


def _with_rope_keys(config: Mapping[str, Any]) -> Mapping[str, Any]:
  """Return a config.json with the keys of transformers 4 where it has those of 5."""
  if not isinstance(config.get("rope_parameters"), Mapping):
    return config
  scaling = dict(config["rope_parameters"])
  moved = {key: scaling.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in scaling}
  return {**config, **moved, "rope_scaling": None if scaling.get("rope_type") == "default" else scaling}


def _rope_scaling(scaling: object) -> tuple[float, ...]:
  """Read the scaling of rotary frequencies: none, or Llama 3's."""
  if scaling is None:
    return ()
  if isinstance(scaling, Mapping):
    kind = scaling.get("rope_type", scaling.get("type"))
    values: list[Any] = [scaling.get(key) for key in LLAMA3_SCALING]
    if kind == "default":
      return ()
    if kind == "llama3" and all(POSITIVE.fits(value) for value in values):
      return tuple(map(float, values))
  raise ValueError(
    f"{WHERE}: rope_scaling={scaling!r} is not supported; it must be null, or of rope_type llama3 with "
    f"{', '.join(LLAMA3_SCALING)}"
  )


def _rope_scaling_to_hf(values: tuple[float, ...]) -> dict[str, Any] | None:
  if not values:
    return None
  length = LLAMA3_SCALING[-1]
  return {"rope_type": "llama3", **dict(zip(LLAMA3_SCALING, values, strict=True)), length: int(values[-1])}


def _check(config: Mapping[str, Any], family: Family) -> None:
  """Check that the entries are there, of the right kind and supported."""
  needed = {family.keys[field]: kind for field, kind in _NEEDED.items() if field not in family.defaults}
  width = family.keys["mlp_hidden_size"]
  if config.get(width) is None and family.mlp_ratio in config:
    del needed[width]
    needed[family.mlp_ratio] = POSITIVE
  needed |= dict.fromkeys(family.stated, ANYTHING) | {"vocab_size": SIZE}
  needed |= {family.keys[field]: SIZE for field in EXPERT_SIZES if field in family.keys}
  defaulted = {field: kind for field, kind in _NEEDED.items() if field in family.defaults}
  optional = {family.keys[field]: kind for field, kind in (_OPTIONAL | defaulted).items() if field in family.keys}
  optional |= (
    {HEAD_DIM: SIZE}
    | dict(family.derived.keys if family.derived else {})
    | ({family.is_multi_query: FLAG} if family.is_multi_query else {})
  )
  check_entries(config, WHERE, needed=needed, optional=optional)
  known: dict[str, tuple[Any, ...]] = {key: (value, None) for key, value in family.fixed.items()}
  known |= {key: values for key, values in NEUTRAL.items() if key not in family.keys.values()}
  if "use_sliding_window" not in family.fixed:  # which says whether the other key has an effect
    known["sliding_window"] = (None,)
  other = {key: config[key] for key, values in known.items() if key in config and config[key] not in values}
  layers = config.get("layer_types")
  if isinstance(layers, list) and set(layers) - {"full_attention"}:
    other["layer_types"], known["layer_types"] = sorted(set(layers)), ("full_attention",)
  if other:
    supported = {key: known[key][0] for key in other}
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
