"""The gradient step: loss and gradient one microbatch at a time, then one optimizer update.

Each is a jitted program. Between microbatches the processes look for a notice of preemption; a step that is interrupted
has changed nothing. A step whose loss or gradient is not finite changes nothing but the counters.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from dmpo_jax import noise
from dmpo_jax.logprobs import make_score
from dmpo_jax.models.trainable import Trainable
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.objectives import Objective
from dmpo_jax.run.preemption import check_preemption
from dmpo_jax.structs import Experience, TrainState

Metrics = dict[str, jax.Array]


KEPT, PROMPTS = "num_kept_prompts", "num_prompts"  # counted beside the metrics of a microbatch


@dataclasses.dataclass(frozen=True)
class Update:
  """A gradient step as programs that a host calls one after another.

  Args:
    num_microbatches: equal parts of a buffer's prompts, whose gradients are added up.
    zeros: `trainable -> gradient`, the sum before the first microbatch, float32 and laid out as what is trained.
    accumulate: `(gradient, state, frozen, microbatch, seed) -> (gradient, metrics)`. Adds one microbatch's gradient to
      the sum, which is donated; None in its place begins a sum. The metrics are the microbatch's share, with its loss.
    apply: `(state, gradient, metrics of all microbatches) -> (state, metrics)`. Donates the state.
  """

  num_microbatches: int
  zeros: Callable[[Any], Any]
  accumulate: Callable[[Any, TrainState, Any, Experience, jax.Array], tuple[Any, Metrics]]
  apply: Callable[[TrainState, Any, tuple[Metrics, ...]], tuple[TrainState, Metrics]]

  def __call__(
    self, state: TrainState, frozen: PyTree, experience: Experience, seed: jax.Array
  ) -> tuple[TrainState, Metrics]:
    """Take one gradient step on a buffer; the state given is donated.

    The seed is given as its key, `jax.random.key(seed)`: runs that differ by it alone share compiled programs.

    Raises:
      Preempted: before one of the microbatches; the state is as it was.
    """
    gradient, shares = self.zeros(state.trainable) if self.num_microbatches > 1 else None, []
    for microbatch in split(experience, self.num_microbatches):
      check_preemption()
      gradient, share = self.accumulate(gradient, state, frozen, microbatch, seed)
      shares.append(share)
      # One microbatch stays queued behind the one that runs. If the host ran further ahead, it would look for notices
      # long before the devices are there.
      jax.block_until_ready(shares[-2:-1])
    return self.apply(state, gradient, tuple(shares))


def split(experience: Experience, number: int) -> list[Experience]:
  """Cut a buffer into equal parts of whole groups; parts of numpy arrays are views."""
  leaves, structure = jax.tree.flatten(experience)
  parts = zip(*(np.split(leaf, number) for leaf in leaves), strict=True)
  return [jax.tree.unflatten(structure, part) for part in parts]


def make_update(
  model: Transformer,
  optimizer: optax.GradientTransformation,
  objective: Objective,
  *,
  shardings: tuple[TrainState, NamedSharding],
  num_microbatches: int = 1,
  sync_reference_every: int = 0,
) -> Update:
  """Jit the gradient step.

  The gradient is of the mean over a buffer's prompts, without those that have no kept rollout. It is accumulated in
  float32 over microbatches of whole groups, and so are the parameters that it moves; where all are trained, it is taken
  at these in the activations' dtype. A row's masks and dropout belong to (seed, step, prompt, rollout), so the split
  changes no number beyond rounding.

  Args:
    shardings: of the state and of the metrics.
    num_microbatches: divides the number of prompts.
    sync_reference_every: updates after which the state's reference becomes a copy of what is trained; 0: never.
  """
  of_state, everywhere = shardings
  trainable = Trainable.of(model.config)
  loss_and_metrics = _make_loss(model, objective, num_microbatches)

  def zeros(trained: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trained)

  def accumulate(gradient: PyTree, state: TrainState, frozen: PyTree, microbatch: Experience, seed: jax.Array):
    trained = trainable.computing(state.trainable)
    microbatch = of_update(microbatch, state.step)
    result = jax.value_and_grad(loss_and_metrics, has_aux=True)(trained, state, frozen, microbatch, seed)
    (loss, metrics), own = jax.tree.map(lambda x: x.astype(jnp.float32), result)
    gradient = own if gradient is None else jax.tree.map(jnp.add, gradient, own)
    counts = {KEPT: microbatch.is_kept.any(-1).sum(), PROMPTS: len(microbatch.is_kept)}
    return gradient, metrics | {"loss": loss} | jax.tree.map(jnp.float32, counts)

  return Update(
    num_microbatches,
    zeros=jax.jit(zeros, out_shardings=of_state.trainable),
    # The optimizer's moments are unused, and kept as arguments: they lie on the devices meanwhile, and the compiler's
    # account of memory (`launch/plan.py`) has to include them.
    accumulate=jax.jit(accumulate, donate_argnums=0, keep_unused=True, out_shardings=(of_state.trainable, everywhere)),
    apply=jax.jit(_make_apply(model, optimizer, sync_reference_every), donate_argnums=0, out_shardings=shardings),
  )


def _make_loss(model: Transformer, objective: Objective, num_microbatches: int) -> Callable:
  """Close over an objective's loss of one microbatch, a share of the mean over the buffer's prompts."""
  trainable = Trainable.of(model.config)
  lora = model.config.lora
  has_dropout = trainable.has_adapters and lora is not None and lora.dropout > 0
  replays = objective.likelihood is not None and objective.likelihood.replays

  def loss_and_metrics(trained: PyTree, state: TrainState, frozen: PyTree, microbatch: Experience, seed: jax.Array):
    num_prompts, group_size = microbatch.reward.shape

    def keys(purpose: str) -> jax.Array:
      return noise.row_keys(noise.step_key(seed, purpose, state.step), microbatch.prompts.prompt_id, group_size)

    score = make_score(
      model,
      trainable.policy(trained, frozen),
      microbatch.prompts,
      microbatch.completion,
      is_counted=microbatch.is_counted,
      uncounted=microbatch.seen if replays else None,
      dropout_keys=keys("dropout") if has_dropout else None,
      teacher=trainable.reference(frozen, state.reference) if objective.has_teacher else None,
    )
    return objective.loss(score, microbatch, keys("loss"), num_microbatches * num_prompts)

  return loss_and_metrics


def _make_apply(model: Transformer, optimizer: optax.GradientTransformation, sync_reference_every: int) -> Callable:
  """Close over the optimizer's change of the state by a whole gradient."""
  trainable = Trainable.of(model.config)

  def apply(state: TrainState, gradient: PyTree, shares: tuple[Metrics, ...]):
    metrics = functools.reduce(lambda total, share: jax.tree.map(jnp.add, total, share), shares)
    # A prompt without a kept rollout has added 0: the mean is over the others.
    scale = metrics.pop(PROMPTS) / jnp.maximum(metrics.pop(KEPT), 1)
    metrics, gradient = jax.tree.map(lambda x: x * scale, (metrics, gradient))
    grad_norm = optax.global_norm(gradient)
    is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    changes, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)

    def choose(new: PyTree, old: PyTree) -> PyTree:
      return jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, old)

    trained, reference = choose(optax.apply_updates(state.trainable, changes), state.trainable), state.reference
    if sync_reference_every:
      is_due = (state.step + 1) % sync_reference_every == 0  # a copy of what was chosen, so a skipped update syncs too
      followed = trainable.computing(trained)
      reference = jax.tree.map(lambda a, b: jnp.where(is_due, a, b), followed, reference)
    state = dataclasses.replace(
      state,
      step=state.step + 1,
      reference=reference,
      trainable=trained,
      opt_state=choose(opt_state, state.opt_state),
      num_skipped=state.num_skipped + ~is_finite,
      num_skipped_in_a_row=jnp.where(is_finite, 0, state.num_skipped_in_a_row + 1),
    )
    return state, metrics | {"grad_norm": grad_norm}

  return apply


def of_update(experience: Experience, step: jax.Array) -> Experience:
  """Take the token log-probabilities that were measured under the views of this update, [p, g, c], where there are any.

  A buffer serves a fixed number of updates, so the step says which of them this is.
  """

  def take(measured: jax.Array | None) -> jax.Array | None:
    return None if measured is None else measured[:, :, step % measured.shape[2]]

  return dataclasses.replace(
    experience, token_log_p_old=take(experience.token_log_p_old), token_log_p_ref=take(experience.token_log_p_ref)
  )
