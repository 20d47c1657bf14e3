"""What an objective gets of rollouts: log-probabilities under the updates' views, and weights until they are quiet."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from etils import epath

from dmpo_jax import build, phases, policy, rollout
from dmpo_jax.grading import Grades
from dmpo_jax.objectives.estimators import ESTIMATORS
from dmpo_jax.objectives.weights import Weighing
from dmpo_jax.policy import Policies
from dmpo_jax.structs import Experience, LogProbs, Prompts, Rollouts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return epath.Path(tmp_path_factory.mktemp("measure"))


def begin(config, folder, use_devices):
  """A phase that starts from parameters at random."""
  use_devices(1)
  with config.unlocked():
    config.warm_start.updates = 0
  parts = build.build_parts(config, folder / "run")
  with jax.set_mesh(parts.mesh):
    return parts, *phases.training_phase(config, folder / "run", parts, policy.initial_params(config, parts))


def groups(config, rows):
  """A buffer's rows [b, ...] as [p, g, ...]."""
  return phases.make_chunking(config).groups(rows)


def collect(phase, state, buffer):
  """A buffer generated and completed by the same policy."""
  return phase.buffers.complete(state, buffer, phase.buffers.generate(state, buffer))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "likelihood", "mask_samples", "kl_weight"),
  [("diffu_grpo", "one_step", 2, 0.04), ("tracerl", "trajectory", 2, 0.04), ("gdpo", "elbo_quadrature", 2, 0.0)],
)
def test_the_first_update_meets_the_views_that_were_measured(
  folder, use_devices, name, likelihood, mask_samples, kl_weight
):
  config = tiny.config(
    seed=3,  # the views are a run's own: another seed's would not meet
    objective__name=name,
    objective__likelihood=likelihood,
    objective__num_mask_samples=mask_samples,
    **{f"objective__{name}__kl_weight": kl_weight, f"objective__{name}__clip": 1e-4},
  )
  parts, phase, state = begin(config, folder, use_devices)
  with jax.set_mesh(parts.mesh):
    experience, _ = collect(phase, state, 0)
    num_measured = 1 if likelihood == "trajectory" else config.train.updates_per_buffer
    assert experience.token_log_p_old.shape[2] == num_measured
    state, metrics = phase.update(state, phase.frozen, experience)
    # ratios are 1 within the clipping of 1e-4, and the policy is still its reference
    assert metrics["loss_clipped"] == 0
    if kl_weight == 0:
      assert experience.token_log_p_ref is None, "nobody reads the reference"
      assert "loss_kl" not in metrics
      return
    assert abs(metrics["loss_kl"]) < 1e-6
    _, metrics = phase.update(state, phase.frozen, experience)
    assert metrics["loss_kl"] >= 0


def test_log_p_old_under_an_updates_own_masks_has_their_noise(folder, use_devices):
  changes = dict(objective__wdce__baseline="model", rollout__chunk_prompts=2, seed=3)
  config = tiny.config(**changes, objective__wdce__old_masks="update")
  parts, phase, state = begin(config, folder, use_devices)
  state = state.replace(step=state.step + 2)  # in the first buffer the policy is its own reference, and is not scored
  with jax.set_mesh(parts.mesh):
    experience, figures = collect(phase, state, 1)
    p, g = experience.reward.shape
    assert experience.token_log_p_old.shape[:3] == (p, g, config.train.updates_per_buffer)
    assert figures["scores_failed"] == 0
    others = np.abs(experience.token_log_p_old[:, :, 0].mean(-1) - experience.log_p_old)
    assert others.mean() > 0.1, "the buffer's log-ratio is of other masks"
    _, metrics = phase.update(state, phase.frozen, experience)
  assert abs(metrics["loss_log_ratio"]) < 1e-4, "the policy has not moved"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_the_reference_follows_every_other_update(folder, use_devices, rank):
  config = tiny.config(
    objective__sync_reference_every=2, model__lora__rank=rank, optim__learning_rate=0.1, train__updates_per_buffer=3
  )
  parts, phase, state = begin(config, folder, use_devices)
  with jax.set_mesh(parts.mesh):
    experience, _ = collect(phase, state, 0)
    assert np.isnan(experience.log_p_old).all(), "the policy is its reference, and no scores are needed"
    # rewards of an untrained policy may all be the same: weights that are not
    weight = np.tile(np.array([0.7, 0.1, 0.1, 0.1], np.float32), (len(experience.reward), 1))
    experience = experience.replace(weight=weight)
    before = jax.device_get(state.reference)
    state, _ = phase.update(state, phase.frozen, experience)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.reference))
    moved, _ = collect(phase, state, 1)
    assert np.abs(moved.log_p_old - moved.log_p_ref).max() > 1e-3
    state, _ = phase.update(state, phase.frozen, experience)
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((state.trainable, state.reference)))
    followed, _ = collect(phase, state, 1)
    assert np.isnan(followed.log_p_old).all()


@pytest.mark.parametrize(
  ("changes", "of_steps"),
  [
    ({}, [0, 2, 2, 2]),  # the run begins at its reference, the base
    (dict(objective__sync_reference_every=4), [0, 2, 0, 2]),
    (dict(objective__sync_reference_every=2), [0, 0, 0, 0]),
    (dict(objective__wdce__unlearning="bounded"), [2, 2, 2, 2]),  # log p_old is read
    (dict(objective__wdce__unlearning="bounded", objective__sync_reference_every=1), [1, 1, 1, 1]),
    (dict(objective__wdce__unlearning="bounded", objective__wdce__old_masks="update"), [0, 2, 2, 2]),
    (dict(objective__name="wddo", objective__sync_reference_every=2), [1, 1, 1, 1]),
    (dict(objective__name="coupled_grpo"), [2, 2, 2, 2]),
    (dict(objective__name="coupled_grpo", objective__coupled_grpo__kl_weight=0.0), [1, 1, 1, 1]),
    (dict(objective__name="coupled_grpo", objective__sync_reference_every=2), [1, 1, 1, 1]),
    (dict(objective__name="wd1"), [0, 0, 0, 0]),
    (dict(objective__likelihood="sampler"), [0, 0, 0, 0]),
    (dict(model__lora__rank=2, model__lora__init_from="adapters"), [2, 2, 2, 2]),
  ],
)
def test_which_policies_score_a_buffer(changes, of_steps):
  """Buffers begin every other update."""
  config = tiny.config(**changes)
  assert [phases.num_scored(config, step) for step in (0, 2, 4, 6)] == of_steps


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_scores_that_are_left_out_would_change_nothing(folder, use_devices, rank):
  """In the first buffer, with rewards that differ: weights and the update are the same to the last bit."""
  config = tiny.config(model__lora__rank=rank, optim__learning_rate=0.1)
  parts, phase, state = begin(config, folder, use_devices)
  found, reward = [], np.random.default_rng(0).random((4, 4), np.float32)
  grades = Grades(reward, reward >= 0, reward > 0.5, per_second=1.0)
  with jax.set_mesh(parts.mesh):
    for is_scored in (True, False):
      buffers = dataclasses.replace(phase.buffers, is_scored=lambda step, is_scored=is_scored: is_scored)
      pending = buffers.generate(state, 0)
      assert (pending.log_probs is not None) == is_scored
      pending = pending.replace(wait=lambda: grades)
      experience, figures = buffers.complete(state, 0, pending)
      assert (figures["log_ratio_std"], figures["elbo_rounds"]) == (0, is_scored)
      updated, metrics = phase.update(jax.tree.map(lambda x: x.copy(), state), phase.frozen, experience)
      found.append(jax.device_get((experience.weight, experience.negative_weight, updated.trainable, metrics["loss"])))
  assert np.ptp(found[0][0]) > 0.5
  jax.tree.map(np.testing.assert_array_equal, *found)


def test_a_teacher_is_the_policy_that_drew_the_buffer(folder, use_devices):
  config = tiny.config(
    objective__name="dtm",
    objective__sync_reference_every=2,
    model__lora__rank=2,
    model__lora__dropout=0.0,
    optim__learning_rate=0.1,
    train__updates_per_buffer=2,
  )
  parts, phase, state = begin(config, folder, use_devices)
  distances = []
  with jax.set_mesh(parts.mesh):
    experience, _ = collect(phase, state, 0)
    reward = np.tile(np.array([1, 0, 0, 0], np.float32), (len(experience.reward), 1))
    for _ in range(3):
      state, metrics = phase.update(state, phase.frozen, experience.replace(reward=reward))
      distances.append(metrics["loss_kl"].item())
  assert distances[0] == pytest.approx(0, abs=1e-6)
  assert distances[1] > 1e-3
  assert distances[2] == pytest.approx(0, abs=1e-6), "the third update is of the next buffer"


@pytest.mark.slow
def test_rounds_of_masks_are_added_until_the_noise_is_small(folder, use_devices):
  adaptive = dict(objective__elbo_rounds="adaptive", objective__max_rounds=3, objective__num_elbo_samples=2)
  for max_noise, rounds in ((1e-9, 3), (1e9, 2)):  # one pair says nothing of its own noise
    config = tiny.config(objective__max_noise=max_noise, objective__sync_reference_every=9, **adaptive)
    parts, phase, state = begin(config, folder, use_devices)
    state = state.replace(reference=jax.tree.map(lambda x: 1.1 * x, state.reference), step=state.step + 1)
    with jax.set_mesh(parts.mesh):
      _, figures = collect(phase, state, 0)
    assert figures["elbo_rounds"] == rounds
    assert phase.buffers.collector.scoring.log_probs._cache_size() == 1, "all rounds are one compiled program"
    assert figures["log_ratio_error"] > 0


def buffer_of_four(reward):
  """One prompt's group as it comes from a sampler that gives log-probabilities."""
  zeros = np.zeros((1, 4), np.float32)
  experience = Experience(
    prompts=Prompts(np.zeros((1, 3), np.int32), np.ones((1, 3), bool), np.zeros(1, np.uint32)),
    completion=np.zeros((1, 4, 2), np.int32),
    is_counted=np.ones((1, 4, 2), bool),
    reward=zeros + reward,
    is_kept=np.ones((1, 4), bool),
    log_p_old=zeros,
    log_p_ref=zeros,
    weight=zeros,
    negative_weight=zeros,
    committed_at=np.zeros((1, 4, 2), np.int32),
  )
  tokens, counts, log_p = np.zeros((1, 4, 2), np.int32), np.full((1, 4), 2, np.int32), np.zeros((1, 4, 2), np.float32)
  return experience, Rollouts(tokens, tokens, log_p, counts, counts, counts, log_p_old=log_p, log_p_ref=log_p)


@pytest.mark.parametrize("weighting", ["tilt", "reward"])
def test_an_effective_sample_size_is_of_shares_not_of_rewards(weighting):
  scoring = rollout.SampledWeights(Weighing(weighting, alpha=1.0))
  _, figures = scoring.complete(Policies(None, None), *buffer_of_four(2), None, 0)
  assert figures.get("effective_sample_size") == (1 if weighting == "tilt" else None)
  assert figures["scores_failed"] == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_rollout_whose_scores_fail_is_dropped_and_counted(value):
  experience, rollouts = buffer_of_four(np.array([0.0, 1.0, 2.0, 9.0]))
  experience.is_kept[0, 2] = False  # its reward failed, so it is not counted again
  rollouts.log_p_old[0, 2:] = value
  scoring = rollout.SampledWeights(Weighing(alpha=1.0))
  weighed, figures = scoring.complete(Policies(None, None), experience, rollouts, None, 0)
  assert figures["scores_failed"] == 1
  np.testing.assert_array_equal(weighed.is_kept, [[True, True, False, False]])
  np.testing.assert_allclose(weighed.weight, [[1 / (1 + np.e), 1 - 1 / (1 + np.e), 0, 0]], rtol=1e-5)
  assert figures["log_ratio_mean"] == 0


def test_a_rollout_with_a_token_that_fails_is_dropped_and_counted():
  experience, rollouts = buffer_of_four(1)
  log_p_old, log_p_ref = np.zeros((2, 1, 4, 3, 2), np.float32)
  log_p_old[0, 1, 2, 0], log_p_ref[0, 3, 0, 1] = np.nan, -np.inf
  scoring = rollout.TokenLogProbs(lambda *batch: None, seed=0, updates_per_buffer=3, num_views=3, with_reference=True)
  log_probs = LogProbs(log_p_old, log_p_ref, np.zeros((1, 4, 3), np.float32))
  experience, figures = scoring.complete(Policies(None, None), experience, rollouts, log_probs, 0)
  assert figures["scores_failed"] == 2
  np.testing.assert_array_equal(experience.is_kept, [[True, False, True, False]])


UNTIL_EOS = dict(objective__counted="until_eos", objective__antithetic=False, sampler__steps=16)


@pytest.mark.slow
@pytest.mark.parametrize("early_exit", [False, True])
@pytest.mark.parametrize("sampler", ["random_order", "llada"])
def test_a_trajectory_is_replayed_as_the_sampler_saw_it(folder, use_devices, sampler, early_exit):
  """Up to the EOS, with what stood behind it: at temperature 1, a call a token, these are the sampler's own numbers."""
  config = tiny.config(
    objective__name="tracerl",
    objective__likelihood="trajectory",
    objective__num_mask_samples=16,
    sampler__name=sampler,
    rollout__early_exit=early_exit,
    rollout__group_size=16,
    **UNTIL_EOS,
  )
  parts, phase, state = begin(config, folder, use_devices)
  assert parts.model.config.embedding_size > parts.model.config.vocab_size
  with jax.set_mesh(parts.mesh):
    pending = phase.buffers.generate(state, 0)
    experience, _ = phase.buffers.complete(state, 0, pending)
    is_counted = experience.is_counted
    rollouts = groups(config, pending.rollouts)
    assert (~is_counted & (np.asarray(rollouts.seen) != parts.tokenizer.mask_token_id)).any()
    replayed = np.where(is_counted, experience.token_log_p_old[:, :, 0], 0)
    np.testing.assert_allclose(replayed, np.log(np.where(is_counted, rollouts.confidence, 1)), atol=1e-5)
    _, metrics = phase.update(state, phase.frozen, experience)
  assert abs(metrics["loss_kl"]) < 1e-6, "the update sees the same states"


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", [*ESTIMATORS, "sampler"])
def test_what_stands_behind_the_eos_changes_no_log_probability_weight_or_loss(folder, use_devices, likelihood):
  config = tiny.config(
    objective__likelihood=likelihood,
    objective__num_mask_samples=2,
    objective__num_elbo_samples=3 if likelihood == "coupled" else 2,
    objective__sync_reference_every=9,
    sampler__name="random_order",
    **UNTIL_EOS,
  )
  parts, phase, state = begin(config, folder, use_devices)
  state = state.replace(reference=jax.tree.map(lambda x: 1.1 * x, state.reference), step=state.step + 1)
  with jax.set_mesh(parts.mesh):
    pending = phase.buffers.generate(state, 0)
    drawn = groups(config, pending.rollouts)
    completion = drawn.completion
    is_counted = np.asarray(rollout.count_positions(completion, parts.tokenizer.end_token_ids, "until_eos"))
    other = np.where(is_counted, completion, 14)
    assert (~is_counted).any(-1).sum() > 4
    scoring = phases.training_scoring(config, parts.model, parts.mesh)
    policies = Policies(state.trainable, phase.frozen, state.reference)
    prompts, _ = parts.prompts.batch(0, config.rollout.num_prompts)
    if scoring.score:
      both = [drawn.replace(completion=tokens) for tokens in (completion, other)]
      scored = [jax.device_get(scoring.score(policies, prompts, rollouts, is_counted, 0)) for rollouts in both]
      jax.tree.map(np.testing.assert_array_equal, *scored)
    experience, _ = phase.buffers.complete(state, 0, pending)
    weight = np.tile(np.array([0.7, 0.1, 0.1, 0.1], np.float32), (len(experience.reward), 1))
    losses = []
    for tokens in (experience.completion, other):
      _, metrics = phase.update(
        jax.tree.map(lambda x: x.copy(), state), phase.frozen, experience.replace(completion=tokens, weight=weight)
      )
      losses.append(jax.device_get(metrics))
  assert losses[0]["grad_norm"] > 0
  jax.tree.map(np.testing.assert_array_equal, *losses)
