"""A tile of ids is drawn first, then an id of it: this is a draw from the whole vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_denoiser import Fake, keys
from jaxprs import equations

from dmpo_jax.samplers.prediction import id_noise, predict, tile_noise
from dmpo_jax.structs import VOCAB_TILE

SIZE, NUM_CHUNKS, MASK = 150, 3, 149  # chunks of 64, 64 and 22 ids; the last tile has 22
POSITIONS = jnp.arange(3, 5)


class Chunked(Fake):
  """Hidden states are logits, read in chunks of 64 ids, the last of them padded."""

  def logits(self, hidden, number=0):
    ids = number * 64 + jnp.arange(64)
    return jnp.where(ids < SIZE, jnp.take(hidden, ids, axis=-1, mode="clip"), -jnp.inf)[:, :, None], ids[None]


CHUNKED = Chunked(len, mask_token_id=MASK, num_chunks=NUM_CHUNKS)


def logits_of(rows, scale=1.5):
  return scale * jax.random.normal(jax.random.key(5), (rows, len(POSITIONS), SIZE))


@pytest.mark.parametrize("temperature", [0.3, 2.0, [0.0, 0.5, 1.0, 0.0]])
def test_tokens_are_those_of_both_draws_written_out(temperature):
  """Of rows with a temperature of their own too, also where it is 0."""
  logits, rows = logits_of(4), keys(4)
  given = jnp.array(temperature) if isinstance(temperature, list) else temperature
  found = jax.jit(lambda hidden: predict(CHUNKED, hidden, rows, POSITIONS, given))(logits)
  num_tiles = -(-SIZE // VOCAB_TILE)
  of_tiles = np.asarray(tile_noise(rows, POSITIONS, jnp.arange(num_tiles)[None]), np.float64)[:, :, 0]
  log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
  for row, position in np.ndindex(4, len(POSITIONS)):
    t = temperature[row] if isinstance(temperature, list) else temperature
    own = np.asarray(logits[row, position], np.float64)
    allowed = np.where(np.arange(SIZE) == MASK, -np.inf, own)
    token = allowed.argmax()
    if t > 0:
      padded = np.pad(allowed, (0, -SIZE % VOCAB_TILE), constant_values=-np.inf).reshape(num_tiles, VOCAB_TILE)
      tile = (np.log(np.exp(padded / t).sum(1)) + of_tiles[row, position]).argmax()
      of_ids = id_noise(rows[row : row + 1], POSITIONS[position : position + 1], jnp.array([[tile]]))[0, 0]
      token = tile * VOCAB_TILE + (padded[tile] / t + np.asarray(of_ids)).argmax()
    assert found.tokens[row, position] == token
    np.testing.assert_allclose(found.log_prob[row, position], log_p[row, position, token], atol=1e-5)


@pytest.mark.parametrize("temperature", [1e-7, 1e-30, 2e-38, [0.0, 1e-7, 2e-38, 1e-45]])
def test_a_temperature_near_0_takes_the_most_likely(temperature):
  logits = logits_of(4, scale=20.0)
  given = jnp.array(temperature) if isinstance(temperature, list) else temperature
  found = jax.jit(lambda hidden: predict(CHUNKED, hidden, keys(4), POSITIONS, given))(logits)
  np.testing.assert_array_equal(found.tokens, logits[..., :MASK].argmax(-1))
  assert np.isfinite(found.log_prob).all()


def test_frequencies_are_the_probabilities():
  rows, temperature = 40_000, 0.7
  hidden = jnp.broadcast_to(logits_of(1, scale=0.7)[0], (rows, len(POSITIONS), SIZE))
  tokens = np.asarray(
    jax.jit(lambda hidden: predict(CHUNKED, hidden, keys(rows), POSITIONS, temperature))(hidden).tokens
  )
  for position in range(len(POSITIONS)):
    weights = np.exp(np.asarray(hidden[0, position, :MASK], np.float64) / temperature)
    expected = rows * weights / weights.sum()
    assert expected.min() > 5
    counts = np.bincount(tokens[:, position], minlength=MASK)
    assert ((counts - expected) ** 2 / expected).sum() < 207  # 0.999 quantile of chi-square with 149 - 1
  together = np.bincount(tokens[:, 0] // VOCAB_TILE * 5 + tokens[:, 1] // VOCAB_TILE, minlength=25).reshape(5, 5)
  apart = np.outer(together.sum(1), together.sum(0)) / rows
  assert ((together - apart) ** 2 / apart).sum() < 39.3, "positions are independent: 0.999 quantile with 16 degrees"


@pytest.mark.parametrize("temperature", [0.0, 0.5, [0.0, 0.0, 0.0, 1.0], [0.0, 0.5, 0.0, 1.0]])
def test_a_row_whose_logits_are_not_numbers_has_ids_too(temperature):
  """And the others have theirs."""
  logits = logits_of(4)
  given = jnp.array(temperature) if isinstance(temperature, list) else temperature
  read = jax.jit(lambda hidden: predict(CHUNKED, hidden, keys(4), POSITIONS, given).tokens)
  found, wanted = read(logits.at[1].set(jnp.nan)), read(logits)
  assert ((found >= 0) & (found < SIZE)).all()
  np.testing.assert_array_equal(found[np.array([0, 2, 3])], wanted[np.array([0, 2, 3])])


def test_noise_is_drawn_for_tiles_and_for_the_ids_of_one():
  program = jax.make_jaxpr(lambda hidden: predict(CHUNKED, hidden, keys(4), POSITIONS, 1.0))(logits_of(4))
  drawn = {x.outvars[0].aval.size for x in equations(program) if x.primitive.name == "random_bits"}
  two_words = 2 * 4 * len(POSITIONS)  # of random bits, for a number of each row and position
  assert drawn == {two_words * 64 // VOCAB_TILE, two_words * VOCAB_TILE}
