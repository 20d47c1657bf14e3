"""The likelihood estimators by name: which noised copies of a completion each of them shows, and what it makes of them.

Of n counted positions y_1..y_n; M is a set of masked ones and log p(y_l | M) the model's log-probability of y_l when it
sees the prompt and y without M. `masks.num`, the mask samples, is what an estimate costs: model calls a completion.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from dmpo_jax.objectives.likelihood import Estimator, Linear, Views
from dmpo_jax.objectives.masking import (
  KINDS,
  Blocks,
  Completions,
  MaskSampling,
  draw,
  draw_block_masks,
  uniform_noise,
)
from dmpo_jax.ranges import SHARE, Range, number, whole
from dmpo_jax.spelling import did_you_mean


@dataclasses.dataclass(frozen=True)
class OneStep(Linear):
  """sum_l log p(y_l | all positions masked), some of the prompt masked too (d1, arXiv 2504.12216).

  Exact only where the positions are independent given the prompt: the mean-field likelihood. Each prompt token is
  masked with probability `prompt_mask_ratio`, which is the only noise.
  """

  prompt_mask_ratio: float

  ranges: ClassVar[Mapping[str, Range]] = {"prompt_mask_ratio": number("[0, 1)")}

  @property
  def draws(self) -> tuple[int, ...]:
    return tuple(range(self.masks.num)) if self.prompt_mask_ratio else (-1,) * self.masks.num

  def views(self, keys: Key[Array, "p g"], completions: Completions) -> Views:
    p, g, c = completions.is_counted.shape
    is_masked = jnp.ones((p, g, self.masks.num, c), bool)
    share = jnp.broadcast_to(completions.is_counted[:, :, None], is_masked.shape) / self.masks.num
    if not self.prompt_mask_ratio:
      return Views(is_masked, share)
    width = completions.prompt_is_valid.shape[-1]
    # Counted from the right, where a prompt's tokens stand whatever its padding.
    noise = jnp.flip(uniform_noise(keys, self.masks.num, width), -1)
    return Views(is_masked, share, (noise < self.prompt_mask_ratio) & completions.prompt_is_valid[:, None, None])


@dataclasses.dataclass(frozen=True)
class Elbo(Linear):
  """mean_r (n/m) sum_{l in M_r} log p(y_l | M_r): see `likelihood.elbo`, which it equals.

  Args:
    masks: with a block_length, as SPG draws them (arXiv 2510.09541). Along a trajectory it is what
      `masking.mask_along_trajectory` says, and no bound.
  """

  mask_kinds: ClassVar[tuple[str, ...]] = KINDS

  def problem(self) -> str:
    return self.masks.problem()

  @property
  def draws(self) -> tuple[int, ...]:
    return tuple(range(self.masks.num_draws)) * (2 if self.masks.antithetic else 1)

  @property
  def pairs(self) -> tuple[tuple[int, int], ...]:
    return self.masks.pairs()

  def views(self, keys: Key[Array, "p g"], completions: Completions) -> Views:
    is_counted = completions.is_counted
    if self.masks.block_length:
      is_read, is_masked = draw_block_masks(keys, is_counted, self.masks, completions.committed_at)
      return Views(is_masked, _by_count(is_read, is_counted) / self.masks.num)
    is_masked, _, weight = draw(keys, completions, self.masks)
    share = _by_count(is_masked, is_counted) / self.masks.num
    return Views(is_masked, share if weight is None else share * weight)


@dataclasses.dataclass(frozen=True)
class Unweighted(Elbo):
  """mean_r sum_{l in M_r} log p(y_l | M_r): the ELBO without the weight n/m (GDSD, arXiv 2605.29398).

  From complementary pairs it reads every position once a pair, and halves the sum. It is no likelihood: in expectation
  over lambda ~ U(0, 1) it is sum_m (m / (n + 1)) times the mean log-probability of a token among m masked ones, where
  the ELBO has n / (n + 1) for every m.
  """

  is_log_p: ClassVar[bool] = False

  def views(self, keys: Key[Array, "p g"], completions: Completions) -> Views:
    views = super().views(keys, completions)
    return views._replace(share=jnp.where(views.share > 0, 1 / self.masks.num, 0))


@dataclasses.dataclass(frozen=True)
class Eubo(Elbo):
  """An upper bound up to a constant, mixed with the lower one (SPG, arXiv 2510.09541).

  EUBO = (1/beta) sum_l log mean_r [(n/m) 1(l in M_r) p(y_l | M_r)^beta] over the positions that were masked at all, and
  mixture * EUBO + (1 - mixture) * ELBO, on the same masks.

  The bound holds for beta >= 1 once the constant is added that depends on the masking alone. From few mask samples the
  logarithm of the mean is biased downwards, and masks that may be empty shift it by about n log(n / (n + 1)).
  """

  beta: float
  mixture: float

  ranges: ClassVar[Mapping[str, Range]] = {"beta": number("[1, inf)"), "mixture": SHARE}

  def tokens(self, log_prob: Float[Array, "p g r c"], views: Views) -> Float[Array, "p g c"]:
    return self.mixture * self.upper(log_prob, views) + (1 - self.mixture) * self.lower(log_prob, views)

  def lower(self, log_prob: Float[Array, "p g r c"], views: Views) -> Float[Array, "p g c"]:
    """Add up each position's part of the ELBO."""
    return super().tokens(log_prob, views)

  def upper(self, log_prob: Float[Array, "p g r c"], views: Views) -> Float[Array, "p g c"]:
    """Compute each position's part of the EUBO; 0 where no mask sample masked it."""
    is_read = views.share > 0
    is_any = is_read.any(2)
    # as a log-sum-exp: p^beta itself is 0 in float32 from log p = -58 on where beta is 1.5
    powers = self.beta * jnp.where(is_read, log_prob, 0) + jnp.log(jnp.where(is_read, views.share, 1))
    powers = jnp.where(is_read, powers, jnp.where(is_any, -jnp.inf, 0)[:, :, None])
    return jnp.where(is_any, jax.nn.logsumexp(powers, axis=2) / self.beta, 0)

  @property
  def num_estimates(self) -> int:
    return 1

  def estimates(self, log_prob: Float[Array, "p g r c"], views: Views) -> Float[Array, "p g n"]:
    return self.tokens(log_prob, views).sum(-1, keepdims=True)  # not a mean of single draws


@dataclasses.dataclass(frozen=True)
class ElboQuadrature(Linear):
  """sum_i w_i mean_k (1/t_i) sum_{l in M_ik} log p(y_l | M_ik): Gauss-Legendre nodes t_i and weights w_i on [0, 1].

  GDPO's semi-deterministic estimator (arXiv 2510.08554): most of the noise of a bound comes from drawing
  the mask ratio, so the integral over it is a quadrature, and only the masks at each ratio are drawn, position by
  position with probability t_i. The integrand is a polynomial of degree n - 1: exact in expectation for
  n <= 2 * num_points.

  Args:
    num_points: the mask samples are a multiple of it: so many masks at each point.
  """

  num_points: int

  ranges: ClassVar[Mapping[str, Range]] = {"num_points": whole(1, 16)}

  def problem(self) -> str:
    if self.masks.num % self.num_points:
      return (
        f"{self.masks.num} mask samples: must be a multiple of objective.elbo_quadrature.num_points = {self.num_points}"
      )
    return ""

  @property
  def draws(self) -> tuple[int, ...]:
    return tuple(np.repeat(np.arange(self.masks.num // self.num_points), self.num_points).tolist())

  def views(self, keys: Key[Array, "p g"], completions: Completions) -> Views:
    is_counted = completions.is_counted
    nodes, weights = np.polynomial.legendre.leggauss(self.num_points)
    masks_a_point = self.masks.num // self.num_points
    ratio = np.tile((nodes + 1) / 2, masks_a_point).astype(np.float32)
    share = np.tile(weights / 2, masks_a_point).astype(np.float32) / ratio / masks_a_point
    noise = uniform_noise(keys, self.masks.num, is_counted.shape[-1])
    is_masked = (noise < ratio[:, None]) & is_counted[:, :, None]
    return Views(is_masked, jnp.where(is_masked, share[:, None], 0))


@dataclasses.dataclass(frozen=True)
class Coupled(Linear):
  """Complementary pairs of masks and the full mask (DiffuCoder, arXiv 2506.20639).

  (1/(k+1)) [sum_{k pairs} (L_t + L_{1-t}) + L_1], L_t = (1/t) sum_{l in M_t} log p(y_l | M_t): t drawn from the range
  of mask ratios, M_{1-t} the complement of M_t, so that each pair reads every position once and the full mask reads
  them all again. It adds 2k + 1 bounds and divides by k + 1: as published, it is no likelihood but up to twice one.
  There are 2k + 1 mask samples.
  """

  is_log_p: ClassVar[bool] = False
  mask_kinds: ClassVar[tuple[str, ...]] = ("random", "stratified")

  def problem(self) -> str:
    if self.masks.num < 3 or self.masks.num % 2 == 0:
      return f"{self.masks.num} mask samples: must be odd and 3 or more for objective.likelihood = 'coupled'"
    return ""

  @property
  def _pairs(self) -> MaskSampling:
    return dataclasses.replace(self.masks, num=self.masks.num - 1, antithetic=True)

  @property
  def draws(self) -> tuple[int, ...]:
    return (-1, *tuple(range(self.masks.num // 2)) * 2)

  @property
  def pairs(self) -> tuple[tuple[int, int], ...]:
    return self._pairs.pairs(first=1)

  def views(self, keys: Key[Array, "p g"], completions: Completions) -> Views:
    is_counted = completions.is_counted
    is_drawn, ratio, _ = draw(keys, completions, self._pairs)
    share = jnp.where(is_drawn, 1 / jnp.where(ratio > 0, ratio, 1), 0)
    everything = is_counted[:, :, None]
    share = jnp.concatenate([everything.astype(share.dtype), share], axis=2)
    return Views(jnp.concatenate([everything, is_drawn], axis=2), share / (self._pairs.num_draws + 1))


@dataclasses.dataclass(frozen=True)
class Trajectory(Linear):
  """sum_k sum_{l in C_k} log p(y_l | C_k and all later chunks masked): along the sampler's own order.

  A completion's model calls, in the order in which they decided its positions, form as many chunks C_k as there are
  mask samples, of neighbouring calls (TraceRL, arXiv 2509.06949, whose shrinkage parameter is the calls of a chunk;
  d2's estimator, arXiv 2509.21474). With as many chunks as calls it is the log-probability of the tokens along the
  trajectory that was sampled; with fewer, tokens of a chunk count as independent. No noise: nothing is drawn.

  Where not all positions count, the states are still those that the sampler saw: what it had decided behind the EOS
  when it decided the tokens before it is shown, and not read.

  A model that attends by blocks sees its earlier blocks whole, so there each block's own calls form the chunks: with as
  many as a block has calls it is the log-probability along the trajectory.
  """

  replays: ClassVar[bool] = True

  @property
  def draws(self) -> tuple[int, ...]:
    return (-1,) * self.masks.num

  def views(self, keys: Key[Array, "p g"], completions: Completions) -> Views:
    first, last = self._calls(completions)
    chunk = (completions.committed_at - first) * self.masks.num // (last - first + 1)
    number = jnp.arange(self.masks.num)[:, None]
    is_masked = chunk[:, :, None] >= number
    is_read = (chunk[:, :, None] == number) & completions.is_counted[:, :, None]
    return Views(is_masked, is_read.astype(jnp.float32))

  def _calls(self, completions: Completions) -> tuple[Int[Array, "p g #c"], Int[Array, "p g #c"]]:
    """Return the first and the last call that form the chunks of a position."""
    is_counted, committed_at = completions.is_counted, completions.committed_at
    if not self.masks.model_block:
      last = jnp.where(is_counted, committed_at, 0).max(-1, keepdims=True)
      return jnp.zeros_like(last), last
    blocks = Blocks.of(completions, self.masks.model_block)
    is_own, called_at = blocks.split(is_counted, False), blocks.split(committed_at, 0)
    last = jnp.where(is_own, called_at, 0).max(-1, keepdims=True)
    first = jnp.minimum(jnp.where(is_own, called_at, last).min(-1, keepdims=True), last)
    first, last = (blocks.join(jnp.broadcast_to(each, called_at.shape)) for each in (first, last))
    return first, last


def _by_count(is_read: Bool[Array, "p g r c"], is_counted: Bool[Array, "p g c"]) -> Float[Array, "p g r c"]:
  """(n/m) at the positions that are read, m of them."""
  num_read = jnp.maximum(is_read.sum(-1, keepdims=True), 1)
  return jnp.where(is_read, is_counted.sum(-1)[:, :, None, None] / num_read, 0)


ESTIMATORS: dict[str, type[Linear]] = {
  "one_step": OneStep,
  "elbo": Elbo,
  "elbo_quadrature": ElboQuadrature,
  "unweighted": Unweighted,
  "eubo": Eubo,
  "coupled": Coupled,
  "trajectory": Trajectory,
}


def make_estimator(name: str, masks: MaskSampling, **own: Any) -> Estimator:
  """Build an estimator with its own settings.

  Raises:
    ValueError: an unknown name, or a number of mask samples that the estimator cannot have.
  """
  if name not in ESTIMATORS:
    near = did_you_mean(name, ESTIMATORS)
    raise ValueError(f"objective.likelihood={name!r}: must be one of {', '.join(ESTIMATORS)}{near}")
  estimator = ESTIMATORS[name](masks, **own)
  if problem := estimator.problem():
    raise ValueError(problem)
  return estimator
