"""Where each tensor of a checkpoint in Hugging Face's layout, or of a PEFT adapter, belongs in our variables.

Torch stores a projection as [out, in] for each layer; we store [layers, in, out]. A `Place` describes one tensor, and
conversion and export both follow from the places.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from dmpo_jax.hub.families import FAMILIES
from dmpo_jax.models.config import ModelConfig
from dmpo_jax.models.lora import TARGETS

PEFT_ROOT = "base_model.model."
BIASED = ("q_proj", "k_proj", "v_proj")
QK_NORMS = ("q_norm", "k_norm")

Path = tuple[str, ...]  # keys down to a leaf of our variables


class Place(NamedTuple):
  """Where a tensor of a checkpoint belongs in our variables."""

  path: Path
  layer: int | None  # index into the leaf, which is stacked over the layers; None: the tensor is the whole leaf
  shape: tuple[int, ...]  # of one layer, in our order of axes
  is_transposed: bool  # whether torch has the axes in the other order

  @property
  def torch_shape(self) -> tuple[int, ...]:
    """Shape of the tensor in the checkpoint."""
    return self.shape[::-1] if self.is_transposed else self.shape


def checkpoint_places(config: ModelConfig, family: str) -> dict[str, Place]:
  """Return the place in "params" of every tensor that a checkpoint of this model has, by the tensor's name."""
  names, width = FAMILIES[family], config.d_model
  table = (config.embedding_size, width)
  places = {
    f"{names.embedding}.weight": Place(("embedding",), None, table, False),
    f"{names.final_norm}.weight": Place(("final_norm", "scale"), None, (width,), False),
  }
  if not config.weight_tying:
    places[f"{names.head}.weight"] = Place(("head",), None, table[::-1], True)
  shapes = projection_shapes(config)
  norms = dict(attn_norm=width, ff_norm=width) | (dict.fromkeys(QK_NORMS, config.head_dim) if config.qk_norm else {})
  for name, theirs in names.modules.items():
    if name not in shapes and name not in norms:
      continue
    for layer in range(config.num_layers):
      module = names.block.format(layer) + theirs
      if name in shapes:
        places[f"{module}.weight"] = Place(("blocks", name, "kernel"), layer, shapes[name], True)
      else:
        places[f"{module}.weight"] = Place(("blocks", name, "scale"), layer, (norms[name],), False)
      if config.qkv_bias and name in BIASED:
        places[f"{module}.bias"] = Place(("blocks", name, "bias"), layer, shapes[name][1:], False)
  return places


def adapter_places(config: ModelConfig, family: str) -> dict[str, Place]:
  """Return the place in the "lora" collection of every tensor that a PEFT adapter for `config.lora` has."""
  names, shapes = FAMILIES[family], projection_shapes(config)
  assert config.lora is not None
  places, rank = {}, config.lora.rank
  for name in config.lora.targets:
    for layer in range(config.num_layers):
      module = PEFT_ROOT + names.block.format(layer) + names.modules[name]
      places[f"{module}.lora_A.weight"] = Place(("blocks", name, "A"), layer, (shapes[name][0], rank), True)
      places[f"{module}.lora_B.weight"] = Place(("blocks", name, "B"), layer, (rank, shapes[name][1]), True)
  return places


def projection_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
  """Return [in, out] of every projection of a block."""
  width, ffn = config.d_model, config.mlp_hidden_size
  heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  shapes = dict(
    q_proj=(width, heads),
    k_proj=(width, kv_heads),
    v_proj=(width, kv_heads),
    attn_out=(heads, width),
    ff_proj=(width, ffn),
    up_proj=(width, ffn),
    ff_out=(ffn, width),
  )
  return {name: shapes[name] for name in TARGETS}


def check_tensors(shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, Place], where: str) -> None:
  """Compare the shapes of the tensors that are there with those that the model needs.

  Raises:
    ValueError: naming the tensors that are missing, unknown or of another shape.
  """
  wanted = {name: place.torch_shape for name, place in places.items()}
  misshapen = [name for name in wanted.keys() & shapes.keys() if tuple(shapes[name]) != wanted[name]]
  problems = {
    "missing": sorted(wanted.keys() - shapes.keys()),
    "unknown": sorted(shapes.keys() - wanted.keys()),
    "misshapen": [
      f"{name} has {list(shapes[name])}, the config asks for {list(wanted[name])}" for name in sorted(misshapen)
    ],
  }
  if any(problems.values()):
    listed = "; ".join(
      f"{len(names)} {problem} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
      for problem, names in problems.items()
      if names
    )
    raise ValueError(f"tensors of {where} do not fit the model's config: {listed}")


def to_tensors(read: Callable[[Path], np.ndarray], places: Mapping[str, Place]) -> Iterator[tuple[str, np.ndarray]]:
  """Yield the names and values of a checkpoint's tensors, one at a time.

  Args:
    read: returns a leaf of our variables; called once for each.
  """
  for leaf, names in leaves_of(places).items():
    array = read(leaf)
    for name in names:
      row = array if places[name].layer is None else array[places[name].layer]
      yield name, np.ascontiguousarray(row.T if places[name].is_transposed else row)


def leaves_of(places: Mapping[str, Place]) -> dict[Path, list[str]]:
  """Group tensor names by the leaf that they belong to, in the order of layers."""
  leaves: dict[Path, list[str]] = {}
  for name, place in places.items():
    leaves.setdefault(place.path, []).append(name)
  return leaves
