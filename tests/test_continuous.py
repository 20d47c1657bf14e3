"""Continuous batching: a row is what it is in a fixed batch, whatever slot it gets, beside whom and when."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from block_models import BLOCKS, load
from etils import epath

from dmpo_jax import build, continuous, noise, phases, policy
from dmpo_jax.run.preemption import Preempted
from dmpo_jax.structs import Prompts

P, Q = 11, 9


def make_prompts(vocab_size=23):
  rng = np.random.default_rng(0)
  tokens = rng.integers(5, vocab_size, (P, Q)).astype(np.int32)
  is_valid = np.arange(Q) >= Q - (1 + np.arange(P) * 3 % Q)[:, None]  # from 1 to 9 tokens
  return Prompts(tokens, is_valid, np.arange(P, dtype=np.uint32) * 7)


KEY = noise.step_key(0, "rollout", 3)
EARLY = dict(temperature=1.0, early_exit=True)


def fixed(**changes):
  config, parts, policies = load(**changes)
  with jax.set_mesh(parts.mesh):
    sample = policy.make_sample(config, parts.model, parts.mesh, group_size=2, **EARLY)
    return jax.device_get(sample(policies, make_prompts(), KEY))


@functools.cache
def programs(num_devices=1, num_slots=3, **changes):
  config, parts, _ = load(num_devices, **changes)
  return continuous.Programs(config, parts.model, parts.mesh, num_slots=num_slots, **EARLY)


def same(found, wanted, **confidence):
  for field in dataclasses.fields(wanted):
    own, other = getattr(found, field.name), getattr(wanted, field.name)
    if field.name == "confidence" and confidence:
      np.testing.assert_allclose(own, other, **confidence)
    else:
      np.testing.assert_array_equal(own, other, err_msg=field.name)


RULES = [
  {},
  dict(sampler__name="llada", sampler__llada__remasking="random", sampler__steps=6),
  dict(sampler__name="editing", sampler__editing__threshold=0.5, sampler__editing__edit_threshold=0.4),
]


@pytest.mark.parametrize("rule", [RULES[0], *(pytest.param(rule, marks=pytest.mark.slow) for rule in RULES[1:])])
def test_a_row_is_what_it_is_in_a_fixed_batch(rule):
  wanted = fixed(**rule)
  is_ended = wanted.num_tokens < 12
  assert 0.2 < is_ended.mean() < 0.9
  assert len(np.unique(wanted.num_calls)) > 3
  found = continuous.Sample(programs(**rule), 2)(load(**rule)[2], make_prompts(), KEY)
  same(found, wanted, atol=1e-5)


def test_neither_slot_nor_neighbours_nor_arrival_change_a_bit():
  policies, own = load()[2], programs()
  queue = continuous.Queued.of_prompts(make_prompts(), 2)
  wanted = dict(continuous.decode(own, policies, queue, KEY))
  assert sorted(wanted) == list(range(2 * P))
  assert list(wanted) != sorted(wanted), "rows end in another order than they began"
  for order in (np.arange(2 * P)[::-1], np.array([20, 3, 11, 4, 0])):
    found = dict(continuous.decode(own, policies, queue.take(order), KEY))
    assert len(found) == len(order)
    for number, row in found.items():
      same(row, wanted[order[number]])


@pytest.mark.slow
def test_slots_are_sharded_over_rows():
  """Five slots become six: three for each half of the rows."""
  own = programs(4, num_slots=5, sharding__data=2, sharding__fsdp=1, sharding__tensor=2)
  assert (own.num_slots, own.num_filled) == (6, 2)
  policies = load(4, sharding__data=2, sharding__fsdp=1, sharding__tensor=2)[2]
  found = continuous.Sample(own, 2)(policies, make_prompts(), KEY)
  same(found, fixed(), atol=1e-5)
  keys = own.empty(policies, continuous.Queued.of_prompts(make_prompts(), 1).take([0]), KEY).kv_cache.kv_cache.keys
  assert keys.sharding.shard_shape(keys.shape)[1] == 3


def test_a_session_takes_rows_at_any_time_and_gives_places_up():
  queue = continuous.Queued.of_prompts(make_prompts(), 1)
  session = continuous.Session(programs(), load()[2], KEY, queue)
  assert session.fill(queue, ["a", "b"]) == 1, "one slot is filled at a time"
  assert session.tags == ["a", None, None]
  assert session.advance(num_done=3, most_calls=1) == []
  assert session.rows.num_calls[0] == 1
  session.fill(queue.take([4]), ["b"])
  session.drop("a")
  [(tag, row)] = session.advance(num_done=3, most_calls=100)
  assert tag == "b"
  assert session.num_free == 3
  [(_, alone)] = continuous.decode(programs(), load()[2], queue.take([4]), KEY)
  same(row, alone)


@pytest.mark.slow
def test_a_buffer_is_what_it_is_in_fixed_batches_and_goes_on_where_it_was_stopped(tmp_path, use_devices, monkeypatch):
  use_devices(1)
  changes = BLOCKS | dict(warm_start__updates=0, rollout__chunk_prompts=2)
  config = tiny.config(**changes)
  parts = build.build_parts(config, epath.Path(tmp_path))

  def generate(begun=None, **others):
    own = tiny.config(**changes | others)
    phase, state = phases.training_phase(own, epath.Path(tmp_path), parts, policy.initial_params(own, parts))
    return phase.buffers.generate(state.replace(step=state.step + 1), 0, begun)

  with jax.set_mesh(parts.mesh):
    wanted = generate(sampler__slots=0)
    polls = []
    monkeypatch.setattr(phases, "check_preemption", lambda: polls.append(None))
    found = generate()
    same(found.rollouts, wanted.rollouts, atol=1e-5)
    np.testing.assert_allclose(found.log_probs.log_p_old, wanted.log_probs.log_p_old, rtol=1e-5)
    left = iter(range(len(polls) // 2, -1, -1))

    def stop():
      if next(left, None) == 0:
        raise Preempted

    monkeypatch.setattr(phases, "check_preemption", stop)
    with pytest.raises(Preempted) as notice:
      generate()
    begun = notice.value.pending
    assert 0 < len(begun.rollouts.num_calls) < 16
    same(generate(begun).rollouts, found.rollouts)
