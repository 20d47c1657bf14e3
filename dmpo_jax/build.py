"""From the configuration to the parts that training and evaluation share: mesh, tokenizer, task, model, parameters.

Below this module everything takes explicit keyword arguments.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmpo_jax import data, models, noise, processes, rollout, samplers, sharding, tasks
from dmpo_jax.config import ConfigError
from dmpo_jax.grading import Grading
from dmpo_jax.hub import pretrained
from dmpo_jax.hub.tokenizer import Tokenizer, load_tokenizer
from dmpo_jax.models.attention import choose_attention
from dmpo_jax.models.lora import LoraConfig
from dmpo_jax.models.transformer import ModelConfig, Transformer
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.run import checks
from dmpo_jax.run.params import identity, load_params, read_metadata
from dmpo_jax.run.workdir import folder_beside
from dmpo_jax.structs import Prompts

logger = logging.getLogger(__name__)

TRAINED = "float32"  # the dtype of what is trained: bfloat16 would round small updates away
EMBEDDING_MULTIPLE = 8  # rows of the embedding table come in this many, so that mesh axes divide it


@runtime_checkable
class Vocabulary(Protocol):
  """What a model takes from its tokenizer."""

  vocab_size: int
  mask_token_id: int
  eos_token_id: int
  pad_token_id: int


@dataclasses.dataclass(frozen=True)
class ModelParts:
  """Where to compute, and with what."""

  mesh: Mesh
  rollout_mesh: Mesh  # where samplers run
  tokenizer: Tokenizer
  model: Transformer


@dataclasses.dataclass(frozen=True)
class Parts(ModelParts):
  """The same, and on what: what training and evaluation need."""

  task: tasks.Task
  grading: Grading  # of the task's completions
  prompts: data.PromptStream | None  # training prompts; None where nothing is trained
  correct_demonstrations: data.PromptStream | None  # the same with demonstrations that are always right
  held_out: tuple[Prompts, list[tasks.Record]]  # evaluation prompts and their records


@runtime_checkable
class Placed(Protocol):
  """A model and the devices that it is laid over: all of the parts that compiled programs need."""

  model: Transformer
  mesh: Mesh


def build_parts(config: ConfigDict, workdir: epath.Path, *, is_training: bool = True) -> Parts:
  """Build what training and evaluation need; the task's data is generated, or read and kept, on first use.

  Args:
    is_training: whether the training prompts are needed, too.

  Raises:
    ConfigError: a file that the configuration names cannot be used, prompts are too long, devices do not fit the mesh.
  """
  with _refusing():
    return _build_parts(config, workdir, is_training)


def build_model_parts(config: ConfigDict) -> ModelParts:
  """Build what the model needs to sample.

  Raises:
    ConfigError: a file that the configuration names cannot be used, or devices do not fit the mesh.
  """
  with _refusing():
    return _build_model_parts(config, is_training=False)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
  """Make what the modules below say of a value or a file a mistake of the configuration."""
  try:
    yield
  except ValueError as error:
    raise ConfigError(str(error)) from error


def _build_model_parts(config: ConfigDict, is_training: bool) -> ModelParts:
  """Where nothing is trained, parameters are loaded to where samplers want them."""
  tokenizer = make_tokenizer(config)
  mesh, rollout_mesh = sharding.make_meshes(**config.sharding.to_dict())
  model = place_model(build_model(config, tokenizer), config, mesh, rollout_mesh)
  if not is_training:  # training says in its own line what it runs on
    mesh, asked = rollout_mesh, sharding.rollout_sizes(**config.sharding.to_dict())
    if any(asked[axis] > size for axis, size in mesh.shape.items()):
      logger.warning("mesh %s", sharding.describe(mesh, asked))
  params = abstract_collection(model, mesh, "params")
  lora = abstract_collection(model, mesh, "lora") if model.config.lora else None
  held = [params, lora]
  if is_training:  # what is trained and its two moments; and what is frozen, which without adapters is the reference
    is_supervised = OBJECTIVES[config.objective.name].needs == "demonstrations"
    trained = abstract_collection(with_params(model, TRAINED), mesh, "lora" if lora else "params")
    held = [*3 * [trained], {} if is_supervised and lora is None else params]
  checks.check_parameters(config, params, lora, held)
  if is_training:
    checks.check_rows(config, model.config.d_model, mesh)
  return ModelParts(mesh=mesh, rollout_mesh=rollout_mesh, tokenizer=tokenizer, model=model)


def _build_parts(config: ConfigDict, workdir: epath.Path, is_training: bool) -> Parts:
  model_parts = _build_model_parts(config, is_training)
  tokenizer = model_parts.tokenizer
  spec = tasks.spec(config.task.to_dict())
  task = tasks.make_task(**spec)
  if is_training:
    _check_parts(config, task)
  source = data.TaskData(
    task,
    config.task.name,
    records_dir=epath.Path(config.task.records_dir or folder_beside(workdir, "data")),
    data_dir=config.task.data_dir,
    num_train=config.task.num_train,
    num_test=config.task.num_test,
    eval_path=config.task.eval_path,
  )
  limits = dict(max_prompt_length=config.task.max_prompt_length, overlong=config.task.overlong_prompts)
  test = source.test()[: config.eval.num_prompts or None]
  held_out = data.PromptStream(test, task, tokenizer, seed=None, **limits)
  prompts = correct_demonstrations = None
  if is_training:
    train = source.train()
    prompts = data.PromptStream(train, task, tokenizer, seed=config.seed, **limits)
    correct_demonstrations = data.PromptStream(train, task.only_correct(), tokenizer, seed=config.seed, **limits)
    is_warm = config.warm_start.updates and not (workdir / "base").exists()
    if is_warm or OBJECTIVES[config.objective.name].needs == "demonstrations":
      for stream in (prompts, correct_demonstrations):
        stream.check_demonstrations(config.sampler.completion_length)
  streams = {"evaluation": held_out, "training": prompts}
  digests = {f"the digest of the {name} prompts": stream.digest() for name, stream in streams.items() if stream}
  if lines := processes.differing("the prompts are compared", digests):
    raise ValueError("the processes of the job have different prompts (files that differ?):\n  " + "\n  ".join(lines))
  return Parts(
    **vars(model_parts),
    task=task,
    grading=Grading(spec, **config.grading),
    prompts=prompts,
    correct_demonstrations=correct_demonstrations,
    held_out=held_out.batch(0, len(held_out)),
  )


def _check_parts(config: ConfigDict, task: tasks.Task) -> None:
  """Check that the rewards of a task have the parts that the objective takes apart.

  Raises:
    ValueError: they have none, or `objective.part_weights` has another number of them.
  """
  own, names = config.objective, task.reward_parts
  if own.reward_scaling == "standardise_parts" and not names:
    raise ValueError(
      f"objective.reward_scaling={own.reward_scaling!r}: a reward of task.name={config.task.name!r} is one number; "
      "set it to 'standardise', or have the task's reward return parts (docs/tasks.md)"
    )
  if own.part_weights and len(own.part_weights) != len(names):
    raise ValueError(
      f"objective.part_weights={tuple(own.part_weights)}: the rewards of task.name={config.task.name!r} have "
      f"{len(names)} parts, {', '.join(names)}; give a weight for each, or ()"
    )


def make_tokenizer(config: ConfigDict) -> Tokenizer:
  """Load the tokenizer of `config.tokenizer`, which may be the checkpoint's own."""
  own = config.tokenizer
  return load_tokenizer(own.name, own.path or config.model.init_from, is_chat=own.is_chat)


def build_model(config: ConfigDict, vocabulary: Vocabulary) -> Transformer:
  """Build the model of `config.model`; special ids and, unless they are given, sizes of the vocabulary are the
  tokenizer's.

  Raises:
    ValueError: the checkpoint in `model.init_from` or the adapters in `model.lora.init_from` are of another model.
  """
  own, lora = pretrained.filled(config).model, None
  if own.lora.rank:
    lora = LoraConfig(own.lora.rank, own.lora.alpha, own.lora.dropout, tuple(own.lora.targets))
    pretrained.check_adapter(lora, own.lora.init_from)
  fields = {name: own[name] for name in pretrained.FIELDS if own.get(name) is not None}
  fields |= {name: getattr(vocabulary, name) for name in pretrained.SPECIAL_IDS}
  checkpoint = pretrained.read_model(own.init_from) if own.init_from else None
  if checkpoint is not None:
    pretrained.check_model(fields, checkpoint.fields, own.init_from)
    fields = checkpoint.fields
  fields["vocab_size"] = fields["vocab_size"] or vocabulary.vocab_size
  fields["embedding_size"] = fields["embedding_size"] or _round_up(fields["vocab_size"], EMBEDDING_MULTIPLE)
  if fields["vocab_size"] < vocabulary.vocab_size:
    raise ValueError(f"model.vocab_size={fields['vocab_size']}: the tokenizer has {vocabulary.vocab_size} ids")
  return models.MODELS[own.name](
    ModelConfig(
      **fields, dtype=own.dtype, param_dtype=own.param_dtype, remat=own.remat, layer_rows=own.layer_rows, lora=lora
    )
  )


def _round_up(number: int, multiple: int) -> int:
  return -(-number // multiple) * multiple


def place_model(model: Transformer, config: ConfigDict, mesh: Mesh, rollout_mesh: Mesh) -> Transformer:
  """Give the model the attention that `model.attention` means on the devices of both meshes.

  Raises:
    ValueError: the devices cannot run it, or a mesh does not divide the model's sizes.
  """
  check_fits(model.config, mesh, "sharding")
  check_fits(model.config, rollout_mesh, "sharding.rollout")
  own, platform = model.config, sharding.platform(mesh)
  attention = choose_attention(config.model.attention, platform=platform, head_dim=own.head_dim, dtype=own.dtype)
  return type(model)(dataclasses.replace(own, attention=attention))


def check_fits(config: ModelConfig, mesh: Mesh, section: str) -> None:
  """Refuse a mesh, whose sizes are those of the configuration's `section`, that does not divide the model's sizes."""
  for logical, path, size in (
    ("embed", "model.d_model", config.d_model),
    ("heads", "model.num_heads", config.num_heads),
    ("kv_heads", "model.num_kv_heads", config.num_kv_heads),
    ("ffn", "model.mlp_hidden_size", config.mlp_hidden_size),
    ("vocab", "rows of the embedding table", config.embedding_size),
    ("rank", "model.lora.rank", config.lora.rank if config.lora else 0),
  ):
    sharding.check_divides(mesh, logical, path, size, section)


def abstract_collection(model: Transformer, mesh: Mesh, name: str) -> Any:
  """Describe a collection of the model's variables (`params`, `lora`) by shape, dtype and sharding."""
  boxed = _boxed_shapes(model, name)
  shapes, shardings = nn.unbox(boxed), sharding.layout(boxed, mesh)
  return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings)


@functools.cache  # a run asks for them several times
def _boxed_shapes(model: Transformer, name: str) -> Any:
  return jax.eval_shape(lambda: _init_collection(model, name)(jax.random.key(0)))


def random_collection(model: Transformer, mesh: Mesh, name: str, key: jax.Array) -> Any:
  """Initialise a collection of the model's variables at random, each array made where it will live."""
  shardings = jax.tree.map(lambda x: x.sharding, abstract_collection(model, mesh, name))
  return jax.jit(lambda key: nn.unbox(_init_collection(model, name)(key)), out_shardings=shardings)(key)


def _init_collection(model: Transformer, name: str) -> Callable[[jax.Array], Any]:
  return lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))[name]


def with_params(model: Transformer, dtype: str) -> Transformer:
  """Give the model with parameters of another dtype."""
  return type(model)(dataclasses.replace(model.config, param_dtype=dtype))


def initial_params(config: ConfigDict, parts: ModelParts, *, are_trained: bool = False) -> Any:
  """Return the parameters that `model.init_from` names, or random ones from the seed, laid out over the mesh.

  Args:
    are_trained: in float32 instead of `model.param_dtype`.
  """
  model = with_params(parts.model, TRAINED) if are_trained else parts.model
  if config.model.init_from:
    return load_params(epath.Path(config.model.init_from), abstract_collection(model, parts.mesh, "params"))
  return random_collection(model, parts.mesh, "params", noise.step_key(config.seed, "init", 0))


def initial_adapters(config: ConfigDict, workdir: epath.Path | None, parts: ModelParts) -> Any:
  """Return the adapters that `model.lora.init_from` names, or new ones from the seed, laid out over the mesh.

  Raises:
    ConfigError: a run trained them on another base.
  """
  saved = config.model.lora.init_from
  if saved:
    check_base(config, workdir, saved)
    return load_params(saved, abstract_collection(parts.model, parts.mesh, "lora"))
  return random_collection(parts.model, parts.mesh, "lora", noise.step_key(config.seed, "init", 1))


def base_params(config: ConfigDict, workdir: epath.Path, parts: ModelParts, *, are_trained: bool = False) -> Any:
  """Return the base: what the warm start left in `workdir/base`, or the initial parameters where there is none.

  Args:
    are_trained: as for `initial_params`.
  """
  if config.warm_start.updates:
    model = with_params(parts.model, TRAINED) if are_trained else parts.model
    return load_params(workdir / "base", abstract_collection(model, parts.mesh, "params"))
  return initial_params(config, parts, are_trained=are_trained)


def load_policy(config: ConfigDict, workdir: epath.Path | None, parts: ModelParts) -> tuple[Any, Any]:
  """Return the policy that training left in `workdir`, or without one the initial model: (trainable, frozen).

  Raises:
    ConfigError: there is neither a workdir nor a model to begin with; or see `load_policies`.
  """
  if workdir is not None:
    (trainable,), frozen = load_policies(config, workdir, parts, ["policy"])
    return trainable, frozen
  if not config.model.init_from:
    raise ConfigError("no policy: give --workdir of a finished run, or set config.model.init_from to a model")
  params = initial_params(config, parts)
  has_adapters = parts.model.config.lora is not None
  return (initial_adapters(config, None, parts), params) if has_adapters else (params, {})


def load_policies(
  config: ConfigDict, workdir: epath.Path, parts: ModelParts, folders: Sequence[str]
) -> tuple[list[Any], Any]:
  """Return the policies in some of a workdir's folders, and the base that their adapters share ({} without adapters).

  Raises:
    ConfigError: there is no such policy, or its adapters were trained on another base.
  """
  has_adapters = parts.model.config.lora is not None
  for folder in folders:
    if not (workdir / folder).exists():
      raise ConfigError(f"{workdir} holds no finished policy: train first, with the same command without --mode")
    if has_adapters:
      check_base(config, workdir, workdir / folder)
  if has_adapters:
    abstract = abstract_collection(parts.model, parts.mesh, "lora")
  else:  # saved in float32; rounded now to what the layers would round them to
    abstract = abstract_collection(with_params(parts.model, parts.model.config.dtype), parts.mesh, "params")
  trained = [load_params(workdir / folder, abstract) for folder in folders]
  return trained, base_params(config, workdir, parts) if has_adapters else {}


def about_policy(config: ConfigDict, workdir: epath.Path, num_buffers: int) -> dict[str, Any]:
  """Say what made a policy, to be saved with it: the buffers that it has learned from, and its base."""
  return {"buffers": num_buffers, "base": base_name(config, workdir)}


def check_base(config: ConfigDict, workdir: epath.Path | None, adapters: epath.PathLike) -> None:
  """Refuse adapters of a run on another base than theirs; where nothing says which that was, the log does.

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
  """Say which base a policy stands on: the identity of its parameters, or what random ones were made from."""
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
  parts: Placed,
  *,
  group_size: int,
  temperature: float,
  early_exit: bool,
  with_reference: bool = False,
  on_call: Callable | None = None,
) -> Callable:
  """Jit the sampler of `config.sampler` with these settings (see `samplers.Plan` and `rollout.make_sample`)."""
  sampler = config.sampler
  return rollout.make_sample(
    parts.model,
    parts.mesh,
    sampler=sampler.name,
    group_size=group_size,
    plan=samplers.Plan(
      completion_length=sampler.completion_length,
      block_length=sampler.block_length,
      steps=sampler.steps,
      temperature=temperature,
      early_exit=early_exit,
      on_call=on_call,
    ),
    guidance=sampler.guidance,
    with_reference=with_reference,
    options=samplers.make_options(sampler.name, sampler.to_dict().get(sampler.name, {})),
  )
