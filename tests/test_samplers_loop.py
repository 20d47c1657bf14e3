"""What all samplers have from their loop: rows that stay alone, the record, early exit, the plan's errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_denoiser import MASK, Fake, contextual, fixed, keys, run
from jaxprs import equations

from dmpo_jax import samplers
from dmpo_jax.samplers import llada
from dmpo_jax.samplers.loop import Decision, Rule, decode


def test_the_loop_lets_a_sampler_take_tokens_back_and_keep_a_state():
  # Calls 0 and 1 of each block commit its two positions, call 2 takes the left one back, call 3 decides it anew.
  def accept(view, seen, state):
    written = jnp.array([[0, MASK], [0, 1], [MASK, 1], [2, 1]])[view.step]
    return Decision(jnp.broadcast_to(written, view.tokens.shape), jnp.full(view.tokens.shape, state / 8)), state + 1

  plan = samplers.Plan(completion_length=4, block_length=2, steps=8)
  rule = Rule(lambda *_: None, accept, 4, is_fixed=True, can_revoke=True, first_state=lambda _: jnp.float32(0))
  rollouts, state = decode(rule, keys(2), plan, contextual(c=4))
  assert state == 8
  np.testing.assert_array_equal(rollouts.completion, [[2, 1, 2, 1]] * 2)
  np.testing.assert_array_equal(rollouts.committed_at, [[3, 1, 7, 5]] * 2)
  np.testing.assert_array_equal(rollouts.confidence, [[3 / 8, 1 / 8, 7 / 8, 5 / 8]] * 2)
  np.testing.assert_array_equal(rollouts.num_calls, [8, 8])


# every sampler, where it decides several tokens a call
OWN = {
  "random_order": {},
  "llada": dict(remasking="random"),
  "parallel": dict(threshold=0.4),
  "prefix_cache": dict(rule="factor", factor=0.8),
  "dual_cache": dict(rule="count"),
  "wino": dict(threshold=0.35, threshold_back=0.5),
  "editing": dict(threshold=0.4, edit_threshold=0.3, max_checks=2),
  "freedave": dict(draft_length=3),
  "entropy_bound": dict(bound=1.0),
}
SETTINGS = dict(completion_length=8, block_length=4, steps=4)


def test_every_sampler_is_tested_here():
  assert OWN.keys() == samplers.SAMPLERS.keys()


@functools.cache
def decode_all(name, early_exit, rows=tuple(range(16))):
  """Decode these of 16 rows, each with a prompt of its own."""
  denoiser = contextual(c=8, prompt=jnp.arange(16.0)[np.array(rows)], eos_token_id=1)
  return run(name, denoiser, keys(16)[np.array(rows)], OWN[name], **SETTINGS, temperature=1.0, early_exit=early_exit)


@pytest.mark.parametrize("name", OWN)
def test_a_row_is_what_it_would_be_alone(name):
  rows = (5, 0, 13)
  together, apart = decode_all(name, True), decode_all(name, True, rows)
  assert len({tuple(row) for row in together.completion}) > 1
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[list(rows)]), apart, together)


@pytest.mark.parametrize("name", OWN)
def test_early_exit_changes_nothing_up_to_the_eos_and_saves_calls(name):
  plain, early = decode_all(name, False), decode_all(name, True)
  is_eos = plain.completion == 1
  is_behind = np.cumsum(is_eos, 1) - is_eos > 0
  assert is_behind.any(1).sum() > 8
  np.testing.assert_array_equal(early.completion, np.where(is_behind, 1, plain.completion))
  np.testing.assert_array_equal(early.num_tokens, (~is_behind).sum(1))
  ends = np.broadcast_to(early.num_calls[:, None], is_behind.shape)
  np.testing.assert_array_equal(early.committed_at, np.where(is_behind, ends, plain.committed_at))
  np.testing.assert_array_equal(early.confidence, np.where(is_behind, 0, plain.confidence))
  assert (early.num_calls <= plain.num_calls).all()
  assert (early.num_calls < plain.num_calls).any()
  assert (early.num_saved[~is_eos.any(1)] == 0).all()
  assert (plain.num_saved == 0).all()
  np.testing.assert_array_equal(plain.seen, plain.completion)
  np.testing.assert_array_equal(plain.seen_at, plain.committed_at)
  was_seen = plain.committed_at < ends  # what was decided before the row ended stood there for the model to see
  assert (was_seen & is_behind).any()
  np.testing.assert_array_equal(early.seen, np.where(was_seen, plain.completion, MASK))
  np.testing.assert_array_equal(early.seen_at, np.where(was_seen, plain.committed_at, ends))
  if name == "llada":  # its schedule is known
    np.testing.assert_array_equal(early.num_calls + early.num_saved, plain.num_calls)


def test_every_token_that_ends_completions_ends_a_row_and_eos_fills_it():
  denoiser = contextual(c=8, prompt=jnp.arange(16.0), eos_token_id=1, ends=(1, 2))
  early = run("llada", denoiser, keys(16), OWN["llada"], **SETTINGS, temperature=1.0, early_exit=True)
  plain = decode_all("llada", False).completion
  is_end = np.isin(plain, (1, 2))
  is_behind = np.cumsum(is_end, 1) - is_end > 0
  np.testing.assert_array_equal(early.completion, np.where(is_behind, 1, plain))
  np.testing.assert_array_equal(early.num_tokens, (~is_behind).sum(1))
  firsts = plain[np.arange(16), is_end.argmax(1)]
  assert {1, 2} <= set(firsts.tolist())


@pytest.mark.parametrize("name", OWN)
def test_only_the_current_block_goes_through_the_head_and_has_noise(name):
  """And greedy decoding draws no noise of tokens at all."""
  b, c, size, seen = 5, 8, 2, set()

  class Recording(Fake):
    def logits(self, hidden, number=0):
      seen.add(hidden.shape[1])
      return super().logits(hidden)

  def draws(temperature):
    plan = samplers.Plan(completion_length=c, block_length=size, steps=8, temperature=temperature)
    options = samplers.make_options(name, OWN[name])
    decode_with = functools.partial(samplers.SAMPLERS[name].sample, plan=plan, options=options)
    sample = functools.partial(decode_with, Recording(contextual(c=c).hidden))
    program = jax.make_jaxpr(sample)(keys(b))
    return {x.outvars[0].aval.shape for x in equations(program) if x.primitive.name == "random_bits"}

  def of_tokens(shapes):
    return {shape for shape in shapes if shape[-1] == MASK + 1}

  assert not of_tokens(draws(0.0))
  drawn = draws(0.5)
  assert of_tokens(drawn)
  assert {shape[1] for shape in drawn} == seen == {size}


@pytest.mark.parametrize("name", OWN)
def test_mask_is_never_committed_and_calls_are_bounded(name):
  """A model that predicts MASK nearly everywhere: the official code loops for ever, or returns masks."""
  denoiser = fixed([[0.0, 1e-4, 1e-3, 0.9989]] * 4)
  rollouts = run(name, denoiser, keys(64), OWN[name], completion_length=4, block_length=2, steps=4, temperature=1.0)
  assert set(np.unique(rollouts.completion)) == {1, 2}
  np.testing.assert_allclose(rollouts.confidence, np.where(rollouts.completion == 1, 1e-4, 1e-3), rtol=1e-4)
  assert (rollouts.num_calls <= (6 if name == "editing" else 4)).all()  # it looks at a finished block once more


def test_watching_sees_every_call():
  seen = {}
  denoiser = fixed([[0.6, 0.2, 0.1, 0.1]] * 4)
  plan = samplers.Plan(4, 2, 4, on_call=lambda number, *state: seen.update({int(number): state}))
  jax.block_until_ready(llada.sample(denoiser, keys(1), plan, llada.Options()))
  jax.effects_barrier()
  assert [np.array(seen[call][0]).tolist() for call in range(4)] == [
    [[0, 3, 3, 3]],
    [[0, 0, 3, 3]],
    [[0, 0, 0, 3]],
    [[0, 0, 0, 0]],
  ]
  assert [int(seen[call][1][0]) for call in range(4)] == [1, 2, 3, 4]


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
  ],
)
def test_a_bad_plan_is_refused(change, words):
  with pytest.raises(ValueError, match="sampler") as error:
    samplers.Plan(**(dict(completion_length=8, block_length=4, steps=4, temperature=0.0) | change))
  for word in words:
    assert word in str(error.value)


@pytest.mark.parametrize("name", ["llada", "freedave"])
def test_a_row_with_its_own_temperature_is_what_it_is_where_all_have_it(name):
  temperatures = np.array([0.0, 1.25] * 8, np.float32)
  mixed = run(name, contextual(c=4), keys(16), completion_length=4, temperature=jnp.asarray(temperatures))
  for temperature in (0.0, 1.25):
    alike = run(name, contextual(c=4), keys(16), completion_length=4, temperature=temperature)
    rows = temperatures == temperature
    np.testing.assert_array_equal(mixed.completion[rows], alike.completion[rows])
    np.testing.assert_allclose(mixed.confidence[rows], alike.confidence[rows], rtol=1e-6)
  assert (mixed.completion[temperatures == 0] == mixed.completion[0]).all()
  assert len(np.unique(mixed.completion, axis=0)) > 2
