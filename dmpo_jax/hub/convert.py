"""Between checkpoints in Hugging Face's layout, PEFT adapters too, and our variables: names, axes, stacking.

Pure mappings on the host; reading and writing files is the caller's. Torch keeps a projection as [out, in] for each
layer, we keep [layers, in, out]. A `Place` says for one tensor where it belongs; everything else follows from these.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dmpo_jax.hub.entries import ANYTHING, FLAG, ID, POSITIVE, SHARE, SIZE, check_entries
from dmpo_jax.hub.families import FAMILIES, Family
from dmpo_jax.models.lora import TARGETS, LoraConfig
from dmpo_jax.models.transformer import ModelConfig

PEFT_ROOT = "base_model.model."
BIASED = ("q_proj", "k_proj", "v_proj")

# PEFT's ways to begin an adapter that leave the model's own weights alone. The others (PiSSA, OLoRA, CorDA, LoftQ,
# LoRA-GA) change them when the adapter is loaded: its numbers hold for that other model.
INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", "mica")
OTHER_ADAPTERS = (  # PEFT's options under which an adapter computes something else than plain LoRA, or on other modules
  "alora_invocation_tokens",
  "alpha_pattern",
  "arrow_config",
  "fan_in_fan_out",
  "kasa_config",
  "layer_replication",
  "lora_bias",
  "modules_to_save",
  "monteclora_config",
  "rank_pattern",
  "target_parameters",
  "trainable_token_indices",
  "use_bdlora",
  "use_dora",
  "use_qalora",
  "use_rslora",
)


class Place(NamedTuple):
  """Where a tensor of a checkpoint belongs in our variables."""

  path: tuple[str, ...]  # keys down to the leaf
  layer: int | None  # row of the leaf, which is stacked over the layers; None: the whole leaf
  shape: tuple[int, ...]  # as we keep it, of one layer
  is_transposed: bool  # whether torch keeps it the other way round


def family_of(config: Mapping[str, Any]) -> str:
  """Name the family of a checkpoint's config.json.

  Raises:
    ValueError: the model is of no family that we know.
  """
  known = {family.model_type.lower(): name for name, family in FAMILIES.items()}
  name = known.get(str(config.get("model_type")).lower())
  if name is None:
    raise ValueError(f"config.json of the checkpoint: model_type={config.get('model_type')!r} is not of {list(known)}")
  return name


def model_config_from_hf(config: Mapping[str, Any], **own: Any) -> ModelConfig:
  """Translate a checkpoint's config.json; `own` are our fields that it does not have (dtype, remat, lora, ...).

  Raises:
    ValueError: the checkpoint lacks an entry, has one of another kind, or uses options that the model does not have.
  """
  family = FAMILIES[family_of(config)]
  _check_config(config, family)
  fields = {ours: config.get(theirs) for ours, theirs in family.sizes.items()}
  eos_token_id, vocab_size = config["eos_token_id"], config["vocab_size"]
  return ModelConfig(
    **fields | {"mlp_hidden_size": _mlp_hidden_size(config, family)},
    num_kv_heads=_num_kv_heads(config, family),
    vocab_size=_or(config.get(family.vocab_size), vocab_size),
    embedding_size=_or(config.get(family.embedding_size), vocab_size),
    mask_token_id=config["mask_token_id"],
    eos_token_id=eos_token_id,
    pad_token_id=_or(config.get("pad_token_id"), eos_token_id),
    rope_theta=float(config["rope_theta"]),
    rms_norm_eps=float(config["rms_norm_eps"]),
    qkv_bias=_or(config.get(family.qkv_bias), family.has_qkv_bias),
    shift_logits=family.shift_logits,
    **own,
  )


def _or(value: Any, default: Any) -> Any:
  """Return the value, which is null where the default is meant; 0 and false are values."""
  return default if value is None else value


def _check_config(config: Mapping[str, Any], family: Family) -> None:
  kinds = dict.fromkeys(("d_model", "num_layers", "num_heads", "mlp_hidden_size"), SIZE) | {"weight_tying": FLAG}
  needed = {theirs: kinds[ours] for ours, theirs in family.sizes.items()}
  width = family.sizes["mlp_hidden_size"]
  if config.get(width) is None and family.mlp_ratio in config:
    del needed[width]
    needed[family.mlp_ratio] = POSITIVE
  needed |= dict.fromkeys(family.stated, ANYTHING) | {"vocab_size": SIZE, "mask_token_id": ID, "eos_token_id": ID}
  needed |= dict.fromkeys(("rope_theta", "rms_norm_eps"), POSITIVE)
  optional = dict.fromkeys((family.num_kv_heads, family.vocab_size, family.embedding_size), SIZE)
  optional |= {family.qkv_bias: FLAG, "multi_query_attention": FLAG, "pad_token_id": ID}
  check_entries(config, "config.json of the checkpoint", needed=needed, optional=optional)
  other = {key: config[key] for key, value in family.fixed.items() if config.get(key, value) not in (value, None)}
  if other:
    wanted = {key: family.fixed[key] for key in other}
    raise ValueError(f"config.json of the checkpoint: {other} is not supported; this model has {wanted}")


def _mlp_hidden_size(config: Mapping[str, Any], family: Family) -> int:
  key, ratio, width = family.sizes["mlp_hidden_size"], family.mlp_ratio, config[family.sizes["d_model"]]
  if config.get(key) is not None:
    return config[key]
  size = config[ratio] * width
  if size != int(size):
    raise ValueError(
      f"config.json of the checkpoint has {ratio}={config[ratio]}, of {width} no whole number: give {key}"
    )
  return int(size)


def _num_kv_heads(config: Mapping[str, Any], family: Family) -> int:
  stated = config.get(family.num_kv_heads)
  if not config.get("multi_query_attention"):
    return _or(stated, config[family.sizes["num_heads"]])
  if stated not in (None, 1):
    raise ValueError(
      f"config.json of the checkpoint has {family.num_kv_heads}={stated} and multi_query_attention, which means 1: "
      "set that to null where the checkpoint's keys have several heads"
    )
  return 1


def natural_family(config: ModelConfig) -> str:
  """Name the family whose layout fits a model that came from no checkpoint."""
  return next(name for name, family in FAMILIES.items() if family.shift_logits == config.shift_logits)


def model_config_to_hf(config: ModelConfig, name: str) -> dict[str, Any]:
  """Write a config.json for a model of ours, in the layout of the family `name`."""
  family = FAMILIES[name]
  common = dict(
    model_type=family.model_type,
    architectures=[family.architecture],
    auto_map=dict(family.code),
    mask_token_id=config.mask_token_id,
    eos_token_id=config.eos_token_id,
    pad_token_id=config.pad_token_id,
    rope_theta=config.rope_theta,
    rms_norm_eps=config.rms_norm_eps,
    use_cache=False,
  )
  sizes = {theirs: getattr(config, ours) for ours, theirs in family.sizes.items()}
  sizes |= {family.vocab_size: config.vocab_size, family.embedding_size: config.embedding_size}
  own = {family.num_kv_heads: config.num_kv_heads, family.qkv_bias: config.qkv_bias}
  return common | dict(family.fixed) | dict(family.written) | sizes | own


def checkpoint_places(config: ModelConfig, family: str) -> dict[str, Place]:
  """Say for every tensor that a checkpoint of this model has, by name, where it belongs in "params"."""
  names, width = FAMILIES[family], config.d_model
  table = (config.embedding_size, width)
  places = {
    f"{names.embedding}.weight": Place(("embedding",), None, table, False),
    f"{names.final_norm}.weight": Place(("final_norm", "scale"), None, (width,), False),
  }
  if not config.weight_tying:
    places[f"{names.head}.weight"] = Place(("head",), None, table[::-1], True)
  shapes = projection_shapes(config)
  for name, theirs in names.modules.items():
    for layer in range(config.num_layers):
      module = names.block.format(layer) + theirs
      if name in shapes:
        places[f"{module}.weight"] = Place(("blocks", name, "kernel"), layer, shapes[name], True)
      else:
        places[f"{module}.weight"] = Place(("blocks", name, "scale"), layer, (width,), False)
      if config.qkv_bias and name in BIASED:
        places[f"{module}.bias"] = Place(("blocks", name, "bias"), layer, shapes[name][1:], False)
  return places


def adapter_places(config: ModelConfig, family: str) -> dict[str, Place]:
  """Say for every tensor that a PEFT adapter for `config.lora` has where it belongs in the "lora" collection."""
  names, rank, shapes = FAMILIES[family], config.lora.rank, projection_shapes(config)
  places = {}
  for name in config.lora.targets:
    for layer in range(config.num_layers):
      module = PEFT_ROOT + names.block.format(layer) + names.modules[name]
      places[f"{module}.lora_A.weight"] = Place(("blocks", name, "A"), layer, (shapes[name][0], rank), True)
      places[f"{module}.lora_B.weight"] = Place(("blocks", name, "B"), layer, (rank, shapes[name][1]), True)
  return places


def projection_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
  """Give [in, out] of every projection of a block."""
  width, ffn, kv = config.d_model, config.mlp_hidden_size, config.num_kv_heads * config.head_dim
  inner = {"k_proj": (width, kv), "v_proj": (width, kv), "ff_proj": (width, ffn), "up_proj": (width, ffn)}
  return {name: inner.get(name, (ffn, width) if name == "ff_out" else (width, width)) for name in TARGETS}


def check_tensors(shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, Place], where: str) -> None:
  """Compare the tensors that there are, by their shapes, with those that there should be.

  Raises:
    ValueError: naming the tensors that are missing, left over or of another shape.
  """
  wanted = {name: place.shape[::-1] if place.is_transposed else place.shape for name, place in places.items()}
  misshapen = [name for name in wanted.keys() & shapes.keys() if tuple(shapes[name]) != wanted[name]]
  problems = [
    f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    for what, names in (
      ("missing", sorted(wanted.keys() - shapes.keys())),
      ("unknown", sorted(shapes.keys() - wanted.keys())),
      (
        "misshapen",
        [f"{name} has {list(shapes[name])}, the config asks for {list(wanted[name])}" for name in sorted(misshapen)],
      ),
    )
    if names
  ]
  if problems:
    raise ValueError(f"tensors of {where} do not fit the model's config: {'; '.join(problems)}")


def from_tensors(tensors: Mapping[str, np.ndarray], places: Mapping[str, Place], dtype: str) -> dict[str, Any]:
  """Build variables from tensors, taken one at a time.

  Raises:
    ValueError: see `check_tensors`.
  """
  check_tensors({name: tensors[name].shape for name in tensors}, places, "the checkpoint")
  variables: dict[str, Any] = {}
  for leaf, names in leaves_of(places).items():
    *parents, last = leaf
    place = places[names[0]]
    stacked = np.empty(place.shape if place.layer is None else (len(names), *place.shape), jnp.dtype(dtype))
    for name in names:
      row = ... if places[name].layer is None else places[name].layer
      stacked[row] = tensors[name].T if place.is_transposed else tensors[name]
    node = variables
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = stacked
  return variables


def to_tensors(
  read: Callable[[tuple[str, ...]], np.ndarray], places: Mapping[str, Place]
) -> Iterator[tuple[str, np.ndarray]]:
  """Yield the tensors of a checkpoint one after the other; the inverse of `from_tensors`.

  Args:
    read: gives a leaf of the variables; each is asked for once.
  """
  for leaf, names in leaves_of(places).items():
    array = read(leaf)
    for name in names:
      row = array if places[name].layer is None else array[places[name].layer]
      yield name, np.ascontiguousarray(row.T if places[name].is_transposed else row)


def reader(variables: Mapping[str, Any]) -> Callable[[tuple[str, ...]], np.ndarray]:
  """Give what `to_tensors` reads from variables that are in memory."""
  return lambda path: np.asarray(functools.reduce(lambda node, key: node[key], path, variables))


def leaves_of(places: Mapping[str, Place]) -> dict[tuple[str, ...], list[str]]:
  """Group the tensors' names by the leaf that they belong to, layers in order."""
  leaves: dict[tuple[str, ...], list[str]] = {}
  for name, place in places.items():
    leaves.setdefault(place.path, []).append(name)
  return leaves


def params_from_hf(tensors: Mapping[str, np.ndarray], config: ModelConfig, family: str = "llada") -> dict[str, Any]:
  """Build the "params" collection, in `config.param_dtype`, from a checkpoint's tensors; see `from_tensors`."""
  return from_tensors(tensors, checkpoint_places(config, family), config.param_dtype)


def params_to_hf(params: Mapping[str, Any], config: ModelConfig, family: str = "llada") -> dict[str, np.ndarray]:
  """Give the tensors of a checkpoint in Hugging Face's layout; the inverse of `params_from_hf`."""
  return dict(to_tensors(reader(params), checkpoint_places(config, family)))


def lora_config_from_peft(config: Mapping[str, Any], names: Iterable[str], family: str = "llada") -> LoraConfig:
  """Translate an adapter_config.json; the targets are those that the adapter's tensor `names` have.

  (PEFT ignores target names that match nothing, and published configs do name modules that LLaDA lacks.)

  Raises:
    ValueError: the adapters are of a kind that the model does not have, or on modules that it does not have.
  """
  check_entries(
    config,
    "adapter_config.json",
    needed={"r": SIZE, "lora_alpha": POSITIVE},
    optional={"lora_dropout": SHARE},
  )
  plain = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": INITIALISATIONS}
  other = {key: config[key] for key, known in plain.items() if config.get(key) not in (None, *known)}
  other |= {key: config[key] for key in OTHER_ADAPTERS if config.get(key)}
  if other:
    raise ValueError(f"adapter_config.json: {other} is not supported; adapters here are plain LoRA")
  ours = {theirs.split(".")[-1]: name for name, theirs in FAMILIES[family].modules.items()}
  modules = {match[1] for name in names if (match := re.search(r"\.(\w+)\.lora_[AB]\.weight$", name))}
  unknown = sorted(modules - ours.keys())
  if unknown or not modules:
    raise ValueError(f"the adapter is on {unknown or 'nothing'}; the model has {', '.join(ours)}")
  targets = tuple(name for name in TARGETS if name in {ours[module] for module in modules})
  return LoraConfig(config["r"], float(config["lora_alpha"]), float(_or(config.get("lora_dropout"), 0)), targets)


def lora_config_to_peft(lora: LoraConfig, family: str, base: str) -> dict[str, Any]:
  """Write the adapter_config.json that PEFT reads; `base` names the model that the adapters are for."""
  modules = [FAMILIES[family].modules[name].split(".")[-1] for name in lora.targets]
  if "ff_out" in modules:  # LLaDA's head has that name too, and PEFT would take it for both: a pattern, of the layers'
    modules = rf".*blocks\.\d+\.({'|'.join(modules)})"
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": lora.rank,
    "lora_alpha": lora.alpha,
    "lora_dropout": lora.dropout,
    "target_modules": modules,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
  }


def adapters_from_peft(tensors: Mapping[str, np.ndarray], config: ModelConfig, family: str = "llada") -> dict[str, Any]:
  """Build the "lora" collection, float32, from the tensors of a PEFT adapter for `config.lora`; see `from_tensors`."""
  return from_tensors(tensors, adapter_places(config, family), "float32")


def adapters_to_peft(adapters: Mapping[str, Any], config: ModelConfig, family: str = "llada") -> dict[str, np.ndarray]:
  """Give the tensors of a PEFT adapter; the inverse of `adapters_from_peft`."""
  return dict(to_tensors(reader(adapters), adapter_places(config, family)))
