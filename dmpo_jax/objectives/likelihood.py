"""From the log-probabilities of masked tokens to estimates of a completion's log-probability, and their noise.

An estimator (`estimators.py` holds them) says which noised copies of a completion the model is to see (`Views`), and
how what it says of them adds up, position by position. All of them share this interface, so that an objective may take
any.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from dmpo_jax import ranges
from dmpo_jax.objectives.masking import Completions, MaskSampling
from dmpo_jax.ranges import Range


class Views(NamedTuple):
  """Noised copies of completions, and each position's share in the estimate."""

  is_masked: Bool[Array, "p g r c"]  # hidden from the model
  share: Float[Array, "p g r c"]  # of a mask sample's log-probability of a position; 0 where it is not read
  prompt_is_masked: Bool[Array, "p g r q"] | None = None


@runtime_checkable
class Estimator(Protocol):
  """One way to estimate log p(y | x)."""

  is_log_p: ClassVar[bool]  # it estimates log p(y | x) or a bound of it, not a multiple
  replays: ClassVar[bool]  # its views are states that the sampler saw, with what stood at positions that do not count

  @property
  def draws(self) -> tuple[int, ...]:
    """The independent draw that each mask sample belongs to; -1: none, it is not random."""
    ...

  @property
  def num_estimates(self) -> int:
    """The number of `estimates` of a completion."""
    ...

  @property
  def has_noise(self) -> bool:
    """Whether another estimate would differ."""
    ...

  @property
  def pairs(self) -> tuple[tuple[int, int], ...]:
    """Mask samples (i, j): what is read of j is not masked in i, and all read of i is."""
    ...

  def views(self, keys: Key[Array, "p g"], completions: Completions) -> Views:
    """Choose the copies from the rollouts' keys."""
    ...

  def tokens(self, log_prob: Float[Array, "p g r c"], views: Views) -> Float[Array, "p g c"]:
    """Add up each position's part of the estimate, in nats; 0 where nothing was read."""
    ...

  def estimates(self, log_prob: Float[Array, "p g r c"], views: Views) -> Float[Array, "p g n"]:
    """Estimate log p(y | x) once from each independent draw; the mean is the sum of `tokens`."""
    ...


@dataclasses.dataclass(frozen=True)
class Linear:
  """What the estimators have in common that are sums of log-probabilities.

  Args:
    masks: how their masks are drawn; `masks.num` is their number of views.
  """

  masks: MaskSampling

  ranges: ClassVar[Mapping[str, Range]] = {}  # of its own settings
  is_log_p: ClassVar[bool] = True
  replays: ClassVar[bool] = False
  mask_kinds: ClassVar[tuple[str, ...]] = (
    "random",
  )  # what `masks.kind` may be; one that is not read has its own masks

  def __post_init__(self) -> None:
    ranges.check(self, self.ranges)

  @property
  def draws(self) -> tuple[int, ...]:
    """The independent draw that each view belongs to; -1: none."""
    raise NotImplementedError

  @property
  def pairs(self) -> tuple[tuple[int, int], ...]:
    """Pairs of complementary views; none by default."""
    return ()

  @property
  def has_noise(self) -> bool:
    """Whether another estimate would differ: something is drawn."""
    return max(self.draws) >= 0

  @property
  def num_estimates(self) -> int:
    """The number of `estimates`."""
    return max(*self.draws, 0) + 1 if len(self.draws) > 1 else 1

  def views(self, keys: Key[Array, "p g"], completions: Completions) -> Views:
    raise NotImplementedError

  def problem(self) -> str:
    """Return why the estimator cannot have its masks; "" where it can."""
    return ""

  def tokens(self, log_prob: Float[Array, "p g r c"], views: Views) -> Float[Array, "p g c"]:
    return _shared(log_prob, views).sum(2)

  def estimates(self, log_prob: Float[Array, "p g r c"], views: Views) -> Float[Array, "p g n"]:
    parts = _shared(log_prob, views).sum(-1)
    num_draws = self.num_estimates
    of_draw = np.array([[num_draws * (draw == n) + (draw < 0) for n in range(num_draws)] for draw in self.draws])
    return parts @ jnp.asarray(of_draw, parts.dtype)


def _shared(log_prob: Float[Array, "p g r c"], views: Views) -> Float[Array, "p g r c"]:
  return jnp.where(views.share > 0, views.share * jnp.where(views.share > 0, log_prob, 0), 0)


def masked_mean(
  values: Float[Array, "p g r c"], is_masked: Bool[Array, "p g r c"], weight: Float[Array, "p g r c"] | None = None
) -> Float[Array, "p g r"]:
  """Average over a sample's masked positions: (1/m) sum_{l in M} values_l, m = max(|M|, 1); 0 for an empty mask.

  Args:
    weight: multiplies the values, where not all positions count alike (`masking.Drawn`).
  """
  num_masked = jnp.maximum(is_masked.sum(-1), 1)
  values = values if weight is None else values * weight
  return jnp.where(is_masked, values, 0).sum(-1) / num_masked


def elbo(
  token_log_prob: Float[Array, "p g r c"],
  is_masked: Bool[Array, "p g r c"],
  is_counted: Bool[Array, "p g c"],
  weight: Float[Array, "p g r c"] | None = None,
) -> Float[Array, "p g r"]:
  """Estimate the denoising bound of log p(y | x), once a mask mask sample.

  (n/m) * sum_{l in M} log p(y_l | x, y with M masked), n counted positions, m = max(|M|, 1): DMPO, arXiv 2510.08233,
  after LLaDA's likelihood evaluation, arXiv 2502.09992, section 2.4. Given a non-empty mask and lambda ~ U(0, 1) it is
  unbiased for the bound

    E_order[sum_t log p(y_{o_t} | y_{o_<t})] <= log E_order[prod_t p(y_{o_t} | y_{o_<t})] = log p(y | x).

  An empty mask, of probability 1/(n+1) then, counts as 0, which scales the expectation by n/(n+1); another range of
  lambda makes some sizes of M more frequent than others, which shifts it too. Two policies under the same masks share
  both effects: compare policies that way.

  Args:
    token_log_prob: at every position; only masked ones are read.
    is_masked: within the counted positions.
    weight: see `masked_mean`; with it the sum over blocks of their bounds.

  Returns:
    Nats, one estimate a mask sample; their mean over r is the estimate.
  """
  return is_counted.sum(-1)[:, :, None] * masked_mean(token_log_prob, is_masked, weight)


def standard_error(estimates: Float[Array, "p g n"]) -> Float[Array, "p g"]:
  """Estimate the Monte-Carlo standard error of independent estimates' mean: s / sqrt(n), n - 1 degrees of freedom.

  NaN from a single draw, which says nothing of its spread.
  """
  num_draws = estimates.shape[-1]
  if num_draws == 1:
    return jnp.full(estimates.shape[:2], jnp.nan, estimates.dtype)
  return estimates.std(-1, ddof=1) / num_draws**0.5
