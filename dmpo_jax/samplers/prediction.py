"""From hidden states to tokens and their probabilities: what the decoding rules choose among.

The vocabulary is read part after part, so that no array of all rows' logits over all of it ever exists.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from dmpo_jax.samplers.loop import Denoiser

NOISE_GROUP = 128  # ids of a large vocabulary whose noise is drawn with one key


class Prediction(NamedTuple):
  """The token that each position would take now, and what the model says of it."""

  tokens: Int[Array, "b s"]
  confidence: Float32[Array, "b s"]  # the token's probability
  log_prob: Float32[Array, "b s"]  # the same in nats
  entropy: Float32[Array, "b s"]  # of the position's distribution, nats


class Running(NamedTuple):
  """What is known of every position after some parts of the vocabulary."""

  highest: Float32[Array, "b s"]  # logit
  total: Float32[Array, "b s"]  # sum of exp(logit - highest)
  weighted: Float32[Array, "b s"]  # sum of exp(logit - highest) * (logit - highest)
  best: Float32[Array, "b s"]  # highest score: the logit, with noise
  token: Int[Array, "b s"]  # of the best score
  logit: Float32[Array, "b s"]  # of that token


def predict(
  denoiser: Denoiser,
  hidden: Float[Array, "b s d"],
  keys: Key[Array, "b"],
  positions: Int[Array, "s"],
  temperature: float | Float[Array, "b"],
) -> Prediction:
  """Sample softmax(logits / temperature) at every position by Gumbel-max; temperature 0 takes the most likely.

  MASK is never chosen. Confidence and entropy are those of softmax(logits): without the noise and at temperature 1, as
  LLaDA has it (arXiv 2502.09992, algorithm 5). All in float32.

  Args:
    keys: the rows' keys for this call; unused at temperature 0.
    positions: of the hidden states in the completion, for their noise.
    temperature: of all rows, or of each.
  """
  is_of_rows = isinstance(temperature, jax.Array)
  scale = temperature[:, None, None, None] if is_of_rows else temperature

  def score(logits: Float32[Array, "b s n w"], ids: Int[Array, "n w"]) -> Float32[Array, "b s n w"]:
    if is_of_rows or temperature > 0:
      logits = logits + scale * gumbel_noise(keys, positions, ids, denoiser.num_parts > 1)
    return jnp.where(ids == denoiser.mask_token_id, -jnp.inf, logits)

  found = _read_vocabulary(denoiser, hidden, score)
  log_total = jnp.log(found.total)
  confidence = jnp.exp(found.logit - found.highest) / found.total
  log_prob = found.logit - found.highest - log_total
  return Prediction(found.token, confidence, log_prob, log_total - found.weighted / found.total)


def log_probs(denoiser: Denoiser, hidden: Float[Array, "b s d"], tokens: Int[Array, "b s"]) -> Float32[Array, "b s"]:
  """Give the log-probabilities of tokens under softmax(logits), in float32 nats."""

  def score(logits: Float32[Array, "b s n w"], ids: Int[Array, "n w"]) -> Float32[Array, "b s n w"]:
    return jnp.where(ids == tokens[..., None, None], logits, -jnp.inf)

  found = _read_vocabulary(denoiser, hidden, score)
  return found.best - found.highest - jnp.log(found.total)


def _read_vocabulary(denoiser: Denoiser, hidden: Float[Array, "b s d"], score: Callable[..., Any]) -> Running:
  """Reduce the logits over the vocabulary's parts: their log-sum-exp and entropy, and the first best by `score`."""

  def read(number: Int[Array, ""] | int, before: Running) -> Running:
    logits, ids = denoiser.logits(hidden, number)
    logits = logits.astype(jnp.float32)
    highest = jnp.maximum(before.highest, logits.max((-2, -1)))
    shifted = logits - highest[..., None, None]
    share = jnp.exp(shifted)
    shrunk, shift = jnp.exp(before.highest - highest), jnp.where(before.total > 0, before.highest - highest, 0.0)
    best, token, logit = _first_best(score(logits, ids), logits, ids)
    is_new = ~(best < before.best) & ((best != before.best) | (token < before.token))
    return Running(
      highest=highest,
      total=before.total * shrunk + share.sum((-2, -1)),
      weighted=(before.weighted + before.total * shift) * shrunk
      + jnp.where(share > 0, share * shifted, 0.0).sum((-2, -1)),
      best=jnp.where(is_new, best, before.best),
      token=jnp.where(is_new, token, before.token),
      logit=jnp.where(is_new, logit, before.logit),
    )

  shape = hidden.shape[:2]
  least, zero = jnp.full(shape, -jnp.inf), jnp.zeros(shape)
  first = Running(least, zero, zero, least, jnp.full(shape, jnp.iinfo(jnp.int32).max), least)
  if denoiser.num_parts == 1:
    return read(0, first)
  return jax.lax.fori_loop(0, denoiser.num_parts, read, first)


def _first_best(
  scores: Float32[Array, "b s n w"], logits: Float32[Array, "b s n w"], ids: Int[Array, "n w"]
) -> tuple[Float32[Array, "b s"], Int[Array, "b s"], Float32[Array, "b s"]]:
  """Give the highest score, the lowest id that has it and that id's logit.

  Plain reductions instead of an argmax of the scores: XLA would draw the noise into it, away from vector code, and on
  CPU the noise would take three times as long.
  """
  best = scores.max((-2, -1))
  is_best = (scores != -jnp.inf) & ~(scores < best[..., None, None])  # where scores are not numbers, still some id
  token = jnp.where(is_best, ids, jnp.iinfo(jnp.int32).max).min((-2, -1))
  logit = jnp.where(ids == token[..., None, None], logits, -jnp.inf).max((-2, -1))
  return best, token, logit


def gumbel_noise(
  keys: Key[Array, "b"], positions: Int[Array, "s"], ids: Int[Array, "n w"], is_part: bool
) -> Float32[Array, "b s n w"]:
  """Draw Gumbel noise that belongs to (row, call, position, id), whatever block, batch or part it is drawn for.

  Args:
    ids: n runs of w neighbours. Where n > 1 each run begins at a multiple of NOISE_GROUP.
    is_part: the ids are a part of the vocabulary: noise is drawn in groups of NOISE_GROUP ids, each by its own key.
      False: they are all of it, and one key draws them.
  """
  n, w = ids.shape

  def draw(key: jax.Array, position: jax.Array) -> jax.Array:
    key = jax.random.fold_in(key, position)
    if not is_part:
      return jax.random.gumbel(key, (n, w), jnp.float32, mode="high")
    num_groups = -(-w // NOISE_GROUP) + (n == 1)  # a single run may begin anywhere in its first group
    groups = ids[:, :1] // NOISE_GROUP + jnp.arange(num_groups)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))(key, groups)
    noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (NOISE_GROUP,), jnp.float32, mode="high")))(keys)
    noise = noise.reshape(n, -1)
    return noise[:, :w] if n > 1 else jax.lax.dynamic_slice_in_dim(noise, ids[0, 0] % NOISE_GROUP, w, axis=1)

  return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(keys, positions)


def uniform_noise(keys: Key[Array, "b"], positions: Int[Array, "s"]) -> Float32[Array, "b s"]:
  """Draw one number in [0, 1) for each (row, call, position), independent of `gumbel_noise`."""

  def draw(key: jax.Array, position: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(key, position))

  other = jax.vmap(jax.random.fold_in, (0, None))(keys, jnp.uint32(2**32 - 1))  # no position has this number
  return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(other, positions)


def comes_before(score: Float[Array, "b s"], is_masked: Bool[Array, "b s"]) -> Bool[Array, "b s s"]:
  """Tell for positions [.., i, j] whether masked j has the higher score than i, or the same and stands left of it.

  Comparing all pairs is little work for a block and, unlike sorting or `top_k`, is computed where the rows are, without
  gathering them on every device.
  """
  index = jnp.arange(score.shape[1])
  mine, other = score[:, :, None], score[:, None, :]
  return is_masked[:, None, :] & ((other > mine) | ((other == mine) & (index < index[:, None])))


def rank(score: Float[Array, "b s"], is_masked: Bool[Array, "b s"]) -> Int[Array, "b s"]:
  """Number each row's masked positions from 0, highest score first; others get the number they would come at."""
  return comes_before(score, is_masked).sum(-1)
