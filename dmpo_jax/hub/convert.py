"""Convert a checkpoint or a PEFT adapter in Hugging Face's layout to a folder that `model.init_from` loads.

Names, shapes and the length of every shard are checked before anything is written. Tensors are then read and written
in pieces of at most PIECE_BYTES, so the memory needed does not depend on the checkpoint's size.
"""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from dmpo_jax import digests, files
from dmpo_jax.hub import layout, pretrained
from dmpo_jax.hub.adapt import AS_IT_IS, Adaptation, GrownShards, prepare
from dmpo_jax.hub.families import FAMILIES, Family, family_of
from dmpo_jax.hub.fused import take_apart
from dmpo_jax.hub.layout import Place
from dmpo_jax.hub.model_config import model_config_from_hf
from dmpo_jax.hub.peft import lora_config_from_peft
from dmpo_jax.hub.piecewise import Index, PiecewiseArray, save_piecewise
from dmpo_jax.hub.shards import ADAPTER, Parts, Shards
from dmpo_jax.models.layers import SCALE, quantize

PIECE_BYTES = 16 * 2**20

Report = Callable[[int], None]  # called with the number of bytes that have been converted since the last call


def ignore(size: int) -> None:
  """A `Report` that does nothing."""


class Converted(NamedTuple):
  """What was converted."""

  num_parameters: int
  notes: tuple[str, ...]  # what was changed to make a diffusion model of it


def convert_model(
  source: epath.Path,
  out: epath.Path,
  dtype: str = "same",
  report: Report = ignore,
  origin: str = "",
  asked: Adaptation = AS_IT_IS,
) -> Converted:
  """Convert the checkpoint in `source`.

  Args:
    dtype: of all parameters; "same": as stored; "int8": projections are quantised (see `layers.quantize`), which reads
      them twice, and the others are as stored.
    origin: name of the checkpoint, for exports of adapters; "": the path of `source`.
    asked: how to make a diffusion model of an autoregressive one.

  Raises:
    ValueError: something does not fit, is damaged or not finite; `out` is left as it was.
  """
  with tempfile.TemporaryDirectory() as stage:
    prepared = prepare(source, epath.Path(stage), asked)
    family, config = family_of(prepared.config), model_config_from_hf(prepared.config)
    if dtype == "int8":
      config = dataclasses.replace(config, quantization=dtype)
    shards, places = Shards(source), layout.checkpoint_places(config, family)
    if prepared.num_rows:
      tables = [f"{name}.weight" for name in (FAMILIES[family].embedding, FAMILIES[family].head)]
      shards = GrownShards(source, tables, prepared.num_rows)
    _drop_copies(shards, places, FAMILIES[family])
    _check(shards, places, source)
    num_parameters, shards = _num_parameters(shards), _in_parts(shards, places)
    with files.new_folder(out, "--out"):
      pretrained.write_model(out, family, config, origin or _absolute(source))
      pretrained.copy_side_files(prepared.sides, out)
      digests.write(out)
      save_piecewise(out / pretrained.PARAMS, _arrays(shards, places, dtype, report))
  return Converted(num_parameters, prepared.notes)


def convert_adapter(source: epath.Path, base: epath.Path, out: epath.Path, report: Report = ignore) -> int:
  """Convert the PEFT adapter in `source`, for the converted model in `base`; return its number of parameters.

  Raises:
    ValueError: something does not fit, is damaged or not finite; `out` is left as it was.
  """
  model = pretrained.read_model(base)
  if model is None:
    raise ValueError(f"--base={base} has no {pretrained.MODEL_FILE}: give the folder of a converted model")
  settings = _read_json(source / "adapter_config.json")
  given = Shards(source, ADAPTER)
  shards, settings = take_apart(given, settings, model.model_config(), model.family)
  lora = lora_config_from_peft(settings, shards.tensors, model.family)
  places = layout.adapter_places(model.model_config(lora=lora), model.family)
  layout.check_places({name: tensor.shape for name, tensor in shards.tensors.items()}, places, str(source))
  with files.new_folder(out, "--out"):
    pretrained.write_adapter(out, lora)
    digests.write(out)
    save_piecewise(out / pretrained.PARAMS, _arrays(shards, places, "float32", report))
  return _num_parameters(given)


def _check(shards: Shards, places: Mapping[str, Place], source: epath.Path) -> None:
  layout.check_tensors({name: tensor.shape for name, tensor in shards.tensors.items()}, places, str(source))


def _drop_copies(shards: Shards, places: Mapping[str, Place], family: Family) -> None:
  """Leave out what some checkpoints store beside the model: the head of a tied one, and rotary frequencies.

  Raises:
    ValueError: the head is not the embedding.
  """
  head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
  if head in shards.tensors and head not in places and embedding in shards.tensors:
    rows = shards.tensors[head].shape[0]
    step = max(1, PIECE_BYTES * rows // max(shards.tensors[head].size, 1))
    pieces = ((i, min(i + step, rows)) for i in range(0, rows, step))
    is_same = shards.tensors[head].shape == shards.tensors[embedding].shape
    if not is_same or not all(
      np.array_equal(shards.read_rows(head, *at), shards.read_rows(embedding, *at)) for at in pieces
    ):
      raise ValueError(
        f"{head} is not {embedding}, but {family.keys['weight_tying']} in config.json is true: "
        "set it to false to use both"
      )
    del shards.tensors[head]
  for name in [name for name in shards.tensors if name.endswith(".rotary_emb.inv_freq")]:
    del shards.tensors[name]


def _in_parts(shards: Shards, places: Mapping[str, Place]) -> Shards:
  """See tensors that hold several arrays of ours as these parts."""
  parts = {name: own for name, own in layout.parts_of(places).items() if own != [name]}
  rows = {name: {part: places[part].torch_shape[0] for part in own} for name, own in parts.items()}
  return Parts(shards, rows) if parts else shards


def _num_parameters(shards: Shards) -> int:
  return sum(int(np.prod(tensor.shape)) for tensor in shards.tensors.values())


def _absolute(path: epath.Path) -> str:
  return os.fspath(path) if "://" in os.fspath(path) else os.path.abspath(path)


def _arrays(shards: Shards, places: Mapping[str, Place], dtype: str, report: Report) -> dict[str, Any]:
  """Describe our variables as arrays that are read piece by piece; the tensors of an int8 kernel are read twice."""
  tree: dict[str, Any] = {}
  for path, names in layout.leaves_of(places).items():
    *parents, last = path
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    make, shape = functools.partial(_array, shards, {name: places[name] for name in names}), places[names[0]].shape
    if dtype == "int8" and last.endswith("kernel"):  # of a projection or of all experts
      node[last] = make(shape, np.dtype(np.int8), lambda piece: np.asarray(quantize(piece)[0]), report)
      node[f"{last}{SCALE}"] = make(
        shape[1:], np.dtype(np.float32), lambda piece: np.asarray(quantize(piece)[1]), ignore
      )
    else:
      stored = jnp.result_type(*(shards.tensors[name].dtype for name in names))
      target = np.dtype(stored) if dtype in ("same", "int8") else layout.cast(path, stored, dtype)
      node[last] = make(shape, target, lambda piece, dtype=target: piece.astype(dtype), report)
  return tree


def _array(
  shards: Shards,
  places: Mapping[str, Place],
  shape: tuple[int, ...],
  dtype: np.dtype,
  keep: Callable[[np.ndarray], np.ndarray],
  report: Report,
) -> PiecewiseArray:
  """Describe one leaf.

  Args:
    places: of its tensors, in the order of layers (and experts).
    shape: of a tensor, after `keep`.
    keep: returns what to store of a tensor's piece, which has our order of axes.
  """
  names: Sequence[str] = list(places)
  first, place = shards.tensors[names[0]], places[names[0]]
  rows = first.shape[0]  # of the tensor on disk: our last axis if it is transposed, else our first
  num_rows = max(1, min(rows, PIECE_BYTES // (max(first.size, 1) // rows)))
  stack = tuple(max(place.index[axis] for place in places.values()) + 1 for axis in range(len(place.index)))

  def along_rows(whole: Sequence[Any], rows: Any) -> tuple[Any, ...]:
    return (*whole[:-1], rows) if place.is_transposed else (rows, *whole[1:])

  def pieces() -> Iterator[tuple[Index, np.ndarray]]:
    for name in names:
      for start in range(0, rows, num_rows):
        stop = min(start + num_rows, rows)
        piece = shards.read_rows(name, start, stop)
        report(piece.nbytes)
        if not np.isfinite(piece).all():
          raise ValueError(
            f"tensor {name} in {shards.tensors[name].file} has values that are not finite: the file is damaged, or its "
            "training has diverged"
          )
        piece = keep(piece.T if place.is_transposed else piece)
        index = along_rows([slice(None)] * len(shape), slice(start, stop))
        where = places[name].index
        yield (*(slice(i, i + 1) for i in where), *index), piece.reshape(*[1] * len(where), *piece.shape)

  chunk = along_rows(shape, num_rows)
  return PiecewiseArray((*stack, *shape), dtype, (*[1] * len(stack), *chunk), pieces)


def _read_json(path: epath.Path) -> dict[str, Any]:
  if not path.is_file():
    raise ValueError(f"{path} is missing: give a folder in Hugging Face's layout")
  return files.read_object(path)
