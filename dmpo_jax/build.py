"""From the configuration to the parts that training and evaluation share: mesh, tokenizer, task, model, parameters.

Below this module everything takes explicit keyword arguments.
"""

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmpo_jax import data, processes, sharding, tasks
from dmpo_jax.config import ConfigError
from dmpo_jax.grading import Grading
from dmpo_jax.hub import pretrained
from dmpo_jax.hub.chat import read_switches
from dmpo_jax.hub.tokenizer import Tokenizer, load_tokenizer
from dmpo_jax.mixed import MixedGrading, MixedStream
from dmpo_jax.models.attention import choose_attention
from dmpo_jax.models.config import ModelConfig
from dmpo_jax.models.lora import LoraConfig
from dmpo_jax.models.trainable import Trainable
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.policy import ModelParts, abstract_collection, abstract_trained
from dmpo_jax.run import checks
from dmpo_jax.run.workdir import folder_beside
from dmpo_jax.structs import Prompts
from dmpo_jax.tasks import mixture

logger = logging.getLogger(__name__)

EMBEDDING_MULTIPLE = 8  # rows of the embedding table come in this many, so that mesh axes divide it


@runtime_checkable
class Vocabulary(Protocol):
  """What a model takes from its tokenizer."""

  vocab_size: int
  mask_token_id: int
  eos_token_id: int
  end_token_ids: tuple[int, ...]
  pad_token_id: int


@dataclasses.dataclass
class SpecialIds:
  """What a model takes from a tokenizer (`Vocabulary`), where there is none."""

  vocab_size: int
  mask_token_id: int
  eos_token_id: int
  pad_token_id: int
  end_token_ids: tuple[int, ...] = ()  # EOS alone


@dataclasses.dataclass(frozen=True)
class Parts(ModelParts):
  """The same, and on what: what training and evaluation need."""

  task: tasks.Task
  grading: Grading  # of the task's completions
  prompts: data.PromptStream | None  # training prompts; None where nothing is trained
  correct_demonstrations: data.PromptStream | None  # the same with demonstrations that are always right
  held_out: tuple[Prompts, list[tasks.Record]]  # evaluation prompts and their records


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
  trainable = Trainable.of(model.config)
  lora = abstract_collection(model, mesh, "lora") if trainable.has_adapters else None
  held = [params, lora]
  if is_training:  # what is trained and its two moments; and what is frozen, which without adapters is the reference
    is_supervised = OBJECTIVES[config.objective.name].learns_from_demonstrations
    held = [*3 * [abstract_trained(model, mesh)], {} if is_supervised and not trainable.has_adapters else params]
  checks.check_parameters(config, params, lora, held)
  if is_training:
    checks.check_rows(config, model.config.d_model, mesh)
  return ModelParts(mesh=mesh, rollout_mesh=rollout_mesh, tokenizer=tokenizer, model=model)


def _build_parts(config: ConfigDict, workdir: epath.Path, is_training: bool) -> Parts:
  model_parts = _build_model_parts(config, is_training)
  if config.task.name == mixture.NAME:
    found, shares = {}, [part.share for part in mixture.read(config.task.mixture).values()]
    for name in mixture.read(config.task.mixture):
      found[name] = _build_task(config_of_task(config, name), workdir, model_parts.tokenizer, is_training)
    of_task = _mix(found, shares)
    if is_training:
      _check_parts(config, of_task.grading.task)
  else:
    of_task = _build_task(config, workdir, model_parts.tokenizer, is_training)
  streams = {"evaluation": of_task.held_out, "training": of_task.prompts}
  digests = {f"the digest of the {name} prompts": stream.digest() for name, stream in streams.items() if stream}
  if lines := processes.differing("the prompts are compared", digests):
    raise ValueError("the processes of the job have different prompts (files that differ?):\n  " + "\n  ".join(lines))
  return Parts(
    **vars(model_parts),
    task=of_task.grading.task,
    grading=of_task.grading,
    prompts=of_task.prompts,
    correct_demonstrations=of_task.correct_demonstrations,
    held_out=of_task.held_out.batch(0, len(of_task.held_out)),
  )


class _OfTask(NamedTuple):
  """What is built for one task, or for several as one."""

  grading: Grading
  held_out: data.PromptStream
  prompts: data.PromptStream | None
  correct_demonstrations: data.PromptStream | None


def _mix(found: Mapping[str, _OfTask], shares: Sequence[float]) -> _OfTask:
  """Make one of what was built for the tasks of a mixture."""

  def join(streams: Mapping[str, data.PromptStream | None]) -> data.PromptStream | None:
    given = {name: stream for name, stream in streams.items() if stream is not None}
    return MixedStream(given, shares) if given else None

  return _OfTask(
    MixedGrading({name: own.grading for name, own in found.items()}),
    MixedStream({name: own.held_out for name, own in found.items()}, None),
    join({name: own.prompts for name, own in found.items()}),
    join({name: own.correct_demonstrations for name, own in found.items()}),
  )


def config_of_task(config: ConfigDict, name: str) -> ConfigDict:
  """Return a copy of the configuration for one task: one of its mixture, with what that has for itself, or another.

  A test file that is named belongs to the configured task, and so does a curriculum.
  """
  varied = copy.deepcopy(config)
  parts = mixture.read(config.task.mixture) if config.task.name == mixture.NAME else {}
  with varied.unlocked():
    if name != config.task.name:
      varied.task.name, varied.task.mixture, varied.task.eval_path, varied.task.curriculum = name, "", "", 0
    if name in parts:
      varied.task.update(parts[name].keys)
      varied.grading.update(parts[name].limits)
      if 0 < parts[name].keys.get("num_test", 0) < varied.eval.num_prompts and not varied.task.eval_path:
        varied.eval.num_prompts = varied.task.num_test  # the run's number is that of tasks that have so many
  return varied


def _build_task(config: ConfigDict, workdir: epath.Path, tokenizer: Tokenizer, is_training: bool) -> _OfTask:
  grading = Grading(tasks.spec(config.task.to_dict()), **config.grading)
  task = grading.task
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
    own = dict(seed=config.seed, curriculum=config.task.curriculum, **limits)
    prompts = data.PromptStream(train, task, tokenizer, **own)
    correct_demonstrations = data.PromptStream(train, task.only_correct(), tokenizer, **own)
    is_warm = config.warm_start.updates and not (workdir / "base").exists()
    if is_warm or OBJECTIVES[config.objective.name].learns_from_demonstrations:
      for stream in (prompts, correct_demonstrations) if task.only_correct() != task else (prompts,):
        stream.check_demonstrations(config.sampler.completion_length)
  return _OfTask(grading, held_out, prompts, correct_demonstrations)


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
  switches = read_switches(own.get("chat_template_kwargs", ""))  # an older run's configuration lacks it
  return load_tokenizer(own.name, own.path or config.model.init_from, is_chat=own.is_chat, switches=switches)


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
  fields = {name: pretrained.as_field(own[name]) for name in pretrained.FIELDS if own.get(name) is not None}
  fields |= {name: getattr(vocabulary, name) for name in pretrained.SPECIAL_IDS}
  stored = pretrained.read_fields(own.init_from) if own.init_from else None
  if stored is not None:
    if own.get("allow_other_blocks", False):  # an older run's configuration lacks it
      stored = stored | {"block_length": fields["block_length"]}
    pretrained.check_model(fields, stored, own.init_from)
    fields = stored
  fields["vocab_size"] = fields["vocab_size"] or vocabulary.vocab_size
  fields["embedding_size"] = fields["embedding_size"] or _round_up(fields["vocab_size"], EMBEDDING_MULTIPLE)
  if fields["vocab_size"] < vocabulary.vocab_size:
    raise ValueError(f"model.vocab_size={fields['vocab_size']}: the tokenizer has {vocabulary.vocab_size} ids")
  return Transformer(
    ModelConfig(
      **fields,
      dtype=own.dtype,
      param_dtype=own.param_dtype,
      remat=own.remat,
      layer_rows=own.get("layer_rows", 0),
      lora=lora,
      end_token_ids=vocabulary.end_token_ids,
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
    ("ffn", "model.expert_size", config.expert_size),
    ("ffn", "model.shared_expert_size", config.shared_expert_size),
    ("expert", "model.num_experts", config.num_experts),
    ("vocab", "rows of the embedding table", config.embedding_size),
    ("rank", "model.lora.rank", config.lora.rank if config.lora else 0),
  ):
    sharding.check_divides(mesh, logical, path, size, section)
