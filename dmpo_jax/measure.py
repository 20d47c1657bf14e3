"""What an objective needs of rollouts besides their rewards: log-probabilities under the old and the reference policy.

Three ways, one for each kind of objective (`objectives.Needs`): nothing; sequence log-probabilities, estimated or as
the sampler gave them, which become importance weights; or log-probabilities position by position under the very views
that the updates will take.
"""

import collections
import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from dmpo_jax import noise
from dmpo_jax.models import lora
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.objectives import weights
from dmpo_jax.objectives.likelihood import Completions, Estimator
from dmpo_jax.run.preemption import Preempted, check_preemption
from dmpo_jax.scoring import make_score
from dmpo_jax.sharding import replicated
from dmpo_jax.structs import Experience, LogProbs, Prompts, Rollouts


class NotFinite(RuntimeError):
  """The model gives no probabilities: its parameters hold NaN or infinities, or it overflows."""


def check_confidence(rollouts: Rollouts) -> None:
  """Stop where no rollout of a sampler's call has a probability for what it holds.

  Raises:
    NotFinite: there is none.
  """
  is_finite = np.isfinite(rollouts.confidence).all(-1)
  if is_finite.size and not is_finite.any():
    raise NotFinite(
      f"none of {is_finite.size} rollouts has finite probabilities: the parameters hold NaN or infinities, or the "
      "model overflows in model.dtype. See that model.init_from and model.lora.init_from are whole"
    )


class Policies(NamedTuple):
  """The policy that draws the rollouts, and the reference."""

  trainable: Any
  frozen: Any  # parameters that are not trained; empty where none are
  reference: Any = None  # see `structs.TrainState`


class Measure(NamedTuple):
  """How rollouts are measured, in two parts: the model's may run while rewards are graded, the other needs them.

  `score(policies, prompts, completion, is_counted, committed_at, buffer, seen=None)` dispatches the forward passes on a
  chunk of prompts, whose arrays are `Experience`'s, and returns `Measures` that are still on the devices; None: there
  are no forward passes.

  `finish(policies, experience, rollouts, measures, buffer)` completes an experience that has its rewards, by the
  measures of all chunks on the host, and returns it with figures for the log. The policies are those that were scored.
  """

  score: Callable[..., LogProbs] | None
  finish: Callable[
    [Policies, Experience, Rollouts, LogProbs | None, int],
    tuple[Experience, dict[str, float]],
  ]


def make_measure_nothing() -> Measure:
  """Leave the experience as it is, for objectives that learn from rewards and the current policy alone."""
  return Measure(None, lambda policies, experience, rollouts, measures, buffer: (experience, {}))


def make_measure_weights(
  model: Transformer,
  mesh: Mesh,
  *,
  estimator: Estimator,
  chunk_prompts: int,
  seed: int,
  elbo_rounds: str,
  max_noise: float,
  max_rounds: int,
  **weighing: Any,
) -> Measure:
  """Close over a measure that estimates both policies' log-probabilities and weighs the rollouts by them.

  Both policies are scored under the same masks, so that their noise largely cancels in the log-ratio.

  Args:
    elbo_rounds: `fixed`: one round of the estimator's draws. `adaptive`: further rounds of as many fresh draws, until
      the log-ratio's standard error is at most max_noise times the spread of reward / alpha, or after max_rounds. All
      rounds are one compiled program.
    weighing: keywords of `weights.weigh`.
  """
  program, weigh = measure_program(model, mesh, estimator=estimator), _make_weigh(**weighing)

  def score(policies, prompts, completion, is_counted, committed_at, buffer: int, seen=None, number: int = 0):
    key = noise.step_key(seed, "measure", buffer)
    key = jax.random.fold_in(key, number) if number else key
    return program(policies, prompts, completion, is_counted, committed_at, key, seen)

  def finish(policies: Policies, experience: Experience, rollouts: Rollouts, measures: LogProbs, buffer: int):
    rounds = [measures]
    while True:
      weighed, figures = weigh(experience, _join(rounds))
      if elbo_rounds == "fixed" or figures["log_ratio_noise"] <= max_noise or len(rounds) == max_rounds:
        break
      again = functools.partial(score, buffer=buffer, number=len(rounds))  # by estimators that draw masks: none replays
      rounds.append(_in_chunks(again, policies, experience, chunk_prompts))
    sampled = np.where(experience.is_counted, log_confidence(rollouts), 0).sum(-1)
    gap = (sampled - weighed.log_p_old)[weighed.is_kept]
    figures["sampler_gap"] = float(gap.mean()) if gap.size else float("nan")
    return weighed, figures | {"elbo_rounds": float(len(rounds))}

  return Measure(score, finish)


def make_measure_sampled(**weighing: Any) -> Measure:
  """Close over a measure that weighs rollouts by the log-probabilities that their sampler gave (random_order).

  They are exact for the order in which the tokens were drawn, and cost no further model call. The entropy is their
  Monte-Carlo estimate, -log p of the counted tokens.

  Args:
    weighing: keywords of `weights.weigh`.
  """
  weigh = _make_weigh(**weighing)

  def finish(policies: Policies, experience: Experience, rollouts: Rollouts, measures: None, buffer: int):
    log_p_old, log_p_ref = (
      np.where(experience.is_counted, log_p, 0.0).sum(-1, keepdims=True)
      for log_p in (rollouts.log_p_old, rollouts.log_p_ref)
    )
    entropy = -log_p_old[..., 0] / experience.is_counted.sum(-1)
    return weigh(experience, LogProbs(log_p_old, log_p_ref, entropy))

  return Measure(None, finish)


def make_measure_ratios(
  model: Transformer,
  mesh: Mesh,
  *,
  estimator: Estimator,
  seed: int,
  updates_per_buffer: int,
  with_reference: bool,
) -> Measure:
  """Close over a measure of token log-probabilities under the views of each update that the buffer will serve.

  Where the estimator draws nothing, all updates share one measurement. A rollout with one that is not finite is
  dropped.
  """
  program = token_program(model, mesh, estimator=estimator, with_reference=with_reference)
  num_measured = updates_per_buffer if max(estimator.draws) >= 0 else 1

  def score(policies, prompts, completion, is_counted, committed_at, buffer: int, seen=None):
    keys = [noise.step_key(seed, "loss", buffer * updates_per_buffer + update) for update in range(num_measured)]
    measured = [program(policies, prompts, completion, is_counted, committed_at, key, seen) for key in keys]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays, axis=2), *measured)

  def finish(policies: Policies, experience: Experience, rollouts: Rollouts, measures: LogProbs, buffer: int):
    is_kept = experience.is_kept & np.isfinite(measures.log_p_old + measures.log_p_ref).all((2, 3))
    figures = {"entropy": float(measures.entropy.mean()), "scores_failed": _num_failed(experience.is_kept, is_kept)}
    return experience.replace(
      is_kept=is_kept,
      token_log_p_old=measures.log_p_old,
      token_log_p_ref=measures.log_p_ref if with_reference else None,
    ), figures

  return Measure(score, finish)


def measure_program(model: Transformer, mesh: Mesh, *, estimator: Estimator) -> Callable:
  """Jit the estimates of both policies under one set of views."""

  def program(policies: Policies, prompts: Prompts, completion, is_counted, committed_at, key, seen=None) -> LogProbs:
    views = estimator.views(
      noise.row_keys(key, prompts.prompt_id, completion.shape[1]),
      Completions(is_counted, committed_at, prompts.is_valid),
    )
    about = dict(is_counted=is_counted, uncounted=seen if estimator.replays else None)
    old, ref = _score_both(model, policies, prompts, completion, estimator, views, about)
    return LogProbs(
      log_p_old=estimator.estimates(old.log_prob, views),
      log_p_ref=estimator.estimates(ref.log_prob, views),
      entropy=_read_entropy(old, views),
    )

  return jax.jit(program, out_shardings=replicated(mesh))


def token_program(model: Transformer, mesh: Mesh, *, estimator: Estimator, with_reference: bool) -> Callable:
  """Jit the estimates position by position."""

  def program(policies: Policies, prompts: Prompts, completion, is_counted, committed_at, key, seen=None) -> LogProbs:
    views = estimator.views(
      noise.row_keys(key, prompts.prompt_id, completion.shape[1]),
      Completions(is_counted, committed_at, prompts.is_valid),
    )
    about = dict(is_counted=is_counted, uncounted=seen if estimator.replays else None)
    old, ref = _score_both(model, policies, prompts, completion, estimator, views, about, with_reference)
    return LogProbs(
      log_p_old=estimator.tokens(old.log_prob, views),
      log_p_ref=estimator.tokens(ref.log_prob, views),
      entropy=_read_entropy(old, views),
    )

  return jax.jit(program, out_shardings=replicated(mesh))


def _score_both(model, policies, prompts, completion, estimator, views, about, with_reference=True):
  has_adapters = model.config.lora is not None
  variables = [lora.policy_variables(policies.trainable, policies.frozen, has_adapters)]
  if with_reference:
    variables.append(lora.reference_variables(policies.frozen, policies.reference, has_adapters))
  scores = [
    make_score(model, each, prompts, completion, **about)(
      views.is_masked, views.prompt_is_masked, pairs=estimator.pairs
    )
    for each in variables
  ]
  return scores[0], scores[-1]


def _read_entropy(scores, views):
  is_read = views.share > 0
  return jnp.where(is_read, scores.entropy, 0).sum((2, 3)) / jnp.maximum(is_read.sum((2, 3)), 1)


def _in_chunks(score: Callable, policies: Policies, experience: Experience, size: int) -> LogProbs:
  """Score `size` prompts of the experience at a time (0: all); join the results along the prompt axis."""
  arrays = experience.prompts, experience.completion, experience.is_counted, experience.committed_at
  parts = [jax.tree.map(operator.itemgetter(part), arrays) for part in chunks(len(experience.completion), size)]
  return concatenate(list(fetch_ahead(functools.partial(score, policies, *part) for part in parts)))


def _join(rounds: list[LogProbs]) -> LogProbs:
  return LogProbs(
    log_p_old=np.concatenate([measures.log_p_old for measures in rounds], axis=-1),
    log_p_ref=np.concatenate([measures.log_p_ref for measures in rounds], axis=-1),
    entropy=np.mean([measures.entropy for measures in rounds], axis=0),
  )


def _make_weigh(**weighing: Any) -> Callable[[Experience, LogProbs], tuple[Experience, dict[str, float]]]:
  """Close over the weighing of an experience, which also says how far weights are spread and how much is noise."""
  program = jax.jit(functools.partial(_weigh, **weighing))  # one, where each of its operations would be one

  def weigh(experience: Experience, measures: LogProbs) -> tuple[Experience, dict[str, float]]:
    weighed, figures = jax.device_get(
      program(experience.reward, experience.is_kept, measures.log_p_ref, measures.log_p_old, experience.reward_parts)
    )
    figures["scores_failed"] = _num_failed(experience.is_kept, weighed.is_kept)
    experience = experience.replace(
      is_kept=weighed.is_kept,
      log_p_old=measures.log_p_old.mean(-1),
      log_p_ref=measures.log_p_ref.mean(-1),
      weight=weighed.weight,
      negative_weight=weighed.negative_weight,
    )
    figures["entropy"] = measures.entropy.mean()
    return experience, {name: float(value) for name, value in figures.items()}

  return weigh


def _num_failed(is_graded: Bool[np.ndarray, "p g"], is_kept: Bool[np.ndarray, "p g"]) -> float:
  """Count the graded rollouts that were dropped since their log-probabilities are not finite."""
  return float((is_graded & ~is_kept).sum())


def _weigh(
  reward: Float[Array, "p g"],
  is_kept: Bool[Array, "p g"],
  log_p_ref: Float[Array, "p g m"],
  log_p_old: Float[Array, "p g m"],
  reward_parts: Float[Array, "p g parts"] | None = None,
  **weighing: Any,
) -> tuple[weights.Weights, dict[str, Float[Array, ""]]]:
  weighed = weights.weigh(
    reward, log_p_ref.mean(-1), log_p_old.mean(-1), is_kept, reward_parts=reward_parts, **weighing
  )
  is_kept = weighed.is_kept
  tilt = weights.scale_rewards(
    reward, reward_parts, is_kept, weighing["reward_scaling"], weighing.get("part_weights", ())
  )
  tilt_std = weights.spread_within_groups(
    tilt / weighing["alpha"] if weighing["weighting"] == "tilt" else tilt, is_kept
  )
  ratio = weights.log_ratio_figures(log_p_ref, log_p_old, is_kept)
  figures = {
    "weight_difference": jnp.abs(weighed.weight - weighed.negative_weight).sum(-1).mean(),
    "kappa": weighed.kappa.mean(),
    "tilt_std": tilt_std,
    "log_ratio_noise": ratio["log_ratio_error"] / jnp.maximum(tilt_std, 1e-6),
    **ratio,
  }
  if weighing["weighting"] != "reward":  # rewards are no shares of a group
    figures["effective_sample_size"] = weights.effective_sample_size(weighed.weight).mean()
  return weighed, figures


def log_confidence(rollouts: Rollouts) -> Float[np.ndarray, "p g c"]:
  """Give the logarithm of each token's probability when it was drawn, nats; 0 where early exit filled a position.

  A probability that float32 takes for 0 counts as the least that it has, -87 nats.
  """
  least = np.finfo(np.float32).tiny
  return np.where(rollouts.is_drawn, np.log(np.maximum(rollouts.confidence, least)), 0)


def chunks(num: int, size: int) -> list[slice]:
  """Cut `num` prompts into parts of `size`; 0: one part."""
  size = size or num
  return [slice(start, start + size) for start in range(0, num, size)]


def concatenate(parts: list[Any]) -> Any:
  """Join arrays of several chunks along the prompt axis."""
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def fetch_ahead(calls: Iterable[Callable[[], Any]]) -> Iterator[Any]:
  """Give what each of the calls computes as numpy arrays; the next call is dispatched before one's result is awaited.

  So the devices have work while the host looks at results. Between the programs a buffer is small and lives on every
  host.

  Raises:
    Preempted: between two calls, once all that was dispatched has been given; a buffer may take longer than the notice.
  """
  dispatched = collections.deque()
  for call in calls:
    try:
      check_preemption()
    except Preempted:
      yield from map(jax.device_get, dispatched)
      raise
    dispatched.append(call())
    if len(dispatched) > 1:
      yield jax.device_get(dispatched.popleft())
  yield from map(jax.device_get, dispatched)
