"""The two phases of a run, built from the configuration: what `train.py` loops over.

Both learn by the same loop from the same kind of buffer. The warm start's hold demonstrations; those of the training
proper hold rollouts (or demonstrations too, where the objective is supervised).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree
from ml_collections import ConfigDict

from dmpo_jax import continuous, lengths, optim, policy, rollout, sharding, update
from dmpo_jax.build import Parts
from dmpo_jax.chunks import Chunking
from dmpo_jax.demonstrations import Demonstrations, make_held_out_loss
from dmpo_jax.evaluate import make_evaluate_training
from dmpo_jax.graded_rollouts import GradedRollouts
from dmpo_jax.logprobs import make_log_probs
from dmpo_jax.models.trainable import TRAINED_DTYPE
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.objectives import OBJECTIVES, Objective
from dmpo_jax.objectives.denoise import Denoise
from dmpo_jax.objectives.estimators import make_estimator
from dmpo_jax.objectives.likelihood import Estimator
from dmpo_jax.objectives.masking import MaskSampling
from dmpo_jax.objectives.weights import Weighing
from dmpo_jax.rollout import Collector
from dmpo_jax.run.params import save_params
from dmpo_jax.run.preemption import check_preemption
from dmpo_jax.structs import Experience, PendingRollouts, Prompts, Rollouts, TrainState


@runtime_checkable
class Buffers(Protocol):
  """Where a phase's buffers come from."""

  def generate(self, state: TrainState, buffer: int, begun: PendingRollouts | None = None, further: int = 0) -> Any:
    """Do all that needs the policy as it is now; `begun` is what an earlier start had generated of the buffer.

    `further` batches were taken beyond one a buffer so far.
    """
    ...

  def complete(
    self, state: TrainState, buffer: int, pending: Any, further: int = 0
  ) -> tuple[Experience, dict[str, float]]:
    """Make the buffer's experience of it, with figures for the log."""
    ...

  def wants_more(self, experience: Experience, num_batches: int) -> bool:
    """Whether a buffer that was collected from so many batches needs another one."""
    ...


@dataclasses.dataclass(frozen=True)
class Phase:
  """What differs between the warm start and the training proper."""

  name: str
  num_buffers: int
  updates_per_buffer: int
  base: str  # identity of the saved parameters that it begins with; "" where they are random
  frozen: PyTree  # reference parameters; {} where the objective has no reference
  buffers: Buffers
  update: Callable[[TrainState, Any, Experience], tuple[TrainState, update.Metrics]]
  evaluate: Callable[[Any, int], dict[str, float]]  # of what is trained, after so many buffers
  evaluate_every: int | None  # buffers; 0: the first policy and the last alone; None: not even these
  is_pipelined: bool = False  # a buffer is generated before the updates on the one before it
  is_by_length: bool = False  # a buffer's prompts are generated in the order of their lengths, not in the stream's
  # Called where an evaluation is the best so far, with what is trained and the number of finished buffers.
  keep_best: Callable[[Any, int], None] = lambda trained, buffer: None

  def generated_at(self, buffer: int) -> int:
    """Return the step whose policy generates a buffer."""
    return max(buffer - self.is_pipelined, 0) * self.updates_per_buffer

  def is_evaluated(self, buffer: int) -> bool:
    """Whether the policy is evaluated after so many buffers."""
    if self.evaluate_every is None:
      return False
    is_due = self.evaluate_every > 0 and buffer % self.evaluate_every == 0
    return is_due or buffer == 0 or buffer >= self.num_buffers


def abstract_state(trained: PyTree, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """Describe the state by shape, dtype and sharding; the optimizer's moments are laid out as their parameters are.

  Args:
    trained: arrays, or their descriptions.
  """
  everywhere = sharding.replicated(mesh)
  shapes = jax.eval_shape(optimizer.init, trained)
  opt_state = optax.tree_map_params(
    optimizer,
    lambda shape, param: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=param.sharding),
    shapes,
    trained,
    transform_non_params=lambda shape: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=everywhere),
  )
  zero = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
  return TrainState(zero, sharding.abstract(trained), opt_state, num_skipped=zero, num_skipped_in_a_row=zero)


def fresh_state(trained: PyTree, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """Return the state before the first update."""
  layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(trained, optimizer, mesh))

  def zero() -> jax.Array:
    return jax.device_put(jnp.zeros((), jnp.int32), layout.step)

  opt_state = jax.jit(optimizer.init, out_shardings=layout.opt_state)(trained)
  return TrainState(zero(), trained, opt_state, num_skipped=zero(), num_skipped_in_a_row=zero())


def warm_start_phase(config: ConfigDict, parts: Parts) -> tuple[Phase, TrainState]:
  """Build masked-diffusion training of every parameter on demonstrations, and its first state."""
  warm = config.warm_start
  optimizer = _make_optimizer(config, optim.warmup_cosine(warm.learning_rate, num_updates=warm.updates))
  state = fresh_state(policy.initial_params(config, parts, are_trained=True), optimizer, parts.mesh)
  masks = MaskSampling(num=1, antithetic=False, min_ratio=warm.min_mask_ratio, max_ratio=1.0)
  objective, num_correct = Denoise(masks, likelihood=None), round(warm.correct_share * warm.updates)
  gradient_step = update.make_update(
    Transformer(dataclasses.replace(parts.model.config, lora=None)),
    optimizer,
    objective,
    shardings=_shardings(state, parts.mesh),
  )
  phase = Phase(
    name="warm_start",
    num_buffers=warm.updates,
    updates_per_buffer=1,
    base=policy.initial_identity(config),
    frozen={},
    buffers=Demonstrations(config, parts, objective, warm.batch_size, num_correct=num_correct),
    update=_with_seed(config.seed, gradient_step),
    evaluate=lambda trained, buffer: {},
    evaluate_every=None,
  )
  return phase, state


def training_phase(config: ConfigDict, workdir: epath.Path, parts: Parts, base: PyTree) -> tuple[Phase, TrainState]:
  """Build the training proper by `config.objective`, and its first state: the base, or fresh adapters on it."""
  trainable, objective = parts.trainable, make_objective(config)
  optimizer = training_optimizer(config)
  if trainable.has_adapters:
    trained = policy.initial_adapters(config, workdir, parts)
  else:
    trained = jax.tree.map(lambda x: jnp.copy(x.astype(TRAINED_DTYPE)), base)
    base = jax.tree.map(lambda x: x.astype(parts.model.config.param_dtype), base)
  state = fresh_state(trained, optimizer, parts.mesh)
  if config.objective.sync_reference_every:
    state = dataclasses.replace(state, reference=jax.tree.map(jnp.copy, trainable.computing(trained)))
  if objective.learns_from_demonstrations:
    buffers = Demonstrations(config, parts, objective, config.rollout.num_prompts, counted=config.objective.counted)
  else:
    buffers = _graded_rollouts(config, parts, base)
  evaluate = _make_evaluate(config, workdir, parts, base)
  step = training_update(config, parts.model, optimizer, _shardings(state, parts.mesh))
  if not objective.learns_from_demonstrations:
    own = prompt_lengths(config, parts)
    step = dataclasses.replace(step, lengths=own, accumulate=lengths.ahead(step.accumulate, own))
  needs_base = trainable.has_adapters or not objective.learns_from_demonstrations
  phase = Phase(
    name="train",
    num_buffers=config.train.num_buffers,
    updates_per_buffer=config.train.updates_per_buffer,
    base=policy.base_identity(config, workdir),
    frozen=base if needs_base else {},
    buffers=buffers,
    update=_with_seed(config.seed, step),
    evaluate=lambda trained, buffer: evaluate(trainable.computing(trained), buffer),
    evaluate_every=config.eval.every_buffers,
    is_pipelined=config.rollout.pipelined,
    is_by_length=len(step.lengths) > 1,
    keep_best=lambda trained, buffer: save_params(
      workdir / "best", trained, policy.policy_metadata(config, workdir, buffer, parts.model.config)
    ),
  )
  return phase, state


def _make_evaluate(
  config: ConfigDict, workdir: epath.Path, parts: Parts, base: Any
) -> Callable[[Any, int], dict[str, float]]:
  """Close over a run's own evaluation, by samples and, where it learns from demonstrations, by its loss on others."""
  sampled, objective = make_evaluate_training(config, workdir, parts, base), make_objective(config)
  if not objective.learns_from_demonstrations:
    return sampled
  held_out_loss = make_held_out_loss(config, parts, objective, base)
  return lambda trained, buffer: sampled(trained, buffer) | {"loss": held_out_loss(trained)}


def make_objective(config: ConfigDict) -> Objective:
  """Build the objective of `config.objective`, with its masks, its likelihood and its own keys."""
  own = config.objective
  kind = OBJECTIVES[own.name]
  likelihood = make_likelihood(config, own.num_mask_samples) if kind.takes_likelihood else None
  return kind(mask_sampling(config, own.num_mask_samples), likelihood, **own.get(own.name, {}))


def make_weighing(config: ConfigDict) -> Weighing:
  """Build the settings of the importance weights."""
  own = config.objective
  return Weighing(
    weighting=own.weighting,
    alpha=own.alpha,
    proximal=own.proximal,
    kappa=own.kappa,
    min_ess=own.min_ess,
    reward_scaling=own.reward_scaling,
    part_weights=tuple(own.part_weights),
    max_weight=own.max_weight,
    shrinkage=own.shrinkage,
  )


def make_likelihood(config: ConfigDict, num: int) -> Estimator:
  """Build the estimator of `objective.likelihood` with so many mask samples."""
  own = config.objective
  return make_estimator(own.likelihood, mask_sampling(config, num), **own.get(own.likelihood, {}))


def mask_sampling(config: ConfigDict, num: int) -> MaskSampling:
  """Build the settings of so many mask samples."""
  own = config.objective
  return MaskSampling(
    num=num,
    antithetic=own.antithetic,
    min_ratio=own.min_mask_ratio,
    max_ratio=own.max_mask_ratio,
    block_length=own.mask_block_length,
    kind=own.masks,
    model_block=config.model.get("block_length") or 0,  # an older run's configuration lacks it
  )


def training_optimizer(config: ConfigDict) -> optax.GradientTransformation:
  """Build the optimizer of the training proper."""
  return _make_optimizer(config, optim.warmup_constant(config.optim.learning_rate, config.optim.warmup_updates))


def training_update(
  config: ConfigDict,
  model: Transformer,
  optimizer: optax.GradientTransformation,
  shardings: tuple[TrainState, NamedSharding],
) -> update.Update:
  """Build the training proper's gradient step (see `update.make_update`)."""
  return update.make_update(
    model,
    optimizer,
    make_objective(config),
    shardings=shardings,
    num_microbatches=num_microbatches(config),
    sync_reference_every=config.objective.sync_reference_every,
  )


def num_microbatches(config: ConfigDict) -> int:
  """Return the number of microbatches of a gradient step."""
  return config.rollout.num_prompts // (config.train.microbatch_prompts or config.rollout.num_prompts)


def prompt_lengths(config: ConfigDict, parts: Parts) -> tuple[int, ...]:
  """Choose the lengths to which the training's prompts are padded; the same in every process, as their prompts are."""
  assert parts.prompts is not None  # training has them
  return lengths.choose(parts.prompts.lengths, config.task.max_prompt_length, config.rollout.prompt_lengths)


def make_chunking(config: ConfigDict, own_lengths: tuple[int, ...] = ()) -> Chunking:
  """Build how a buffer is cut into chunks, whose prompts are padded to one of the lengths given."""
  own = config.rollout
  return Chunking(own.group_size, own.chunk_prompts, own.chunk_rollouts, own_lengths)


def training_sample(config: ConfigDict, model: Transformer, mesh: Mesh) -> jax.stages.Wrapped:
  """Jit the sampler of the rollouts."""
  return policy.make_sample(
    config,
    model,
    mesh,
    group_size=config.rollout.chunk_rollouts or config.rollout.group_size,
    temperature=config.sampler.temperature,
    early_exit=config.rollout.early_exit,
    with_reference=config.objective.likelihood == "sampler" and not ratio_is_always_one(config),
  )


def training_log_probs(config: ConfigDict, model: Transformer, mesh: Mesh) -> jax.stages.Wrapped | None:
  """Jit the log-probabilities that the objective needs of rollouts; None where it needs no forward passes."""
  own, objective = config.objective, make_objective(config)
  if not needs_log_probs(config):
    return None
  if objective.needs_weights:
    with_reference = not ratio_is_always_one(config)
    return make_log_probs(model, mesh, make_likelihood(config, own.num_elbo_samples), with_reference=with_reference)
  estimator = make_likelihood(config, own.num_mask_samples)
  with_reference = objective.needs_reference and not ratio_is_always_one(config)
  return make_log_probs(model, mesh, estimator, per_token=objective.reads_tokens, with_reference=with_reference)


def needs_log_probs(config: ConfigDict) -> bool:
  """Whether the objective needs forward passes on its rollouts."""
  own = OBJECTIVES[config.objective.name]
  return own.needs_token_log_probs or (own.needs_weights and config.objective.likelihood != "sampler")


def num_scored(config: ConfigDict, step: int) -> int:
  """Return how many policies score the rollouts that the policy of a step draws: that and its reference, one, or none.

  Where it is its own reference log p_ref - log p_old is 0, and log p_old is needed by losses that read it alone. There
  the reference is left out if it is so in every buffer: for the first buffer alone the program would not be worth it.
  """
  objective = make_objective(config)
  if not needs_log_probs(config):
    return 0
  if objective.needs_weights and ratio_is_one(config, step) and not objective.reads_log_p_old:
    return 0
  has_reference = objective.needs_weights or objective.needs_reference
  return 1 + (has_reference and not ratio_is_always_one(config))


def ratio_is_one(config: ConfigDict, step: int) -> bool:
  """Whether the policy of a step is its own reference by construction."""
  every = config.objective.sync_reference_every
  return step % every == 0 if every else step == 0 and not config.model.lora.init_from


def ratio_is_always_one(config: ConfigDict) -> bool:
  """Whether every policy that draws a buffer is its own reference: it is synchronised before each."""
  every = config.objective.sync_reference_every
  return every > 0 and config.train.updates_per_buffer % every == 0


def training_scoring(
  config: ConfigDict, model: Transformer, mesh: Mesh, own_lengths: tuple[int, ...] = ()
) -> rollout.Scoring:
  """Build what gives the rollouts the log-probabilities or weights that the objective needs.

  Args:
    own_lengths: of prompts (`prompt_lengths`); (): as they come.
  """
  scoring = _buffer_scoring(config, model, mesh, own_lengths)
  if not make_objective(config).scores_updates:
    return scoring
  masks = dataclasses.replace(mask_sampling(config, config.objective.num_mask_samples), block_length=0)
  of_updates = rollout.TokenLogProbs(
    lengths.ahead(make_log_probs(model, mesh, make_estimator("elbo", masks), with_reference=False), own_lengths),
    seed=config.seed,
    updates_per_buffer=config.train.updates_per_buffer,
    num_views=config.train.updates_per_buffer,
    with_reference=False,
  )
  return rollout.WithUpdates(scoring, of_updates, make_chunking(config, own_lengths))


def _buffer_scoring(
  config: ConfigDict, model: Transformer, mesh: Mesh, own_lengths: tuple[int, ...]
) -> rollout.Scoring:
  """Build what the objective needs of a buffer once, whatever its updates."""
  own, objective = config.objective, make_objective(config)
  log_probs = training_log_probs(config, model, mesh)
  log_probs = None if log_probs is None else lengths.ahead(log_probs, own_lengths)
  if objective.needs_token_log_probs:
    assert log_probs is not None
    return rollout.TokenLogProbs(
      log_probs,
      seed=config.seed,
      updates_per_buffer=config.train.updates_per_buffer,
      num_views=config.train.updates_per_buffer if make_likelihood(config, own.num_mask_samples).has_noise else 1,
      with_reference=objective.needs_reference,
    )
  if not objective.needs_weights:
    return rollout.RewardsOnly()
  if log_probs is None:
    return rollout.SampledWeights(make_weighing(config))
  return rollout.EstimatedWeights(
    log_probs,
    make_weighing(config),
    seed=config.seed,
    chunking=make_chunking(config, own_lengths),
    max_noise=own.max_noise,
    max_rounds=own.max_rounds if own.elbo_rounds == "adaptive" else 1,
  )


def make_stream(
  config: ConfigDict, model: Transformer, mesh: Mesh
) -> Callable[[policy.Policies, Prompts, jax.Array, int], Iterator[tuple[int, Rollouts]]] | None:
  """Build the sampler of the rollouts by continuous batching (see `Collector.stream`); None: fixed batches."""
  if not config.sampler.slots:
    return None
  settings = dict(temperature=config.sampler.temperature, early_exit=config.rollout.early_exit)
  programs = continuous.Programs(config, model, mesh, num_slots=config.sampler.slots, **settings)

  def stream(policies: policy.Policies, prompts: Prompts, key: jax.Array, row: int) -> Iterator[tuple[int, Rollouts]]:
    queue = continuous.Queued.of_prompts(prompts, config.rollout.group_size)
    left = np.arange(row, len(queue.rollout))
    moved = sharding.move(policies, mesh)
    for number, found in continuous.decode(programs, moved, queue.take(left), key, check_preemption):
      yield row + number, found

  return stream


def _graded_rollouts(config: ConfigDict, parts: Parts, base: PyTree) -> GradedRollouts:
  own_lengths = prompt_lengths(config, parts)
  sample = lengths.ahead(training_sample(config, parts.model, parts.mesh), own_lengths)
  sample = sharding.within(parts.rollout_mesh, sample)
  collector = Collector(
    sample=lambda policies: functools.partial(sample, sharding.move(policies, parts.rollout_mesh)),
    scoring=training_scoring(config, parts.model, parts.mesh, own_lengths),
    grading=parts.grading,
    tokenizer=parts.tokenizer,
    seed=config.seed,
    chunking=make_chunking(config, own_lengths),
    counted=config.objective.counted,
    stream=make_stream(config, parts.model, parts.rollout_mesh),
  )
  assert parts.prompts is not None  # training has them
  return GradedRollouts(
    collector,
    parts.prompts,
    config.rollout.num_prompts,
    base,
    parts.trainable,
    compares_rewards=compares_rewards(config),
    takes_parts=config.objective.reward_scaling == "standardise_parts",
    is_scored=lambda step: num_scored(config, step) > 0,
    drops_equal=config.rollout.drop_equal_groups,
    until_informative=config.rollout.until_informative,
    max_batches=config.rollout.max_batches,
    lengths=own_lengths,
  )


def compares_rewards(config: ConfigDict) -> bool:
  """Whether the objective learns from the differences of rewards inside a group alone."""
  own = config.objective
  return OBJECTIVES[own.name].compares_rewards(own.weighting, own.to_dict().get(own.name, {}))


def _with_seed(seed: int, gradient_step: update.Update) -> Callable:
  """Give a gradient step the run's seed, as its last argument."""
  key = jax.random.key(seed)
  return lambda state, frozen, experience: gradient_step(state, frozen, experience, key)


def _make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
  own = config.optim
  return optim.make_optimizer(schedule, b1=own.b1, b2=own.b2, weight_decay=own.weight_decay, clip_norm=own.clip_norm)


def _shardings(state: TrainState, mesh: Mesh) -> tuple[TrainState, NamedSharding]:
  return jax.tree.map(lambda array: array.sharding, state), sharding.replicated(mesh)
