"""The section `convert`: bytes per second and memory of converting a checkpoint from Hugging Face's layout."""

import itertools
import json
import pathlib
import tempfile

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from dmpo_jax.hub.convert import convert_model
from dmpo_jax.hub.families import natural_family
from dmpo_jax.hub.layout import checkpoint_places
from dmpo_jax.hub.model_config import model_config_to_hf
from launch.bench import programs, timing, workload
from launch.bench.results import Options, Result, Row

MB = 1e6


def run(config: ConfigDict, options: Options) -> Result:
  """Write a checkpoint with random weights in the sizes of the configuration, and convert it."""
  with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder) / "source"
    options.say("writing a checkpoint")
    size = timing.facts_of(write_checkpoint, (config, str(source)))["bytes"]
    makers: dict[str, timing.Maker] = {"convert_hf": (make_conversion, (str(source), folder))}
    measured = timing.run_in_turns(makers, options.repeats, say=options.say)["convert_hf"]
    family = json.loads((source / "config.json").read_text())["model_type"]
  row = Row("convert_hf", measured.seconds, size / MB, "MB", measured.peak_bytes)
  settings = f"{size / MB:,.0f} MB of {family}, {workload.settings_line(config).split(';')[0]}"
  return Result("convert", settings, [row])


def write_checkpoint(config: ConfigDict, folder: str) -> timing.Contender:
  """Write random weights in one file, and return its size as a fact."""
  source, model = pathlib.Path(folder), programs.make_model(workload.changed(config, {"model.lora.rank": 0}))
  source.mkdir(parents=True)
  name = natural_family(model.config)
  (source / "config.json").write_text(json.dumps(model_config_to_hf(model.config, name)))
  rng, dtype = np.random.default_rng(0), jax.numpy.dtype(model.config.param_dtype)
  tensors = {
    key: rng.standard_normal(place.torch_shape, np.float32).astype(dtype)
    for key, place in checkpoint_places(model.config, name).items()
  }
  save_file(tensors, source / "model.safetensors")
  return timing.Contender(lambda: None, facts={"bytes": float(sum(array.nbytes for array in tensors.values()))})


def make_conversion(source: str, folder: str) -> timing.Contender:
  """Convert into a new folder in every turn."""
  numbers = itertools.count()

  def turn() -> None:
    convert_model(epath.Path(source), epath.Path(folder) / f"out{next(numbers)}")

  return timing.Contender(turn)
