"""From rewards and log-ratios to each rollout's share in the loss: importance weights, their baselines, and figures.

Every softmax runs over the rollouts of one prompt, the axis g; a rollout that is not kept has no share in any.
"""

import difflib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dmpo_jax.objectives.likelihood import standard_error

BASELINES = ("none", "mean", "model", "negative")


def importance_weights(
  reward: Float[Array, "p g"],
  log_p_ref: Float[Array, "p g"],
  log_p_old: Float[Array, "p g"],
  is_kept: Bool[Array, "p g"],
  *,
  alpha: float,
  kappa: float,
) -> tuple[Float[Array, "p g"], Float[Array, "p g"]]:
  """Weigh rollouts of p_old towards the target p_ref * exp(reward / alpha), and towards its opposite.

  weight = softmax_g(kappa * (log p_ref - log p_old + reward / alpha)); negative_weight the same with -reward / alpha
  (DMPO, arXiv 2510.08233: self-normalised importance sampling with a proximal step). alpha = 0 stands for the limit
  without the log-ratio: softmax_g(kappa * reward) and softmax_g(-kappa * reward).

  Args:
    is_kept: False drops a rollout (its values, NaN included, are not read): 0 in both. A group with none kept is all 0.
    alpha: temperature of the target, at least 0.
    kappa: proximal step in (0, 1]; 1: none.

  Raises:
    ValueError: alpha or kappa out of range.
  """
  if alpha < 0:
    raise ValueError(f"objective.alpha={alpha}: must be positive, or 0 for weights without the log-ratio")
  if not 0 < kappa <= 1:
    raise ValueError(f"objective.kappa={kappa}: must be in (0, 1]; 1 means no proximal term")
  log_ratio = log_p_ref - log_p_old if alpha else jnp.zeros_like(reward)
  tilt = reward / alpha if alpha else reward
  return softmax_kept(kappa * (log_ratio + tilt), is_kept), softmax_kept(kappa * (log_ratio - tilt), is_kept)


def baseline(
  name: str,
  *,
  negative_weight: Float[Array, "p g"],
  log_p_theta: Float[Array, "p g"],
  log_p_old: Float[Array, "p g"],
  is_kept: Bool[Array, "p g"],
) -> Float[Array, "p g"]:
  """Compute what is subtracted from the weights; no gradient goes through it. Dropped rollouts get 0.

  none: 0. mean: 1 / (rollouts kept), the mean weight of the group. model: softmax_g(log p_theta - log p_old), which
  leaves the gradient unbiased since E_{p_theta} grad log p_theta = 0. negative: `negative_weight`.

  Args:
    log_p_theta: of the policy that is being updated; log_p_old: when the rollouts were drawn. Read by `model` only.

  Raises:
    ValueError: an unknown name.
  """
  if name == "none":
    return jnp.zeros_like(negative_weight)
  if name == "mean":
    return softmax_kept(jnp.zeros_like(negative_weight), is_kept)
  if name == "model":
    return softmax_kept(jax.lax.stop_gradient(log_p_theta) - log_p_old, is_kept)
  if name == "negative":
    return jnp.where(is_kept, negative_weight, 0)
  near = difflib.get_close_matches(name, BASELINES, n=1)
  hint = f"; did you mean {near[0]!r}?" if near else ""
  raise ValueError(f"objective.baseline={name!r}: must be one of {', '.join(BASELINES)}{hint}")


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
  """Effective share of a group's rollouts, 1 / (g * sum_g weight^2), in [1/g, 1]; 0 for a group with none kept."""
  squares = (weight**2).sum(-1)
  return jnp.where(squares > 0, 1 / (weight.shape[-1] * jnp.where(squares > 0, squares, 1)), 0)


def fraction_without_variance(reward: Float[Array, "p g"], is_kept: Bool[Array, "p g"]) -> Float[Array, ""]:
  """Fraction of the groups whose kept rewards are all the same (or none): they have nothing to learn from."""
  highest = jnp.where(is_kept, reward, -jnp.inf).max(-1)
  lowest = jnp.where(is_kept, reward, jnp.inf).min(-1)
  return (highest <= lowest).mean()


def spread_within_groups(values: Float[Array, "p g"], is_kept: Bool[Array, "p g"]) -> Float[Array, ""]:
  """Root mean square of the kept values' distances from the mean of their group; 0 when nothing is kept."""
  return _root_mean_square(values - mean_kept(values, is_kept)[:, None], is_kept)


def log_ratio_figures(
  log_p_ref: Float[Array, "p g r"],
  log_p_old: Float[Array, "p g r"],
  is_kept: Bool[Array, "p g"],
  *,
  antithetic: bool,
) -> dict[str, Float[Array, ""]]:
  """Summarise log p_ref - log p_old over the kept rollouts, in nats; both by bounds on the same mask replicates.

  log_ratio_mean: its mean. log_ratio_std: its spread inside the groups, which is what the weights see.
  log_ratio_error: its Monte-Carlo standard error (root mean square; NaN from a single mask draw). The estimate is too
  noisy to weigh with when this nears the spread of reward / alpha (`spread_within_groups`).
  """
  replicates = log_p_ref - log_p_old
  log_ratio = replicates.mean(-1)
  mean = jnp.where(is_kept, log_ratio, 0).sum() / jnp.maximum(is_kept.sum(), 1)
  return {
    "log_ratio_mean": mean,
    "log_ratio_std": spread_within_groups(log_ratio, is_kept),
    "log_ratio_error": _root_mean_square(standard_error(replicates, antithetic=antithetic), is_kept),
  }


def _root_mean_square(values: Float[Array, "p g"], is_kept: Bool[Array, "p g"]) -> Float[Array, ""]:
  return jnp.sqrt(jnp.where(is_kept, values**2, 0).sum() / jnp.maximum(is_kept.sum(), 1))
