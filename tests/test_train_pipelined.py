"""Buffers drawn before the updates on the one before: as a plain loop would do it, and interrupted like any run."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from etils import epath
from remains import die_at_save, leave_alone, policy_of, rows_of

from dmpo_jax import build, chunks, phases, policy, train
from dmpo_jax.run.preemption import Preempted


def config(**overrides):
  """Without a baseline every rollout is learned from: rewards of a policy at random may all be the same.

  Bounded unlearning needs log p_old, so every buffer is scored.
  """
  own = dict(rollout__pipelined=True, rollout__chunk_prompts=2, objective__wdce__baseline="none", warm_start__updates=0)
  own |= dict(objective__wdce__unlearning="bounded")
  return tiny.config(**own | overrides)


@pytest.fixture(autouse=True)
def one_device(use_devices):
  use_devices(1)


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
  """A pipelined run that nothing interrupts."""
  return leave_alone(config(), tmp_path_factory.mktemp("left_alone"))


def collect(phase, state, buffer):
  return phase.buffers.complete(state, buffer, phase.buffers.generate(state, buffer))


def test_a_buffer_is_drawn_by_the_policy_that_the_one_before_begins_with(left_alone, tmp_path):
  """The plain twin, which finishes every buffer before it goes on."""
  own, workdir = config(), epath.Path(tmp_path / "run")
  parts = build.build_parts(own, workdir)
  with jax.set_mesh(parts.mesh):
    phase, state = phases.training_phase(own, workdir, parts, policy.initial_params(own, parts))
    rewards, (experience, figures) = [], collect(phase, state, 0)
    for buffer in range(own.train.num_buffers):
      following = collect(phase, state, buffer + 1)
      for _ in range(own.train.updates_per_buffer):
        state, _ = phase.update(state, phase.frozen, experience)
      rewards.append((figures["reward_mean"], figures["log_ratio_std"]))
      experience, figures = following
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.trainable), policy_of(left_alone))
  assert rewards == [(row["reward_mean"], row["log_ratio_std"]) for row in rows_of(left_alone)[1:]]
  assert rewards[1][1] == 0  # the second buffer's policy is the base, as it is the first one's
  assert rewards[2][1] > 0


def saved_at(workdir, name):
  """The parts of a checkpoint, less what every one has."""
  folder = workdir / "checkpoints" / "train" / name
  return {path.name for path in folder.iterdir() if path.is_dir()} - {"progress"}


def num_drawn(workdir, name):
  """The rollouts of the coming buffer that a checkpoint has sampled, and those that it has scored; four of a prompt."""
  path = (workdir / "checkpoints" / "train" / name / "drawn").resolve()
  saved = ocp.StandardCheckpointer().metadata(path).item_metadata.tree
  return saved["rollouts"]["completion"].shape[0], saved["log_probs"]["entropy"].shape[0] if saved["log_probs"] else 0


def test_no_buffer_is_drawn_after_the_last(left_alone):
  assert saved_at(left_alone, "4") == {"state", "drawn"}
  assert saved_at(left_alone, "6") == {"state"}


def notice_at_poll(patch, number):
  """Let a notice of preemption come when programs on a buffer's chunks ask for one for the `number`-th time."""
  count = [0]

  def listen():
    count[0] += 1
    if count[0] == number:
      raise Preempted

  patch.setattr(chunks, "check_preemption", listen)


@pytest.mark.slow
def test_an_interrupted_run_ends_as_if_left_alone(left_alone, tmp_path, monkeypatch):
  """Twice while one buffer is drawn, while the next is, in the middle of one, between two, and after a shorter run."""
  workdir = epath.Path(tmp_path / "run")
  interruptions = (
    (notice_at_poll, 2, Preempted, "0", {"state", "drawn"}),  # a buffer: 2 chunks are sampled, then scored
    (notice_at_poll, 3, Preempted, "0.1", {"state", "drawn"}),
    (notice_at_poll, 3, Preempted, "0.2", {"state", "experience", "drawn"}),
    (die_at_save, 1, KeyboardInterrupt, "1", {"state", "experience", "drawn"}),
    (die_at_save, 2, KeyboardInterrupt, "2", {"state", "drawn"}),  # the first is of the step that it begins at
  )
  drawn = []
  for interrupt, number, error, name, wanted in interruptions:
    with monkeypatch.context() as patch:
      interrupt(patch, number)
      with pytest.raises(error):
        train.main(config(), workdir)
    assert saved_at(workdir, name) == wanted
    drawn.append(num_drawn(workdir, name))
  assert drawn == [(8, 0), (16, 8), (8, 0), (16, 16), (16, 16)]  # no finished chunk is lost, none is drawn again
  train.main(config(train__num_buffers=2, checkpoint__keep=1), workdir)
  assert saved_at(workdir, "4") == {"state"}
  train.main(config(), workdir)  # the third buffer's policy is that of step 2
  jax.tree.map(np.testing.assert_array_equal, policy_of(workdir), policy_of(left_alone))
  of_buffers = [name for name in rows_of(left_alone)[1] if not name.startswith("eval_")]
  for row, wanted in zip(rows_of(workdir)[1:], rows_of(left_alone)[1:], strict=True):
    assert {name: row[name] for name in of_buffers} == {name: wanted[name] for name in of_buffers}


@pytest.mark.slow
def test_a_buffer_whose_last_rounds_are_interrupted_is_kept(tmp_path, monkeypatch):
  """Rounds of further masks are scored once rewards are known: what was generated before them is saved."""
  own = dict(objective__elbo_rounds="adaptive", objective__max_noise=1e-9, objective__max_rounds=2)
  own = config(rollout__pipelined=False, train__num_buffers=2, **own)
  workdir, alone = epath.Path(tmp_path / "run"), leave_alone(own, tmp_path / "alone")
  with monkeypatch.context() as patch:
    notice_at_poll(patch, 9)  # in the second buffer, after two chunks were sampled and scored; the first has no noise
    with pytest.raises(Preempted):
      train.main(own, workdir)
  assert saved_at(workdir, "2.1") == {"state", "drawn"}
  assert num_drawn(workdir, "2.1") == (16, 16)
  train.main(own, workdir)
  jax.tree.map(np.testing.assert_array_equal, policy_of(workdir), policy_of(alone))
