"""Checkpoints, adapters and outputs recorded from the official PyTorch code, and a tiny random model."""

import dataclasses
import functools
import json
import operator
import pathlib
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors.numpy import load_file, save_file

from dmpo_jax.hub import convert, pretrained
from dmpo_jax.hub.model_config import model_config_from_hf, model_config_to_hf
from dmpo_jax.hub.peft import lora_config_to_peft
from dmpo_jax.hub.shards import write_shards
from dmpo_jax.models.config import ModelConfig
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.run.params import load_params

FOLDER = pathlib.Path(__file__).parent / "goldens" / "models"
# where a checkpoint's weights are, if not beside its recorded outputs
WEIGHTS = {"m1_base": FOLDER.parent / "samplers" / "m1_base"}

TINY = ModelConfig(
  vocab_size=29,
  embedding_size=32,
  d_model=16,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  mlp_hidden_size=24,
  mask_token_id=28,
  eos_token_id=27,
  pad_token_id=26,
)


def tensors(name):
  """The tensors of a checkpoint or adapter, by their Hugging Face names."""
  found = {}
  for path in WEIGHTS.get(name, FOLDER / name).glob("*.safetensors"):
    found |= load_file(path)
  return found


def settings(name):
  folder = WEIGHTS.get(name, FOLDER / name)
  return json.loads((folder / ("adapter_config.json" if name == "adapter" else "config.json")).read_text())


@functools.cache
def recorded(name):
  """The recorded arrays of a checkpoint or adapter."""
  with np.load(FOLDER / name / "io.npz") as arrays:
    return {key: jnp.asarray(arrays[key]) for key in arrays}


@functools.cache
def load(name, **own):
  """Give (model, variables) of a checkpoint."""
  config = model_config_from_hf(settings(name), **own)
  return Transformer(config), {"params": params_of(tensors(name), config)}


def params_of(stored, config, family="llada"):
  """Convert a checkpoint's tensors, in `config.param_dtype`."""
  with tempfile.TemporaryDirectory() as folder:
    source, out = epath.Path(folder) / "hf", epath.Path(folder) / "out"
    source.mkdir()
    save_file(stored, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(model_config_to_hf(config, family)))
    convert.convert_model(source, out)
    return load_params(out, _abstract(config, "params"))


def adapters_of(stored, config, family="llada"):
  """Convert the tensors of a PEFT adapter for `config.lora`, to float32."""
  with tempfile.TemporaryDirectory() as folder:
    source, base, out = (epath.Path(folder) / name for name in ("peft", "base", "out"))
    for path in (source, base):
      path.mkdir()
    save_file(stored, source / "adapter_model.safetensors")
    (source / "adapter_config.json").write_text(json.dumps(lora_config_to_peft(config.lora, family, "base")))
    pretrained.write_model(base, family, config, "")
    convert.convert_adapter(source, base, out)
    return load_params(out, _abstract(config, "lora"))


def _abstract(config, collection):
  variables = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), nn.unbox(variables)[collection]
  )


def write_checkpoint(folder, name, *, max_bytes=10**9, drop=None, **changes):
  """Write a recorded checkpoint to a folder, sharded, without the tensors that `drop` names and with others."""
  folder = epath.Path(folder)
  folder.mkdir(parents=True)
  stored = {key: array for key, array in tensors(name).items() if drop is None or drop not in key} | changes
  write_shards(folder, {key: array.nbytes for key, array in stored.items()}, stored.items(), max_bytes)
  (folder / "config.json").write_text(json.dumps(settings(name)))
  return folder


def load_converted(folder, **own):
  """Give (model, variables) of a converted folder."""
  config = pretrained.read_model(folder).model_config(**own)
  model = Transformer(config)
  return model, {"params": load_params(folder, _abstract(config, "params"))}


def reader(variables):
  """Give the function by which `layout.to_tensors` reads leaves of variables in memory."""
  return lambda path: np.asarray(functools.reduce(operator.getitem, path, variables))


@functools.cache
def tiny(**changes):
  """Give (model, variables) of `TINY` with other fields, its numbers drawn here: nothing to compile."""
  model = Transformer(dataclasses.replace(TINY, **changes))
  shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
  generator = np.random.default_rng(0)

  def draw(path, shape):
    if path[-1].key == "scale":
      return jnp.asarray(generator.uniform(0.6, 1.4, shape.shape), shape.dtype)
    return jnp.asarray(generator.normal(size=shape.shape) * shape.shape[-2] ** -0.5, shape.dtype)

  return model, jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def compiled(model, method="__call__"):
  """Jit a method of a model: `run(variables, ..., **keywords)`."""
  return jax.jit(lambda variables, *args, **keywords: model.apply(variables, *args, method=method, **keywords))
