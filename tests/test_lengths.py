"""Lengths that prompts are padded to: which are chosen, and that a buffer does not depend on them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny
from etils import epath

from dmpo_jax import build, lengths, phases, policy, processes, train
from dmpo_jax.structs import PendingRollouts, Prompts


def prompts(*sizes, width=12):
  is_valid = np.arange(width) >= width - np.array(sizes)[:, None]
  tokens = np.where(is_valid, np.arange(width) + 100 * np.arange(len(sizes))[:, None], 0).astype(np.int32)
  return Prompts(tokens, is_valid, np.arange(len(sizes), dtype=np.uint32))


def test_lengths_are_chosen_for_the_least_padding():
  """Of 10 short, 5 middle and 1 long prompt: two lengths are best kept for the short ones and the long one's."""
  sizes = [20] * 10 + [40] * 5 + [150]
  assert lengths.choose(sizes, 200, 1) == (200,)
  assert lengths.choose(sizes, 200, 2) == (64, 160)  # 15 * 64 + 160, where (32, 160) takes 10 * 32 + 6 * 160
  assert lengths.choose(sizes, 200, 3) == lengths.choose(sizes, 200, 9) == (32, 64, 160)
  assert lengths.choose([3, 5, 150], 155, 2) == (32, 155)  # no longer than they ever are
  assert lengths.choose([3, 5], 18, 4) == (18,)
  # Of 1,024 equally frequent lengths every 128th is best; there are more choices of eight than could be tried.
  assert lengths.choose(range(32, 32769, 32), 32768, 8) == tuple(range(4096, 32769, 4096))


def test_prompts_are_padded_to_the_first_length_that_holds_them():
  given = prompts(3, 6, 2)
  for own, wanted in (((4, 6, 12), 6), ((4, 8, 12), 8), ((2, 12), 12), ((), 12), ((20,), 12)):
    found = lengths.cut(given, own)
    assert found.tokens.shape == found.is_valid.shape == (3, wanted)
    np.testing.assert_array_equal(found.tokens, given.tokens[:, -wanted:])
    assert found.is_valid.sum() == 11
  assert lengths.order(given, (4, 12)).tolist() == [1, 0, 2]
  assert lengths.order(prompts(3, 6, 6), (4, 12)).tolist() == [1, 2, 0]
  assert lengths.order(given, (12,)) is None


WORDS = (1, 29, 4, 16, 29, 2, 9, 5)  # of the prompts, in the order of the file


@pytest.fixture
def task(tmp_path):
  path = tmp_path / "rows.jsonl"
  rows = [{"prompt": f"{index} " + "1 " * num, "answer": str(index)} for index, num in enumerate(WORDS)]
  path.write_text("\n".join(json.dumps(row) for row in rows))
  return path


def learn(task, prompt_lengths, use_devices):
  """Generate a buffer, and take a step on it."""
  use_devices(1)
  config = tiny.config(
    task__name=str(task),
    task__eval_path=str(task),
    task__max_prompt_length=64,
    task__num_train=0,
    task__num_test=0,
    rollout__prompt_lengths=prompt_lengths,
    rollout__chunk_prompts=1,
    train__microbatch_prompts=2,
    objective__wdce__baseline="none",
    warm_start__updates=0,
  )
  parts = build.build_parts(config, epath.Path(task.parent))
  with jax.set_mesh(parts.mesh):
    base = policy.initial_params(config, parts, are_trained=True)
    phase, state = phases.training_phase(config, epath.Path(task.parent), parts, base)
    experience, _ = phase.buffers.complete(state, 0, phase.buffers.generate(state, 0))
    state, metrics = phase.update(state, phase.frozen, experience)
  return experience, *jax.device_get((state.trainable, metrics))


@pytest.mark.slow
def test_a_buffer_does_not_depend_on_the_lengths(task, use_devices):
  """Prompts in the stream's order, the same tokens, scores and gradient, in chunks and microbatches of one length."""
  found, params, metrics = learn(task, 3, use_devices)
  wanted, wanted_params, wanted_metrics = learn(task, 1, use_devices)
  for field in ("completion", "is_counted", "committed_at", "reward", "is_kept"):
    np.testing.assert_array_equal(getattr(found, field), getattr(wanted, field), err_msg=field)
  np.testing.assert_array_equal(found.prompts.tokens, wanted.prompts.tokens)
  for field in ("log_p_old", "log_p_ref", "weight"):
    np.testing.assert_allclose(getattr(found, field), getattr(wanted, field), rtol=1e-5, err_msg=field)
  np.testing.assert_allclose(metrics["loss"], wanted_metrics["loss"], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, wanted_params)


def test_no_program_runs_on_longer_prompts_than_its_own_need():
  """Each is compiled for all lengths when it is first called, and for nothing later."""
  seen = []

  @jax.jit
  def program(scale, prompts):
    seen.append(prompts.tokens.shape)  # once for each shape that is traced
    return scale * prompts.tokens.sum()

  own = (4, 8, 12)
  run = lengths.ahead(program, own)
  given = prompts(6, 3, 2, 12)
  assert run(2.0, lengths.cut(dataclasses.replace(given, tokens=given.tokens * 0 + 1), (8, 12))) == 2 * 4 * 12
  assert sorted(seen) == [(4, 4), (4, 8), (4, 12)]
  count = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: count.append(event) if event.endswith("backend_compile_duration") else None
  )
  for length in own:
    run(2.0, lengths.cut(prompts(1, 2, 3, length), own))
  assert (len(seen), count) == (3, [])
  assert lengths.ahead(program, (12,)) is program


def test_processes_meet_before_each_program(monkeypatch):
  """So one that finds programs in its cache never waits for more than one that another compiles."""
  program = jax.jit(lambda prompts: prompts.tokens.sum())
  met = []
  monkeypatch.setattr(processes, "meet", lambda name, seconds: met.append((name, seconds)))
  run = lengths.ahead(program, (4, 8, 12))
  for width in (8, 12):
    run(prompts(1, 2, width=width))
  assert len(met) == 3


@pytest.mark.parametrize("was_by_length", [True, False])
def test_a_buffer_that_had_begun_in_another_order_begins_again(was_by_length):
  """A checkpoint of before the lengths says nothing of the order, which was the stream's."""
  pending = PendingRollouts(None, None, {})
  for is_by_length in (True, False):
    position = train.Position(is_by_length=True) if was_by_length else train.Position()
    found = train.if_in_order(pending, position, is_by_length)
    assert (found is pending) == (is_by_length == was_by_length)
    assert position.is_by_length == is_by_length
