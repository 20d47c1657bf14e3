"""PEFT adapters on a tensor that holds several of our projections (LLaDA2's queries, keys and values).

Such an adapter is B [out, rank] A [rank, in] for all of them. Ours are one for each projection. So a file has either
the same A for all parts, as an adapter that PEFT trained has. Or their A stand one below the other, at so many times
the rank, and each has its own columns of B, which are zero in the rows of the others. PEFT scales both by alpha / rank.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dmpo_jax.hub.families import FAMILIES, Family
from dmpo_jax.hub.layout import PART, projection_shapes
from dmpo_jax.hub.shards import Shards, Tensor
from dmpo_jax.models.config import ModelConfig

PATTERNS = ("rank_pattern", "alpha_pattern")


class Taken(Shards):
  """The adapters of a folder, of which some have been taken apart, or left out."""

  def __init__(self, shards: Shards, apart: Mapping[str, np.ndarray], without: set[str]):
    self._shards, self._apart = shards, apart
    self.tensors = {name: tensor for name, tensor in shards.tensors.items() if name not in without}
    file = next(iter(shards.tensors.values())).file
    self.tensors |= {name: Tensor(file, array.dtype, array.shape, 0) for name, array in apart.items()}

  def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
    """Read the rows [start, stop) of a tensor."""
    return self._apart[name][start:stop] if name in self._apart else self._shards.read_rows(name, start, stop)


def fused_modules(family: Family) -> dict[str, list[str]]:
  """Return the modules of a family that hold several of ours, and these from the top."""
  found: dict[str, list[str]] = {}
  for ours, theirs in family.modules.items():
    found.setdefault(theirs, []).append(ours)
  return {theirs: ours for theirs, ours in found.items() if len(ours) > 1}


def take_apart(
  shards: Shards, settings: Mapping[str, Any], config: ModelConfig, family: str
) -> tuple[Shards, dict[str, Any]]:
  """Give each projection its own adapter, and the settings without what such a file needs to say.

  Raises:
    ValueError: an adapter has neither of the two forms.
  """
  rank, alpha, plain = settings.get("r"), settings.get("lora_alpha"), dict(settings)
  for theirs, ours in fused_modules(FAMILIES[family]).items():
    names = [name for name in shards.tensors if name.endswith(f".{theirs}.lora_A.weight")]
    if not names or not isinstance(rank, int) or not isinstance(alpha, int | float):
      continue
    stacked = {"rank_pattern": rank * len(ours), "alpha_pattern": alpha * len(ours)}
    if all(plain.get(key) == {theirs.rpartition(".")[2]: value} for key, value in stacked.items()):
      plain |= {"rank_pattern": {}, "alpha_pattern": {}}
    widths = [projection_shapes(config, config.runs[0])[name][1] for name in ours]
    apart: dict[str, np.ndarray] = {}
    for name in names:
      for part, (a, b) in zip(ours, _take_apart(shards, name, rank, widths), strict=True):
        apart |= {f"{name}{PART}{part}": a, f"{_b(name)}{PART}{part}": b}
    unused = {part for part in ours if not any(apart[f"{name}{PART}{part}"].any() for name in names)}
    apart = {name: array for name, array in apart.items() if name.rpartition(PART)[2] not in unused}
    shards = Taken(shards, apart, {*names, *map(_b, names)})
  return shards, plain


def _take_apart(shards: Shards, name: str, rank: int, widths: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
  """Return A and B of every part."""
  a, num, other = shards[name], len(widths), _b(name)
  b = shards[other] if other in shards else np.zeros((0, 0))
  if a.shape[0] not in (rank, rank * num) or b.shape != (sum(widths), a.shape[0]):
    raise ValueError(
      f"{name} has {list(a.shape)} and {other} {list(b.shape)}: the rank must be {rank}, or {rank * num} for {num} "
      f"adapters one below the other, and the second have {sum(widths)} rows"
    )
  rows = np.split(b, np.cumsum(widths)[:-1])
  if a.shape[0] == rank:
    return [(a, part) for part in rows]
  own = [part[:, index * rank : (index + 1) * rank] for index, part in enumerate(rows)]
  if sum(map(np.count_nonzero, own)) != np.count_nonzero(b):
    raise ValueError(f"{other}: adapters one below the other must each have their own columns, and 0 elsewhere")
  return list(zip(np.split(a, num), own, strict=True))


def put_together(
  arrays: Mapping[str, np.ndarray], config: ModelConfig, family: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Undo `take_apart`: return the tensors of a PEFT file, and what its settings say beside the usual."""
  lora = config.lora
  assert lora is not None
  tensors = {name: array for name, array in arrays.items() if PART not in name}
  said: dict[str, Any] = {}
  for theirs, ours in fused_modules(FAMILIES[family]).items():
    names = sorted({name.partition(PART)[0] for name in arrays if f".{theirs}.lora_A.weight{PART}" in name})
    widths = {part: projection_shapes(config, config.runs[0])[part][1] for part in ours}
    is_same = all(_is_shared([arrays.get(f"{name}{PART}{part}") for part in ours]) for name in names)
    for name in names:
      width = next(iter(arrays[f"{name}{PART}{part}"].shape[1] for part in ours if f"{name}{PART}{part}" in arrays))
      a = [arrays.get(f"{name}{PART}{part}", np.zeros((lora.rank, width), np.float32)) for part in ours]
      b = [arrays.get(f"{_b(name)}{PART}{part}", np.zeros((widths[part], lora.rank), np.float32)) for part in ours]
      tensors[name] = a[0] if is_same else np.concatenate(a)
      tensors[_b(name)] = np.concatenate(b) if is_same else _diagonal(b)
    if names and not is_same:
      values = (lora.rank * len(ours), lora.alpha * len(ours))
      said |= {key: {theirs.rpartition(".")[2]: value} for key, value in zip(PATTERNS, values, strict=True)}
  return tensors, said


def _is_shared(of_parts: list[np.ndarray | None]) -> bool:
  """Whether all parts are there and the same."""
  found = [array for array in of_parts if array is not None]
  return len(found) == len(of_parts) and all(np.array_equal(array, found[0]) for array in found)


def _diagonal(blocks: list[np.ndarray]) -> np.ndarray:
  """Put blocks of as many columns on the diagonal of zeros."""
  rank = blocks[0].shape[1]
  return np.concatenate(
    [np.pad(block, ((0, 0), (rank * index, rank * (len(blocks) - 1 - index)))) for index, block in enumerate(blocks)]
  )


def _b(name: str) -> str:
  return name.replace(".lora_A.", ".lora_B.")
