"""Where each tensor of a checkpoint in Hugging Face's layout, or of a PEFT adapter, belongs in our variables.

Torch stores a projection as [out, in] for each layer; we store [layers, in, out], or [layers, experts, in, out]. A
`Place` describes one tensor, and conversion and export both follow from the places.

A tensor that holds several of our arrays, one below the other (LLaDA2's queries, keys and values), has a place for each
part: `tensor#ours`. `Parts` reads such a tensor, and `to_tensors` puts it together.
"""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dmpo_jax.hub.families import FAMILIES, Family
from dmpo_jax.models.config import ModelConfig, Run

PEFT_ROOT = "base_model.model."
BIASED = ("q_proj", "k_proj", "v_proj")
PART = "#"
EXPERT_KERNELS = ("ff_proj", "up_proj", "ff_out")
QK_NORMS = ("q_norm", "k_norm")

Path = tuple[str, ...]  # keys down to a leaf of our variables


class Place(NamedTuple):
  """Where a tensor of a checkpoint belongs in our variables."""

  path: Path
  index: tuple[int, ...]  # into the leaf, stacked over layers (and experts); (): the tensor is the whole leaf
  shape: tuple[int, ...]  # of the tensor, in our order of axes
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
    f"{names.embedding}.weight": Place(("embedding",), (), table, False),
    f"{names.final_norm}.weight": Place(("final_norm", "scale"), (), (width,), False),
  }
  if not config.weight_tying:
    places[f"{names.head}.weight"] = Place(("head",), (), table[::-1], True)
  norms = dict(attn_norm=width, ff_norm=width) | (dict.fromkeys(QK_NORMS, config.head_dim) if config.qk_norm else {})
  biased = (*(BIASED if config.qkv_bias else ()), *(("attn_out",) if config.out_bias else ()))
  for run in config.runs:
    shapes = projection_shapes(config, run)
    for name, theirs in names.modules.items():
      part = part_of(names, name)
      for index, module in enumerate(_modules(names, run, theirs)):
        if name in shapes:
          places[f"{module}.weight{part}"] = Place((run.name, name, "kernel"), (index,), shapes[name], True)
        elif name in norms:
          places[f"{module}.weight"] = Place((run.name, name, "scale"), (index,), (norms[name],), False)
        if name in shapes and name in biased:
          places[f"{module}.bias{part}"] = Place((run.name, name, "bias"), (index,), shapes[name][1:], False)
    if run.has_experts:
      places |= _expert_places(config, names, run)
  return places


def part_of(names: Family, module: str) -> str:
  """Return the end of a place's name, if the module is a part of a tensor; "" if it is a tensor itself."""
  return f"{PART}{module}" if [*names.modules.values()].count(names.modules[module]) > 1 else ""


def whole(name: str) -> str:
  """Return the tensor of a place's name."""
  return name.partition(PART)[0]


def parts_of(places: Mapping[str, Place]) -> dict[str, list[str]]:
  """Group the names of places by tensor, its parts from the top."""
  found: dict[str, list[str]] = {}
  for name in places:
    found.setdefault(whole(name), []).append(name)
  return found


def tensor_shape(places: Mapping[str, Place], parts: Sequence[str]) -> tuple[int, ...]:
  """Return the shape of the tensor that has these parts, in the checkpoint."""
  return sum(places[part].torch_shape[0] for part in parts), *places[parts[0]].torch_shape[1:]


def _modules(names: Family, run: Run, theirs: str) -> list[str]:
  """Name a module in each layer of a run."""
  return [names.block.format(layer) + theirs for layer in range(run.first, run.first + run.length)]


def _expert_places(config: ModelConfig, names: Family, run: Run) -> dict[str, Place]:
  """Return the places of the router and of every expert's kernels in a run of layers."""
  width, hidden, path = config.d_model, config.expert_size, (run.name, "experts")
  shapes = {"ff_proj": (width, hidden), "up_proj": (width, hidden), "ff_out": (hidden, width)}
  places = {}
  for layer, module in enumerate(_modules(names, run, names.router)):
    places[f"{module}.weight"] = Place((*path, "router"), (layer,), (width, config.num_experts), True)
  if config.expert_bias:
    for layer, name in enumerate(_modules(names, run, names.expert_bias)):
      places[name] = Place((*path, "bias"), (layer,), (config.num_experts,), False)
  for name in EXPERT_KERNELS:
    for layer, module in enumerate(_modules(names, run, names.expert)):
      for expert in range(config.num_experts):
        tensor = f"{module.replace('{expert}', str(expert))}.{names.modules[name].rpartition('.')[2]}.weight"
        places[tensor] = Place((*path, f"{name}_kernel"), (layer, expert), shapes[name], True)
  return places


def adapter_places(config: ModelConfig, family: str) -> dict[str, Place]:
  """Return the place in the "lora" collection of every tensor that a PEFT adapter for `config.lora` has.

  Those on a part of a tensor are as `fused.take_apart` leaves them.
  """
  names = FAMILIES[family]
  assert config.lora is not None
  places, rank = {}, config.lora.rank
  for run in config.runs:
    shapes = projection_shapes(config, run)
    for name in (name for name in config.lora.targets if name in shapes):
      part = part_of(names, name)
      for index, module in enumerate(_modules(names, run, names.modules[name])):
        a, b = ((run.name, name, matrix) for matrix in "AB")
        places[f"{PEFT_ROOT}{module}.lora_A.weight{part}"] = Place(a, (index,), (shapes[name][0], rank), True)
        places[f"{PEFT_ROOT}{module}.lora_B.weight{part}"] = Place(b, (index,), (rank, shapes[name][1]), True)
  return places


def projection_shapes(config: ModelConfig, run: Run) -> dict[str, tuple[int, int]]:
  """Return [in, out] of every projection of a run's layers, but those of experts."""
  width, ffn, shared = config.d_model, config.mlp_hidden_size, config.shared_expert_size
  heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  shapes = dict(
    q_proj=(width, heads),
    k_proj=(width, kv_heads),
    v_proj=(width, kv_heads),
    attn_out=(heads, width),
  )
  if not run.has_experts:
    return shapes | dict(ff_proj=(width, ffn), up_proj=(width, ffn), ff_out=(ffn, width))
  if shared:
    shapes |= dict(shared_ff_proj=(width, shared), shared_up_proj=(width, shared), shared_ff_out=(shared, width))
  return shapes


def check_tensors(shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, Place], where: str) -> None:
  """Compare the shapes of the tensors that are there with those that the model needs.

  Raises:
    ValueError: naming the tensors that are missing, unknown or of another shape.
  """
  _compare(
    shapes,
    {name: tensor_shape(places, parts) for name, parts in parts_of(places).items()},
    where,
  )


def check_places(shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, Place], where: str) -> None:
  """Do the same with the parts of tensors, as `to_arrays` gives them."""
  _compare(shapes, {name: place.torch_shape for name, place in places.items()}, where)


def _compare(shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: str) -> None:
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


def cast(path: Path, stored: DTypeLike, asked: DTypeLike) -> np.dtype:
  """Return the dtype in which a leaf is kept if `asked` is wanted: an expert bias is not rounded.

  It decides between experts that are almost equal.
  """
  return np.dtype(jnp.promote_types(stored, asked) if path[-2:] == ("experts", "bias") else asked)


def to_tensors(read: Callable[[Path], np.ndarray], places: Mapping[str, Place]) -> Iterator[tuple[str, np.ndarray]]:
  """Yield the names and values of a checkpoint's tensors, one at a time; a tensor of parts once it has its last.

  Args:
    read: returns a leaf of our variables; called once for each.
  """
  parts, found = parts_of(places), collections.defaultdict(dict)
  for name, array in to_arrays(read, places):
    tensor = whole(name)
    found[tensor][name] = array
    if len(found[tensor]) == len(parts[tensor]):
      own = found.pop(tensor)
      yield tensor, np.concatenate([own[part] for part in parts[tensor]]) if len(own) > 1 else array


def to_arrays(read: Callable[[Path], np.ndarray], places: Mapping[str, Place]) -> Iterator[tuple[str, np.ndarray]]:
  """Yield the values of places, as `to_tensors` does, but parts by themselves."""
  for leaf, names in leaves_of(places).items():
    array = read(leaf)
    for name in names:
      row = array[places[name].index]
      yield name, np.ascontiguousarray(row.T if places[name].is_transposed else row)


def leaves_of(places: Mapping[str, Place]) -> dict[Path, list[str]]:
  """Group tensor names by the leaf that they belong to, in the order of layers."""
  leaves: dict[Path, list[str]] = {}
  for name, place in places.items():
    leaves.setdefault(place.path, []).append(name)
  return leaves
