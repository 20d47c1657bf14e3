"""From rewards and log-ratios to each rollout's share in the loss: importance weights, their baselines, and figures.

Every softmax runs over the rollouts of one prompt, the axis g; a rollout that is not kept has no share in any.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmpo_jax import ranges
from dmpo_jax.objectives.likelihood import standard_error
from dmpo_jax.ranges import POSITIVE, Range, number, numbers, one_of

BASELINES = ("none", "mean", "model", "negative")
MIN_KAPPA, MAX_KAPPA = 0.01, 0.99  # range of the adaptive proximal step, the official code's


class Weights(NamedTuple):
  """What a group's rollouts count, in the target and in its opposite."""

  weight: Float[Array, "p g"]
  negative_weight: Float[Array, "p g"]
  kappa: Float[Array, "p"]  # the proximal step that was taken
  is_kept: Bool[Array, "p g"]  # of the rollouts given as kept, those whose log-probabilities are numbers


@dataclasses.dataclass(frozen=True)
class Weighing:
  """How rewards and log-ratios become importance weights.

  Args:
    weighting: `tilt`, `softmax` or `reward`: see `importance_weights`.
    alpha: temperature of the target p_ref * exp(reward / alpha), above 0; read by `tilt` alone.
    proximal: `fixed` takes kappa, `adaptive` the largest that keeps the effective sample size (`adaptive_kappa`).
    kappa: proximal step in (0, 1]; 1: none.
    min_ess: effective sample size that `adaptive` keeps, as a share of the group.
    reward_scaling, part_weights: see `scale_rewards`.
    max_weight: weights are cut to this (truncated importance sampling), without being normalised again; 1: none.
    shrinkage: `reliability` multiplies each group's log-ratio by how much of its spread is no noise (`reliability`);
      read by `tilt` alone.
  """

  weighting: str = "tilt"
  alpha: float = 0.1
  proximal: str = "fixed"
  kappa: float = 1.0
  min_ess: float = 0.8
  reward_scaling: str = "none"
  part_weights: tuple[float, ...] = ()
  max_weight: float = 1.0
  shrinkage: str = "none"

  ranges: ClassVar[Mapping[str, Range]] = {
    "weighting": one_of("tilt", "softmax", "reward"),
    "alpha": POSITIVE,
    "proximal": one_of("fixed", "adaptive"),
    "kappa": number("(0, 1]"),
    "min_ess": number("(0, 1]"),
    "reward_scaling": one_of("none", "standardise", "standardise_parts"),
    "part_weights": numbers(),
    "max_weight": number("(0, 1]"),
    "shrinkage": one_of("none", "reliability"),
  }

  def __post_init__(self) -> None:
    ranges.check(self, self.ranges)


def weigh(
  reward: Float[Array, "p g"],
  log_p_ref: Float[Array, "p g"],
  log_p_old: Float[Array, "p g"],
  is_kept: Bool[Array, "p g"],
  weighing: Weighing,
  reward_parts: Float[Array, "p g parts"] | None = None,
) -> Weights:
  """Weigh a buffer: scale the rewards, choose kappa, weigh, cut.

  A rollout whose log-probabilities are not finite is dropped: it would make its whole group's weights NaN.
  """
  how, weighting = weighing, weighing.weighting
  is_kept = is_kept & jnp.isfinite(log_p_ref) & jnp.isfinite(log_p_old)
  reward = scale_rewards(reward, reward_parts, is_kept, how.reward_scaling, how.part_weights)
  if how.proximal == "adaptive" and weighting != "reward":
    step = adaptive_kappa(log_weights(reward, log_p_ref, log_p_old, weighting, how.alpha)[0], is_kept, how.min_ess)
  else:
    step = jnp.full(reward.shape[:1], how.kappa)
  weight, negative = importance_weights(
    reward, log_p_ref, log_p_old, is_kept, weighting=weighting, alpha=how.alpha, kappa=step
  )
  if weighting != "reward":
    weight, negative = jnp.minimum(weight, how.max_weight), jnp.minimum(negative, how.max_weight)
  return Weights(weight, negative, step, is_kept)


@functools.partial(jax.jit, static_argnames="weighing")  # called on the host: one program, not one an operation
def weigh_buffer(
  reward: Float[Array, "p g"],
  is_kept: Bool[Array, "p g"],
  log_p_ref: Float[Array, "p g n"],
  log_p_old: Float[Array, "p g n"],
  weighing: Weighing,
  reward_parts: Float[Array, "p g parts"] | None = None,
) -> tuple[Weights, dict[str, Float[Array, ""]]]:
  """Weigh a buffer by the means of n estimates, and say how far weights are spread and how much of it is noise.

  Returns:
    The weights, and `weight_difference` (mean over groups of sum |w - w_negative|), `kappa`, `tilt_std` (spread of
    reward / alpha inside groups), `log_ratio_noise` (standard error of the log-ratio over tilt_std), the figures of
    `log_ratio_figures`, and, where weights are shares of a group, `effective_sample_size` and `signal_kept`; with
    shrinkage, `reliability`, its mean over groups.
  """
  reference, old = log_p_ref.mean(-1), log_p_old.mean(-1)
  if weighing.shrinkage == "reliability":
    share = reliability(log_p_ref, log_p_old, is_kept)
    reference = old + share[:, None] * (reference - old)
  weighed = weigh(reward, reference, old, is_kept, weighing, reward_parts)
  is_kept = weighed.is_kept
  tilt = scale_rewards(reward, reward_parts, is_kept, weighing.reward_scaling, weighing.part_weights)
  tilt_std = spread_within_groups(tilt / weighing.alpha if weighing.weighting == "tilt" else tilt, is_kept)
  ratio = log_ratio_figures(log_p_ref, log_p_old, is_kept)
  figures = {
    "weight_difference": jnp.abs(weighed.weight - weighed.negative_weight).sum(-1).mean(),
    "kappa": weighed.kappa.mean(),
    "tilt_std": tilt_std,
    "log_ratio_noise": ratio["log_ratio_error"] / jnp.maximum(tilt_std, 1e-6),
    **ratio,
  }
  if weighing.weighting != "reward":
    figures["effective_sample_size"] = effective_sample_size(weighed.weight).mean()
    figures["signal_kept"] = signal_kept(weighed, tilt)
  if weighing.shrinkage == "reliability":
    figures["reliability"] = share.mean()
  return weighed, figures


def importance_weights(
  reward: Float[Array, "p g"],
  log_p_ref: Float[Array, "p g"],
  log_p_old: Float[Array, "p g"],
  is_kept: Bool[Array, "p g"],
  *,
  weighting: str,
  alpha: float,
  kappa: float | Float[Array, "p"],
) -> tuple[Float[Array, "p g"], Float[Array, "p g"]]:
  """Weigh rollouts of p_old towards the target p_ref * exp(reward / alpha), and towards its opposite.

  tilt: weight = softmax_g(kappa * (log p_ref - log p_old + reward / alpha)); negative_weight the same with
  -reward / alpha (DMPO, arXiv 2510.08233: self-normalised importance sampling with a proximal step).
  softmax: softmax_g(kappa * reward) and softmax_g(-kappa * reward), the limit in which the log-ratio is nothing beside
  the reward (the official code's alpha = 0).
  reward: the reward itself, and minus it (the official code's alpha = -1, which there fails).

  Args:
    is_kept: False drops a rollout (its values, NaN included, are not read): 0 in both. A group with none kept is all 0.
    alpha: temperature of the target, above 0; read by `tilt` alone.
    kappa: proximal step in (0, 1], of all groups or of each; 1: none. Not read by `reward`.
  """
  if isinstance(kappa, int | float):
    kappa = jnp.full(reward.shape[:1], kappa)
  if weighting == "reward":
    reward = jnp.where(is_kept, reward, 0)
    return reward, -reward
  towards, away = log_weights(reward, log_p_ref, log_p_old, weighting, alpha)
  return softmax_kept(kappa[:, None] * towards, is_kept), softmax_kept(kappa[:, None] * away, is_kept)


def log_weights(
  reward: Float[Array, "p g"],
  log_p_ref: Float[Array, "p g"],
  log_p_old: Float[Array, "p g"],
  weighting: str,
  alpha: float,
) -> tuple[Float[Array, "p g"], Float[Array, "p g"]]:
  """What the softmaxes of `importance_weights` are taken of, before the proximal step."""
  if weighting == "softmax":
    return reward, -reward
  log_ratio = log_p_ref - log_p_old
  return log_ratio + reward / alpha, log_ratio - reward / alpha


def adaptive_kappa(
  log_weight: Float[Array, "p g"], is_kept: Bool[Array, "p g"], min_ess: float | Float[Array, ""]
) -> Float[Array, "p"]:
  """Find the largest kappa in [MIN_KAPPA, MAX_KAPPA] whose softmax(kappa * log_weight) has an ESS of at least min_ess.

  Of each prompt's group by itself, over the rollouts kept. The effective sample size falls as kappa rises, so halving
  the interval finds it wherever the softmax is saturated. Where no kappa reaches min_ess, or every one does: the end of
  the range that is nearer to it.
  """
  num_kept = jnp.maximum(is_kept.sum(-1), 1)

  def is_enough(kappa: Float[Array, "p"]) -> Bool[Array, "p"]:
    weight = softmax_kept(kappa[:, None] * log_weight, is_kept)
    squares = (weight**2).sum(-1)
    return jnp.where(squares > 0, 1 / (num_kept * jnp.where(squares > 0, squares, 1)), 1) >= min_ess

  def halve(_: jax.Array, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    low, high = interval
    middle = (low + high) / 2
    enough = is_enough(middle)
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  low, high = (jnp.full(log_weight.shape[:1], end) for end in (MIN_KAPPA, MAX_KAPPA))
  kappa, _ = jax.lax.fori_loop(0, 30, halve, (low, high))
  return jnp.where(is_enough(high), high, kappa)


def scale_rewards(
  reward: Float[Array, "p g"],
  reward_parts: Float[Array, "p g parts"] | None,
  is_kept: Bool[Array, "p g"],
  scaling: str,
  part_weights: Sequence[float] = (),
) -> Float[Array, "p g"]:
  """Scale rewards within each group.

  none: the rewards as they are. standardise: minus the group's mean, divided by its standard deviation.
  standardise_parts: sum_parts part_weight * standardise(part), so that a part counts by its weight whatever its scale
  (arXiv 2601.05242, whose last step, standardising the sum over the batch, is left to alpha).

  Args:
    reward_parts: parts whose sum is the reward; read by standardise_parts alone.
    part_weights: one for each part; (): all are 1.
  """
  if scaling == "none":
    return reward
  if scaling == "standardise":
    return standardise(reward, is_kept)
  assert reward_parts is not None  # `build` has checked that the task has parts
  parts = jnp.moveaxis(reward_parts, -1, 0)
  weighted = zip(parts, part_weights or (1.0,) * len(parts), strict=True)
  # the sum of no parts would be an int
  return sum(weight * standardise(part, is_kept) for part, weight in weighted)  # pyright: ignore[reportReturnType]


def standardise(reward: Float[Array, "p g"], is_kept: Bool[Array, "p g"]) -> Float[Array, "p g"]:
  """Subtract the mean of the group's kept rewards and divide by their standard deviation; 0 where all are the same."""
  distance = jnp.where(is_kept, reward - mean_kept(reward, is_kept)[:, None], 0)
  deviation = jnp.sqrt(mean_kept(distance**2, is_kept))[:, None]
  return jnp.where(deviation > 1e-6, distance / jnp.where(deviation > 1e-6, deviation, 1), 0)


def baseline(
  name: str,
  *,
  weight: Float[Array, "p g"],
  negative_weight: Float[Array, "p g"],
  log_p_theta: Float[Array, "p g"],
  log_p_old: Float[Array, "p g"],
  is_kept: Bool[Array, "p g"],
) -> Float[Array, "p g"]:
  """Compute what is subtracted from the weights; no gradient goes through it. Dropped rollouts get 0.

  none: 0. mean: the mean weight of the group's kept rollouts, which is 1 / (their number) unless weights are rewards or
  were cut. model: softmax_g(log p_theta - log p_old), which leaves the gradient unbiased since
  E_{p_theta} grad log p_theta = 0. negative: `negative_weight`.

  Args:
    name: one of BASELINES.
    log_p_theta: of the policy that is being updated; log_p_old: when the rollouts were drawn. Read by `model` only.
  """
  if name == "none":
    return jnp.zeros_like(negative_weight)
  if name == "mean":
    return jnp.where(is_kept, mean_kept(weight, is_kept)[:, None], 0)
  if name == "model":
    return softmax_kept(jax.lax.stop_gradient(log_p_theta) - log_p_old, is_kept)
  return jnp.where(is_kept, negative_weight, 0)


def softmax_kept(logits: Float[Array, "p g"], is_kept: Bool[Array, "p g"]) -> Float[Array, "p g"]:
  """Softmax over the kept rollouts of each group; 0 for the others, whatever their logits, and for an empty group."""
  logits = jnp.where(is_kept, logits, -jnp.inf)
  highest = jnp.where(is_kept.any(-1, keepdims=True), logits.max(-1, keepdims=True), 0)
  shares = jnp.exp(logits - highest)
  return shares / jnp.maximum(shares.sum(-1, keepdims=True), 1)  # the highest share is 1, unless nothing is kept


def mean_kept(values: Float[Array, "p g"], is_kept: Bool[Array, "p g"]) -> Float[Array, "p"]:
  """Average over the kept rollouts of each group; 0 for a group with none kept."""
  return jnp.where(is_kept, values, 0).sum(-1) / jnp.maximum(is_kept.sum(-1), 1)


def effective_sample_size(weight: Float[Array, "p g"]) -> Float[Array, "p"]:
  """Effective share of a group's rollouts, (sum_g weight)^2 / (g * sum_g weight^2), in [1/g, 1].

  The sum is 1 unless weights were cut to `max_weight`. 0 for a group with none kept.
  """
  squares = (weight**2).sum(-1)
  share = weight.sum(-1) ** 2 / (weight.shape[-1] * jnp.where(squares > 0, squares, 1))
  return jnp.minimum(share, 1)  # which rounding may exceed


@jax.jit  # called on the host: one program, where each of its operations would be one
def fraction_without_variance(reward: Float[Array, "p g"], is_kept: Bool[Array, "p g"]) -> Float[Array, ""]:
  """Fraction of the groups whose kept rewards are all the same (or none): they have nothing to learn from."""
  return (~has_variance(reward, is_kept)).mean()


@jax.jit  # as above
def has_variance(reward: Float[Array, "p g *parts"], is_kept: Bool[Array, "p g"]) -> Bool[Array, "p"]:
  """Whether the kept rewards of each group, or any part of them, differ: what is learned from by comparing them."""
  parts, is_kept = reward.reshape(*is_kept.shape, -1), is_kept[..., None]
  highest, lowest = jnp.where(is_kept, parts, -jnp.inf).max(1), jnp.where(is_kept, parts, jnp.inf).min(1)
  return (highest > lowest).any(-1)


def signal_kept(weighed: Weights, reward: Float[Array, "p g"]) -> Float[Array, ""]:
  """Say how far the weights and those of the opposite target come apart, of what they could: in [0, 1].

  sum_g |w - w_negative| / 2, the mean over the groups whose rewards differ; NaN where none do. 1: the two pick
  different rollouts; 0: the same ones, and under the negative baseline nothing is learned. Low where the log-ratio,
  signal or noise, outweighs the tilt reward / alpha in both, and where kappa times the tilt is so small that neither
  picks any.
  """
  difference = jnp.abs(weighed.weight - weighed.negative_weight).sum(-1) / 2
  is_informative = has_variance(reward, weighed.is_kept)
  return jnp.where(is_informative, difference, 0).sum() / is_informative.sum()


def spread_within_groups(values: Float[Array, "p g"], is_kept: Bool[Array, "p g"]) -> Float[Array, ""]:
  """Root mean square of the kept values' distances from the mean of their group; 0 when nothing is kept."""
  return _root_mean_square(values - mean_kept(values, is_kept)[:, None], is_kept)


def log_ratio_figures(
  log_p_ref: Float[Array, "p g n"], log_p_old: Float[Array, "p g n"], is_kept: Bool[Array, "p g"]
) -> dict[str, Float[Array, ""]]:
  """Summarise log p_ref - log p_old over the kept rollouts, in nats; both estimated under the same mask draws.

  log_ratio_mean: its mean. log_ratio_std: its spread inside the groups, which is what the weights see.
  log_ratio_error: its Monte-Carlo standard error (root mean square; NaN from a single mask draw). The estimate is too
  noisy to weigh with when this nears the spread of reward / alpha (`spread_within_groups`).
  """
  draws = log_p_ref - log_p_old
  log_ratio = draws.mean(-1)
  mean = jnp.where(is_kept, log_ratio, 0).sum() / jnp.maximum(is_kept.sum(), 1)
  return {
    "log_ratio_mean": mean,
    "log_ratio_std": spread_within_groups(log_ratio, is_kept),
    "log_ratio_error": _root_mean_square(standard_error(draws), is_kept),
  }


def reliability(
  log_p_ref: Float[Array, "p g n"], log_p_old: Float[Array, "p g n"], is_kept: Bool[Array, "p g"]
) -> Float[Array, "p"]:
  """Estimate how much of the spread of each group's log-ratio is no noise, in [0, 1], from n >= 2 independent draws.

  spread^2 / (spread^2 + error^2) over the k kept rollouts: error^2 the mean of the squared standard errors, and
  spread^2 + error^2 the variance of the estimates (k - 1 degrees of freedom), where that is larger than error^2; else
  0. The log-ratio times it is the best linear prediction of the noise-free one from the estimate (up to a constant of
  the group, which no softmax sees).

  Weights of the shrunk log-ratio are biased: they tilt p_old, not p_ref, by as much as was taken from it, and p_old
  where the estimate is all noise. The bias goes away as the number of draws grows, not with that of rollouts. In small
  groups the spread itself is noisy, and so is the factor.
  """
  is_kept = is_kept & jnp.isfinite(log_p_ref - log_p_old).all(-1)
  draws = jnp.where(is_kept[..., None], log_p_ref - log_p_old, 0)
  log_ratio = draws.mean(-1)
  distance = jnp.where(is_kept, log_ratio - mean_kept(log_ratio, is_kept)[:, None], 0)
  total = (distance**2).sum(-1) / jnp.maximum(is_kept.sum(-1) - 1, 1)
  noise = mean_kept(standard_error(draws) ** 2, is_kept)
  spread = jnp.maximum(total - noise, 0)
  return jnp.where(spread > 0, spread / jnp.where(spread > 0, spread + noise, 1), 0)


@jax.jit  # as above
def unique_rollouts(
  completion: Int[Array, "p g c"], is_until_eos: Bool[Array, "p g c"], is_kept: Bool[Array, "p g"]
) -> Float[Array, "p"]:
  """Effective number of different completions in each group: 1 / sum over them of the share squared, in [1, g].

  That of the kept rollouts, compared up to their first EOS; 0 for a group with none kept.
  """
  text = jnp.where(is_until_eos, completion, -1)
  is_pair = is_kept[:, :, None] & is_kept[:, None]
  is_same = (text[:, :, None] == text[:, None]).all(-1) & is_pair
  pairs = is_same.sum((1, 2))
  return jnp.where(pairs > 0, is_kept.sum(-1) ** 2 / jnp.maximum(pairs, 1), 0)


def _root_mean_square(values: Float[Array, "p g"], is_kept: Bool[Array, "p g"]) -> Float[Array, ""]:
  return jnp.sqrt(jnp.where(is_kept, values**2, 0).sum() / jnp.maximum(is_kept.sum(), 1))
