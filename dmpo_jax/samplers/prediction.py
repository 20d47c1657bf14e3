"""From hidden states to tokens and their probabilities, among which the decoding rules choose.

The vocabulary is read chunk by chunk: full [rows, positions, vocab] logits are never materialised.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Integer, Key

from dmpo_jax.logsumexp import LogSumExp
from dmpo_jax.structs import VOCAB_TILE, Denoiser

NOWHERE = 2**31 - 1  # no id, and no tile
# Below this temperature the noise is less than the rounding of logits, and logits / temperature may be infinite.
GREEDY_BELOW = 1e-6


class Prediction(NamedTuple):
  """The token that each position would take now, and its probability."""

  tokens: Int[Array, "b s"]
  confidence: Float32[Array, "b s"]  # the token's probability
  log_prob: Float32[Array, "b s"]  # the same in nats
  entropy: Float32[Array, "b s"]  # of the position's distribution, nats
  mask_log_prob: Float32[Array, "b s"] | None = None  # that of MASK, nats, if it was asked for


class Choice(NamedTuple):
  """The best of the ids read so far, or of their tiles."""

  score: Float32[Array, "b s"]  # logit with noise, of the id or of the whole tile
  place: Int[Array, "b s"]  # the id, or the tile's number
  logits: Float32[Array, "b s j"]  # of the id, or of the tile's ids


Choose = Callable[[Float32[Array, "b s n w"], Int[Array, "n w"]], Choice]


def predict(
  denoiser: Denoiser,
  hidden: Float[Array, "b s d"],
  keys: Key[Array, "b"],
  positions: Int[Array, "*b s"],
  temperature: float | Float[Array, "b"],
  with_mask: bool = False,
) -> Prediction:
  """Sample softmax(logits / temperature) at every position by Gumbel-max; temperature 0 takes the most likely token.

  If the vocabulary has several chunks, a tile of ids is drawn first and then one of its ids. The maximum over a tile of
  logits / temperature plus Gumbel noise is distributed as the tile's log-sum-exp plus Gumbel noise (arXiv 1411.0030),
  so the distribution is the same, with a VOCAB_TILEth of the noise.

  MASK is never chosen. Confidence and entropy are those of softmax(logits), without noise and at temperature 1, as in
  LLaDA (arXiv 2502.09992, algorithm 5). All in float32.

  Args:
    keys: the rows' keys for this call; unused at temperature 0.
    positions: of the hidden states in the completion, for their noise.
    temperature: one for all rows, or one for each.
    with_mask: also give MASK's probability.
  """
  is_noisy = isinstance(temperature, jax.Array) or temperature > 0
  scale = jnp.asarray(temperature, jnp.float32)[..., None, None]  # broadcasts with [b, s, n]
  in_tiles = is_noisy and denoiser.num_chunks > 1

  def choose(logits: Float32[Array, "b s n w"], ids: Int[Array, "n w"]) -> Choice:
    logits = jnp.where(ids == denoiser.mask_token_id, -jnp.inf, logits)
    if in_tiles:
      return _best_tile(logits, ids, keys, positions, scale)
    if is_noisy:
      noise = gumbel_noise(keys, positions, ids.size)[:, :, None]
      return _first_best(logits + scale[..., None] * noise, logits, ids)
    return _first_best(logits, logits, ids)

  chooses = {choose: VOCAB_TILE if in_tiles else 1} | ({_only(denoiser.mask_token_id): 1} if with_mask else {})
  sums, (found, *of_mask) = _read_vocabulary(denoiser, hidden, chooses)
  if in_tiles:
    found = _best_in_tile(found, keys, positions, scale)
  tokens = jnp.where(found.place == NOWHERE, 0, found.place)  # an id even where logits are NaN
  logit, log_total = found.logits[..., 0], jnp.log(sums.total)
  confidence = jnp.exp(logit - sums.highest) / sums.total
  mask_log_prob = of_mask[0].score - sums.highest - log_total if of_mask else None
  return Prediction(tokens, confidence, logit - sums.highest - log_total, sums.entropy, mask_log_prob)


def log_probs(denoiser: Denoiser, hidden: Float[Array, "b s d"], tokens: Int[Array, "b s"]) -> Float32[Array, "b s"]:
  """Return the log-probabilities of tokens under softmax(logits), float32 nats."""
  sums, (found,) = _read_vocabulary(denoiser, hidden, {_only(tokens[..., None, None]): 1})
  return found.score - sums.highest - jnp.log(sums.total)


def _only(tokens: Int[Array, "b s 1 1"] | int) -> Choose:
  """Choose these ids."""

  def choose(logits: Float32[Array, "b s n w"], ids: Int[Array, "n w"]) -> Choice:
    return _first_best(jnp.where(ids == tokens, logits, -jnp.inf), logits, ids)

  return choose


def _read_vocabulary(
  denoiser: Denoiser, hidden: Float[Array, "b s d"], chooses: Mapping[Choose, int]
) -> tuple[LogSumExp, tuple[Choice, ...]]:
  """Reduce the logits over the vocabulary's chunks: their log-sum-exp and entropy, and the first best of each choice.

  Args:
    chooses: and the number of logits to keep of each.
  """

  def better(choice: Choice, best: Choice) -> Choice:
    is_new = ~(choice.score < best.score) & ((choice.score != best.score) | (choice.place < best.place))
    return Choice(
      score=jnp.where(is_new, choice.score, best.score),
      place=jnp.where(is_new, choice.place, best.place),
      logits=jnp.where(is_new[..., None], choice.logits, best.logits),
    )

  def read(
    number: Int[Array, ""] | int, before: tuple[LogSumExp, tuple[Choice, ...]]
  ) -> tuple[LogSumExp, tuple[Choice, ...]]:
    sums, found = before
    logits, ids = denoiser.logits(hidden, number)
    logits = logits.astype(jnp.float32)
    choices = [choose(logits, ids) for choose in chooses]
    return sums.add(logits, (-2, -1))[0], tuple(map(better, choices, found))

  shape = hidden.shape[:2]
  nothing = tuple(
    Choice(jnp.full(shape, -jnp.inf), jnp.full(shape, NOWHERE), jnp.full((*shape, number), -jnp.inf))
    for number in chooses.values()
  )
  first = LogSumExp.start(jnp.zeros(shape)), nothing
  if denoiser.num_chunks == 1:
    return read(0, first)
  return jax.lax.fori_loop(0, denoiser.num_chunks, read, first)


def _first_best(
  scores: Float32[Array, "b s n w"], logits: Float32[Array, "b s n w *j"], places: Int[Array, "*z n w"]
) -> Choice:
  """Return the highest score, the lowest place that has it, and that place's logits.

  Plain reductions, no argmax: XLA would fuse the noise into an argmax and no longer vectorise it, which takes three
  times as long on CPU. They also keep a sharded vocabulary sharded. The logits are reduced over runs and places as one
  axis: over two, the TPU compiler all-reduces whole chunks.
  """
  best = scores.max((-2, -1))
  is_best = (scores != -jnp.inf) & ~(scores < best[..., None, None])  # NaN may be the best
  place = jnp.where(is_best, places, NOWHERE).min((-2, -1))
  is_place = places == place[..., None, None]
  logits = jnp.where(is_place[..., None], logits.reshape(*scores.shape, -1), -jnp.inf)
  return Choice(best, place, logits.reshape(*best.shape, -1, logits.shape[-1]).max(-2))


def _best_tile(
  logits: Float32[Array, "b s n w"],
  ids: Int[Array, "n w"],
  keys: Key[Array, "b"],
  positions: Int[Array, "*b s"],
  scale: Float32[Array, "*z"],
) -> Choice:
  """Draw a tile by the log-sum-exp of its ids."""
  surplus = -logits.shape[-1] % VOCAB_TILE  # the vocabulary's last tile may be incomplete
  logits = jnp.pad(logits, ((0, 0), (0, 0), (0, 0), (0, surplus)), constant_values=-jnp.inf)
  logits = logits.reshape(*logits.shape[:3], -1, VOCAB_TILE)
  tiles = ids[:, ::VOCAB_TILE] // VOCAB_TILE
  is_noisy = scale > GREEDY_BELOW
  together = jax.nn.logsumexp(logits / jnp.where(is_noisy, scale, 1.0)[..., None, None], axis=-1)
  noisy = scale[..., None] * (together + tile_noise(keys, positions, tiles))
  return _first_best(jnp.where(is_noisy[..., None], noisy, logits.max(-1)), logits, tiles)


def _best_in_tile(
  tile: Choice, keys: Key[Array, "b"], positions: Int[Array, "*b s"], scale: Float32[Array, "*z"]
) -> Choice:
  """Draw one of a tile's ids."""
  logits = tile.logits[:, :, None]
  noise = id_noise(keys, positions, tile.place)[:, :, None]
  ids = tile.place[..., None, None] * VOCAB_TILE + jnp.arange(VOCAB_TILE)
  return _first_best(logits + scale[..., None] * noise, logits, ids)


def gumbel_noise(keys: Key[Array, "b"], positions: Int[Array, "*b s"], num_ids: int) -> Float32[Array, "b s v"]:
  """Draw Gumbel noise that depends on (row, call, position, id) alone, not on block or batch."""
  return _draw(position_keys(keys, positions), num_ids)


def tile_noise(
  keys: Key[Array, "b"], positions: Int[Array, "*b s"], tiles: Int[Array, "n j"]
) -> Float32[Array, "b s n j"]:
  """Draw Gumbel noise that depends on (row, call, position, tile) alone, not on the vocabulary's chunks."""
  return _draw(_fold(_fold(position_keys(keys, positions), 0)[..., None, None], tiles))


def id_noise(keys: Key[Array, "b"], positions: Int[Array, "*b s"], tile: Int[Array, "b s"]) -> Float32[Array, "b s w"]:
  """Draw Gumbel noise for the ids of each position's tile, independent of `tile_noise`."""
  return _draw(_fold(_fold(position_keys(keys, positions), 1), tile), VOCAB_TILE)


def uniform_noise(keys: Key[Array, "b"], positions: Int[Array, "*b s"]) -> Float32[Array, "b s"]:
  """Draw one number in [0, 1) for each (row, call, position), independent of the Gumbel noise."""
  other = _fold(keys, jnp.uint32(2**32 - 1))  # no position has this number
  return jnp.vectorize(jax.random.uniform)(position_keys(other, positions))


def position_keys(keys: Key[Array, "b"], positions: Int[Array, "*b s"]) -> Key[Array, "b s"]:
  """Derive the positions' keys from their rows' keys."""
  return _fold(keys[:, None], positions)


def _fold(keys: Key[Array, "..."], numbers: Integer[Array, "..."] | int) -> Key[Array, "..."]:
  return jnp.vectorize(jax.random.fold_in)(keys, numbers)


def _draw(keys: Key[Array, "..."], *shape: int) -> Float32[Array, "..."]:
  draw = functools.partial(jax.random.gumbel, shape=shape, dtype=jnp.float32, mode="high")
  return jnp.vectorize(draw, signature="()->(v)" if shape else "()->()")(keys)


def comes_before(score: Float[Array, "b s"], is_masked: Bool[Array, "b s"]) -> Bool[Array, "b s s"]:
  """Return at [.., i, j] whether j is masked and ranks before i: a higher score, or the same and further left.

  Comparing all pairs is little work for a block and, unlike sorting or `top_k`, gathers no rows on every device.
  """
  index = jnp.arange(score.shape[1])
  mine, other = score[:, :, None], score[:, None, :]
  return is_masked[:, None, :] & ((other > mine) | ((other == mine) & (index < index[:, None])))


def rank(score: Float[Array, "b s"], is_masked: Bool[Array, "b s"]) -> Int[Array, "b s"]:
  """Rank each row's masked positions from 0, highest score first; other positions get the rank they would have."""
  return comes_before(score, is_masked).sum(-1)
