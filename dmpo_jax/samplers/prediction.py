"""From logits to a token and its probability at every position of a block: what the decoding rules choose among."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Key


class Prediction(NamedTuple):
  """The token that each position would take now, and the model's probability of it."""

  tokens: Int[Array, "b s"]
  confidence: Float32[Array, "b s"]


def predict(
  logits: Float[Array, "b s v"],
  keys: Key[Array, "b"],
  positions: Int[Array, "s"],
  *,
  mask_token_id: int,
  temperature: float,
) -> Prediction:
  """Sample softmax(logits / temperature) at every position by Gumbel-max; temperature 0 takes the most likely.

  MASK is never chosen. The confidence is the token's probability under softmax(logits): without the noise and at
  temperature 1, as LLaDA has it (arXiv 2502.09992, algorithm 5). All in float32.

  Args:
    keys: the rows' keys for this call; unused at temperature 0.
    positions: the block's positions in the completion, for their noise.
  """
  logits = logits.astype(jnp.float32)
  scores = logits
  if temperature > 0:
    scores = logits + temperature * gumbel_noise(keys, positions, logits.shape[-1])
  ids = jnp.arange(logits.shape[-1])
  tokens = _first_highest(scores, ids != mask_token_id)
  chosen = jnp.where(ids == tokens[..., None], logits, -jnp.inf).max(-1)
  highest = logits.max(-1)
  confidence = jnp.exp(chosen - highest) / jnp.exp(logits - highest[..., None]).sum(-1)
  return Prediction(tokens, confidence)


def _first_highest(scores: Float[Array, "b s v"], is_allowed: Bool[Array, "v"]) -> Int[Array, "b s"]:
  """Give the first allowed id of highest score; scores that are not numbers still give an allowed one.

  Two plain reductions instead of an argmax of the scores: XLA would draw the noise into it, away from vector code, and
  on CPU the noise would take three times as long.
  """
  highest = jnp.where(is_allowed, scores, -jnp.inf).max(-1, keepdims=True)
  return jnp.argmax(is_allowed & ~(scores < highest), axis=-1).astype(jnp.int32)


def gumbel_noise(keys: Key[Array, "b"], positions: Int[Array, "s"], vocab_size: int) -> Float32[Array, "b s v"]:
  """Draw Gumbel noise that belongs to (row, call, position), whatever block or batch the position is decoded in."""

  def draw(key: jax.Array, position: jax.Array) -> jax.Array:
    return jax.random.gumbel(jax.random.fold_in(key, position), (vocab_size,), jnp.float32, mode="high")

  return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(keys, positions)


def uniform_noise(keys: Key[Array, "b"], positions: Int[Array, "s"]) -> Float32[Array, "b s"]:
  """Draw one number in [0, 1) for each (row, call, position), independent of `gumbel_noise`."""

  def draw(key: jax.Array, position: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(key, position))

  other = jax.vmap(jax.random.fold_in, (0, None))(keys, jnp.uint32(2**32 - 1))  # no position has this number
  return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(other, positions)


def select_highest(
  score: Float[Array, "b s"], is_masked: Bool[Array, "b s"], count: Int[Array, "b"], most: int
) -> Bool[Array, "b s"]:
  """Mark each row's `count` masked positions of highest score, the leftmost first among equals.

  One after the other: few are taken a call, so this is less work than sorting, and unlike `top_k` it is computed where
  the rows are, without gathering them on every device.

  Args:
    most: static upper bound of `count`.
  """

  def take(number: jax.Array, is_taken: jax.Array) -> jax.Array:
    best = jnp.argmax(jnp.where(is_masked & ~is_taken, score, -jnp.inf), axis=-1)
    is_best = jnp.arange(score.shape[1]) == best[:, None]
    return is_taken | (is_best & is_masked & (number < count)[:, None])

  return jax.lax.fori_loop(0, most, take, jnp.zeros_like(is_masked))
