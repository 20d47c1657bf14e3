"""The folder of a converted checkpoint or adapter:

params/         the arrays, an Orbax checkpoint; written last, so a folder without it is incomplete
model.json      the model's sizes, special ids and family; or
adapter.json    the settings of the adapters in `params`
config.json, tokenizer.json, ...   files of the original folder, for tokenisation and for export
digests.json    digests of the files beside params, which has its own
"""

import copy
import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from dmpo_jax import digests, files
from dmpo_jax.digests import DIGESTS
from dmpo_jax.files import Unreadable
from dmpo_jax.models.config import OLDER, ModelConfig
from dmpo_jax.models.lora import LoraConfig

MODEL_FILE = "model.json"
MODEL = "model"  # the same, in the metadata of parameters that a run has saved
ADAPTER_FILE = "adapter.json"
PARAMS = "params"
SIDE_FILES = (
  "*.json",
  "*.jinja",
  "*.txt",
  "*.model",
  "*.py",
)  # files beside the weights that are copied

# ModelConfig's fields that a run, or its tokenizer, decides; a checkpoint decides the others.
OWN_FIELDS = ("dtype", "param_dtype", "remat", "attention", "layer_rows", "lora", "end_token_ids")
FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig) if field.name not in OWN_FIELDS)
SPECIAL_IDS = ("mask_token_id", "eos_token_id", "pad_token_id")  # the tokenizer has them too
_HINTS = typing.get_type_hints(ModelConfig)
_TYPES = {name: list if typing.get_origin(_HINTS[name]) is tuple else _HINTS[name] for name in FIELDS}  # in JSON
_REMEDY = "convert the checkpoint again"

# Keys of config.model that may be None, and their values without a checkpoint: a model for tests and laptops.
SMALL = {
  "d_model": 64,
  "num_layers": 4,
  "num_heads": 4,
  "num_kv_heads": 4,
  "mlp_hidden_size": 128,
  "rope_theta": 10_000.0,
  "rms_norm_eps": 1e-5,
  "weight_tying": False,
  "rotary_fraction": 1.0,
  "rope_scaling": (),
  "qkv_bias": False,
  "qk_norm": False,
  "block_length": 0,
  "shift_logits": False,
  "quantization": "none",
  "out_bias": False,
  "clip_qkv": 0.0,
  "num_experts": 0,
  "experts_per_token": 0,
  "expert_size": 0,
  "shared_expert_size": 0,
  "expert_layers": (),
  "expert_bias": False,
  "expert_groups": 1,
  "expert_groups_per_token": 1,
  "expert_scale": 1.0,
  "router": "none",
}
ROUNDING = 1e-6  # relative tolerance between a float in the configuration and a checkpoint's float32


class Pretrained(NamedTuple):
  """The description of a converted model."""

  family: str  # a name in `families.FAMILIES`
  fields: dict[str, Any]  # values of `FIELDS`
  origin: str = ""  # name on the hub or path of the original; "" if an earlier version converted it

  def model_config(self, **own: Any) -> ModelConfig:
    """Build the model's configuration; `own` are the fields that the run decides."""
    return ModelConfig(**self.fields, **own)


def filled(config: ConfigDict) -> ConfigDict:
  """Return a copy of the configuration in which keys of `model` that are None have the checkpoint's values.

  Without a converted checkpoint they have those of SMALL, and `head_dim` stays None. Floats that differ from the
  checkpoint's by rounding get its values.

  Raises:
    ValueError: the checkpoint's description is damaged.
  """
  config = copy.deepcopy(config)
  model = config.model
  stored = read_fields(model.init_from) if model.get("init_from") else None
  fields = SMALL if stored is None else stored
  for name in SMALL.keys() & model.keys():
    value, known = model[name], fields[name]
    is_rounded = stored is not None and isinstance(value, float) and math.isclose(value, known, rel_tol=ROUNDING)
    if value is None or is_rounded:
      model[name] = known
  if stored is not None and "head_dim" in model and model.head_dim is None:
    model.head_dim = stored["head_dim"]
  return config


def params_path(folder: epath.PathLike) -> epath.Path:
  """Return the folder of the arrays: `params` in a converted folder, else the folder itself."""
  folder = epath.Path(folder)
  is_converted = any((folder / name).exists() for name in (MODEL_FILE, ADAPTER_FILE))
  return folder / PARAMS if is_converted else folder


def read_model(folder: epath.PathLike) -> Pretrained | None:
  """Read the description of a converted model; None if the folder holds only parameters.

  Raises:
    Unreadable: the description is damaged.
  """
  path = epath.Path(folder) / MODEL_FILE
  if not path.exists():
    return None
  fields = _read(path, {"family": str, "origin": str, **_TYPES}, OLDER | {"origin": ""})
  family, origin = fields.pop("family"), fields.pop("origin")
  try:
    model = ModelConfig(**{name: as_field(value) for name, value in fields.items()})
  except (TypeError, ValueError) as error:
    raise Unreadable(f"{path} describes no valid model ({error}): {_REMEDY}") from error
  return Pretrained(family, {name: getattr(model, name) for name in FIELDS}, origin)


def read_fields(folder: epath.PathLike) -> dict[str, Any] | None:
  """Read the fields of the model that a folder's parameters are of, converted or a run's; None where it has none.

  Raises:
    Unreadable: they are damaged.
  """
  converted = read_model(folder)
  if converted is not None:
    return converted.fields
  saved = digests.read_metadata(epath.Path(folder)).get(MODEL)
  return None if saved is None else {name: as_field(value) for name, value in (OLDER | saved).items() if name in FIELDS}


def description(model: ModelConfig) -> dict[str, Any]:
  """Return what a run saves with parameters, for `read_fields`."""
  return {MODEL: {name: getattr(model, name) for name in FIELDS}}


def as_field(value: Any) -> Any:
  """Return a value as ModelConfig has it: a list, of JSON or of a configuration, becomes a tuple of floats."""
  return tuple(map(float, value)) if isinstance(value, list | tuple) else value


def write_model(folder: epath.Path, family: str, config: ModelConfig, origin: str) -> None:
  """Write the description of a converted model; see `Pretrained`."""
  fields = {"family": family, "origin": origin} | {name: getattr(config, name) for name in FIELDS}
  (folder / MODEL_FILE).write_text(json.dumps(fields, indent=2) + "\n")


def read_adapter(folder: epath.PathLike) -> LoraConfig | None:
  """Read the settings of a converted adapter; None if the folder holds only arrays.

  Raises:
    ValueError: the settings are damaged.
  """
  path = epath.Path(folder) / ADAPTER_FILE
  if not path.exists():
    return None
  fields = _read(path, {"rank": int, "alpha": float, "dropout": float, "targets": list}, {})
  targets = tuple(fields.pop("targets"))
  return LoraConfig(**fields, targets=targets)


def write_adapter(folder: epath.Path, lora: LoraConfig) -> None:
  """Write the settings of a converted adapter."""
  (folder / ADAPTER_FILE).write_text(json.dumps(dataclasses.asdict(lora), indent=2) + "\n")


def check_model(wanted: Mapping[str, Any], stored: Mapping[str, Any], where: str) -> None:
  """Compare the model of the configuration and the tokenizer with the checkpoint's.

  Raises:
    ValueError: they differ; the differences are listed.
  """
  differing = [
    f"{'the tokenizer' if name in SPECIAL_IDS else 'config.model'} has {name} = {value}, the checkpoint {stored[name]}"
    for name, value in wanted.items()
    if value != stored[name] and not (value == 0 and name in ("vocab_size", "embedding_size"))
  ]
  if differing:
    if wanted["block_length"] != stored["block_length"]:
      differing.append("(model.allow_other_blocks=True runs it with other blocks than it was trained for)")
    if any(wanted[name] != stored[name] for name in SPECIAL_IDS):
      differing.append("(the folder's own tokenizer is tokenizer.name='huggingface' with tokenizer.path='')")
    raise ValueError(f"model.init_from={where!r} is of another model:\n  " + "\n  ".join(differing))


def check_adapter(lora: LoraConfig, where: str) -> None:
  """Compare the configuration's adapters with those in the folder that they start from.

  Raises:
    ValueError: they differ; the differences are listed.
  """
  stored = read_adapter(where) if where else None
  if stored is None:
    return
  differing = [
    f"config.model.lora has {name} = {getattr(lora, name)}, the adapters {getattr(stored, name)}"
    for name in ("rank", "alpha", "targets")
    if getattr(lora, name) != getattr(stored, name)
  ]
  if differing:
    raise ValueError(f"model.lora.init_from={where!r} holds other adapters:\n  " + "\n  ".join(differing))


def copy_side_files(source: epath.Path, out: epath.Path) -> None:
  """Copy the files beside the weights from one folder to another."""
  for pattern in SIDE_FILES:
    for path in source.glob(pattern):
      if not path.name.endswith(".safetensors.index.json") and path.name not in (MODEL_FILE, ADAPTER_FILE, DIGESTS):
        (out / path.name).write_bytes(path.read_bytes())


def _read(path: epath.Path, types: Mapping[str, type], older: Mapping[str, Any]) -> dict[str, Any]:
  fields = files.read_object(path, _REMEDY)
  missing, unknown = sorted(types.keys() - fields.keys() - older.keys()), sorted(fields.keys() - types.keys())
  if missing or unknown:
    raise Unreadable(f"{path}: missing keys {missing}, unknown keys {unknown}: {_REMEDY}")
  for name, value in fields.items():
    kinds = (int, float) if types[name] is float else (types[name],)
    if type(value) not in kinds:
      raise Unreadable(f"{path} has {name} = {value!r}, which is not of type {types[name].__name__}: {_REMEDY}")
  return {**older, **fields}
