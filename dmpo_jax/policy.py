"""Policies: their parameters (from the seed, a checkpoint or a workdir), and sampling from them.

A policy is the model's variables: what is trained, and, under adapters, the frozen base. The reference is the base, or
a copy of the policy that follows it.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from dmpo_jax import noise, samplers, sharding
from dmpo_jax.config import ConfigError
from dmpo_jax.hub import pretrained
from dmpo_jax.hub.tokenizer import Tokenizer
from dmpo_jax.models.config import ModelConfig
from dmpo_jax.models.denoiser import make_denoiser
from dmpo_jax.models.trainable import TRAINED_DTYPE, Trainable
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.run.params import identity, load_params, read_metadata
from dmpo_jax.structs import Prompts, Rollouts

logger = logging.getLogger(__name__)


class NotFinite(RuntimeError):
  """The model gives no probabilities: its parameters hold NaN or infinities, or it overflows."""


class Policies(NamedTuple):
  """The policy that draws rollouts, and its reference."""

  trainable: PyTree
  frozen: PyTree  # parameters that are not trained; {} where there are none
  reference: PyTree = None  # see `structs.TrainState`


@dataclasses.dataclass(frozen=True)
class ModelParts:
  """The model, its tokenizer, and the devices."""

  mesh: Mesh
  rollout_mesh: Mesh  # where samplers run
  tokenizer: Tokenizer
  model: Transformer

  @property
  def trainable(self) -> Trainable:
    """What is trained of the model."""
    return Trainable.of(self.model.config)


def abstract_collection(model: Transformer, mesh: Mesh, name: str) -> Any:
  """Describe a collection of the model's variables ("params", "lora") by shape, dtype and sharding."""
  boxed = _boxed_shapes(model, name)  # pyright: ignore[reportArgumentType]  # Flax makes its modules hashable
  shapes, shardings = nn.unbox(boxed), sharding.layout(boxed, mesh)
  return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings)


def abstract_trained(model: Transformer, mesh: Mesh) -> Any:
  """Describe what is trained, in float32: the adapters, or all parameters."""
  return abstract_collection(with_params(model, TRAINED_DTYPE), mesh, Trainable.of(model.config).collection)


@functools.cache  # a run needs them several times
def _boxed_shapes(model: Transformer, name: str) -> Any:
  return jax.eval_shape(lambda: _init_collection(model, name)(jax.random.key(0)))


def random_collection(model: Transformer, mesh: Mesh, name: str, key: jax.Array) -> Any:
  """Initialise a collection of the model's variables at random; each array is made where it will live."""
  shardings = jax.tree.map(lambda x: x.sharding, abstract_collection(model, mesh, name))
  return jax.jit(lambda key: nn.unbox(_init_collection(model, name)(key)), out_shardings=shardings)(key)


def _init_collection(model: Transformer, name: str) -> Callable[[jax.Array], Any]:
  return lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))[name]


def with_params(model: Transformer, dtype: str) -> Transformer:
  """Return the model with parameters of another dtype."""
  return type(model)(dataclasses.replace(model.config, param_dtype=dtype))


def initial_params(config: ConfigDict, parts: ModelParts, *, are_trained: bool = False) -> Any:
  """Return the parameters in `model.init_from`, or random ones from the seed, laid out over the mesh.

  Args:
    are_trained: in float32 instead of `model.param_dtype`.
  """
  model = with_params(parts.model, TRAINED_DTYPE) if are_trained else parts.model
  if config.model.init_from:
    return load_params(epath.Path(config.model.init_from), abstract_collection(model, parts.mesh, "params"))
  return random_collection(model, parts.mesh, "params", noise.step_key(config.seed, "init", 0))


def initial_adapters(config: ConfigDict, workdir: epath.Path | None, parts: ModelParts) -> Any:
  """Return the adapters in `model.lora.init_from`, or new ones from the seed, laid out over the mesh.

  Raises:
    ConfigError: a run trained them on another base.
  """
  saved = config.model.lora.init_from
  if saved:
    check_base(config, workdir, saved)
    return load_params(saved, abstract_collection(parts.model, parts.mesh, "lora"))
  return random_collection(parts.model, parts.mesh, "lora", noise.step_key(config.seed, "init", 1))


def base_params(config: ConfigDict, workdir: epath.Path, parts: ModelParts, *, are_trained: bool = False) -> Any:
  """Return the base: what the warm start left in `workdir/base`, or without a warm start the initial parameters.

  Args:
    are_trained: as for `initial_params`.
  """
  if config.warm_start.updates:
    model = with_params(parts.model, TRAINED_DTYPE) if are_trained else parts.model
    return load_params(workdir / "base", abstract_collection(model, parts.mesh, "params"))
  return initial_params(config, parts, are_trained=are_trained)


def load_policy(config: ConfigDict, workdir: epath.Path | None, parts: ModelParts) -> Policies:
  """Return the policy that training left in `workdir`, or without a workdir the initial model.

  Raises:
    ConfigError: there is neither a workdir nor a model to begin with; or see `load_policies`.
  """
  if workdir is not None:
    (trained,), frozen = load_policies(config, workdir, parts, ["policy"])
    return Policies(trained, frozen)
  if not config.model.init_from:
    raise ConfigError("no policy: give --workdir of a finished run, or set config.model.init_from to a model")
  params = initial_params(config, parts)
  return Policies(initial_adapters(config, None, parts), params) if config.model.lora.rank else Policies(params, {})


def load_policies(
  config: ConfigDict, workdir: epath.Path, parts: ModelParts, folders: Sequence[str]
) -> tuple[list[Any], Any]:
  """Return what was trained, from some of a workdir's folders, and the base that adapters share ({} without adapters).

  Raises:
    ConfigError: there is no such policy, or its adapters were trained on another base.
  """
  has_adapters = parts.trainable.has_adapters
  for folder in folders:
    if not (workdir / folder).exists():
      raise ConfigError(f"{workdir} holds no finished policy: train first, with the same command without --mode")
    if has_adapters:
      check_base(config, workdir, workdir / folder)
  # parameters were saved in float32, and are rounded now to what the layers would round them to
  model = parts.model if has_adapters else with_params(parts.model, parts.model.config.dtype)
  abstract = abstract_collection(model, parts.mesh, parts.trainable.collection)
  trained = [load_params(workdir / folder, abstract) for folder in folders]
  return trained, base_params(config, workdir, parts) if has_adapters else {}


def policy_metadata(config: ConfigDict, workdir: epath.Path, num_buffers: int, model: ModelConfig) -> dict[str, Any]:
  """Return what is saved with a policy: the number of buffers that it has learned from, its base, and its model."""
  return {"buffers": num_buffers, "base": base_name(config, workdir), **model_metadata(model)}


def model_metadata(model: ModelConfig) -> dict[str, Any]:
  """Return what is saved with any parameters of a run: the model that they are of."""
  return pretrained.description(model)


def check_base(config: ConfigDict, workdir: epath.Path | None, adapters: epath.PathLike) -> None:
  """Refuse adapters that were trained on another base; warn where their folder does not name the base.

  Raises:
    ConfigError: naming both.
  """
  trained_on, given = read_metadata(adapters).get("base"), base_name(config, workdir)
  if trained_on is None:
    _warn_once(f"{adapters} does not say which base its adapters were trained on: taken for those of {given}")
  elif trained_on != given:
    raise ConfigError(
      f"the adapters in {adapters} were trained on the base {trained_on}, and this base is {given}: set "
      f"config.model.init_from = {config.model.init_from!r} back (a copy of the folder will do); where the base was "
      "random, config.seed and config.model.param_dtype"
    )


@functools.cache
def _warn_once(text: str) -> None:
  logger.warning(text)


def base_name(config: ConfigDict, workdir: epath.Path | None) -> str:
  """Name a policy's base: the identity of its parameters, or what random ones were made from."""
  known = initial_identity(config) if workdir is None else base_identity(config, workdir)
  return known or f"random, seed {config.seed}, {config.model.param_dtype}"


def initial_identity(config: ConfigDict) -> str:
  """Identify the parameters that `initial_params` returns; "" where they come from the seed."""
  return identity(config.model.init_from) if config.model.init_from else ""


def base_identity(config: ConfigDict, workdir: epath.Path) -> str:
  """Identify the parameters that `base_params` returns; "" where they come from the seed."""
  return identity(workdir / "base") if config.warm_start.updates else initial_identity(config)


def make_sample(
  config: ConfigDict,
  model: Transformer,
  mesh: Mesh,
  *,
  group_size: int,
  temperature: float,
  early_exit: bool,
  with_reference: bool = False,
  on_call: Callable[..., None] | None = None,
) -> jax.stages.Wrapped:
  """Jit the sampler of `config.sampler`: `sample(policies, prompts, key, first=0, temperature=None) -> Rollouts`.

  Its fields are [p, g, ...], from the rollout with index `first` on. A temperature [p], one for each prompt's rollouts,
  replaces the one given here. Where the devices do not divide the rows, copies of the last row fill them up and are
  dropped again.

  Args:
    mesh: where the rollouts are to lie, on every device; the sampler runs on the mesh that is set when it is called.
    group_size: rollouts of each prompt, of one call.
    temperature, early_exit, on_call: see `samplers.Plan`.
    with_reference: the sampler also gives the reference's log-probabilities of the tokens that it draws.
  """
  own, trainable = config.sampler, Trainable.of(model.config)
  options = samplers.make_options(own.name, own.to_dict().get(own.name, {}))
  common_plan = make_plan(config, temperature=temperature, early_exit=early_exit, on_call=on_call)

  def sample(
    policies: Policies,
    prompts: Prompts,
    key: jax.Array,
    first: int | jax.Array = 0,
    temperature: jax.Array | None = None,
  ) -> Rollouts:
    num_rows = prompts.tokens.shape[0] * group_size

    def rows(array: jax.Array) -> jax.Array:
      return sharding.fill_rows(jnp.repeat(array, group_size, axis=0))

    denoiser = make_denoiser(
      model,
      trainable.policy(policies.trainable, policies.frozen),
      rows(prompts.tokens),
      rows(prompts.is_valid),
      guidance=own.guidance,
      reference=trainable.reference(policies.frozen, policies.reference) if with_reference else None,
    )
    keys = sharding.fill_rows(noise.row_keys(key, prompts.prompt_id, group_size, first).reshape(-1))
    plan = common_plan if temperature is None else dataclasses.replace(common_plan, temperature=rows(temperature))
    rollouts = samplers.SAMPLERS[own.name].sample(denoiser, keys, plan, options)
    return jax.tree.map(lambda array: array[:num_rows].reshape(-1, group_size, *array.shape[1:]), rollouts)

  return jax.jit(sample, out_shardings=sharding.replicated(mesh))


def make_plan(
  config: ConfigDict, *, temperature: float, early_exit: bool, on_call: Callable[..., None] | None = None
) -> samplers.Plan:
  """Build the settings that all samplers share; the arguments are those of `samplers.Plan`."""
  own = config.sampler
  return samplers.Plan(
    completion_length=own.completion_length,
    block_length=own.block_length,
    steps=own.steps,
    temperature=temperature,
    early_exit=early_exit,
    on_call=on_call,
  )


class Compiled:
  """A jitted sampler that compiles one program for each shape of prompts, and says how long that took.

  It is called with `(policies, prompts, key)`; `seconds` of compiling add up.
  """

  def __init__(self, sample: jax.stages.Wrapped):
    self.seconds = 0.0
    self._sample = sample
    self._programs: dict[tuple[int, ...], jax.stages.Compiled] = {}

  def __call__(self, policies: Policies, prompts: Prompts, key: jax.Array) -> Rollouts:
    return self.compile(policies, prompts, key)(policies, prompts, key)

  def compile(self, policies: Policies, prompts: Prompts, key: jax.Array) -> jax.stages.Compiled:
    """Return the program for prompts of this shape, compiled on first use."""
    shape = prompts.tokens.shape
    if shape not in self._programs:
      start = time.monotonic()
      self._programs[shape] = self._sample.lower(policies, prompts, key).compile()
      self.seconds += time.monotonic() - start
    return self._programs[shape]


def check_confidence(rollouts: Rollouts) -> None:
  """Stop where no rollout of a sampler's call has finite probabilities.

  Raises:
    NotFinite: none has.
  """
  is_finite = np.isfinite(rollouts.confidence).all(-1)
  if is_finite.size and not is_finite.any():
    raise NotFinite(
      f"none of {is_finite.size} rollouts has finite probabilities: the parameters hold NaN or infinities, or the "
      "model overflows in model.dtype. Check that model.init_from and model.lora.init_from are whole"
    )
