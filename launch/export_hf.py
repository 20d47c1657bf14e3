"""Export the policy of a run, or a converted checkpoint, to Hugging Face's layout.

    python -m launch.export_hf --run=WORKDIR --out=DIR_OR_GS          # the policy, adapters merged into the weights
    python -m launch.export_hf --run=WORKDIR --out=DIR --adapter      # its adapters alone, for PEFT
    python -m launch.export_hf --model=CONVERTED_DIR --out=DIR        # a converted checkpoint, as it was

Arrays are read one at a time and written one shard at a time.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from dmpo_jax import build, files
from dmpo_jax.hub import convert, pretrained
from dmpo_jax.hub.families import FAMILIES, Family
from dmpo_jax.hub.shards import ADAPTER, write_file, write_shards
from dmpo_jax.hub.tokenizer import FILES, QWEN_FILES
from dmpo_jax.models.layers import KERNEL_SCALE
from dmpo_jax.models.transformer import ModelConfig
from dmpo_jax.run import buckets, progress
from dmpo_jax.run import workdir as workdir_lib
from dmpo_jax.run.params import check_params, load_leaf, saved_dtypes
from launch import commands

SENTENCEPIECE = "tokenizer.model"  # file name of a sentencepiece tokenizer beside exported weights


class Source(NamedTuple):
  """What there is to export."""

  config: ModelConfig
  family: str
  base: epath.Path | None  # the parameters under the adapters, or all parameters
  policy: epath.Path | None  # adapters, if config.lora; otherwise parameters that replace the base's
  side: epath.Path | None  # folder of the files that are copied along
  origin: str = ""  # the checkpoint that the base was converted from, if its weights are the same; "": unknown
  tokenizer: epath.Path | None = None  # the run's own, where the checkpoint has none


class Update:
  """Measures how much of the update that a run has learned is lost when its weights are rounded."""

  def __init__(self) -> None:
    self._squares: dict[str, tuple[float, float]] = {}  # of the lost part and of the update, by tensor

  def add(self, name: str, base: np.ndarray, merged: np.ndarray, written: np.ndarray) -> None:
    """Add a tensor: compare its change in float32 with the change from the rounded base to what is written."""
    update = merged - base
    lost = written.astype(np.float32) - base.astype(written.dtype).astype(np.float32) - update
    self._squares[name] = (float(np.square(lost).sum()), float(np.square(update).sum()))

  def error(self) -> tuple[float, str, float] | None:
    """Return the norm of the lost part relative to the update's, the worst tensor and its value; None: no update."""
    changed = {name: pair for name, pair in self._squares.items() if pair[1] > 0}
    if not changed:
      return None
    errors = {name: math.sqrt(lost / update) for name, (lost, update) in changed.items()}
    worst = max(errors, key=errors.__getitem__)
    lost, update = (sum(pair[i] for pair in changed.values()) for i in (0, 1))
    return math.sqrt(lost / update), worst, errors[worst]


def find_model(folder: epath.Path) -> Source:
  """Describe the export of a converted folder.

  Raises:
    ValueError: it is not a converted folder.
  """
  model = pretrained.read_model(folder)
  if model is None:
    raise ValueError(f"--model={folder} has no {pretrained.MODEL_FILE}: give a folder that launch/convert_hf.py wrote")
  return Source(model.model_config(), model.family, folder, None, folder)


def find_run(workdir: epath.Path) -> Source:
  """Describe the export of a finished run.

  Raises:
    ValueError: it is not a finished run, or its base is stored nowhere.
  """
  about = workdir / workdir_lib.FILE
  if not about.exists() or not (workdir / "policy").exists():
    raise ValueError(f"--run={workdir} is not a finished run: {workdir_lib.FILE} or policy is missing")
  settings = ConfigDict(files.read_object(about))
  model = build.build_model(settings, build.make_tokenizer(settings))
  checkpoint = settings.model.init_from
  described = pretrained.read_model(checkpoint) if checkpoint else None
  family = described.family if described else convert.natural_family(model.config)
  base = workdir / "base" if settings.warm_start.updates else epath.Path(checkpoint) if checkpoint else None
  if base is None and model.config.lora is not None:
    raise ValueError(f"--run={workdir} has adapters on random parameters that were not saved: they cannot be merged")
  if model.config.lora is not None:
    build.check_base(settings, workdir, workdir / "policy")
  side, tokenizer = epath.Path(checkpoint) if described else None, settings.tokenizer.path
  is_original = described is not None and base == side and model.config.quantization == "none"
  return Source(
    model.config,
    family,
    base,
    workdir / "policy",
    side,
    origin=described.origin if is_original else "",
    tokenizer=epath.Path(tokenizer) if tokenizer else None,
  )


def export_model(source: Source, out: epath.Path, *, dtype: str, shard_bytes: int, update: Update | None = None) -> int:
  """Write the weights, merged with the adapters if there are any; return their number of parameters.

  Args:
    update: measures what rounding does to the run's update.

  Raises:
    ValueError: `out` exists already, or weights are damaged or not finite.
  """
  places = convert.checkpoint_places(source.config, source.family)
  weights = source.base if source.config.lora else source.policy or source.base
  for saved in {weights, source.policy} - {None}:
    check_params(saved)
  dtypes = _dtypes(weights, dtype)
  counts = {name: int(np.prod(place.shape)) for name, place in places.items()}
  sizes = {name: counts[name] * dtypes[place.path].itemsize for name, place in places.items()}

  order = [name for names in convert.leaves_of(places).values() for name in names]
  with files.new_folder(out, "--out"), progress.Progress("exporting", sum(sizes.values()), unit="bytes") as shown:
    _write_side_files(source, out, jnp.result_type(*dtypes.values()).name)
    reader = _Weights(source, weights, dtypes, convert.leaves_of(places), update or Update())
    tensors = _checked(convert.to_tensors(reader.read, places), shown)
    write_shards(out, {name: sizes[name] for name in order}, tensors, shard_bytes)
  return sum(counts.values())


def _checked(tensors: Iterable[tuple[str, np.ndarray]], shown: progress.Progress) -> Iterator[tuple[str, np.ndarray]]:
  for name, array in tensors:
    if not np.isfinite(array).all():
      raise ValueError(f"tensor {name} has values that are not finite: the run has diverged; export another policy")
    shown.advance(array.nbytes)
    yield name, array


def _dtypes(weights: epath.Path, dtype: str) -> dict[tuple[str, ...], np.dtype]:
  """Return the dtype in which each leaf is written; int8, unknown to Hugging Face's layout, becomes the embedding's."""
  saved = saved_dtypes(weights)
  own = {path: saved[("embedding",)] if saved_as == np.int8 else saved_as for path, saved_as in saved.items()}
  return {path: np.dtype(own[path] if dtype == "same" else dtype) for path in own if path[-1] != KERNEL_SCALE}


class _Weights(NamedTuple):
  """Reads leaves in the form in which they are written."""

  source: Source
  path: epath.Path  # of the base, if there are adapters
  dtypes: Mapping[tuple[str, ...], np.dtype]
  names: Mapping[tuple[str, ...], Sequence[str]]  # of a leaf's tensors
  update: Update

  def read(self, path: tuple[str, ...]) -> np.ndarray:
    """Read a leaf: int8 times its scale, plus its adapters (alpha / rank) A B, in float32 and rounded once."""
    stored, lora, dtype = load_leaf(self.path, path), self.source.config.lora, self.dtypes[path]
    is_adapted = lora is not None and path[-1] == "kernel" and path[1] in lora.targets
    if stored.dtype != np.int8 and not is_adapted:
      written = stored.astype(dtype, copy=False)
      base = self.source.base
      if lora is None and self.source.policy and base and base.exists() and dtype != stored.dtype:
        self._compare(path, load_leaf(base, path), stored, written)
      return written
    written = np.empty(stored.shape, dtype)
    scale = load_leaf(self.path, (*path[:-1], KERNEL_SCALE)) if stored.dtype == np.int8 else None
    if is_adapted:
      a, b = (load_leaf(self.source.policy, (*path[:-1], part)).astype(np.float32) for part in "AB")
    for layer, kernel in enumerate(stored):
      kernel = kernel.astype(np.float32)
      if scale is not None:
        kernel *= scale[layer]
      merged = kernel + lora.scale * (a[layer] @ b[layer]) if is_adapted else kernel
      written[layer] = merged
      if is_adapted and dtype != np.float32:
        self.update.add(self.names[path][layer], kernel, merged, written[layer])
    return written

  def _compare(self, path: tuple[str, ...], base: np.ndarray, policy: np.ndarray, written: np.ndarray) -> None:
    """Add the tensors of a leaf that was itself trained to the measured update."""
    names = self.names[path]
    each = zip(*(x if len(x) == len(names) > 1 else x[None] for x in (base, policy, written)), strict=True)
    for name, (before, after, rounded) in zip(names, each, strict=True):
      self.update.add(name, before.astype(np.float32), after.astype(np.float32), rounded)


def export_adapter(source: Source, out: epath.Path, base_name: str = "") -> int:
  """Write the adapters in PEFT's layout; return their number of parameters.

  Raises:
    ValueError: the run has no adapters, or `out` exists already.
  """
  lora = source.config.lora
  if lora is None:
    raise ValueError("--adapter: all parameters were trained (model.lora.rank = 0); leave it out to write the weights")
  check_params(source.policy)
  places = convert.adapter_places(source.config, source.family)
  tensors = dict(convert.to_tensors(lambda path: load_leaf(source.policy, path), places))
  about = convert.lora_config_to_peft(lora, source.family, base_name or source.origin or str(source.base))
  with files.new_folder(out, "--out"):
    write_file(out / ADAPTER, tensors)
    (out / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n")
  return sum(array.size for array in tensors.values())


def _write_side_files(source: Source, out: epath.Path, dtype: str) -> None:
  """Write config.json (the original's if there is one) and the copied files; `dtype` can hold every weight."""
  about: dict[str, Any] = convert.model_config_to_hf(source.config, source.family)
  if source.side is not None:
    pretrained.copy_side_files(source.side, out)
    about = files.read_object(out / "config.json")
  if source.tokenizer is not None:
    _copy_tokenizer(source.tokenizer, out)
  about["torch_dtype"] = dtype
  if "dtype" in about:  # the key in later releases of transformers
    about["dtype"] = dtype
  (out / "config.json").write_text(json.dumps(about, indent=2) + "\n")


def _copy_tokenizer(tokenizer: epath.Path, out: epath.Path) -> None:
  """Copy a run's own tokenizer: a folder's files, or one of sentencepiece."""
  if tokenizer.is_dir():
    copies = {tokenizer / name: out / name for name in (*FILES, *QWEN_FILES) if (tokenizer / name).exists()}
  else:
    copies = {tokenizer: out / SENTENCEPIECE}
  for path, copy in copies.items():
    copy.write_bytes(path.read_bytes())


def how_to_load(source: Source, out: epath.Path) -> str:
  """Give the lines of Python that load an exported model with `transformers`, and what else that needs as comments."""
  family, about = FAMILIES[source.family], files.read_object(out / "config.json")
  folder = "DIR" if buckets.is_in_bucket(out) else out
  lines = [
    "from transformers import AutoModel, AutoTokenizer",
    f'tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)',
    f'model = AutoModel.from_pretrained("{folder}", trust_remote_code=True)',
  ]
  if (out / SENTENCEPIECE).exists() and not (out / FILES[0]).exists():  # of which transformers knows no class
    lines[:2] = [
      "import sentencepiece; from transformers import AutoModel",
      f'tokenizer = sentencepiece.SentencePieceProcessor(model_file="{folder}/{SENTENCEPIECE}")',
    ]
  lines.insert(0, f"# The published code of {family.architecture} needs transformers 4: pip install 'transformers<5'")
  if missing := sorted(name for name in _code_files(family, about, out) if not (out / name).exists()):
    lines.insert(0, f"# Copy {', '.join(missing)} from {family.published_at} on the hub to {folder} first")
  if "auto_map" not in about:  # the original has none, and what is exported is as it was
    lines.insert(0, f'# Add to its config.json: "auto_map": {json.dumps(dict(family.code))}')
  if buckets.is_in_bucket(out):  # from where transformers does not load
    lines.insert(0, f"# gcloud storage cp -r {out} {folder}")
  return "\n".join(f"  {line}" for line in lines)


def _code_files(family: Family, about: Mapping[str, Any], out: epath.Path) -> set[str]:
  """Name the files that the classes of a config.json and of a tokenizer_config.json need."""
  tokenizer = files.read_object(out / FILES[1]) if (out / FILES[1]).exists() else {}
  classes = list(about.get("auto_map", family.code).values())
  for entry in tokenizer.get("auto_map", {}).values():  # a class, or a slow and a fast one of which either may be null
    classes += [entry] if isinstance(entry, str) else filter(None, entry)
  return {name.partition(".")[0] + ".py" for name in classes} | set(family.code_needs)


def run() -> None:
  """Export what the flags name, and print a summary."""
  given = flags.FLAGS
  check_flags(given)
  buckets.check({"--run": given.run or "", "--model": given.model or ""}, {"--out": given.out})
  out = epath.Path(given.out).expanduser()
  where = epath.Path(given.run or given.model).expanduser()
  source = find_run(where) if given.run else find_model(where)
  update = Update()
  if given.adapter:
    count = export_adapter(source, out, given.base_name)
  else:
    count = export_model(source, out, dtype=given.dtype, shard_bytes=round(given.shard_gb * 1e9), update=update)
  print(f"{out}: {count:,} parameters in {', '.join(sorted(path.name for path in out.glob('*.safetensors')))}")
  if given.adapter:
    print(f"for the base {files.read_object(out / 'adapter_config.json')['base_model_name_or_path']}")
    return
  if error := update.error():
    print(_describe_error(*error, has_adapters=source.config.lora is not None))
  print(f"In Python:\n{how_to_load(source, out)}")


def _describe_error(error: float, worst: str, worst_error: float, *, has_adapters: bool) -> str:
  remedy = "--dtype=float32 keeps all of it" + (", --adapter writes only the adapters" if has_adapters else "")
  return f"rounding changes the learned update by {error:.1%} of its norm (most: {worst}, {worst_error:.1%}); {remedy}"


def check_flags(given: flags.FlagValues) -> None:
  """Refuse flags that would have no effect."""
  if bool(given.run) == bool(given.model):
    raise ValueError("give either --run or --model")
  if given.model and given.adapter:
    raise ValueError("--adapter: only a run has adapters, and --model is none; give --run, or leave it out")
  if given.adapter:
    for name in ("dtype", "shard_gb"):
      if given[name].present:
        raise ValueError(f"--{name}: adapters are written in one file, as they were trained; leave it out")
  elif given["base_name"].present:
    raise ValueError("--base_name: only an adapter names its base; give --adapter, or leave it out")


def define_flags() -> None:
  """Declare the command's flags; not on import, as every command has an --out of its own."""
  flags.adopt_module_key_flags(progress)
  flags.DEFINE_string("run", None, "The workdir of a finished run.")
  flags.DEFINE_string("model", None, "Or: a folder that launch/convert_hf.py wrote.")
  flags.DEFINE_string("out", None, "The folder (or gs:// path) to write; it must not exist.")
  flags.DEFINE_boolean("adapter", False, "Write only the run's adapters, for PEFT.")
  flags.DEFINE_string("base_name", "", "Base model that an adapter names; by default what its base was converted from.")
  flags.DEFINE_enum("dtype", "same", ["same", "bfloat16", "float32"], "Of the weights written.")
  flags.DEFINE_float("shard_gb", 5.0, "Maximum size of a shard in gigabytes.", lower_bound=0.001)
  flags.mark_flag_as_required("out")


if __name__ == "__main__":
  define_flags()
  commands.start(run)
