"""The folder that a converted checkpoint lives in: its parameters, which model they are for, and what came with them.

params/         the arrays, an Orbax checkpoint; last to be written, so a folder without it is nothing
model.json      sizes and special ids of the model, and its family; or
adapter.json    settings of the adapters that `params` holds
config.json, tokenizer.json, ...   files of the original folder, for tokenisation and for the way back
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from dmpo_jax.models.llada import OLDER, ModelConfig
from dmpo_jax.models.lora import LoraConfig

MODEL_FILE = "model.json"
ADAPTER_FILE = "adapter.json"
PARAMS = "params"
SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")  # that travel along: tokenizer, config, the model's code

# Fields of the model that a checkpoint decides; the others are the run's own.
OWN_FIELDS = ("dtype", "param_dtype", "remat", "attention", "layer_rows", "lora")
FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig) if field.name not in OWN_FIELDS)


class Pretrained(NamedTuple):
  """What a converted folder says of its model."""

  family: str  # a name in `families.FAMILIES`
  fields: dict[str, Any]  # values of `FIELDS`

  def model_config(self, **own: Any) -> ModelConfig:
    """Build the model's configuration with the run's own fields."""
    return ModelConfig(**self.fields, **own)


def params_path(folder: epath.PathLike) -> epath.Path:
  """Return where the arrays are: in a converted folder's `params`, or the folder itself if a run saved it."""
  folder = epath.Path(folder)
  is_converted = any((folder / name).exists() for name in (MODEL_FILE, ADAPTER_FILE))
  return folder / PARAMS if is_converted else folder


def read_model(folder: epath.PathLike) -> Pretrained | None:
  """Read which model a converted folder is of; None if the folder holds nothing but parameters.

  Raises:
    ValueError: the description cannot be used.
  """
  path = epath.Path(folder) / MODEL_FILE
  if not path.exists():
    return None
  about = _read(path, {"family", *FIELDS}, OLDER)
  return Pretrained(about.pop("family"), about)


def write_model(folder: epath.Path, family: str, config: ModelConfig) -> None:
  """Say which model a folder's parameters are of."""
  about = {"family": family} | {name: getattr(config, name) for name in FIELDS}
  (folder / MODEL_FILE).write_text(json.dumps(about, indent=2) + "\n")


def read_adapter(folder: epath.PathLike) -> LoraConfig | None:
  """Read the settings of a converted adapter; None if the folder holds nothing but arrays.

  Raises:
    ValueError: the description cannot be used.
  """
  path = epath.Path(folder) / ADAPTER_FILE
  if not path.exists():
    return None
  about = _read(path, {field.name for field in dataclasses.fields(LoraConfig)}, {})
  return LoraConfig(**about | {"targets": tuple(about["targets"])})


def write_adapter(folder: epath.Path, lora: LoraConfig) -> None:
  """Say what the adapters in a folder's parameters are."""
  (folder / ADAPTER_FILE).write_text(json.dumps(dataclasses.asdict(lora), indent=2) + "\n")


def copy_side_files(source: epath.Path, out: epath.Path) -> None:
  """Copy what travels along with the weights from one folder to another."""
  for pattern in SIDE_FILES:
    for path in source.glob(pattern):
      if not path.name.endswith(".safetensors.index.json") and path.name not in (MODEL_FILE, ADAPTER_FILE):
        (out / path.name).write_bytes(path.read_bytes())


def _read(path: epath.Path, keys: set[str], older: Mapping[str, Any]) -> dict[str, Any]:
  try:
    about = dict(json.loads(path.read_text()))
  except (ValueError, TypeError) as error:
    raise ValueError(f"{path} cannot be read ({error}); convert the checkpoint again") from error
  missing, unknown = sorted(keys - about.keys() - older.keys()), sorted(about.keys() - keys)
  if missing or unknown:
    raise ValueError(f"{path} lacks {missing} and has {unknown} beside what is known; convert the checkpoint again")
  return {**older, **about}
