"""What the benchmark measures: the programs of training, on random weights, prompts and rollouts."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from dmpo_jax.hub import pretrained
from dmpo_jax.models.config import ModelConfig
from dmpo_jax.models.trainable import TRAINED_DTYPE, Trainable
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.policy import Policies, random_collection
from dmpo_jax.structs import Experience, Prompts
from dmpo_jax.update import Update
from launch.bench import costs, programs

# Factor on the head for sampling, which makes random weights confident; with more, confidences round to 1.
SHARPNESS = 10.0

# Changes of a configuration for which every program compiles and runs in seconds on a CPU.
TINY = {
  "model.d_model": 16,
  "model.num_heads": 2,
  "model.num_kv_heads": 2,
  "model.num_layers": 2,
  "model.mlp_hidden_size": 24,
  "model.vocab_size": 320,
  "model.embedding_size": 320,
  "model.lora.rank": 2,
  "task.max_prompt_length": 6,
  "sampler.completion_length": 8,
  "sampler.block_length": 4,
  "sampler.steps": 4,
}


class Workload(NamedTuple):
  """A configuration with the arguments of its programs."""

  config: ConfigDict
  model: Transformer
  meshes: tuple[Mesh, Mesh]  # of training, and of the samplers
  policies: Policies  # adapters are not zero
  experience: Experience

  @property
  def mesh(self) -> Mesh:
    """Return the mesh of training."""
    return self.meshes[0]

  @property
  def beside_state(self) -> tuple[Any, Experience, jax.Array]:
    """Return the arguments of the gradient step after its state."""
    return self.policies.frozen, self.experience, jax.random.key(self.config.seed)


def make(config: ConfigDict, *, sharpness: float = 1.0) -> Workload:
  """Draw weights and a buffer, the same ones in every process.

  Args:
    sharpness: factor on the head's weights.
  """
  model, meshes = programs.place(config, jax.devices())
  mesh = meshes[0]
  params = random_collection(model, mesh, "params", jax.random.key(0))
  if not model.config.weight_tying:  # the published samplers fail where MASK is the most likely token
    params = params | {"head": params["head"].at[:, model.config.mask_token_id].set(0) * sharpness}
  if model.config.lora is None:
    trainable = Trainable.of(model.config).computing(as_trained(params))
  else:  # B of new adapters is 0, and with it their output and the gradient of A
    trainable = random_collection(model, mesh, "lora", jax.random.key(1))
    trainable = jax.tree.map_with_path(_fill_b, trainable)
  reference = jax.tree.map(jnp.copy, trainable) if config.objective.sync_reference_every else None
  return Workload(config, model, meshes, Policies(trainable, params, reference), _experience(config, model))


def as_trained(params: PyTree) -> PyTree:
  """Copy parameters in the dtype in which they are trained."""
  return jax.tree.map(lambda x: jnp.copy(x.astype(TRAINED_DTYPE)), params)


def _fill_b(path: jax.tree_util.KeyPath, array: jax.Array) -> jax.Array:
  if path[-1].key != "B":
    return array
  key = jax.random.fold_in(jax.random.key(2), array.shape[-1])
  return jax.device_put(0.02 * jax.random.normal(key, array.shape, array.dtype), array.sharding)


def _experience(config: ConfigDict, model: Transformer) -> Experience:
  """Draw a buffer of rollouts: ordinary tokens, prompts without padding, some rewards and log-probabilities."""
  rng, p, g = np.random.default_rng(0), config.rollout.num_prompts, config.rollout.group_size
  ordinary = ordinary_ids(model.config)
  prompt = rng.choice(ordinary, (p, config.task.max_prompt_length))
  completion = rng.choice(ordinary, (p, g, config.sampler.completion_length))
  weight, negative_weight = rng.dirichlet(np.ones(g), (2, p)).astype(np.float32)
  drawn = Experience(
    prompts=Prompts(prompt, np.ones(prompt.shape, bool), np.arange(p, dtype=np.uint32)),
    completion=completion,
    is_counted=np.ones(completion.shape, bool),
    reward=rng.random((p, g), np.float32),
    is_kept=np.ones((p, g), bool),
    log_p_old=-rng.random((p, g), np.float32),
    log_p_ref=-rng.random((p, g), np.float32),
    weight=weight,
    negative_weight=negative_weight,
    committed_at=np.zeros(completion.shape, np.int32),
  )
  return jax.tree.map(jnp.asarray, drawn)


def ordinary_ids(config: ModelConfig) -> np.ndarray:
  """List the ids that are not those of special tokens."""
  special = [getattr(config, name) for name in pretrained.SPECIAL_IDS]
  return np.setdiff1d(np.arange(config.vocab_size), special).astype(np.int32)


def without_noise(config: ConfigDict) -> ConfigDict:
  """Return the same work without random draws, which differ between implementations: no dropout, temperature 0."""
  return changed(config, {"model.lora.dropout": 0.0, "sampler.temperature": 0.0})


def changed(config: ConfigDict, keys: dict[str, Any]) -> ConfigDict:
  """Copy a configuration with some keys changed."""
  copy = ConfigDict(config.to_dict())
  copy.update_from_flattened_dict(keys)
  return copy


def trace(name: str, work: Workload) -> jax.stages.Traced:
  """Trace one of `programs.PROGRAMS` for the workload's sizes."""
  return programs.trace(name, work.config, work.model, work.meshes)


def compiled(name: str, work: Workload) -> jax.stages.Compiled:
  """Compile one of `programs.PROGRAMS` for the workload's sizes."""
  return trace(name, work).lower().compile()


def compile_step(work: Workload) -> Update:
  """Compile the programs of the gradient step."""
  step, _ = programs.make_step(work.config, work.model, work.mesh)
  return dataclasses.replace(step, **{name: compiled(name, work) for name in programs.STEP})


def trace_on(name: str, config: ConfigDict, devices: Sequence[jax.Device]) -> jax.stages.Traced:
  """Trace a program for a mesh of these devices, without drawing its arguments."""
  return programs.trace(name, config, *programs.place(config, devices))


def count_flops(name: str, config: ConfigDict) -> float:
  """Count the floating-point operations of a program without recomputation, whatever model.remat says.

  Attention counts as its definition, as a jaxpr does not show what cuDNN's kernel does. A sampler that may stop early
  counts with all calls of its schedule.
  """
  plain = changed(config, {"model.remat": "none", "model.attention": "xla"})
  return costs.count_flops(trace_on(name, plain, jax.devices()).jaxpr, while_trips=programs.loop_calls(config))


def planned_bytes(compiled: jax.stages.Compiled) -> int:
  """Return the peak memory of a program as the compiler estimates it: arguments, results and temporaries."""
  memory = compiled.memory_analysis()
  assert memory is not None  # CPUs, GPUs and TPUs have one
  total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
  return total - memory.alias_size_in_bytes


def settings_line(config: ConfigDict) -> str:
  """Describe the sizes of a configuration in one line."""
  model, sampler, rollout = config.model, config.sampler, config.rollout
  lora = f"LoRA rank {model.lora.rank}" if model.lora.rank else "all parameters trained"
  return (
    f"d_model {model.d_model}, {model.num_layers} layers, feed-forward {model.mlp_hidden_size}, vocabulary "
    f"{model.vocab_size:,}, {model.dtype}, {lora}; {rollout.num_prompts} prompts x {rollout.group_size} rollouts, "
    f"{config.task.max_prompt_length} prompt and {sampler.completion_length} completion tokens"
  )
