"""The gradient step: loss and gradient one microbatch at a time, then one optimizer update.

Each is a jitted program. Between microbatches the processes look for a notice of preemption; a step that is interrupted
has changed nothing. A step whose loss or gradient is not finite changes nothing but the counters. Groups that teach
nothing are not computed: the others are packed into as few microbatches as hold them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, PyTree

from dmpo_jax import lengths, noise, sharding
from dmpo_jax.logprobs import make_score
from dmpo_jax.models.router import ROUTING, describe
from dmpo_jax.models.trainable import Trainable
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.objectives import Objective
from dmpo_jax.run.preemption import check_preemption
from dmpo_jax.structs import Experience, Routing, Scores, TrainState

Metrics = Mapping[str, Any]  # arrays and, where the model has experts, their `Routing`

MOST_HALVINGS = 2  # of a buffer that is one microbatch, where few of its groups are learned from: each is one program


@dataclasses.dataclass(frozen=True)
class Update:
  """A gradient step as programs that a host calls one after another.

  Args:
    num_microbatches: equal parts of a buffer's prompts, whose gradients are added up.
    zeros: `trainable -> gradient`, the sum before the first microbatch, float32 and laid out as what is trained.
    accumulate: `(gradient, state, frozen, microbatch, seed) -> (gradient, metrics)`. Adds one microbatch's gradient to
      the sum, which is donated; None in its place begins a sum. The metrics are the microbatch's share, with its loss.
    add: `(metrics, metrics) -> metrics`, the sum of two shares.
    apply: `(state, gradient, metrics, scales) -> (state, metrics)`. Donates the state. The scales [2] make means of the
      sums: of the loss and gradient, and of the other metrics.
    skip: `state -> state`, a step without a gradient. Donates the state.
    lengths: prompts of one length are in a microbatch together, padded to the first of them that holds them all; ():
      in the buffer's order, as they come.
  """

  num_microbatches: int
  zeros: Callable[[PyTree], PyTree]
  accumulate: Callable[[PyTree, TrainState, PyTree, Experience, jax.Array], tuple[PyTree, Metrics]]
  add: Callable[[Metrics, Metrics], Metrics]
  apply: Callable[[TrainState, PyTree, Metrics, np.ndarray], tuple[TrainState, Metrics]]
  skip: Callable[[TrainState], TrainState]
  lengths: tuple[int, ...] = ()

  def __call__(
    self, state: TrainState, frozen: PyTree, experience: Experience, seed: jax.Array
  ) -> tuple[TrainState, Metrics]:
    """Take one gradient step on a buffer; the state given is donated.

    The seed is given as its key, `jax.random.key(seed)`: runs that differ by it alone share compiled programs. The
    metrics include `microbatches`, the number that was computed. Without any, only the step is counted, and the
    reference synchronised where that is due.

    Raises:
      Preempted: before one of the microbatches; the state is as it was.
    """
    order = lengths.order(experience.prompts, self.lengths)
    if order is not None:
      experience = jax.tree.map(lambda leaf: np.asarray(leaf)[order], experience)
    microbatches = pack(experience, self.num_microbatches)
    if not microbatches:
      nothing = np.zeros((), np.float32)
      return self.skip(state), {"loss": nothing, "grad_norm": nothing, "microbatches": nothing}
    gradient, shares = self.zeros(state.trainable) if self.num_microbatches > 1 else None, []
    for microbatch in microbatches:
      check_preemption()
      microbatch = dataclasses.replace(microbatch, prompts=lengths.cut(microbatch.prompts, self.lengths))
      gradient, share = self.accumulate(gradient, state, frozen, microbatch, seed)
      shares.append(share)
      # One microbatch stays queued behind the one that runs. If the host ran further ahead, it would look for notices
      # long before the devices are there.
      jax.block_until_ready(shares[-2:-1])
    scales = _scales(experience, microbatches, self.num_microbatches)
    state, metrics = self.apply(state, gradient, functools.reduce(self.add, shares), scales)
    return state, {**metrics, "microbatches": np.array(len(microbatches), np.float32)}


def pack(experience: Experience, number: int) -> list[Experience]:
  """Cut the groups of a buffer that updates learn from into microbatches, as large as one of `number` equal parts.

  They keep their order. The last microbatch is filled up with groups that have no kept rollout. With a single part, it
  is halved as long as it holds the groups, at most `MOST_HALVINGS` times, and the devices divide its rollouts.
  """
  if experience.is_informative is None:
    return split(experience, number)
  num_prompts, group_size = np.shape(experience.is_kept)
  chosen, size = np.flatnonzero(experience.is_informative), num_prompts // number
  for _ in range(MOST_HALVINGS if number == 1 else 0):
    half = size // 2
    if size % 2 == 0 and half >= len(chosen) and half * group_size % sharding.num_shares("batch") == 0:
      size = half
  experience = dataclasses.replace(experience, is_informative=None)
  if len(chosen) == num_prompts:
    return split(experience, number)
  filling = np.repeat(chosen[-1:], -len(chosen) % size)
  packed = jax.tree.map(lambda leaf: np.asarray(leaf)[np.concatenate([chosen, filling])], experience)
  is_filling = np.arange(len(packed.is_kept)) >= len(chosen)
  packed = dataclasses.replace(packed, is_kept=packed.is_kept & ~is_filling[:, None])
  return split(packed, len(is_filling) // size) if len(chosen) else []


def split(experience: Experience, number: int) -> list[Experience]:
  """Cut a buffer into equal parts of whole groups; parts of numpy arrays are views."""
  leaves, structure = jax.tree.flatten(experience)
  parts = zip(*(np.split(leaf, number) for leaf in leaves), strict=True)
  return [jax.tree.unflatten(structure, part) for part in parts]


def _scales(experience: Experience, microbatches: list[Experience], number: int) -> np.ndarray:
  """Return what makes means of the sums of `number` microbatches' shares.

  A prompt without a kept rollout has added 0 and does not count. Loss and gradient are means over all others, those
  that updates leave out included: these add 0 to them too. The other metrics are means over the prompts computed.
  """
  size = number * len(microbatches[0].is_kept)
  computed = sum(int(np.any(microbatch.is_kept, -1).sum()) for microbatch in microbatches)
  counted = np.array([np.any(experience.is_kept, -1).sum(), computed], np.float32)
  return np.float32(size) / np.maximum(counted, 1)


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

  The gradient is of the mean over a buffer's prompts, without those that have no kept rollout (`_scales`). It is
  accumulated in float32 over microbatches of whole groups, and so are the parameters that it moves; where all are
  trained, it is taken at these in the activations' dtype. A row's masks and dropout belong to (seed, step, prompt,
  rollout), so the split changes no number beyond rounding.

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
    return gradient, metrics | {"loss": loss}

  return Update(
    num_microbatches,
    zeros=jax.jit(zeros, out_shardings=of_state.trainable),
    # The optimizer's moments are unused, and kept as arguments: they lie on the devices meanwhile, and the compiler's
    # account of memory (`launch/plan.py`) has to include them.
    accumulate=jax.jit(accumulate, donate_argnums=0, keep_unused=True, out_shardings=(of_state.trainable, everywhere)),
    add=jax.jit(functools.partial(jax.tree.map, jnp.add), out_shardings=everywhere),
    apply=jax.jit(_make_apply(model, optimizer, sync_reference_every), donate_argnums=0, out_shardings=shardings),
    skip=jax.jit(_make_advance(model, sync_reference_every), donate_argnums=0, out_shardings=of_state),
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
    routed: list[Routing] = []

    def watched(*args: Any, **options: Any) -> Scores:
      scores = score(*args, **options)
      routed.extend([] if scores.routing is None else [_of_kept(scores.routing, microbatch.is_kept)])
      return scores

    loss, metrics = objective.loss(watched, microbatch, keys("loss"), num_microbatches * num_prompts)
    return loss, metrics | ({ROUTING: jax.tree.map(lambda *each: sum(each), *routed)} if routed else {})

  return loss_and_metrics


def _of_kept(routing: Routing, is_kept: Bool[Array, "p g"]) -> Routing:
  """Add up the rollouts that count."""
  return Routing(
    jnp.where(is_kept[..., None], routing.load, 0).sum((1, 2)), jnp.where(is_kept, routing.entropy, 0).sum((1, 2))
  )


def _make_apply(model: Transformer, optimizer: optax.GradientTransformation, sync_reference_every: int) -> Callable:
  """Close over the optimizer's change of the state by a whole gradient."""
  advance = _make_advance(model, sync_reference_every)

  def apply(state: TrainState, gradient: PyTree, metrics: Metrics, scales: jax.Array):
    routing, metrics = metrics.get(ROUTING), {name: value for name, value in metrics.items() if name != ROUTING}
    metrics = {name: value * scales[int(name != "loss")] for name, value in metrics.items()}
    if routing is not None:  # sums over the buffer, whose figures are not means of the microbatches'
      metrics |= describe(routing, model.config.experts_per_token)
    gradient = jax.tree.map(lambda x: x * scales[0], gradient)
    grad_norm = optax.global_norm(gradient)
    is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    changes, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)

    def choose(new: PyTree, old: PyTree) -> PyTree:
      return jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, old)

    state = dataclasses.replace(
      state,
      trainable=choose(optax.apply_updates(state.trainable, changes), state.trainable),
      opt_state=choose(opt_state, state.opt_state),
      num_skipped=state.num_skipped + ~is_finite,
      num_skipped_in_a_row=jnp.where(is_finite, 0, state.num_skipped_in_a_row + 1),
    )
    return advance(state), metrics | {"grad_norm": grad_norm}

  return apply


def _make_advance(model: Transformer, sync_reference_every: int) -> Callable[[TrainState], TrainState]:
  """Close over what ends a step, whether or not it has changed what is trained."""
  trainable = Trainable.of(model.config)

  def advance(state: TrainState) -> TrainState:
    step, reference = state.step + 1, state.reference
    if sync_reference_every:
      is_due = step % sync_reference_every == 0
      followed = trainable.computing(state.trainable)
      reference = jax.tree.map(lambda a, b: jnp.where(is_due, a, b), followed, reference)
    return dataclasses.replace(state, step=step, reference=reference)

  return advance


def of_update(experience: Experience, step: jax.Array) -> Experience:
  """Take the token log-probabilities that were measured under the views of this update, [p, g, c], where there are any.

  A buffer serves a fixed number of updates, so the step says which of them this is.
  """

  def take(measured: jax.Array | None) -> jax.Array | None:
    return None if measured is None else measured[:, :, step % measured.shape[2]]

  return dataclasses.replace(
    experience, token_log_p_old=take(experience.token_log_p_old), token_log_p_ref=take(experience.token_log_p_ref)
  )
