"""A log-sum-exp that reads its logits in chunks, for whoever reads a vocabulary: scores in `models`, `samplers`."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32


class LogSumExp(NamedTuple):
  """Sums over the logits read so far, relative to the highest of them (Milakov and Gimelshein, arXiv 1805.02867).

  The highest logit carries no gradient: no result depends on what the sums are relative to.
  """

  highest: Float32[Array, "*t"]  # logit; -inf: none was read
  total: Float32[Array, "*t"]  # sum of exp(logit - highest)
  weighted: Float32[Array, "*t"] | None  # sum of exp(logit - highest) * (logit - highest); None: not needed

  @classmethod
  def start(cls, zeros: Float32[Array, "*t"], *, with_entropy: bool = True) -> "LogSumExp":
    """Return the sums before anything is read, for as many distributions as there are zeros."""
    return cls(jnp.full_like(zeros, -jnp.inf), zeros, zeros if with_entropy else None)

  def add(
    self, logits: Float32[Array, "..."], axes: int | Sequence[int]
  ) -> tuple["LogSumExp", Float32[Array, "..."], Float32[Array, "*t"]]:
    """Read a chunk of logits along its last axes; -inf is no logit.

    Returns:
      The sums, the chunk's exp(logit - highest), and the factor on sums from before that are relative to `highest`.
    """
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    before, shrunk = self.beside(jnp.maximum(self.highest, jax.lax.stop_gradient(logits.max(axes))))
    shifted = logits - jnp.expand_dims(jnp.where(before.highest > -jnp.inf, before.highest, 0), axes)
    share = jnp.exp(shifted)
    weighted = before.weighted
    if weighted is not None:
      weighted += jnp.where(share > 0, share * shifted, 0).sum(axes)
    return before._replace(total=before.total + share.sum(axes), weighted=weighted), share, shrunk

  def beside(self, highest: Float32[Array, "..."]) -> tuple["LogSumExp", Float32[Array, "*t"]]:
    """Return the sums relative to a logit that is at least as high, and the factor on them."""
    shift = jnp.where(self.total > 0, self.highest - highest, 0)  # nothing read yet: minus infinity
    shrunk = jnp.where(self.total > 0, jnp.exp(shift), 0)
    weighted = None if self.weighted is None else (self.weighted + self.total * shift) * shrunk
    return self._replace(
      highest=jnp.broadcast_to(highest, self.highest.shape), total=self.total * shrunk, weighted=weighted
    ), shrunk

  @property
  def log_normalizer(self) -> Float32[Array, "*t"]:
    """Log of the sum of exp(logit)."""
    return self.highest + jnp.log(self.total)

  @property
  def entropy(self) -> Float32[Array, "*t"]:
    """Entropy of the softmax of the logits, nats."""
    assert self.weighted is not None
    return jnp.log(self.total) - self.weighted / self.total
