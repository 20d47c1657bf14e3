"""The gradient step: microbatches, devices and padding change nothing; what is not finite is skipped."""

import jax
import numpy as np
import pytest
import tiny
from etils import epath

from dmpo_jax import build, phases, rollout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return epath.Path(tmp_path_factory.mktemp("update"))


def begin(config, folder, num_devices, use_devices):
  use_devices(num_devices)
  config.warm_start.updates = 0  # the base is random here, and saved nowhere
  parts = build.build_parts(config, folder / "run")
  with jax.set_mesh(parts.mesh):
    return parts, *phases.training_phase(config, folder / "run", parts, build.initial_params(config, parts))


def experience_of(parts, config):
  """A buffer with rewards and weights that differ inside each group."""
  p, g, c = config.rollout.num_prompts, config.rollout.group_size, config.sampler.completion_length
  rng = np.random.default_rng(0)
  prompts, _ = parts.prompts.batch(0, p)
  weight, negative = rng.dirichlet(np.ones(g), (2, p)).astype(np.float32)
  completion = rng.integers(12, 16, (p, g, c)).astype(np.int32)
  demonstrations = rollout.demonstrate(prompts, completion[:, 0])
  zeros = np.zeros((p, g), np.float32)
  return demonstrations.replace(
    completion=completion,
    is_counted=np.ones((p, g, c), bool),
    reward=zeros,
    is_kept=np.ones((p, g), bool),
    log_p_old=zeros,
    log_p_ref=zeros,
    weight=weight,
    negative_weight=negative,
  )


def step_of(begun, experience):
  """The parameters and metrics after one update from a fresh state."""
  parts, phase, state = begun
  with jax.set_mesh(parts.mesh):
    state, metrics = phase.update(state, phase.frozen, experience)
  return jax.device_get((state, metrics))


@pytest.mark.parametrize("baseline", ["negative", "model"])
def test_microbatches_and_devices_change_nothing(folder, use_devices, baseline):
  whole = tiny.config(objective__baseline=baseline, optim__learning_rate=0.1)
  parted = tiny.config(objective__baseline=baseline, optim__learning_rate=0.1, train__microbatch_prompts=1)
  sharded = tiny.config(objective__baseline=baseline, optim__learning_rate=0.1, sharding__fsdp=2, sharding__tensor=2)
  results = []
  for config, num_devices in ((whole, 1), (parted, 1), (sharded, 8)):
    begun = begin(config, folder, num_devices, use_devices)
    results.append(step_of(begun, experience_of(begun[0], config)))
  (state, metrics), *others = results
  assert metrics["grad_norm"] > 0
  for other_state, other_metrics in others:
    for name, value in metrics.items():
      np.testing.assert_allclose(other_metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    moments = jax.tree.leaves(state.opt_state), jax.tree.leaves(other_state.opt_state)
    for ours, theirs in zip(*moments, strict=True):
      np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-6)


def test_what_is_not_finite_changes_only_the_counters(folder, use_devices):
  config = tiny.config()
  parts, phase, state = begin(config, folder, 1, use_devices)
  experience = experience_of(parts, config)
  bad = experience.replace(weight=np.full_like(experience.weight, np.nan))
  before = jax.device_get((state.trainable, state.opt_state))
  with jax.set_mesh(parts.mesh):
    given, _ = phase.update(state, phase.frozen, bad)
    state, _ = phase.update(given, phase.frozen, bad)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given)), "its memory is the new state's"
    assert (int(state.step), int(state.num_skipped), int(state.num_skipped_in_a_row)) == (2, 2, 2)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get((state.trainable, state.opt_state)))
    state, metrics = phase.update(state, phase.frozen, experience)
  assert np.isfinite(metrics["loss"])
  assert (int(state.step), int(state.num_skipped), int(state.num_skipped_in_a_row)) == (3, 2, 0)
  assert np.abs(jax.device_get(state.trainable)["embedding"] - before[0]["embedding"]).max() > 0


def test_a_skipped_update_syncs_the_reference_too(folder, use_devices):
  """The reference of the buffer that follows is the policy that draws it, whether or not the last update was taken."""
  own = dict(model__lora__rank=2, model__lora__dropout=0.0, optim__learning_rate=0.1)
  config = tiny.config(objective__name="dtm", objective__sync_reference_every=2, **own)
  parts, phase, state = begin(config, folder, 1, use_devices)
  rewards = np.eye(config.rollout.num_prompts, config.rollout.group_size, dtype=np.float32)
  experience = experience_of(parts, config).replace(reward=rewards)
  bad = experience.replace(reward=np.nan * rewards)
  with jax.set_mesh(parts.mesh):
    state, _ = phase.update(state, phase.frozen, experience)
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), *jax.device_get((state.trainable, state.reference)))
    assert max(jax.tree.leaves(gaps)) > 0, "not due yet"
    state, _ = phase.update(state, phase.frozen, bad)
    assert int(state.num_skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((state.trainable, state.reference)))
    _, metrics = phase.update(state, phase.frozen, experience)
  np.testing.assert_allclose(metrics["loss_kl"], 0, atol=1e-6)


def test_adapters_learn_and_dropout_is_in_the_gradient_step_alone(folder, use_devices):
  config = tiny.config(model__lora__rank=2, model__lora__dropout=0.5, optim__learning_rate=0.1)
  parts, phase, state = begin(config, folder, 1, use_devices)
  experience = experience_of(parts, config)
  before = jax.device_get(state.trainable)
  assert set(before["blocks"]) == {"q_proj", "k_proj", "v_proj", "up_proj"}
  after, metrics = step_of((parts, phase, state), experience)
  assert np.abs(after.trainable["blocks"]["q_proj"]["B"]).max() > 0, "adapters start at B = 0 and move"
  without = begin(tiny.config(model__lora__rank=2, model__lora__dropout=0.0), folder, 1, use_devices)
  _, plain = step_of(without, experience)
  np.testing.assert_allclose(metrics["loss"], plain["loss"], rtol=1e-5, err_msg="B = 0: dropout has nothing to drop")
  assert abs(metrics["grad_norm"] - plain["grad_norm"]) > 1e-4, "but the gradient of B sees it"


def test_nothing_is_compiled_after_the_first_iteration(folder, use_devices):
  """Buffers of other prompts and completions run the programs that are there: rollouts, scores, weights, updates."""
  config = tiny.config(rollout__chunk_prompts=2, sampler__name="parallel", objective__replicates="adaptive")
  parts, phase, state = begin(config, folder, 1, use_devices)
  compiled, counts = [], []

  def note(event, *_, **about):
    if event.endswith("backend_compile_duration"):
      compiled.append(about)

  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    with jax.set_mesh(parts.mesh):
      for buffer in range(3):
        experience, _ = phase.finish(state, phase.draw(state, buffer), buffer)
        for _ in range(2):
          state, _ = phase.update(state, phase.frozen, experience)
        counts.append(len(compiled))
  finally:
    jax.monitoring.unregister_event_duration_listener(note)
  assert 3 <= counts[0] <= 12, "the sampler, the scores, the update, and few that are small"
  assert counts[1:] == [counts[0]] * 2
