"""Write what a run has learned, or a converted checkpoint, in Hugging Face's layout.

    python -m launch.export_hf --run=WORKDIR --out=DIR_OR_GS          # the policy, adapters merged into the weights
    python -m launch.export_hf --run=WORKDIR --out=DIR --adapter      # its adapters alone, for PEFT
    python -m launch.export_hf --model=CONVERTED_DIR --out=DIR        # a converted checkpoint, as it was

Arrays are read one at a time and written shard by shard.
"""

import functools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from etils import epath
from ml_collections import ConfigDict

from dmpo_jax import buckets, build, command, config, files, pretrained, progress
from dmpo_jax.checkpoints import load_leaf, saved_dtypes
from dmpo_jax.models import convert
from dmpo_jax.models.layers import KERNEL_SCALE
from dmpo_jax.models.llada import ModelConfig
from dmpo_jax.shards import ADAPTER, write_file, write_shards


class Source(NamedTuple):
  """What there is to export."""

  config: ModelConfig
  family: str
  base: epath.Path | None  # the parameters under the adapters, or all that there are
  policy: epath.Path | None  # adapters, if config.lora; else parameters that replace the base's
  side: epath.Path | None  # the folder of the files that travel along


def find_model(folder: epath.Path) -> Source:
  """Look at a converted folder.

  Raises:
    ValueError: it is none.
  """
  model = pretrained.read_model(folder)
  if model is None:
    raise ValueError(f"--model={folder} has no {pretrained.MODEL_FILE}: give a folder that launch/convert_hf.py wrote")
  return Source(model.model_config(), model.family, folder, None, folder)


def find_run(workdir: epath.Path) -> Source:
  """Look at a finished run.

  Raises:
    ValueError: it is none, or its base is not stored anywhere.
  """
  about = workdir / config.FILE
  if not about.exists() or not (workdir / "policy").exists():
    raise ValueError(f"--run={workdir} holds no finished run: there is no {config.FILE} or no policy")
  settings = ConfigDict(json.loads(about.read_text()))
  model = build.build_model(settings, build.make_tokenizer(settings))
  checkpoint = settings.model.init_from
  described = pretrained.read_model(checkpoint) if checkpoint else None
  family = described.family if described else convert.natural_family(model.config)
  base = workdir / "base" if settings.warm_start.updates else epath.Path(checkpoint) if checkpoint else None
  if base is None and model.config.lora is not None:
    raise ValueError(f"--run={workdir} has adapters on random parameters, which are not stored: they cannot be merged")
  if model.config.lora is not None:
    build.check_base(settings, workdir, workdir / "policy")
  return Source(model.config, family, base, workdir / "policy", epath.Path(checkpoint) if described else None)


def export_model(source: Source, out: epath.Path, *, dtype: str, shard_bytes: int) -> int:
  """Write the weights, merged with the adapters if there are any; return their number of parameters.

  Raises:
    ValueError: `out` is there already.
  """
  places = convert.checkpoint_places(source.config, source.family)
  weights = source.base if source.config.lora else source.policy or source.base
  dtypes = _dtypes(weights, dtype)
  counts = {name: int(np.prod(place.shape)) for name, place in places.items()}
  sizes = {name: counts[name] * dtypes[place.path].itemsize for name, place in places.items()}

  order = [name for names in convert.leaves_of(places).values() for name in names]
  with files.new_folder(out, "--out"), progress.Progress("exporting", sum(sizes.values()), unit="bytes") as shown:
    _write_side_files(source, out, jnp.result_type(*dtypes.values()).name)
    leaves = functools.partial(_read_weights, source, weights, dtypes)
    tensors = _counted(convert.to_tensors(leaves, places), shown)
    write_shards(out, {name: sizes[name] for name in order}, tensors, shard_bytes)
  return sum(counts.values())


def _counted(tensors: Iterable[tuple[str, np.ndarray]], shown: progress.Progress) -> Iterator[tuple[str, np.ndarray]]:
  for name, array in tensors:
    shown.advance(array.nbytes)
    yield name, array


def _dtypes(weights: epath.Path, dtype: str) -> dict[tuple[str, ...], np.dtype]:
  """Say in which dtype each leaf is written; "same" is for int8, which theirs do not have, the embedding's."""
  saved = saved_dtypes(weights)
  own = {path: saved[("embedding",)] if saved_as == np.int8 else saved_as for path, saved_as in saved.items()}
  return {path: np.dtype(own[path] if dtype == "same" else dtype) for path in own if path[-1] != KERNEL_SCALE}


def _read_weights(
  source: Source, weights: epath.Path, dtypes: Mapping[tuple[str, ...], np.dtype], path: tuple[str, ...]
) -> np.ndarray:
  """Read a leaf; int8 times its scale, with its adapters added: W + (alpha / rank) A B, in float32, rounded once."""
  stored, lora = load_leaf(weights, path), source.config.lora
  is_adapted = lora is not None and path[-1] == "kernel" and path[1] in lora.targets
  if stored.dtype != np.int8 and not is_adapted:
    return stored.astype(dtypes[path], copy=False)
  written = np.empty(stored.shape, dtypes[path])
  scale = load_leaf(weights, (*path[:-1], KERNEL_SCALE)) if stored.dtype == np.int8 else None
  if is_adapted:
    a, b = (load_leaf(source.policy, (*path[:-1], part)).astype(np.float32) for part in "AB")
  for layer, kernel in enumerate(stored):
    kernel = kernel.astype(np.float32)
    if scale is not None:
      kernel *= scale[layer]
    if is_adapted:
      kernel += lora.scale * (a[layer] @ b[layer])
    written[layer] = kernel
  return written


def export_adapter(source: Source, out: epath.Path, base_name: str = "") -> int:
  """Write the adapters as PEFT reads them; return their number of parameters.

  Raises:
    ValueError: the run has none, or `out` is there already.
  """
  lora = source.config.lora
  if lora is None:
    raise ValueError("--adapter: all parameters were trained (model.lora.rank = 0); leave it out to write the weights")
  places = convert.adapter_places(source.config, source.family)
  tensors = dict(convert.to_tensors(lambda path: load_leaf(source.policy, path), places))
  about = convert.lora_config_to_peft(lora, source.family, base_name or str(source.base))
  with files.new_folder(out, "--out"):
    write_file(out / ADAPTER, tensors)
    (out / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n")
  return sum(array.size for array in tensors.values())


def _write_side_files(source: Source, out: epath.Path, dtype: str) -> None:
  """Write config.json, the original's where there is one, and what travels along; `dtype` holds every weight."""
  about: dict[str, Any] = convert.model_config_to_hf(source.config, source.family)
  if source.side is not None:
    pretrained.copy_side_files(source.side, out)
    about = json.loads((out / "config.json").read_text())
  about["torch_dtype"] = dtype
  if "dtype" in about:  # the key's name in later releases of transformers
    about["dtype"] = dtype
  (out / "config.json").write_text(json.dumps(about, indent=2) + "\n")


def run() -> None:
  """Export what the flags name, and say what came out."""
  given = flags.FLAGS
  check_flags(given)
  buckets.check({"--run": given.run or "", "--model": given.model or ""}, {"--out": given.out})
  out = epath.Path(given.out).expanduser()
  where = epath.Path(given.run or given.model).expanduser()
  source = find_run(where) if given.run else find_model(where)
  if given.adapter:
    count = export_adapter(source, out, given.base_name)
  else:
    count = export_model(source, out, dtype=given.dtype, shard_bytes=round(given.shard_gb * 1e9))
  print(f"{out}: {count:,} parameters in {', '.join(sorted(path.name for path in out.glob('*.safetensors')))}")


def check_flags(given: flags.FlagValues) -> None:
  """Refuse flags that would do nothing."""
  if bool(given.run) == bool(given.model):
    raise ValueError("give either --run or --model")
  if given.model and given.adapter:
    raise ValueError(
      "--adapter: adapters are what a run has trained, and --model has none; give --run, or leave it out"
    )
  if given.adapter:
    for name in ("dtype", "shard_gb"):
      if given[name].present:
        raise ValueError(f"--{name}: adapters are written as they were trained, in one file; leave it out")
  elif given["base_name"].present:
    raise ValueError("--base_name: it is written into an adapter; give --adapter, or leave it out")


def define_flags() -> None:
  """Declare the command's flags; not on import, as every command has an --out of its own."""
  flags.adopt_module_key_flags(progress)
  flags.DEFINE_string("run", None, "The workdir of a finished run.")
  flags.DEFINE_string("model", None, "Or: a folder that launch/convert_hf.py wrote.")
  flags.DEFINE_string("out", None, "The folder (or gs:// path) to write; it must not exist.")
  flags.DEFINE_boolean("adapter", False, "Write the run's adapters for PEFT, and no weights.")
  flags.DEFINE_string("base_name", "", "What an adapter says that it is for; the base's folder by default.")
  flags.DEFINE_enum("dtype", "same", ["same", "bfloat16", "float32"], "Of the weights written.")
  flags.DEFINE_float("shard_gb", 5.0, "Gigabytes of a shard, at most.", lower_bound=0.001)
  flags.mark_flag_as_required("out")


def main(argv: Sequence[str]) -> None:
  """Run; a mistake ends in one message and exit code 2."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  try:
    run()
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  define_flags()
  command.run(main)
