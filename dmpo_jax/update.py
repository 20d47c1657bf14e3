"""The jitted gradient step: keys, masks, loss and gradient by microbatches, then one optimizer update.

A step whose loss or gradient is not finite changes nothing but the counters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from dmpo_jax import noise
from dmpo_jax.models import lora
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.scoring import make_score
from dmpo_jax.structs import Experience, TrainState


def make_update(
  model: Transformer,
  optimizer: optax.GradientTransformation,
  *,
  objective: str,
  microbatch_prompts: int,
  sync_reference_every: int,
  shardings: tuple[TrainState, NamedSharding],
  **keywords: Any,
) -> Callable[[TrainState, Any, Experience, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
  """Jit `update(state, frozen, experience, seed) -> (state, metrics)`; the state given is donated.

  The gradient is of the mean over the experience's prompts, accumulated in float32 over microbatches of whole groups,
  and so are the parameters that it moves; where all are trained, it is taken at these in the activations' dtype.
  A row's masks and dropout belong to (seed, step, prompt, rollout), so the split changes no number beyond rounding. The
  seed is given as its key, `jax.random.key(seed)`: runs that differ by it alone share one compiled program.

  Args:
    objective: a name in `objectives.OBJECTIVES`; `keywords` are its own.
    microbatch_prompts: prompts whose gradient is computed at one time; divides their number; 0 for all.
    sync_reference_every: updates after which the state's reference becomes a copy of what is trained; 0: never.
    shardings: of the state and of the metrics.
  """
  has_adapters = model.config.lora is not None
  has_dropout = has_adapters and model.config.lora.dropout > 0
  loss, _, has_teacher = OBJECTIVES[objective]
  replays = "likelihood" in keywords and keywords["likelihood"].replays

  def loss_and_metrics(
    trainable: Any, state: TrainState, frozen: Any, experience: Experience, seed: jax.Array, num_prompts: int
  ):
    group_size = experience.reward.shape[1]

    def keys(purpose: str) -> jax.Array:
      return noise.row_keys(noise.step_key(seed, purpose, state.step), experience.prompts.prompt_id, group_size)

    score = make_score(
      model,
      lora.policy_variables(trainable, frozen, has_adapters),
      experience.prompts,
      experience.completion,
      is_counted=experience.is_counted,
      uncounted=experience.seen if replays else None,
      dropout_keys=keys("dropout") if has_dropout else None,
      teacher=lora.reference_variables(frozen, state.reference, has_adapters) if has_teacher else None,
    )
    return loss(score, experience, keys("loss"), num_prompts=num_prompts, **keywords)

  def accumulate(state: TrainState, frozen: Any, experience: Experience, seed: jax.Array):
    num_prompts = experience.reward.shape[0]
    gradient_of = jax.value_and_grad(loss_and_metrics, has_aux=True)
    trainable = lora.computing(state.trainable, model.config.dtype, has_adapters)

    def part(microbatch: Experience):
      result = gradient_of(trainable, state, frozen, microbatch, seed, num_prompts)
      return jax.tree.map(lambda x: x.astype(jnp.float32), result)

    if microbatch_prompts in (0, num_prompts):
      return part(experience)

    def add(total: Any, microbatch: Experience):
      return jax.tree.map(jnp.add, total, part(microbatch)), None

    microbatches = jax.tree.map(lambda x: x.reshape(-1, microbatch_prompts, *x.shape[1:]), experience)
    shapes = jax.eval_shape(part, jax.tree.map(lambda x: x[0], microbatches))
    return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), microbatches)[0]

  def update(state: TrainState, frozen: Any, experience: Experience, seed: jax.Array):
    experience = of_update(experience, state.step)
    (loss, metrics), gradient = accumulate(state, frozen, experience, seed)
    grad_norm = optax.global_norm(gradient)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    changes, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)

    def choose(new: Any, old: Any) -> Any:
      return jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, old)

    trainable, reference = choose(optax.apply_updates(state.trainable, changes), state.trainable), state.reference
    if sync_reference_every:
      is_due = (state.step + 1) % sync_reference_every == 0  # a copy of what was chosen, so a skipped update syncs too
      followed = lora.computing(trainable, model.config.dtype, has_adapters)
      reference = jax.tree.map(lambda a, b: jnp.where(is_due, a, b), followed, reference)
    state = state.replace(
      step=state.step + 1,
      reference=reference,
      trainable=trainable,
      opt_state=choose(opt_state, state.opt_state),
      num_skipped=state.num_skipped + ~is_finite,
      num_skipped_in_a_row=jnp.where(is_finite, 0, state.num_skipped_in_a_row + 1),
    )
    return state, metrics | {"loss": loss, "grad_norm": grad_norm}

  return jax.jit(update, donate_argnums=0, out_shardings=shardings)


def of_update(experience: Experience, step: jax.Array) -> Experience:
  """Take the token log-probabilities that were measured under the views of this update, [p, g, c], where there are any.

  A buffer serves a fixed number of updates, so the step says which of them this is.
  """

  def take(measured: jax.Array | None) -> jax.Array | None:
    return None if measured is None else measured[:, :, step % measured.shape[2]]

  return experience.replace(
    token_log_p_old=take(experience.token_log_p_old), token_log_p_ref=take(experience.token_log_p_ref)
  )
