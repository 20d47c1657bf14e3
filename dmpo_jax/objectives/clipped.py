"""What the policy-gradient rivals share: advantages, likelihoods under one set of views, clipped ratios, KL estimates.

Each rival is a file that puts these together as its paper does.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from dmpo_jax.objectives.likelihood import Estimator, Views
from dmpo_jax.objectives.masking import Completions
from dmpo_jax.objectives.objective import Loss, Objective
from dmpo_jax.objectives.weights import mean_kept
from dmpo_jax.ranges import FROM_ZERO, POSITIVE, Range
from dmpo_jax.structs import Experience, Score

# Beyond exp(30), about 1e13, a ratio says only that two policies have nothing in common. exp overflows float32 at 88.7,
# and the square of a gradient, which its norm is made of, halfway there.
MAX_LOG_RATIO = 30.0


class Likelihood(NamedTuple):
  """What a policy says of a buffer's completions."""

  log_prob: Float[Array, "p g r c"]  # as scored
  tokens: Float[Array, "p g c"]  # each position's part of the estimate, nats
  entropy: Float[Array, "p g"]  # nats a read token
  views: Views


def estimate(score: Score, experience: Experience, keys: Key[Array, "p g"], likelihood: Estimator) -> Likelihood:
  """Estimate log p(y | x) of every rollout under the views that the estimator takes from the rollouts' keys."""
  views = likelihood.views(keys, Completions.of(experience))
  scores = score(views.is_masked, views.prompt_is_masked, pairs=likelihood.pairs)
  is_read = views.share > 0
  num_read = jnp.maximum(is_read.sum((2, 3)), 1)
  entropy = jnp.where(is_read, scores.entropy, 0).sum((2, 3)) / num_read
  return Likelihood(scores.log_prob, likelihood.tokens(scores.log_prob, views), entropy, views)


@dataclasses.dataclass(frozen=True)
class RatioObjective(Objective):
  """Objectives of ratios to the policy that drew the rollouts.

  Args:
    clip: ratios are clipped to 1 - clip, 1 + clip.
    kl_weight: of the KL; with 0 there is no reference.
  """

  clip: float
  kl_weight: float

  ranges: ClassVar[Mapping[str, Range]] = {"clip": POSITIVE, "kl_weight": FROM_ZERO}
  needs_token_log_probs: ClassVar[bool] = True
  reads_tokens: ClassVar[bool] = True
  takes_likelihood: ClassVar[bool] = True

  @property
  def needs_reference(self) -> bool:
    return self.kl_weight > 0

  def ratio_loss(
    self,
    score: Score,
    experience: Experience,
    keys: Key[Array, "p g"],
    num_prompts: int,
    advantage: Float[Array, "p g"],
  ) -> Loss:
    """Compute `token_loss` of a buffer under the views from `keys`, a rollout's counted tokens all alike.

    Args:
      experience: token_log_p_old and token_log_p_ref are those of this update's views; the KL is to the reference.
      advantage: of each rollout.
    """
    assert self.likelihood is not None  # as `takes_likelihood` says
    assert experience.token_log_p_old is not None  # as `needs_token_log_probs` says
    policy = estimate(score, experience, keys, self.likelihood)
    losses, metrics = token_loss(
      policy.tokens,
      experience.token_log_p_old,
      experience.token_log_p_ref,
      advantage,
      experience.is_counted / jnp.maximum(experience.is_counted.sum(-1, keepdims=True), 1),
      experience.is_kept,
      clip=self.clip,
      kl_weight=self.kl_weight,
    )
    return averaged(losses, metrics, policy.entropy, experience.is_kept, num_prompts)


def token_loss(
  log_p: Float[Array, "p g c"],
  log_p_old: Float[Array, "p g c"],
  log_p_kl: Float[Array, "p g c"] | None,
  advantage: Float[Array, "p g"],
  share: Float[Array, "p g c"],
  is_kept: Bool[Array, "p g"],
  *,
  clip: float,
  kl_weight: float | Float[Array, "p g c"],
) -> tuple[Float[Array, "p"], dict[str, Float[Array, "p"]]]:
  """Compute each group's GRPO loss with a ratio a token.

  mean_i sum_l share_il [- min(rho_il A_i, clip(rho_il, 1 - clip, 1 + clip) A_i) + kl_weight * k3_il],
  rho = exp(log p - log p_old), k3 = exp(d) - d - 1 with d = log p_kl - log p: an estimate of KL(p || p_kl). Both
  exponents are bounded, see `bounded_exp`.

  Args:
    share: of each token in its rollout's mean; a token with none is not read. 1/n_i is the plain mean.
    log_p_kl: None: there is no KL. kl_weight: of all tokens, or of each.

  Returns:
    The losses, and `loss_clipped` (share of the tokens whose gradient the clipping stops) and, where there is a policy
    for it, `loss_kl` (nats a token).
  """
  is_read = (share > 0) & is_kept[:, :, None]
  log_ratio = jnp.where(is_read, log_p - jnp.where(is_read, log_p_old, 0), 0)
  surrogate, is_clipped = clipped_surrogate(log_ratio, advantage[:, :, None], clip)

  def per_token(values: Float[Array, "p g c"]) -> Float[Array, "p"]:
    return mean_kept(jnp.where(is_read, share * values, 0).sum(-1), is_kept)

  metrics = {"loss_clipped": per_token(is_clipped.astype(jnp.float32))}
  if log_p_kl is None:
    return per_token(-surrogate), metrics
  kl = k3(jnp.where(is_read, log_p_kl, 0), jnp.where(is_read, log_p, 0))
  return per_token(kl_weight * kl - surrogate), metrics | {"loss_kl": per_token(kl)}


def clipped_surrogate(
  log_ratio: Float[Array, "p g *c"], advantage: Float[Array, "p g *#c"], clip: float
) -> tuple[Float[Array, "p g *c"], Bool[Array, "p g *c"]]:
  """min(rho A, clip(rho, 1 - clip, 1 + clip) A), and where it is constant in rho (PPO, arXiv 1707.06347, eq. 7).

  A negative A leaves rho unclipped upwards: there it is constant where `bounded_exp` makes it so.
  """
  ratio = bounded_exp(log_ratio)
  clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
  is_constant = (clipped * advantage < ratio * advantage) | ((log_ratio > MAX_LOG_RATIO) & (advantage != 0))
  return jnp.minimum(ratio * advantage, clipped * advantage), is_constant


def bounded_exp(exponent: Float[Array, "*s"]) -> Float[Array, "*s"]:
  """exp up to MAX_LOG_RATIO and constant from there on, without a gradient: one wild token spoils no update."""
  return jnp.exp(jnp.minimum(exponent, MAX_LOG_RATIO))


def k3(log_p_other: Float[Array, "*s"], log_p: Float[Array, "*s"]) -> Float[Array, "*s"]:
  """exp(d) - d - 1, d = log p_other - log p: never negative, and for samples of p unbiased for KL(p || p_other).

  From d = MAX_LOG_RATIO on it is constant, about 1e13 nats, and pulls no more.
  """
  distance = jnp.minimum(log_p_other - log_p, MAX_LOG_RATIO)
  return jnp.exp(distance) - distance - 1


def k2(log_p_other: Float[Array, "*s"], log_p: Float[Array, "*s"]) -> Float[Array, "*s"]:
  """d^2 / 2, d = log p_other - log p: for samples of p, KL(p || p_other) to second order, and its gradient exactly."""
  return (log_p_other - log_p) ** 2 / 2


def centred_advantage(reward: Float[Array, "p g"], is_kept: Bool[Array, "p g"]) -> Float[Array, "p g"]:
  """Reward minus the mean of the group's kept rewards; 0 for dropped rollouts."""
  return jnp.where(is_kept, reward - mean_kept(reward, is_kept)[:, None], 0)


def leave_one_out_advantage(reward: Float[Array, "p g"], is_kept: Bool[Array, "p g"]) -> Float[Array, "p g"]:
  """Reward minus the mean of the group's *other* kept rewards: n / (n - 1) times the centred one; 0 if alone."""
  num_kept = is_kept.sum(-1, keepdims=True)
  return centred_advantage(reward, is_kept) * jnp.where(num_kept > 1, num_kept / jnp.maximum(num_kept - 1, 1), 0)


def averaged(
  losses: Float[Array, "p"],
  metrics: dict[str, Float[Array, "p"]],
  entropy: Float[Array, "p g"],
  is_kept: Bool[Array, "p g"],
  num_prompts: int,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Finish a loss: sums over the prompts given, divided by the prompts of the whole buffer."""
  metrics = metrics | {"loss_entropy": mean_kept(entropy, is_kept)}
  return losses.sum() / num_prompts, {name: value.sum() / num_prompts for name, value in metrics.items()}
