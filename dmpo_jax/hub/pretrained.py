"""The folder that a converted checkpoint lives in: its parameters, which model they are for, and what came with them.

params/         the arrays, an Orbax checkpoint; last to be written, so a folder without it is nothing
model.json      sizes and special ids of the model, and its family; or
adapter.json    settings of the adapters that `params` holds
config.json, tokenizer.json, ...   files of the original folder, for tokenisation and for the way back
digests.json    of the files beside params, which has its own
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

from dmpo_jax import files
from dmpo_jax.digests import DIGESTS
from dmpo_jax.files import Unreadable
from dmpo_jax.models.lora import LoraConfig
from dmpo_jax.models.transformer import OLDER, ModelConfig

MODEL_FILE = "model.json"
ADAPTER_FILE = "adapter.json"
PARAMS = "params"
SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")  # that travel along: tokenizer, config, the model's code

# Fields of the model that a checkpoint decides; the others are the run's own.
OWN_FIELDS = ("dtype", "param_dtype", "remat", "attention", "layer_rows", "lora")
FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig) if field.name not in OWN_FIELDS)
SPECIAL_IDS = ("mask_token_id", "eos_token_id", "pad_token_id")  # those that the tokenizer has, too
_TYPES = {name: typing.get_type_hints(ModelConfig)[name] for name in FIELDS}
_REMEDY = "convert the checkpoint again"

# What the configuration may leave open, and its value where no checkpoint says it: a model for tests and laptops.
SMALL = {
  "d_model": 64,
  "num_layers": 4,
  "num_heads": 4,
  "num_kv_heads": 4,
  "mlp_hidden_size": 128,
  "rope_theta": 10_000.0,
  "rms_norm_eps": 1e-5,
  "weight_tying": False,
  "qkv_bias": False,
  "shift_logits": False,
  "quantization": "none",
}
ROUNDING = 1e-6  # of a float that a person has typed, relative: checkpoints hold float32 ones


class Pretrained(NamedTuple):
  """What a converted folder says of its model."""

  family: str  # a name in `families.FAMILIES`
  fields: dict[str, Any]  # values of `FIELDS`
  origin: str = ""  # the hub's name or the path of what was converted; "" where an earlier version did not say

  def model_config(self, **own: Any) -> ModelConfig:
    """Build the model's configuration with the run's own fields."""
    return ModelConfig(**self.fields, **own)


def filled(config: ConfigDict) -> ConfigDict:
  """Return a copy of the configuration in which `model` says everything: what it left open (None) is the checkpoint's.

  Without a checkpoint that describes its model it is that of SMALL. A float that is the checkpoint's but for rounding
  becomes the checkpoint's.

  Raises:
    ValueError: the checkpoint's description cannot be used.
  """
  config = copy.deepcopy(config)
  own = config.model
  stored = read_model(own.init_from) if own.get("init_from") else None
  fields = SMALL if stored is None else stored.fields
  for name in SMALL.keys() & own.keys():
    value, known = own[name], fields[name]
    is_rounded = stored is not None and isinstance(value, float) and math.isclose(value, known, rel_tol=ROUNDING)
    if value is None or is_rounded:
      own[name] = known
  return config


def params_path(folder: epath.PathLike) -> epath.Path:
  """Return where the arrays are: in a converted folder's `params`, or the folder itself if a run saved it."""
  folder = epath.Path(folder)
  is_converted = any((folder / name).exists() for name in (MODEL_FILE, ADAPTER_FILE))
  return folder / PARAMS if is_converted else folder


def read_model(folder: epath.PathLike) -> Pretrained | None:
  """Read which model a converted folder is of; None if the folder holds nothing but parameters.

  Raises:
    Unreadable: the description cannot be used.
  """
  path = epath.Path(folder) / MODEL_FILE
  if not path.exists():
    return None
  about = _read(path, {"family": str, "origin": str, **_TYPES}, OLDER | {"origin": ""})
  found = Pretrained(about.pop("family"), origin=about.pop("origin"), fields=about)
  try:
    found.model_config()
  except ValueError as error:
    raise Unreadable(f"{path} is of no model ({error}): {_REMEDY}") from error
  return found


def write_model(folder: epath.Path, family: str, config: ModelConfig, origin: str) -> None:
  """Say which model a folder's parameters are of; see `Pretrained`."""
  about = {"family": family, "origin": origin} | {name: getattr(config, name) for name in FIELDS}
  (folder / MODEL_FILE).write_text(json.dumps(about, indent=2) + "\n")


def read_adapter(folder: epath.PathLike) -> LoraConfig | None:
  """Read the settings of a converted adapter; None if the folder holds nothing but arrays.

  Raises:
    ValueError: the description cannot be used.
  """
  path = epath.Path(folder) / ADAPTER_FILE
  if not path.exists():
    return None
  about = _read(path, {"rank": int, "alpha": float, "dropout": float, "targets": list}, {})
  return LoraConfig(**about | {"targets": tuple(about["targets"])})


def write_adapter(folder: epath.Path, lora: LoraConfig) -> None:
  """Say what the adapters in a folder's parameters are."""
  (folder / ADAPTER_FILE).write_text(json.dumps(dataclasses.asdict(lora), indent=2) + "\n")


def check_model(asked: Mapping[str, Any], stored: Mapping[str, Any], where: str) -> None:
  """Compare what the configuration and the tokenizer say of the model with what its checkpoint says.

  Raises:
    ValueError: listing what differs.
  """
  differing = [
    f"{'the tokenizer' if name in SPECIAL_IDS else 'config.model'} has {name} = {value}, the checkpoint {stored[name]}"
    for name, value in asked.items()
    if value != stored[name] and not (value == 0 and name in ("vocab_size", "embedding_size"))
  ]
  if differing:
    if any(asked[name] != stored[name] for name in SPECIAL_IDS):
      differing.append("(the folder's own tokenizer is tokenizer.name='huggingface' with tokenizer.path='')")
    raise ValueError(f"model.init_from={where!r} is of another model:\n  " + "\n  ".join(differing))


def check_adapter(lora: LoraConfig, where: str) -> None:
  """Compare the adapters that the configuration asks for with those that it starts from.

  Raises:
    ValueError: listing what differs.
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
  """Copy what travels along with the weights from one folder to another."""
  for pattern in SIDE_FILES:
    for path in source.glob(pattern):
      if not path.name.endswith(".safetensors.index.json") and path.name not in (MODEL_FILE, ADAPTER_FILE, DIGESTS):
        (out / path.name).write_bytes(path.read_bytes())


def _read(path: epath.Path, types: Mapping[str, type], older: Mapping[str, Any]) -> dict[str, Any]:
  about = files.read_object(path, _REMEDY)
  missing, unknown = sorted(types.keys() - about.keys() - older.keys()), sorted(about.keys() - types.keys())
  if missing or unknown:
    raise Unreadable(f"{path} lacks {missing} and has {unknown} beside what is known: {_REMEDY}")
  for name, value in about.items():
    kinds = (int, float) if types[name] is float else (types[name],)
    if type(value) not in kinds:
      raise Unreadable(f"{path} has {name} = {value!r}, which is no {types[name].__name__}: {_REMEDY}")
  return {**older, **about}
