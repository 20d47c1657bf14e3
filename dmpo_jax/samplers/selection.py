"""Which of a block's masked positions a model call commits: the rules of LLaDA and of parallel decoding."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from dmpo_jax.samplers.prediction import rank


def num_transfer_tokens(num_masked: Int[Array, "*b"], steps: int) -> Int[Array, "*b {steps}"]:
  """Spread the masked tokens of a block evenly over its calls; the remainder goes to the first ones."""
  share, remainder = jnp.divmod(num_masked[..., None], steps)
  return (share + (jnp.arange(steps) < remainder)).astype(jnp.int32)


def select_count(
  score: Float[Array, "b s"], is_masked: Bool[Array, "b s"], count: Int[Array, "*b"]
) -> Bool[Array, "b s"]:
  """Keep the `count` masked positions of highest score, the leftmost first among equals."""
  return is_masked & (rank(score, is_masked) < _column(count, score))


def _column(number: Int[Array, "*b"], rows: Float[Array, "b s"]) -> Int[Array, "b 1"]:
  return jnp.broadcast_to(number, rows.shape[:1])[:, None]


def certain_shares(steps: int) -> Float32[np.ndarray, "{steps}"]:
  """Return the share of the tokens still masked that each of a block's calls commits in Dream's code.

  From noise level t to s < t a share 1 - s / t is decided; the levels go from 1 to 0.001 in equal steps, and the last
  call takes all. The levels are float32, counted from the nearer end as PyTorch's `linspace` does: where a share of the
  tokens is almost a whole number, the last bit decides.
  """
  index, end = np.arange(steps + 1), np.float32(1e-3)
  step = float((end - np.float32(1)) / np.float32(steps))
  levels = np.where(index < (steps + 1) // 2, 1 + step * index, float(end) - step * (steps - index)).astype(np.float32)
  return np.append(1 - levels[1:-1] / levels[:-2], np.float32(1))


def select_share(
  score: Float[Array, "b s"], is_masked: Bool[Array, "b s"], share: Float[Array, "*b"]
) -> Bool[Array, "b s"]:
  """Keep a share of each row's masked positions, rounded down, those of highest score.

  Dream's code takes one number for all rows, the share of the mean of their masked positions.
  """
  count = jnp.floor(is_masked.sum(1).astype(jnp.float32) * share).astype(jnp.int32)
  return select_count(score, is_masked, count)


def select_threshold(
  confidence: Float[Array, "b s"], is_masked: Bool[Array, "b s"], threshold: float
) -> Bool[Array, "b s"]:
  """Keep every masked position whose confidence reaches the threshold, and always the best (Fast-dLLM, 2505.22618)."""
  return is_masked & ((confidence >= threshold) | (rank(confidence, is_masked) == 0))


def select_dynamic(
  confidence: Float[Array, "b s"], is_masked: Bool[Array, "b s"], count: Int[Array, "*b"], threshold: float
) -> Bool[Array, "b s"]:
  """Keep every masked position whose confidence exceeds the threshold, or the best `count` if fewer do (SDAR)."""
  is_sure = is_masked & (confidence > threshold)
  is_enough = is_sure.sum(1, keepdims=True) >= _column(count, confidence)
  return jnp.where(is_enough, is_sure, select_count(confidence, is_masked, count))


def select_factor(confidence: Float[Array, "b s"], is_masked: Bool[Array, "b s"], factor: float) -> Bool[Array, "b s"]:
  """Keep the most confident positions, the more the surer they are (Fast-dLLM, arXiv 2505.22618, section 3.3).

  Sorted by confidence, position i (from 0) passes if its confidence >= 1 - factor / (i + 2); position 0 always passes.
  Those before the first failure are kept. As in the authors' code, if only the last masked position fails it is kept
  too, so the last two are always kept together. Each row counts for itself.
  """
  place = rank(confidence, is_masked)
  num_masked = is_masked.sum(1, keepdims=True)
  fails = is_masked & (place > 0) & ~(confidence >= 1 - factor / (place + 2))
  count = jnp.where(fails, place, num_masked).min(1, keepdims=True)
  return is_masked & (place < jnp.where((count == num_masked - 1) & (count > 0), num_masked, count))
