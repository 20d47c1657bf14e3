"""LLaDA's decoding against cases worked out by hand, exact probabilities, and its own promises."""

import collections
import functools
import itertools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax import samplers
from dmpo_jax.samplers import llada, prediction
from dmpo_jax.samplers.loop import Decision, decode

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "samplers"
MASK = 3  # of the fake models: tokens 0, 1, 2


class Fake(NamedTuple):
  """A denoiser whose hidden states are its logits, a pure function of the completion."""

  hidden: collections.abc.Callable
  mask_token_id: int = MASK

  def logits(self, hidden):
    return hidden


def fixed(probabilities):
  """A model that predicts the same at every call: probabilities [c, v]."""
  logits = jnp.log(jnp.asarray(probabilities, jnp.float32))
  return Fake(lambda completion: jnp.broadcast_to(logits, (completion.shape[0], *logits.shape)))


def contextual(seed=0, c=2, prompt=None, scale=1.5):
  """A model whose every prediction depends on the whole row: the sum of a random table over what is there."""
  table = scale * jax.random.normal(jax.random.key(seed), (c, MASK + 1, c, MASK + 1))

  def hidden(completion):
    seen = jax.nn.one_hot(completion, MASK + 1)
    logits = jnp.einsum("bcv,cvdw->bdw", seen, table)
    return logits if prompt is None else logits + jnp.sin(prompt[:, None, None] * jnp.arange(1.0, MASK + 2))

  return Fake(hidden)


def run(denoiser, keys, **keywords):
  keywords = (
    dict(block_length=keywords["completion_length"], steps=keywords["completion_length"], temperature=0.0) | keywords
  )
  return jax.tree.map(np.asarray, jax.jit(functools.partial(samplers.SAMPLERS["llada"], denoiser, **keywords))(keys))


def keys(n, seed=0):
  data = np.random.default_rng(seed).integers(0, 2**32, (n, 2), np.uint32)  # from numpy: nothing to compile
  return jax.random.wrap_key_data(jnp.asarray(data))


PROBABILITIES = [[0.6, 0.2, 0.1, 0.1], [0.1, 0.1, 0.75, 0.05], [0.1, 0.5, 0.3, 0.1], [0.05, 0.9, 0.05, 0.0]]


@pytest.mark.parametrize(
  ("block_length", "steps", "committed_at"),
  [
    (4, 4, [2, 1, 3, 0]),  # one a call, the most confident first
    (4, 2, [1, 0, 1, 0]),  # two a call
    (4, 3, [1, 0, 2, 0]),  # 2, 1, 1: the remainder goes to the first call
    (4, 1, [0, 0, 0, 0]),
    (2, 4, [1, 0, 3, 2]),  # the left block first
    (2, 2, [0, 0, 1, 1]),
    (4, 6, [2, 1, 3, 0]),  # the last two calls keep nothing
    (1, 4, [0, 1, 2, 3]),
  ],
)
def test_greedy_order_by_hand(block_length, steps, committed_at):
  rollouts = run(fixed(PROBABILITIES), keys(2), completion_length=4, block_length=block_length, steps=steps)
  for row in range(2):
    np.testing.assert_array_equal(rollouts.completion[row], [0, 2, 1, 1])
    np.testing.assert_array_equal(rollouts.committed_at[row], committed_at)
    np.testing.assert_allclose(rollouts.confidence[row], [0.6, 0.75, 0.5, 0.9], rtol=1e-6)
  np.testing.assert_array_equal(rollouts.num_calls, [steps, steps])
  assert rollouts.completion.dtype == rollouts.committed_at.dtype == rollouts.num_calls.dtype == np.int32


def test_predictions_follow_what_was_committed():
  # Position 1 is sure of 2 at first. Position 0 copies position 1, and prefers 0 as long as it sees a mask there.
  def hidden(completion):
    right = completion[:, 1]
    first = jnp.where((right == MASK)[:, None], jnp.array([1.0, 0, 0, 0]), 2.0 * jax.nn.one_hot(right, 4))
    return jnp.stack([first, jnp.broadcast_to(jnp.array([0.0, 0, 3, 0]), first.shape)], axis=1)

  rollouts = run(Fake(hidden), keys(1), completion_length=2)
  np.testing.assert_array_equal(rollouts.completion, [[2, 2]])
  np.testing.assert_array_equal(rollouts.committed_at, [[1, 0]])
  np.testing.assert_allclose(
    rollouts.confidence, [[np.exp(2) / (np.exp(2) + 3), np.exp(3) / (np.exp(3) + 3)]], rtol=1e-6
  )


def test_ties_go_to_the_lowest_token_and_the_leftmost_position():
  rollouts = run(fixed([[0.25, 0.35, 0.35, 0.05]] * 5), keys(1), completion_length=5, steps=3)
  np.testing.assert_array_equal(rollouts.completion, [[1] * 5])
  np.testing.assert_array_equal(rollouts.committed_at, [[0, 0, 1, 1, 2]])


@pytest.mark.parametrize(("remasking", "temperature"), [("low_confidence", 0.0), ("random", 1.0)])
def test_mask_is_never_committed(remasking, temperature):
  rollouts = run(
    fixed([[0.0, 1e-4, 1e-3, 0.9989]] * 4), keys(64), completion_length=4, temperature=temperature, remasking=remasking
  )
  assert set(np.unique(rollouts.completion)) <= {1, 2}
  np.testing.assert_allclose(rollouts.confidence, np.where(rollouts.completion == 1, 1e-4, 1e-3), rtol=1e-4)


def test_only_the_current_block_goes_through_the_head():
  shapes = []

  class Recording(Fake):
    def logits(self, hidden):
      shapes.append(hidden.shape)
      return hidden

  denoiser = Recording(contextual(c=8).hidden)
  jax.eval_shape(
    functools.partial(llada.sample, denoiser, completion_length=8, block_length=2, steps=8, temperature=1.0), keys(3)
  )
  assert set(shapes) == {(3, 2, MASK + 1)}


def test_greedy_draws_nothing():
  sample = functools.partial(llada.sample, contextual(), completion_length=2, block_length=2, steps=2)
  assert "random_bits" not in str(jax.make_jaxpr(functools.partial(sample, temperature=0.0))(keys(2)))
  assert "random_bits" in str(jax.make_jaxpr(functools.partial(sample, temperature=0.5))(keys(2)))


def test_temperature_draws_only_for_the_current_block():
  sample = functools.partial(
    llada.sample, contextual(c=8), completion_length=8, block_length=2, steps=8, temperature=1.0
  )
  drawn = str(jax.make_jaxpr(sample)(keys(5)))
  assert f"f32[5,2,{MASK + 1}]" in drawn
  bits = [line for line in drawn.splitlines() if "random_bits" in line]
  assert bits
  assert all("[5,8" not in line for line in bits)


@pytest.mark.parametrize(
  ("remasking", "temperature", "rows"), [("low_confidence", 1.0, [2]), ("random", 1.0, [5, 0, 3])]
)
def test_a_row_is_what_it_would_be_alone(remasking, temperature, rows):
  prompt, row_keys, rows = jnp.arange(6.0), keys(6, seed=1), np.array(rows)
  settings = dict(completion_length=8, block_length=4, steps=6, temperature=temperature, remasking=remasking)
  together = run(contextual(c=8, prompt=prompt), row_keys, **settings)
  apart = run(contextual(c=8, prompt=prompt[rows]), row_keys[rows], **settings)
  assert len({tuple(row) for row in together.completion}) > 1
  jax.tree.map(np.testing.assert_array_equal, apart, jax.tree.map(lambda array: array[rows], together))


def test_noise_belongs_to_the_position_not_to_the_block():
  @functools.partial(jax.jit, static_argnames="vocab_size")
  def draw(keys, positions, vocab_size):
    return prediction.gumbel_noise(keys, positions, vocab_size), prediction.uniform_noise(keys, positions)

  gumbel, uniform = draw(keys(2), jnp.arange(8), 5)
  gumbel_part, uniform_part = draw(keys(2)[1:], jnp.arange(4, 8), 5)
  np.testing.assert_array_equal(gumbel[1:, 4:], gumbel_part)
  np.testing.assert_array_equal(uniform[1:, 4:], uniform_part)
  assert len(np.unique(gumbel)) == gumbel.size
  assert len(np.unique(uniform)) == uniform.size
  assert ((uniform >= 0) & (uniform < 1)).all()


def exact(denoiser, temperature, remasking, c=2):
  """Probability of every completion when one token is committed a call, by walking the whole tree."""
  final = collections.defaultdict(float)

  def walk(state, weight):
    masked = [i for i in range(c) if state[i] == MASK]
    if not masked:
      final[state] += weight
      return
    logits = np.asarray(denoiser.hidden(jnp.array([state])), np.float64)[0]
    confidence = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    proposal = np.exp(logits[:, :MASK] / temperature)
    proposal /= proposal.sum(-1, keepdims=True)
    for tokens in itertools.product(range(MASK), repeat=len(masked)):
      drawn = weight * np.prod([proposal[i, t] for i, t in zip(masked, tokens, strict=True)])
      if remasking == "random":
        chosen = [(j, 1 / len(masked)) for j in range(len(masked))]
      else:
        chosen = [(int(np.argmax([confidence[i, t] for i, t in zip(masked, tokens, strict=True)])), 1.0)]
      for j, share in chosen:
        walk((*state[: masked[j]], tokens[j], *state[masked[j] + 1 :]), drawn * share)

  walk((MASK,) * c, 1.0)
  return final


@pytest.mark.parametrize(("remasking", "temperature"), [("low_confidence", 1.0), ("random", 0.5)])
def test_sampled_frequencies_are_the_exact_probabilities(remasking, temperature):
  denoiser, num_rows = contextual(scale=0.5), 30_000
  rollouts = run(denoiser, keys(num_rows, seed=2), completion_length=2, temperature=temperature, remasking=remasking)
  expected = exact(denoiser, temperature, remasking)
  assert sum(expected.values()) == pytest.approx(1)
  counts = collections.Counter(map(tuple, rollouts.completion.tolist()))
  statistic = sum((counts[y] - num_rows * p) ** 2 / (num_rows * p) for y, p in expected.items())
  assert min(expected.values()) * num_rows > 5
  assert statistic < 26.1  # 0.999 quantile of chi-square with 9 - 1 degrees of freedom
  # And the order: random positions first come first equally often, whatever the confidence.
  if remasking == "random":
    assert abs((rollouts.committed_at[:, 0] == 0).mean() - 0.5) < 0.012


def test_transfer_counts_recorded_from_the_official_code():
  goldens = np.load(GOLDENS / "functions.npz")
  for i in range(4):
    num_masked = jnp.asarray(goldens[f"ntt_mask_{i}"].sum(1))
    counts = llada.num_transfer_tokens(num_masked, int(goldens[f"ntt_steps_{i}"]))
    np.testing.assert_array_equal(counts, goldens[f"ntt_out_{i}"])
  assert llada.num_transfer_tokens(jnp.int32(5), 3).tolist() == [2, 2, 1]


def test_selection_recorded_from_the_official_code(monkeypatch):
  """Tokens, and which are committed, from the recorded logits and uniform noise."""
  goldens = np.load(GOLDENS / "functions.npz")
  for i in range(int(goldens["num_ti"])):
    case = {
      name: goldens[f"ti{i}_{name}"] for name in ("logits", "x", "mask", "x0", "transfer", "count", "temperature")
    }
    if case["temperature"] > 0:
      noise = -np.log(-np.log(goldens[f"ti{i}_u"] + 1e-10) + 1e-10)
      monkeypatch.setattr(prediction, "gumbel_noise", lambda *_, noise=noise: jnp.asarray(noise, jnp.float32))
    b, s, v = case["logits"].shape
    predicted = prediction.predict(
      jnp.asarray(case["logits"]), keys(b), jnp.arange(s), mask_token_id=v, temperature=float(case["temperature"])
    )
    is_masked = jnp.asarray(case["mask"])
    chosen = prediction.select_highest(predicted.confidence, is_masked, jnp.asarray(case["count"]), s)
    np.testing.assert_array_equal(np.where(case["mask"], predicted.tokens, case["x"]), case["x0"])
    np.testing.assert_array_equal(chosen, case["transfer"])


@pytest.mark.parametrize("form", ["llada", "fast"])
def test_gumbel_argmax_recorded_from_the_official_code(monkeypatch, form):
  """Ours chooses as both official forms do: exp(logits) / (-log u)^T and logits - T log(-log u)."""
  goldens = np.load(GOLDENS / "functions.npz")
  logits = jnp.asarray(goldens["gumbel_logits"])
  noise = jnp.asarray(-np.log(-np.log(goldens["gumbel_u"])), jnp.float32)
  monkeypatch.setattr(prediction, "gumbel_noise", lambda *_: noise)
  for j, temperature in enumerate(goldens["gumbel_temps"].tolist()):
    tokens = prediction.predict(
      logits, keys(2), jnp.arange(5), mask_token_id=logits.shape[-1], temperature=temperature
    ).tokens
    np.testing.assert_array_equal(tokens, goldens[f"gumbel_{form}_{j}_argmax"])


def test_the_loop_lets_a_sampler_take_tokens_back_and_keep_a_state():
  # Calls 0 and 1 of each block commit its two positions, call 2 takes the left one back, call 3 decides it anew.
  def visit(view, state):
    written = jnp.array([[0, MASK], [0, 1], [MASK, 1], [2, 1]])[view.step]
    return Decision(jnp.broadcast_to(written, view.tokens.shape), jnp.full(view.tokens.shape, state / 8)), state + 1

  rollouts, state = decode(
    visit, jnp.float32(0), keys(2), mask_token_id=MASK, completion_length=4, block_length=2, steps=8
  )
  assert state == 8
  np.testing.assert_array_equal(rollouts.completion, [[2, 1, 2, 1]] * 2)
  np.testing.assert_array_equal(rollouts.committed_at, [[3, 1, 7, 5]] * 2)
  np.testing.assert_array_equal(rollouts.confidence, [[3 / 8, 1 / 8, 7 / 8, 5 / 8]] * 2)
  np.testing.assert_array_equal(rollouts.num_calls, [8, 8])


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (dict(block_length=3), ["sampler.block_length=3", "divide", "[1, 2, 4, 8]"]),
    (dict(block_length=16), ["sampler.block_length=16", "divide"]),
    (dict(steps=5), ["sampler.steps=5", "multiple of the 2 blocks", "4 or 6"]),
    (dict(steps=1), ["sampler.steps=1", "such as 2"]),
    (dict(steps=0), ["sampler.steps=0", "at least 1"]),
    (dict(completion_length=0), ["sampler.completion_length=0"]),
    (dict(temperature=-0.1), ["sampler.temperature=-0.1", "0 (greedy)"]),
    (dict(temperature=float("nan")), ["sampler.temperature=nan"]),
    (dict(remasking="low_confidense"), ["sampler.llada.remasking", "did you mean 'low_confidence'"]),
    (dict(remasking="topk"), ["sampler.llada.remasking='topk'", "low_confidence, random"]),
  ],
)
def test_bad_arguments(change, words):
  good = dict(completion_length=8, block_length=4, steps=4, temperature=0.0, remasking="random")
  with pytest.raises(ValueError, match="sampler") as error:
    llada.sample(contextual(c=8), keys(1), **(good | change))
  for word in words:
    assert word in str(error.value)
