"""From the log-probabilities of masked tokens to bounds of a completion's log-probability, and their noise."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@runtime_checkable
class Scores(Protocol):
  """What a policy says of a completion's own tokens, under given masks."""

  log_prob: Float[Array, "p g r c"]  # log p(y_l | prompt, y with the masked positions hidden), at every position
  entropy: Float[Array, "p g r c"]  # of that distribution, nats


Score = Callable[[Bool[Array, "p g r c"]], Scores]


def masked_mean(values: Float[Array, "p g r c"], is_masked: Bool[Array, "p g r c"]) -> Float[Array, "p g r"]:
  """Average over a replicate's masked positions: (1/m) sum_{l in M} values_l, m = max(|M|, 1); 0 for an empty mask."""
  num_masked = jnp.maximum(is_masked.sum(-1), 1)
  return jnp.where(is_masked, values, 0).sum(-1) / num_masked


def elbo(
  token_log_prob: Float[Array, "p g r c"], is_masked: Bool[Array, "p g r c"], is_counted: Bool[Array, "p g c"]
) -> Float[Array, "p g r"]:
  """Estimate the denoising bound of log p(y | x), once a mask replicate.

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

  Returns:
    Nats, one estimate a replicate; their mean over r is the estimate.
  """
  return is_counted.sum(-1)[:, :, None] * masked_mean(token_log_prob, is_masked)


def standard_error(replicates: Float[Array, "p g r"], *, antithetic: bool) -> Float[Array, "p g"]:
  """Estimate the Monte-Carlo standard error of the replicates' mean: s / sqrt(n), s with n - 1 degrees of freedom.

  The halves of an antithetic pair (replicates i and i + r/2) are not independent: a pair's mean counts as one draw.
  NaN from a single draw, which says nothing of its spread.
  """
  if antithetic:
    replicates = replicates.reshape(*replicates.shape[:2], 2, -1).mean(2)
  num_draws = replicates.shape[-1]
  if num_draws == 1:
    return jnp.full(replicates.shape[:2], jnp.nan, replicates.dtype)
  return replicates.std(-1, ddof=1) / num_draws**0.5
