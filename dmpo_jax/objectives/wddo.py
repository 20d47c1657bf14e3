"""DMPO's second loss, weighted direct discriminative optimisation: raise good rollouts against the policy's own."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from dmpo_jax.objectives.likelihood import elbo, masked_mean
from dmpo_jax.objectives.masking import Completions, draw
from dmpo_jax.objectives.objective import Loss, Objective
from dmpo_jax.objectives.weights import mean_kept
from dmpo_jax.ranges import FROM_ZERO, POSITIVE, Range, one_of
from dmpo_jax.structs import Experience, Score


@dataclasses.dataclass(frozen=True)
class Wddo(Objective):
  """DMPO's second loss (arXiv 2510.08233, after DDO).

  Args:
    sets: `shared`: the real and the fake term read one estimate; `independent`: two, each from masks of its own.
    alpha_ddo: weight of the fake term.
    beta: steepness.
    scale: `proper`: the real term is the weights' sum, an estimate of the target's mean; `official`: it is divided by
      the group size, as in the authors' code.
  """

  sets: str
  alpha_ddo: float
  beta: float
  scale: str = "proper"

  ranges: ClassVar[Mapping[str, Range]] = {
    "sets": one_of("shared", "independent"),
    "alpha_ddo": FROM_ZERO,
    "beta": POSITIVE,
    "scale": one_of("proper", "official"),
  }
  needs_weights: ClassVar[bool] = True

  @property
  def reads_log_p_old(self) -> bool:
    return True

  def loss(self, score: Score, experience: Experience, keys: Key[Array, "p g"], num_prompts: int) -> Loss:
    """Discriminate the target's samples from p_old's (DMPO, arXiv 2510.08233, after DDO).

    (1 / num_prompts) sum_prompts [- sum_g w_i log sigmoid(beta d_i^real) - alpha_ddo mean_g log sigmoid(-beta
    d_i^fake)], d_i = log p_theta(y_i) - log p_old(y_i), log p_theta the mean of the bound over the mask samples.
    Both terms estimate means, over the target p* and over p_old. With beta = alpha_ddo = 1 the least loss is where
    p_theta = p*. With the official scale the real term is divided by the g kept rollouts of a group, though its weights
    already sum to 1. The least loss is then where p_theta = p* / g, which is no distribution: rollouts are pushed down
    until their likelihoods are a g-th.

    Returns:
      The loss, and of the kept rollouts, averaged over prompts: `loss_real`, `loss_fake` (the terms), `loss_log_ratio`
      (d, nats) and `loss_entropy` (nats a masked token).
    """
    num = self.masks.num
    drawn = [draw(key, Completions.of(experience), self.masks) for key in _keys_of(keys, self.sets)]
    is_masked, _, weight = jax.tree.map(lambda *sets: jnp.concatenate(sets, axis=2), *drawn)
    pairs = [self.masks.pairs(number * num) for number in range(len(drawn))]
    scores = score(is_masked, pairs=sum(pairs, ()))
    bounds = elbo(scores.log_prob, is_masked, experience.is_counted, weight)
    log_p_real, log_p_fake = bounds[:, :, :num].mean(-1), bounds[:, :, -num:].mean(-1)
    real, fake = terms(
      log_p_real, log_p_fake, experience.log_p_old, experience.weight, experience.is_kept, beta=self.beta
    )
    is_kept = experience.is_kept
    metrics = {
      "loss_real": real,
      "loss_fake": fake,
      "loss_log_ratio": mean_kept(log_p_real - experience.log_p_old, is_kept),
      "loss_entropy": mean_kept(masked_mean(scores.entropy, is_masked, weight).mean(-1), is_kept),
    }
    losses = self.group_loss(real, fake, is_kept)
    return losses.sum() / num_prompts, {name: value.sum() / num_prompts for name, value in metrics.items()}

  def group_loss(
    self, real: Float[Array, "p"], fake: Float[Array, "p"], is_kept: Bool[Array, "p g"]
  ) -> Float[Array, "p"]:
    """Add up each prompt's two terms."""
    size = jnp.maximum(is_kept.sum(-1), 1) if self.scale == "official" else 1
    return real / size + self.alpha_ddo * fake


def terms(
  log_p_real: Float[Array, "p g"],
  log_p_fake: Float[Array, "p g"],
  log_p_old: Float[Array, "p g"],
  weight: Float[Array, "p g"],
  is_kept: Bool[Array, "p g"],
  *,
  beta: float,
) -> tuple[Float[Array, "p"], Float[Array, "p"]]:
  """Compute each group's two terms: - sum_g w log sigmoid(beta d_real) and - mean_g log sigmoid(-beta d_fake)."""

  def ratio(log_p: Float[Array, "p g"]) -> Float[Array, "p g"]:
    return jnp.where(is_kept, log_p - jnp.where(is_kept, log_p_old, 0), 0)

  real = -jnp.where(is_kept, weight, 0) * jax.nn.log_sigmoid(beta * ratio(log_p_real))
  fake = -jax.nn.log_sigmoid(-beta * ratio(log_p_fake))
  return real.sum(-1), mean_kept(fake, is_kept)


def _keys_of(keys: Key[Array, "p g"], sets: str) -> list[Key[Array, "p g"]]:
  if sets == "shared":
    return [keys]
  return [keys, jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, jnp.uint32(2**32 - 1))))(keys)]
