"""Convert a checkpoint or a PEFT adapter in Hugging Face's layout to what `model.init_from` loads.

    python -m launch.convert_hf --hf=DIR_OR_REPO --out=DIR_OR_GS [--dtype=bfloat16|float32|int8]
    python -m launch.convert_hf --hf=ADAPTER_DIR --base=CONVERTED_DIR --out=DIR    # for model.lora.init_from

All names, shapes and shard lengths are checked before anything is written. Tensors are then read and written in pieces
of at most 16 MiB, so memory use does not depend on the size of the checkpoint; --dtype=int8 reads projections twice.
The other files of the checkpoint (tokenizer, config, the model's code) are copied.
"""

import dataclasses
import functools
import os
import re
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath

from dmpo_jax import digests, files
from dmpo_jax.hub import convert, pretrained
from dmpo_jax.hub.convert import Place
from dmpo_jax.hub.piecewise import Index, PiecewiseArray, save_piecewise
from dmpo_jax.hub.shards import ADAPTER, WEIGHTS, Shards
from dmpo_jax.hub.tokenizer import FILES, HuggingFaceTokenizer
from dmpo_jax.models.layers import KERNEL_SCALE, quantize
from dmpo_jax.run import buckets, progress
from launch import commands

PIECE_BYTES = 16 * 2**20
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Report = Callable[[int], None]  # called with the number of bytes just converted


def find_folder(hf: str, revision: str | None = None) -> epath.Path:
  """Return the folder of a checkpoint; a name that is not a folder is downloaded from the hub.

  Raises:
    ValueError: there is no such folder and the hub does not provide it, or a revision of a folder is asked for.
  """
  folder = epath.Path(hf).expanduser()
  if folder.is_dir():
    if revision is not None:
      raise ValueError(f"--revision={revision}: --hf={hf} is a folder, and only the hub has revisions; leave it out")
    return folder
  if not HUB_ID.fullmatch(hf):
    raise ValueError(f"--hf={hf}: neither a folder nor the name of a repository such as GSAI-ML/LLaDA-8B-Instruct")
  from huggingface_hub import snapshot_download  # slow to import and seldom needed

  try:
    return epath.Path(
      snapshot_download(hf, revision=revision, allow_patterns=[*pretrained.SIDE_FILES, "*.safetensors"])
    )
  except Exception as error:  # the hub's client raises its network library's errors
    raise ValueError(f"--hf={hf}: no such folder, and the hub does not provide it ({error})") from error


def convert_model(
  source: epath.Path,
  out: epath.Path,
  dtype: str = "same",
  report: Report = lambda size: None,
  origin: str = "",
) -> int:
  """Convert the checkpoint in `source`; return its number of parameters.

  Args:
    dtype: of all parameters; "same": as stored; "int8": projections quantised by `layers.quantize`, others as stored.
    report: gets the number of bytes of each piece that has been converted.
    origin: the checkpoint's name, for exports of adapters; "": the path of `source`.

  Raises:
    ValueError: the checkpoint does not match its description, is damaged or not finite; nothing is left in `out`.
  """
  hf = _read_json(source / "config.json")
  family, config = convert.family_of(hf), convert.model_config_from_hf(hf)
  if dtype == "int8":
    config = dataclasses.replace(config, quantization=dtype)
  shards, places = Shards(source), convert.checkpoint_places(config, family)
  convert.check_tensors({name: tensor.shape for name, tensor in shards.tensors.items()}, places, str(source))
  if any((source / name).exists() for name in (FILES[0], "vocab.json")):
    HuggingFaceTokenizer(source, is_chat=False)  # raises if its special ids differ from the model's
  with files.new_folder(out, "--out"):
    pretrained.write_model(out, family, config, origin or _absolute(source))
    pretrained.copy_side_files(source, out)
    digests.write(out)
    save_piecewise(out / pretrained.PARAMS, _arrays(shards, places, dtype, report))
  return sum(int(np.prod(tensor.shape)) for tensor in shards.tensors.values())


def convert_adapter(source: epath.Path, base: epath.Path, out: epath.Path, report: Report = lambda size: None) -> int:
  """Convert the PEFT adapter in `source`, for the converted model in `base`; return its number of parameters.

  Raises:
    ValueError: the adapter does not match the model or is damaged; nothing is left in `out`.
  """
  model = pretrained.read_model(base)
  if model is None:
    raise ValueError(f"--base={base} has no {pretrained.MODEL_FILE}: give the folder of a converted model")
  shards = Shards(source, ADAPTER)
  lora = convert.lora_config_from_peft(_read_json(source / "adapter_config.json"), shards.tensors, model.family)
  places = convert.adapter_places(model.model_config(lora=lora), model.family)
  convert.check_tensors({name: tensor.shape for name, tensor in shards.tensors.items()}, places, str(source))
  with files.new_folder(out, "--out"):
    pretrained.write_adapter(out, lora)
    digests.write(out)
    save_piecewise(out / pretrained.PARAMS, _arrays(shards, places, "float32", report))
  return sum(int(np.prod(tensor.shape)) for tensor in shards.tensors.values())


def _absolute(path: epath.Path) -> str:
  return os.fspath(path) if buckets.is_in_bucket(path) else os.path.abspath(path)


def _arrays(shards: Shards, places: Mapping[str, Place], dtype: str, report: Report) -> dict[str, Any]:
  """Describe our parameters as arrays that are read in pieces; the tensors of an int8 kernel are read twice."""
  tree: dict[str, Any] = {}
  for path, names in convert.leaves_of(places).items():
    *parents, last = path
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    array, shape = functools.partial(_array, shards, names, places), places[names[0]].shape
    if dtype == "int8" and last == "kernel":
      node[last] = array(shape, np.dtype(np.int8), lambda piece: quantize(piece)[0], report)
      scale = array(shape[1:], np.dtype(np.float32), lambda piece: quantize(piece)[1], lambda size: None)
      node[KERNEL_SCALE] = scale
    else:
      stored = jnp.result_type(*(shards.tensors[name].dtype for name in names))
      target = np.dtype(stored if dtype in ("same", "int8") else jnp.dtype(dtype))
      node[last] = array(shape, target, lambda piece, dtype=target: piece.astype(dtype), report)
  return tree


def _array(
  shards: Shards,
  names: Sequence[str],
  places: Mapping[str, Place],
  shape: tuple[int, ...],
  dtype: np.dtype,
  keep: Callable[[np.ndarray], np.ndarray],
  report: Report,
) -> PiecewiseArray:
  """Describe one array in pieces; `shape` is one layer's, `keep` turns a piece, in our axes, into the saved one."""
  first, place = shards.tensors[names[0]], places[names[0]]
  rows = first.shape[0]  # of the tensor on disk: our last axis if it is transposed, otherwise our first
  num_rows = max(1, min(rows, PIECE_BYTES // (max(first.size, 1) // rows)))
  is_stacked = place.layer is not None

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
            "training diverged"
          )
        piece = keep(piece.T if place.is_transposed else piece)
        index = along_rows([slice(None)] * len(shape), slice(start, stop))
        if is_stacked:
          layer = places[name].layer
          index, piece = (slice(layer, layer + 1), *index), piece[None]
        yield index, piece

  chunk = along_rows(shape, num_rows)
  if is_stacked:
    return PiecewiseArray((len(names), *shape), dtype, (1, *chunk), pieces)
  return PiecewiseArray(shape, dtype, chunk, pieces)


def _read_json(path: epath.Path) -> dict[str, Any]:
  if not path.is_file():
    raise ValueError(f"{path} does not exist: give a folder in Hugging Face's layout")
  return files.read_object(path)


def run(hf: str, revision: str | None, out: epath.Path, base: epath.Path | None, dtype: str) -> None:
  """Convert with a progress bar, and print a summary."""
  start, source = time.monotonic(), find_folder(hf, revision)
  is_adapter = (source / "adapter_config.json").exists()
  if is_adapter and base is None:
    raise ValueError(f"{source} holds an adapter: give its model's converted folder with --base")
  if is_adapter and dtype != "same":
    raise ValueError(f"--dtype={dtype}: {source} holds an adapter, and adapters are kept in float32; leave it out")
  if base is not None and not is_adapter:
    raise ValueError(f"--base={base}: {source} holds a model and no adapter_config.json; leave it out")
  size = sum(tensor.size for tensor in Shards(source, ADAPTER if is_adapter else WEIGHTS).tensors.values())
  with progress.Progress("converting", size, unit="bytes") as shown:
    report = shown.advance
    if is_adapter:
      count = convert_adapter(source, base, out, report)
    else:
      origin = "" if epath.Path(hf).expanduser().is_dir() else hf
      count = convert_model(source, out, dtype, report, origin)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  print(f"{out}: {count:,} parameters, {time.monotonic() - start:.1f} s, at most {peak:.2f} GiB of memory")
  if not is_adapter and not any((out / name).exists() for name in (FILES[0], "vocab.json")):
    print(f"{source} has no tokenizer: copy one into {out}")


def define_flags() -> None:
  """Declare the command's flags; not on import, as every command has an --out of its own."""
  flags.adopt_module_key_flags(progress)
  flags.DEFINE_string("hf", None, "A folder (or gs:// path) in Hugging Face's layout, or a repository of the hub.")
  flags.DEFINE_string("revision", None, "Branch, tag or commit of the hub's repository.")
  flags.DEFINE_string("out", None, "The folder (or gs:// path) to write; it must not exist.")
  flags.DEFINE_string("base", None, "For an adapter: the converted folder of the model that it is for.")
  about = "Of the parameters written. int8: only the projections of the layers, the rest as stored."
  flags.DEFINE_enum("dtype", "same", ["same", "bfloat16", "float32", "int8"], about)
  flags.mark_flags_as_required(["hf", "out"])


def main() -> None:
  """Convert what the flags name."""
  given = flags.FLAGS
  base = epath.Path(given.base).expanduser() if given.base else None
  buckets.check({"--hf": given.hf, "--base": given.base or ""}, {"--out": given.out})
  run(given.hf, given.revision, epath.Path(given.out).expanduser(), base, given.dtype)


if __name__ == "__main__":
  define_flags()
  commands.start(main)
