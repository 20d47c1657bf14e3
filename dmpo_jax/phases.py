"""The two phases of a run, as closures over its parts: what `train.py` loops over.

Both learn by the same loop from the same kind of buffer. The warm start's hold demonstrations; the training proper's
hold rollouts (or demonstrations too, where the objective is supervised).
"""

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from dmpo_jax import build, optim, rollout, sharding, update
from dmpo_jax.build import Parts, Placed, initial_adapters, initial_params, make_sample
from dmpo_jax.evaluate import make_evaluate_training
from dmpo_jax.measure import (
  Measure,
  Policies,
  make_measure_nothing,
  make_measure_ratios,
  make_measure_sampled,
  make_measure_weights,
  measure_program,
  token_program,
)
from dmpo_jax.models import lora
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.objectives import OBJECTIVES, needs_of, weights
from dmpo_jax.objectives.estimators import make_estimator
from dmpo_jax.run.params import save_params
from dmpo_jax.structs import Drawn, Experience, TrainState

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Phase:
  """What differs between the warm start and the training proper."""

  name: str
  num_buffers: int
  updates_per_buffer: int
  base: str  # identity of the saved parameters that it begins with; "" where they are random
  frozen: Any  # reference parameters; an empty dict where the objective has no reference
  # What takes the policy to make a buffer, and what does not need to have it as it was then: figures for the log too.
  # A third argument of `draw` is what an earlier start had drawn of the buffer.
  draw: Callable[..., Drawn | Experience]
  finish: Callable[[TrainState, Drawn | Experience, int], tuple[Experience, dict[str, float]]]
  update: Callable[[TrainState, Any, Experience], tuple[TrainState, dict[str, jax.Array]]]
  evaluate: Callable[[Any, int], dict[str, float]]  # of what is learned, after so many buffers
  evaluate_every: int | None  # buffers; 0: the first policy and the last alone; None: not even these
  is_pipelined: bool = False  # a buffer is drawn before the updates on the one before it
  # Called where an evaluation is the best so far, with what is learned and the number of finished buffers.
  keep_best: Callable[[Any, int], None] = lambda trainable, buffer: None

  def drawn_at(self, buffer: int) -> int:
    """Return the step whose policy draws a buffer."""
    return max(buffer - self.is_pipelined, 0) * self.updates_per_buffer

  def is_evaluated(self, buffer: int) -> bool:
    """Whether the policy is evaluated after so many buffers."""
    if self.evaluate_every is None:
      return False
    is_due = self.evaluate_every > 0 and buffer % self.evaluate_every == 0
    return is_due or buffer == 0 or buffer >= self.num_buffers


def abstract_state(trainable: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """Describe the state by shape, dtype and sharding, the optimizer's moments laid out as their parameters are.

  Args:
    trainable: arrays, or their descriptions.
  """
  everywhere = sharding.replicated(mesh)
  shapes = jax.eval_shape(optimizer.init, trainable)
  opt_state = optax.tree_map_params(
    optimizer,
    lambda shape, param: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=param.sharding),
    shapes,
    trainable,
    transform_non_params=lambda shape: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=everywhere),
  )
  zero = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
  return TrainState(zero, sharding.abstract(trainable), opt_state, num_skipped=zero, num_skipped_in_a_row=zero)


def fresh_state(trainable: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """Return the state before the first update."""
  layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(trainable, optimizer, mesh))

  def zero() -> jax.Array:
    return jax.device_put(jnp.zeros((), jnp.int32), layout.step)

  opt_state = jax.jit(optimizer.init, out_shardings=layout.opt_state)(trainable)
  return TrainState(zero(), trainable, opt_state, num_skipped=zero(), num_skipped_in_a_row=zero())


def warm_start_phase(config: ConfigDict, parts: Parts) -> tuple[Phase, TrainState]:
  """Build masked-diffusion training of every parameter on demonstrations, and its first state."""
  warm = config.warm_start
  schedule = optim.warmup_cosine(warm.learning_rate, num_updates=warm.updates)
  optimizer = _make_optimizer(config, schedule)
  state = fresh_state(initial_params(config, parts, are_trained=True), optimizer, parts.mesh)
  draw, finish = _demonstrations(config, parts, warm.batch_size, num_correct=round(warm.correct_share * warm.updates))
  phase = Phase(
    name="warm_start",
    num_buffers=warm.updates,
    updates_per_buffer=1,
    base=build.initial_identity(config),
    frozen={},
    draw=draw,
    finish=finish,
    update=_of_seed(
      config.seed,
      update.make_update(
        Transformer(dataclasses.replace(parts.model.config, lora=None)),
        optimizer,
        objective="denoise",
        num_microbatches=1,
        sync_reference_every=0,
        shardings=_shardings(state, parts.mesh),
        num_mask_samples=1,
        antithetic=False,
        min_mask_ratio=warm.min_mask_ratio,
        max_mask_ratio=1.0,
      ),
    ),
    evaluate=lambda trainable, buffer: {},
    evaluate_every=None,
  )
  return phase, state


def training_phase(config: ConfigDict, workdir: epath.Path, parts: Parts, base: Any) -> tuple[Phase, TrainState]:
  """Build the training proper by `config.objective`, and its first state: the base, or fresh adapters on it."""
  objective, has_adapters = config.objective, parts.model.config.lora is not None
  optimizer = training_optimizer(config)
  if has_adapters:
    trainable = initial_adapters(config, workdir, parts)
  else:
    trainable = jax.tree.map(lambda x: jnp.copy(x.astype(build.TRAINED)), base)
    base = jax.tree.map(lambda x: x.astype(parts.model.config.param_dtype), base)
  state = fresh_state(trainable, optimizer, parts.mesh)
  is_supervised = OBJECTIVES[objective.name].needs == "demonstrations"
  if objective.sync_reference_every:
    state = state.replace(reference=jax.tree.map(jnp.copy, _computing(config, trainable)))
  if is_supervised:
    draw, finish = _demonstrations(config, parts, config.rollout.num_prompts)
  else:
    draw, finish = _rollouts(config, parts, base)
  evaluate = make_evaluate_training(config, workdir, parts, base)
  phase = Phase(
    name="train",
    num_buffers=config.train.num_buffers,
    updates_per_buffer=config.train.updates_per_buffer,
    base=build.base_identity(config, workdir),
    frozen=base if has_adapters or not is_supervised else {},
    draw=draw,
    finish=finish,
    update=_of_seed(config.seed, training_update(config, parts.model, optimizer, _shardings(state, parts.mesh))),
    evaluate=lambda trainable, buffer: evaluate(_computing(config, trainable), buffer),
    evaluate_every=config.eval.every_buffers,
    is_pipelined=config.rollout.pipelined,
    keep_best=lambda trainable, buffer: save_params(
      workdir / "best", trainable, build.about_policy(config, workdir, buffer)
    ),
  )
  return phase, state


def training_optimizer(config: ConfigDict) -> optax.GradientTransformation:
  """Build the optimizer of the training proper."""
  return _make_optimizer(config, optim.warmup_constant(config.optim.learning_rate, config.optim.warmup_updates))


def training_update(
  config: ConfigDict,
  model: Transformer,
  optimizer: optax.GradientTransformation,
  shardings: tuple[TrainState, NamedSharding],
) -> update.Update:
  """Jit the training proper's gradient step (see `update.make_update`)."""
  return update.make_update(
    model,
    optimizer,
    objective=config.objective.name,
    num_microbatches=num_microbatches(config),
    sync_reference_every=config.objective.sync_reference_every,
    shardings=shardings,
    **_loss_keywords(config.objective),
  )


def num_microbatches(config: ConfigDict) -> int:
  """Count the microbatches of a gradient step."""
  return config.rollout.num_prompts // (config.train.microbatch_prompts or config.rollout.num_prompts)


def training_sample(config: ConfigDict, parts: Placed) -> Callable:
  """Jit the sampler of the rollouts."""
  return make_sample(
    config,
    parts,
    group_size=config.rollout.group_size,
    temperature=config.sampler.temperature,
    early_exit=config.rollout.early_exit,
    with_reference=config.objective.likelihood == "sampler",
  )


def training_scores(config: ConfigDict, model: Transformer, mesh: Mesh) -> Callable | None:
  """Jit the forward passes of the objective's measure (see `measure.py`); None: it needs none."""
  objective, needs = config.objective, needs_of(config.objective)
  if needs in ("rewards", "demonstrations") or objective.likelihood == "sampler":
    return None
  num_mask_samples = objective.num_elbo_samples if needs == "weights" else objective.num_mask_samples
  estimator = make_estimator(objective.likelihood, objective.to_dict(), num_mask_samples)
  if needs == "weights":
    return measure_program(model, mesh, estimator=estimator)
  return token_program(model, mesh, estimator=estimator, with_reference=needs == "ratio_and_reference")


def _demonstrations(
  config: ConfigDict, parts: Parts, batch_size: int, num_correct: int = 0
) -> tuple[Callable, Callable]:
  """Make buffers of demonstrations, of which the first `num_correct` are all right: `draw` and `finish`.

  The next one is made while the devices learn from this one, by a thread that leaves them alone.
  """
  thread = ThreadPoolExecutor(1, thread_name_prefix="demonstrations")
  ahead: dict[int, Future[Experience]] = {}

  def make(buffer: int) -> Experience:
    stream = parts.correct_demonstrations if buffer < num_correct else parts.prompts
    prompts, completion, _ = stream.demonstrations(
      buffer * batch_size, batch_size, completion_length=config.sampler.completion_length
    )
    return rollout.demonstrate(prompts, completion)

  def draw(state: TrainState, buffer: int) -> Experience:
    made = ahead.pop(buffer, None) or thread.submit(make, buffer)
    ahead[buffer + 1] = thread.submit(make, buffer + 1)
    return made.result()

  return draw, lambda state, experience, buffer: (experience, {})


def _rollouts(config: ConfigDict, parts: Parts, base: Any) -> tuple[Callable, Callable]:
  """Make buffers of rollouts: `draw` and `finish`."""
  num_prompts = config.rollout.num_prompts
  sample = sharding.within(parts.rollout_mesh, training_sample(config, parts))
  common = dict(
    measure=training_measure(config, parts),
    grading=parts.grading,
    tokenizer=parts.tokenizer,
    counted=config.objective.counted,
  )

  def draw(state: TrainState, buffer: int, begun: Drawn | None = None) -> Drawn:
    policies = Policies(_computing(config, state.trainable), base, state.reference)
    return rollout.draw(
      policies,
      *parts.prompts.batch(buffer * num_prompts, num_prompts),
      sample=functools.partial(sample, sharding.move(policies, parts.rollout_mesh)),
      seed=config.seed,
      buffer=buffer,
      chunk_prompts=config.rollout.chunk_prompts,
      begun=begun,
      **common,
    )

  def finish(state: TrainState, drawn: Drawn, buffer: int) -> tuple[Experience, dict[str, float]]:
    experience, metrics = rollout.finish(
      drawn,
      Policies(_computing(config, state.trainable), base, state.reference),
      *parts.prompts.batch(buffer * num_prompts, num_prompts),
      buffer=buffer,
      **common,
    )
    is_apart = config.objective.reward_scaling == "standardise_parts"
    reward = experience.reward_parts if is_apart else experience.reward
    lack = rollout.lack_of_signal(reward, experience.is_kept, compares=_compares(config.objective))
    if lack and jax.process_index() == 0:
      logger.warning("buffer %d: %s", buffer + 1, lack)
    metrics["without_signal"] = float(bool(lack))
    prompts_counted = {"prompts_skipped": parts.prompts.num_skipped, "prompts_cut": parts.prompts.num_cut}
    return experience, metrics | {name: float(count) for name, count in prompts_counted.items()}

  return draw, finish


def _computing(config: ConfigDict, trainable: Any) -> Any:
  """Give what is trained as samplers and scores take it."""
  return lora.computing(trainable, config.model.dtype, config.model.lora.rank > 0)


def training_measure(config: ConfigDict, parts: Placed) -> Measure:
  """Build what completes the rollouts for the objective (`objectives.Needs`)."""
  objective, needs = config.objective, needs_of(config.objective)
  if needs == "rewards":
    return make_measure_nothing()
  if objective.likelihood == "sampler":
    return make_measure_sampled(**_keywords(weights.weigh, objective))
  if needs == "weights":
    return make_measure_weights(
      parts.model,
      parts.mesh,
      estimator=make_estimator(objective.likelihood, objective.to_dict(), objective.num_elbo_samples),
      chunk_prompts=config.rollout.chunk_prompts,
      seed=config.seed,
      **_keywords(make_measure_weights, objective),
      **_keywords(weights.weigh, objective),
    )
  return make_measure_ratios(
    parts.model,
    parts.mesh,
    estimator=make_estimator(objective.likelihood, objective.to_dict(), objective.num_mask_samples),
    updates_per_buffer=config.train.updates_per_buffer,
    seed=config.seed,
    with_reference=needs == "ratio_and_reference",
  )


def _compares(objective: ConfigDict) -> bool:
  """Whether a loss learns from the differences of rewards inside a group alone."""
  if OBJECTIVES[objective.name].needs != "weights" or objective.weighting != "reward":
    return True
  return objective.name == "wdce" and objective.wdce.baseline == "mean" and objective.wdce.baseline_strength == 1


def _of_seed(seed: int, step: update.Update) -> Callable:
  """Give a gradient step the run's seed, as its last argument."""
  key = jax.random.key(seed)
  return lambda state, frozen, experience: step(state, frozen, experience, key)


def _make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
  own = config.optim
  return optim.make_optimizer(schedule, b1=own.b1, b2=own.b2, weight_decay=own.weight_decay, clip_norm=own.clip_norm)


def _shardings(state: TrainState, mesh: Mesh) -> tuple[TrainState, NamedSharding]:
  return jax.tree.map(lambda array: array.sharding, state), sharding.replicated(mesh)


def _loss_keywords(objective: ConfigDict) -> dict[str, Any]:
  """The keyword arguments of the chosen loss, its estimator among them."""
  loss = OBJECTIVES[objective.name].loss
  keywords = _keywords(loss, objective) | _keywords(loss, objective.get(objective.name, ConfigDict()))
  if "likelihood" in keywords:
    keywords["likelihood"] = make_estimator(objective.likelihood, objective.to_dict(), objective.num_mask_samples)
  return keywords


def _keywords(function: Callable, section: ConfigDict) -> dict[str, Any]:
  """The keyword arguments of `function` that the configuration's section has."""
  names = [name for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
  return {name: section[name] for name in names if name in section}
