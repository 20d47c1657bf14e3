"""Export the policy of a run, or a converted checkpoint, to Hugging Face's layout.

    python -m launch.export_hf --run=WORKDIR --out=DIR_OR_GS          # the policy, adapters merged into the weights
    python -m launch.export_hf --run=WORKDIR --out=DIR --adapter      # its adapters alone, for PEFT
    python -m launch.export_hf --model=CONVERTED_DIR --out=DIR        # a converted checkpoint, as it was

Arrays are read one at a time and written one shard at a time.
"""

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from dmpo_jax import build, files, policy
from dmpo_jax.hub import pretrained
from dmpo_jax.hub.export import ModelExport, Source, export_adapter, how_to_load
from dmpo_jax.hub.families import natural_family
from dmpo_jax.run import buckets, progress
from dmpo_jax.run import workdir as workdir_lib
from dmpo_jax.run.params import SavedParams
from launch import commands


def find_model(folder: epath.Path) -> Source:
  """Describe the export of a converted folder.

  Raises:
    ValueError: it is not a converted folder.
  """
  model = pretrained.read_model(folder)
  if model is None:
    raise ValueError(f"--model={folder} has no {pretrained.MODEL_FILE}: give a folder that launch/convert_hf.py wrote")
  return Source(model.model_config(), model.family, SavedParams(folder), None, folder)


def find_run(workdir: epath.Path) -> Source:
  """Describe the export of a finished run.

  Raises:
    ValueError: it has not finished, or its base is not stored anywhere.
  """
  path = workdir / workdir_lib.FILE
  if not path.exists() or not (workdir / "policy").exists():
    raise ValueError(f"--run={workdir} is not a finished run: {workdir_lib.FILE} or policy is missing")
  settings = ConfigDict(files.read_object(path))
  config = build.build_model(settings, build.make_tokenizer(settings)).config
  checkpoint = epath.Path(settings.model.init_from) if settings.model.init_from else None
  described = pretrained.read_model(checkpoint) if checkpoint else None
  base = workdir / "base" if settings.warm_start.updates else checkpoint
  if config.lora is not None:
    if base is None:
      raise ValueError(f"--run={workdir} has adapters on random parameters that were not saved: they cannot be merged")
    policy.check_base(settings, workdir, workdir / "policy")
  elif base is not None and not base.exists():
    base = None  # it is only compared with the policy
  is_original = described is not None and base == checkpoint and config.quantization == "none"
  return Source(
    config,
    described.family if described else natural_family(config),
    base and SavedParams(base),
    SavedParams(workdir / "policy"),
    checkpoint if described else None,
    origin=(described.origin if described and is_original else "") or str(base),
    tokenizer=epath.Path(settings.tokenizer.path) if settings.tokenizer.path else None,
  )


def run() -> None:
  """Export what the flags name, and print what was written."""
  given = flags.FLAGS
  check_flags(given)
  buckets.check({"--run": given.run or "", "--model": given.model or ""}, {"--out": given.out})
  out = epath.Path(given.out).expanduser()
  folder = epath.Path(given.run or given.model).expanduser()
  source = find_run(folder) if given.run else find_model(folder)
  if given.adapter:
    count = export_adapter(source, out, given.base_name)
    print(_written(out, count))
    print(f"for the base {files.read_object(out / 'adapter_config.json')['base_model_name_or_path']}")
    return
  model = ModelExport(source, given.dtype)
  with progress.Progress("exporting", model.num_bytes, unit="bytes") as shown:
    model.write(out, round(given.shard_gb * 1e9), shown.advance)
  print(_written(out, model.num_parameters))
  if error := model.rounding.error():
    print(_describe_error(*error, has_adapters=source.config.lora is not None))
  print(f"In Python:\n{how_to_load(source, out)}")


def _written(out: epath.Path, count: int) -> str:
  return f"{out}: {count:,} parameters in {', '.join(sorted(path.name for path in out.glob('*.safetensors')))}"


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
