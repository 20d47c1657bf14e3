"""The programs of training, traced as a run calls them, with abstract arrays; for `launch.plan` and the benchmark."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmpo_jax import build, phases, sharding
from dmpo_jax.config import validate
from dmpo_jax.models.trainable import Trainable
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.policy import Policies, abstract_collection, abstract_trained
from dmpo_jax.structs import Experience, Prompts, TrainState
from dmpo_jax.update import Update

STEP = ("accumulate", "apply")  # of a gradient step: the gradient of a microbatch, and the optimizer
PROGRAMS = (*STEP, "sample", "score", "move")


def make_meshes(config: ConfigDict, devices: Sequence[jax.Device]) -> tuple[Mesh, Mesh]:
  """Lay out the meshes of training and of the samplers over devices.

  Raises:
    ValueError: the devices do not fit a mesh.
  """
  return sharding.make_meshes(**config.sharding.to_dict(), devices=devices)


def make_model(config: ConfigDict) -> Transformer:
  """Build the model of a configuration; without a checkpoint its special ids are arbitrary: no program depends on them.

  Raises:
    ValueError: neither a checkpoint nor model.vocab_size or embedding_size gives the size of the vocabulary.
  """
  if config.tokenizer.path or config.model.init_from:
    return build.build_model(config, build.make_tokenizer(config))
  size = config.model.vocab_size or config.model.embedding_size
  if not size:
    raise ValueError("config.model.vocab_size = 0: without a tokenizer the size of the vocabulary is needed")
  own = build.SpecialIds(vocab_size=size, mask_token_id=size - 1, eos_token_id=size - 2, pad_token_id=size - 2)
  return build.build_model(config, own)


def place(config: ConfigDict, devices: Sequence[jax.Device]) -> tuple[Transformer, tuple[Mesh, Mesh]]:
  """Return the model of a configuration and its meshes over the devices."""
  meshes = make_meshes(config, devices)
  return build.place_model(make_model(config), config, *meshes), meshes


def is_needed(name: str, config: ConfigDict) -> bool:
  """Return whether the objective of a configuration runs a program."""
  objective = phases.make_objective(config)
  if name == "score":
    return phases.num_scored(config, config.train.updates_per_buffer) > 0  # of any buffer but the first
  if name == "move":
    return not objective.learns_from_demonstrations and any(config.sharding.rollout.values())
  return name in STEP or not objective.learns_from_demonstrations


def calls_of(name: str, config: ConfigDict) -> int:
  """Return how often a program runs for one buffer."""
  if name in STEP:
    return config.train.updates_per_buffer * (phases.num_microbatches(config) if name == "accumulate" else 1)
  return 1 if name == "move" else len(phases.make_chunking(config).cut(config.rollout.num_prompts))


def loop_calls(config: ConfigDict) -> int:
  """Count the model calls in a sampler's loop over a block, by its schedule."""
  own = config.sampler
  calls = own.steps * own.block_length // own.completion_length
  return calls - 1 if own.name in ("prefix_cache", "dual_cache") else calls  # their first call comes before the loop


def make_step(config: ConfigDict, model: Transformer, mesh: Mesh) -> tuple[Update, TrainState]:
  """Return the jitted gradient step for a mesh, and its abstract state."""
  optimizer = phases.training_optimizer(config)
  trained = abstract_trained(model, mesh)
  reference = Trainable.of(model.config).computing(trained)
  state = phases.abstract_state(trained, optimizer, mesh)
  state = dataclasses.replace(state, reference=reference if config.objective.sync_reference_every else None)
  layout = jax.tree.map(lambda leaf: leaf.sharding, state), sharding.replicated(mesh)
  return phases.training_update(config, model, optimizer, layout), state


def trace(name: str, config: ConfigDict, model: Transformer, meshes: tuple[Mesh, Mesh]) -> jax.stages.Traced:
  """Trace one of `PROGRAMS` as training calls it, with abstract arrays."""
  mesh = meshes[1] if name == "sample" else meshes[0]
  params = abstract_collection(model, mesh, "params")
  step, state = make_step(config, model, mesh)
  trainable = Trainable.of(model.config).computing(state.trainable)
  policies = Policies(trainable, params, state.reference)
  own = config.rollout
  chunk = _experience(config, own.chunk_prompts or own.num_prompts, own.chunk_rollouts or own.group_size)
  key = jax.eval_shape(lambda: jax.random.key(0))
  if name in STEP:
    gradient = state.trainable  # in shapes, float32 and layout
    microbatch = _experience(config, own.num_prompts // step.num_microbatches, own.group_size)
    program, args = step.accumulate, (gradient if step.num_microbatches > 1 else None, state, params, microbatch, key)
    if name == "apply":
      with jax.set_mesh(mesh):
        _, share = jax.eval_shape(program, *args)
      share = jax.tree.map(lambda leaf: leaf.update(sharding=sharding.replicated(mesh)), share)
      program, args = step.apply, (state, gradient, share, jax.ShapeDtypeStruct((2,), jnp.float32))
  elif name == "sample":
    program = phases.training_sample(config, model, mesh)
    args = policies, chunk.prompts, key, 0
  elif name == "move":
    args = (policies,)
    program = sharding.moving(policies, meshes[1])
  else:
    program = phases.training_log_probs(config, model, mesh)
    assert program is not None  # callers ask for what the objective needs
    args = policies, chunk.prompts, chunk.completion, chunk.is_counted, chunk.committed_at, key, None, 0
  with jax.set_mesh(mesh):  # nothing may be computed here: the devices may not exist
    return program.trace(*args)


def _experience(config: ConfigDict, p: int, g: int) -> Experience:
  """Return abstract rollouts, g of each of p prompts."""
  objective, num_updates = phases.make_objective(config), config.train.updates_per_buffer
  names = ["token_log_p_old"] * objective.needs_token_log_probs + ["token_log_p_ref"] * objective.needs_reference
  q, c = config.task.max_prompt_length, config.sampler.completion_length
  width = c if objective.likelihood is None or objective.reads_tokens else objective.likelihood.num_estimates

  def array(dtype: jax.typing.DTypeLike, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)

  return Experience(
    prompts=Prompts(array(jnp.int32, p, q), array(bool, p, q), array(jnp.uint32, p)),
    completion=array(jnp.int32, p, g, c),
    is_counted=array(bool, p, g, c),
    reward=array(jnp.float32, p, g),
    is_kept=array(bool, p, g),
    log_p_old=array(jnp.float32, p, g),
    log_p_ref=array(jnp.float32, p, g),
    weight=array(jnp.float32, p, g),
    negative_weight=array(jnp.float32, p, g),
    committed_at=array(jnp.int32, p, g, c),
    **dict.fromkeys(names, array(jnp.float32, p, g, num_updates, width)),
  )


def check(config: ConfigDict) -> None:
  """Validate a configuration whose checkpoint need not exist yet.

  Raises:
    ConfigError: it is not valid.
  """
  config = ConfigDict(config.to_dict())
  if not config.tokenizer.path and not config.model.init_from:
    config.tokenizer.path = "."
  validate(config)
