"""A buffer's way: nothing depends on batch, padding or devices; failed rewards drop out and are counted."""

import functools
import itertools
import math
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath

from dmpo_jax import build, chunks, phases, policy, rollout, sharding, structs
from dmpo_jax.chunks import Chunking
from dmpo_jax.config import ConfigError
from dmpo_jax.grading import Grades, Grading
from dmpo_jax.hub.tokenizer import load_tokenizer
from dmpo_jax.logprobs import make_log_probs
from dmpo_jax.objectives import weights
from dmpo_jax.objectives.estimators import Elbo
from dmpo_jax.objectives.masking import MaskSampling
from dmpo_jax.policy import NotFinite, Policies
from dmpo_jax.rollout_metrics import describe, lack_of_signal, log_confidence
from dmpo_jax.run import progress
from dmpo_jax.run.preemption import Preempted
from dmpo_jax.tasks.sudoku import Sudoku


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return epath.Path(tmp_path_factory.mktemp("rollout"))


def collect(config, folder, use_devices, num_devices=1, task=None):
  """One buffer from random parameters."""
  use_devices(num_devices)
  parts = build.build_parts(config, folder / "run")
  objective = config.objective
  with jax.set_mesh(parts.mesh):
    params = policy.initial_params(config, parts)
    reference = jax.tree.map(lambda x: x * 1.1, params)
    is_sampled = objective.likelihood == "sampler"
    sample = policy.make_sample(
      config,
      parts.model,
      parts.mesh,
      group_size=config.rollout.chunk_rollouts or config.rollout.group_size,
      temperature=1.0,
      early_exit=config.rollout.early_exit,
      with_reference=is_sampled,
    )
    scoring = rollout.SampledWeights(phases.make_weighing(config))
    if not is_sampled:
      estimator = Elbo(MaskSampling(2, min_ratio=0.1))
      scoring = rollout.EstimatedWeights(
        make_log_probs(parts.model, parts.mesh, estimator),
        phases.make_weighing(config),
        seed=config.seed,
        chunking=phases.make_chunking(config),
      )
    collector = rollout.Collector(
      sample=lambda policies: functools.partial(
        sharding.within(parts.rollout_mesh, sample), sharding.move(policies, parts.rollout_mesh)
      ),
      scoring=scoring,
      grading=Grading(task=task) if task else parts.grading,
      tokenizer=parts.tokenizer,
      seed=config.seed,
      chunking=phases.make_chunking(config),
      counted=objective.counted,
    )
    policies = Policies(params, reference)
    batch = rollout.Batch(3, *parts.prompts.batch(0, config.rollout.num_prompts))
    return collector.complete(collector.generate(policies, batch), policies)


@pytest.mark.slow
def test_chunks_padding_and_devices_change_nothing(folder, use_devices):
  plain, metrics = collect(tiny.config(), folder, use_devices)
  assert np.abs(plain.log_p_ref - plain.log_p_old).max() > 0.01
  assert len({row.tobytes() for row in plain.completion.reshape(-1, 16)}) > 8, "rollouts differ"
  others = (
    (tiny.config(rollout__chunk_prompts=2), 1),
    (tiny.config(task__max_prompt_length=26), 1),
    (tiny.config(sharding__data=2, sharding__fsdp=-1, sharding__tensor=2), 8),
    (tiny.config(sharding__fsdp=8, sharding__rollout__fsdp=1, sharding__rollout__tensor=2), 8),
    (tiny.config(sharding__data=3, model__layer_rows=2), 3),  # 16 rows
  )
  for config, num_devices in others:
    other, _ = collect(config, folder, use_devices, num_devices)
    np.testing.assert_array_equal(other.completion, plain.completion)
    np.testing.assert_allclose(other.log_p_old, plain.log_p_old, rtol=1e-5)
    np.testing.assert_allclose(other.log_p_ref, plain.log_p_ref, rtol=1e-5)
    np.testing.assert_allclose(other.weight, plain.weight, atol=1e-4)
  assert metrics["tokens_per_call"] == 4
  assert metrics["log_ratio_std"] > 0
  assert np.isnan(metrics["log_ratio_error"]), "a single pair says nothing of its own noise"


@pytest.mark.slow
def test_log_probabilities_from_the_sampler(folder, use_devices):
  own = dict(sampler__name="random_order", sampler__steps=16, objective__likelihood="sampler")
  whole, metrics = collect(tiny.config(**own), folder, use_devices)
  assert (whole.log_p_old < 0).all()
  assert (whole.log_p_ref != whole.log_p_old).all()
  np.testing.assert_allclose(whole.weight.sum(1), 1, rtol=1e-6)
  np.testing.assert_allclose(metrics["entropy"], -whole.log_p_old.mean() / 16, rtol=1e-5)
  own |= dict(objective__counted="until_eos", rollout__early_exit=True, rollout__chunk_prompts=2)
  early, metrics = collect(tiny.config(**own), folder, use_devices)
  assert metrics["calls_saved"] > 0
  np.testing.assert_array_equal(early.completion[early.is_counted], whole.completion[early.is_counted])
  assert (early.log_p_old >= whole.log_p_old - 1e-4).all()  # fewer positions
  assert (early.log_p_old > whole.log_p_old + 1).any()


@pytest.mark.slow
def test_a_larger_buffer_begins_with_the_smaller_one(folder, use_devices):
  small, _ = collect(tiny.config(rollout__num_prompts=2, rollout__group_size=2), folder, use_devices)
  large, _ = collect(tiny.config(rollout__num_prompts=4, rollout__group_size=4), folder, use_devices)
  np.testing.assert_array_equal(large.completion[:2, :2], small.completion)
  np.testing.assert_allclose(large.log_p_old[:2, :2], small.log_p_old, rtol=1e-5)


def test_a_prompt_that_a_buffer_holds_twice_is_drawn_twice(folder, use_devices):
  """The buffer begins at record 0, so of three records the fourth prompt is of the second epoch."""
  config = tiny.config(task__num_train=3, rollout__num_prompts=4)
  experience, _ = collect(config, folder, use_devices)
  texts = [row.tobytes() for row in experience.prompts.tokens]
  first, again = texts.index(texts[3]), 3
  assert first < again
  assert (experience.completion[first] != experience.completion[again]).any(-1).all()
  assert (experience.log_p_old[first] != experience.log_p_old[again]).all()


def test_failed_rewards_drop_out_of_their_group(folder, use_devices, caplog):
  calls = []

  class Broken(Sudoku):
    def reward(self, record, completion):
      calls.append(completion)
      if len(calls) == 1:
        raise RuntimeError("the grader broke")
      return float("nan") if len(calls) == 2 else len(calls) / 100

  task = Broken(min_blanks=4, max_blanks=10, demo_patience=11.0)
  experience, metrics = collect(tiny.config(), folder, use_devices, task=task)
  assert metrics["rewards_failed"] == 2
  np.testing.assert_array_equal(experience.is_kept[0], [False, False, True, True])
  assert experience.is_kept[1:].all()
  np.testing.assert_array_equal(experience.weight[0, :2], 0)
  np.testing.assert_allclose(experience.weight.sum(1), 1, rtol=1e-6)
  np.testing.assert_allclose(experience.negative_weight.sum(1), 1, rtol=1e-6)
  assert metrics["reward_mean"] >= 0.03
  assert "the grader broke" in caplog.text
  assert "nan" in caplog.text


def test_chunks_are_drawn_while_earlier_ones_are_graded():
  """A grader that goes on once all chunks are there, and says so if that took too long."""
  p, g, c, is_drawn, in_time = 4, 2, 16, threading.Event(), []

  class Patient(Sudoku):
    def reward(self, record, completion):
      in_time.append(is_drawn.wait(timeout=2))
      is_drawn.set()  # a draw that waits for rewards is not to wait for every one of them
      return 1.0

  def sample(prompts, key, first):
    shape = (len(prompts.prompt_id), g, c)
    count = np.ones(shape[:2], np.int32)
    return structs.Rollouts(
      np.full(shape, 12, np.int32), np.zeros(shape, np.int32), np.ones(shape), count, count, count
    )

  task = Patient(min_blanks=4, max_blanks=10, demo_patience=11.0)
  prompts = structs.Prompts(np.zeros((p, 3), np.int32), np.ones((p, 3), bool), np.arange(p))
  collector = rollout.Collector(
    sample=lambda policies: sample,
    scoring=rollout.RewardsOnly(),
    grading=Grading(task=task),
    tokenizer=load_tokenizer("sentencepiece", tiny.config().tokenizer.path, is_chat=False),
    seed=0,
    chunking=Chunking(g, prompts=1),
    counted="all",
  )
  pending = collector.generate(Policies(None, None), rollout.Batch(0, prompts, list(task.generate("test", p, 0))))
  is_drawn.set()
  assert (pending.wait().reward == np.ones((p, g))).all()
  assert in_time == [True] * p * g


@pytest.mark.slow
def test_the_rest_of_a_buffer_is_drawn_in_chunks_of_another_size(folder, use_devices):
  """An earlier start had sampled three prompts and scored two; of its work whole chunks are taken."""
  use_devices(1)
  config, asked = tiny.config(warm_start__updates=0, rollout__chunk_prompts=1), []
  parts = build.build_parts(config, folder / "run")

  def phase_of(size):
    own = tiny.config(warm_start__updates=0, rollout__chunk_prompts=size)
    phase, state = phases.training_phase(own, folder / "run", parts, policy.initial_params(own, parts))
    return phase, state.replace(step=state.step + 1)  # from which on rollouts are scored

  with jax.set_mesh(parts.mesh):
    phase, state = phase_of(1)
    whole = phase.buffers.generate(state, 0)
    begun = structs.PendingRollouts(
      rollouts=jax.tree.map(lambda x: x[:12], whole.rollouts),
      log_probs=jax.tree.map(lambda x: x[:8], whole.log_probs),
      seconds={"sample": np.float32(1000), "score": np.float32(0)},
      is_whole=np.array(False),
    )
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(progress, "part", lambda what, done=0, total=0: asked.append((what, done)))
      rest = phase_of(2)[0].buffers.generate(state, 0, begun)
    assert asked == [("sampling prompts", 2), ("scoring prompts", 2)]
    assert rest.is_whole
    np.testing.assert_array_equal(rest.rollouts.completion, whole.rollouts.completion)
    np.testing.assert_array_equal(rest.log_probs.log_p_old[:8], whole.log_probs.log_p_old[:8])
    np.testing.assert_allclose(rest.log_probs.log_p_old, whole.log_probs.log_p_old, rtol=1e-5)
    assert 1000 < rest.seconds["sample"] < 2000
    rewards = [phase.buffers.complete(state, 0, pending)[0].reward for pending in (rest, whole)]
  np.testing.assert_array_equal(*rewards)


def begin(config, folder, use_devices):
  """A phase that starts from parameters at random, and its reference other ones."""
  use_devices(1)
  parts = build.build_parts(config, folder / "run")
  with jax.set_mesh(parts.mesh):
    params = policy.initial_params(config, parts)
    phase, state = phases.training_phase(config, folder / "run", parts, jax.tree.map(lambda x: 1.1 * x, params))
    return parts, phase, state.replace(trainable=params, step=state.step + 1)


SPLIT = dict(rollout__chunk_prompts=1, rollout__chunk_rollouts=2)  # of four


@pytest.mark.parametrize("objective", ["wdce", pytest.param("coupled_grpo", marks=pytest.mark.slow)])
def test_a_group_that_is_split_over_chunks_is_the_whole_group(folder, use_devices, objective):
  own = dict(objective__name=objective, objective__num_elbo_samples=4, warm_start__updates=0)
  own |= dict(objective__likelihood="coupled", objective__num_mask_samples=3) if objective == "coupled_grpo" else {}
  found = []
  for config in (tiny.config(**own), tiny.config(**own, **SPLIT)):
    parts, phase, state = begin(config, folder, use_devices)
    with jax.set_mesh(parts.mesh):
      pending = phase.buffers.generate(state, 0)
      found.append((pending, *phase.buffers.complete(state, 0, pending)))
  (whole, experience, metrics), (split, split_experience, split_metrics) = found
  assert (whole.log_probs.log_p_old != whole.log_probs.log_p_ref).any()
  np.testing.assert_array_equal(split.rollouts.completion, whole.rollouts.completion)
  np.testing.assert_array_equal(split.rollouts.committed_at, whole.rollouts.committed_at)
  for ours, theirs in zip(*(jax.tree.leaves(each.log_probs) for each in (split, whole)), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
  np.testing.assert_array_equal(split_experience.reward, experience.reward)
  np.testing.assert_allclose(split_experience.weight, experience.weight, rtol=1e-3, atol=1e-6)
  assert split_metrics["reward_mean"] == metrics["reward_mean"]


@pytest.mark.slow
@pytest.mark.parametrize("polls", [2, 5, 12])  # of eight chunks that are sampled, then scored: in the middle of a group
def test_a_group_that_was_interrupted_in_its_middle_goes_on_from_there(folder, use_devices, monkeypatch, polls):
  parts, phase, state = begin(tiny.config(**SPLIT, warm_start__updates=0), folder, use_devices)
  count = itertools.count(1)

  def listen():
    if next(count) == polls:
      raise Preempted

  with jax.set_mesh(parts.mesh):
    alone = phase.buffers.generate(state, 0)
    with monkeypatch.context() as patch:
      patch.setattr(chunks, "check_preemption", listen)
      with pytest.raises(Preempted) as notice:
        phase.buffers.generate(state, 0)
    begun = notice.value.pending
    num_scored = 0 if begun.log_probs is None else len(begun.log_probs.entropy)
    assert (len(begun.rollouts.completion), num_scored) == (2 * min(polls - 1, 8), 2 * max(polls - 9, 0))
    rest = phase.buffers.generate(state, 0, begun)
  for ours, theirs in zip(jax.tree.leaves(rest.rollouts), jax.tree.leaves(alone.rollouts), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  jax.tree.map(np.testing.assert_array_equal, rest.log_probs, alone.log_probs)


def test_a_reward_is_asked_once_for_each_rollout_of_a_split_group(folder, use_devices):
  asked = []

  class Asked(Sudoku):
    def reward(self, record, completion):
      asked.append((record["puzzle"], completion))
      return float(len(asked))

  experience, _ = collect(
    tiny.config(**SPLIT), folder, use_devices, task=Asked(min_blanks=4, max_blanks=10, demo_patience=11.0)
  )
  np.testing.assert_array_equal(experience.reward, np.arange(1, 17).reshape(4, 4))
  assert len(asked) == 16
  assert [puzzle for puzzle, _ in asked] == [puzzle for puzzle, _ in asked[::4] for _ in range(4)]


@pytest.mark.parametrize(
  ("reward", "compares", "said"),
  [
    ([[0, 0], [0, 0]], True, "no signal: all rewards equal in 2 of 2 groups, all are 0"),
    ([[0, 0], [0, 0]], False, "no signal: all rewards equal in 2 of 2 groups, all are 0"),
    ([[1, 1], [2, 2]], True, "no signal: all rewards equal in 2 of 2 groups"),
    ([[1, 1], [2, 2]], False, ""),
    ([[1, 1], [2, 1]], True, ""),
    (
      [[1], [2]],
      True,
      "no signal: all rewards equal in 2 of 2 groups, as rollout.group_size=1 leaves nothing to compare",
    ),
    ([[1, math.nan], [2, 2]], True, "no signal: all rewards equal in 2 of 2 groups"),
  ],
)
def test_rewards_that_teach_nothing_are_told(reward, compares, said):
  reward = np.array(reward, np.float32)
  assert lack_of_signal(reward, np.isfinite(reward), compares=compares) == said


def test_parts_that_differ_teach_though_their_sums_are_equal():
  parts, is_kept = np.array([[[1.0, 0.0], [0.0, 1.0]]]), np.ones((1, 2), bool)
  assert lack_of_signal(parts.sum(-1), is_kept, compares=True).startswith("no signal")
  assert lack_of_signal(parts, is_kept, compares=True) == ""
  assert lack_of_signal(parts[:, :1].repeat(2, 1), is_kept, compares=True).startswith("no signal")


PARTS = """
REWARD_PARTS = ("length", "digits")

def records(split):
  return [{"n": n} for n in (range(100, 164) if split == "train" else range(164, 180))]

def prompt(record):
  return f"({record['n']}="

def reward(record, completion):
  if len(completion) % 5 == 4:
    raise ValueError("some fail")
  return {"digits": float(sum(map(str.isdigit, completion))), "length": len(completion) / 100}
"""


def test_parts_of_the_rewards_reach_the_weights_and_the_log(folder, use_devices, tmp_path):
  (tmp_path / "task.py").write_text(PARTS)
  scaling = dict(objective__reward_scaling="standardise_parts", objective__part_weights=(2.0, 1.0))
  config = tiny.config(task__name=str(tmp_path / "task.py"), rollout__chunk_prompts=2, warm_start__updates=0, **scaling)
  experience, metrics = collect(config, folder, use_devices)
  parts, is_kept = experience.reward_parts, experience.is_kept
  assert parts.dtype == np.float32
  assert 0 < is_kept.sum() < is_kept.size
  assert not parts[~is_kept].any()
  np.testing.assert_allclose(parts.sum(-1), experience.reward, rtol=1e-6)
  for index, name in enumerate(("length", "digits")):
    assert metrics[f"reward_{name}"] == pytest.approx(parts[..., index][is_kept].mean())
  reward, parts, is_kept = map(jnp.asarray, (experience.reward, parts, is_kept))
  scaled = weights.scale_rewards(reward, parts, is_kept, "standardise_parts", (2.0, 1.0))
  logits = scaled / config.objective.alpha + experience.log_p_ref - experience.log_p_old
  np.testing.assert_allclose(experience.weight, weights.softmax_kept(logits, is_kept), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
  ("name", "weights", "problem"),
  [
    ("sudoku", (), "reward_scaling='standardise_parts': a reward of task.name='sudoku' is one number"),
    (
      "task.py",
      (1.0,),
      r"part_weights=\(1.0,\): the rewards of .*task.py' have 2 parts, length, digits",
    ),
  ],
)
def test_parts_that_the_task_has_not_are_refused_before_work_starts(folder, tmp_path, name, weights, problem):
  (tmp_path / "task.py").write_text(PARTS)
  config = tiny.config(objective__reward_scaling="standardise_parts", objective__part_weights=weights)
  config.task.name = str(tmp_path / name) if name.endswith(".py") else name
  with pytest.raises(ConfigError, match=problem):
    build.build_parts(config, folder / "run")


def test_parameters_that_are_not_finite_stop_the_first_call(folder, use_devices):
  use_devices(1)
  config = tiny.config(warm_start__updates=0)
  parts = build.build_parts(config, folder / "run")
  with jax.set_mesh(parts.mesh):
    params = jax.tree.map(lambda x: x * np.nan, policy.initial_params(config, parts))
    phase, state = phases.training_phase(config, folder / "run", parts, params)
    for work in (lambda: phase.buffers.generate(state, 0), lambda: phase.evaluate(state.trainable, 0)):
      with pytest.raises(NotFinite, match="of 16 rollouts has finite probabilities: the parameters hold NaN"):
        work()


def test_counted_positions_end_with_the_first_eos():
  completion = np.array([[5, 2, 5, 2], [5, 5, 5, 5], [2, 2, 2, 2]], np.int32)
  until = rollout.count_positions(completion, (2,), "until_eos")
  np.testing.assert_array_equal(until, [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
  assert rollout.count_positions(completion, (2,), "all").all()
  several = rollout.count_positions(np.array([[5, 3, 2, 2], [2, 3, 5, 5]], np.int32), (2, 3), "until_eos")
  np.testing.assert_array_equal(several, [[1, 1, 0, 0], [1, 0, 0, 0]])


def test_rollouts_that_differ_behind_their_eos_alone_are_the_same():
  completion = np.array([[[5, 2, 2, 2], [5, 2, 6, 2], [5, 6, 2, 2], [5, 2, 7, 7]]], np.int32)
  count = np.full((1, 4), 4)
  rollouts = structs.Rollouts(completion, 0 * completion, np.full(completion.shape, 0.5), count, count, 0 * count)
  grades = Grades(np.eye(1, 4), np.ones((1, 4), bool), np.ones((1, 4), bool))
  figures = describe(grades, rollouts, rollout.count_positions(completion, (2,), "until_eos"), (2,))
  np.testing.assert_allclose(figures["unique_rollouts"], 1 / (9 / 16 + 1 / 16), rtol=1e-6)


def test_what_the_log_says_of_completions():
  completion = np.array([[[5, 2, 2, 2], [5, 5, 5, 5]]], np.int32)
  rollouts = structs.Rollouts(
    completion, completion * 0, np.full((1, 2, 4), 0.5), np.array([[2, 2]]), np.array([[4, 2]]), np.array([[0, 1]])
  )
  grades = Grades(np.array([[1.0, 0.0]]), np.array([[True, False]]), np.array([[True, False]]), per_second=4.0)
  figures = describe(grades, rollouts, rollout.count_positions(completion, (2,), "until_eos"), (2,))
  assert figures == {
    "reward_mean": 1.0,
    "reward_std": 0.0,
    "solve_rate": 1.0,
    "rewards_failed": 1.0,
    "grading_timeouts": 0.0,
    "grading_crashes": 0.0,
    "graded_per_second": 4.0,
    "groups_without_variance": 1.0,
    "unique_rollouts": 1.0,
    "tokens_per_call": 1.5,
    "calls_saved": 0.5,
    "confidence": 2 / 3,
    "sampled_nll": math.log(2),
    "completion_length": 2.5,
    "eos_rate": 0.5,
  }


def test_a_probability_that_underflows_is_no_filled_position():
  count, confidence = np.array([[2]]), np.array([[[0.5, 0.0, 0.0]]], np.float32)
  rollouts = structs.Rollouts(
    np.zeros((1, 1, 3), np.int32), np.array([[[0, 1, 2]]]), confidence, count, count, 0 * count
  )
  lowest = np.log(np.finfo(np.float32).tiny)
  np.testing.assert_allclose(log_confidence(rollouts), [[[math.log(0.5), lowest, 0]]], rtol=1e-6)
  grades = Grades(np.ones((1, 1)), np.ones((1, 1), bool), np.ones((1, 1), bool))
  figures = describe(grades, rollouts, np.ones((1, 1, 3), bool), (9,))
  assert figures["sampled_nll"] == pytest.approx(-(math.log(0.5) + lowest) / 2)


def test_rewards_that_all_failed_are_no_equal_ones():
  said = lack_of_signal(np.zeros((2, 3)), np.zeros((2, 3), bool), compares=True)
  assert said == "no signal: no reward could be computed"


@pytest.mark.parametrize(
  ("changes", "compares"),
  [
    ({}, True),
    (dict(objective__name="coupled_grpo", objective__weighting="reward"), True),  # which reads no weighting
    (dict(objective__weighting="reward"), False),  # r + r pushes where all rewards are 1
    (dict(objective__weighting="reward", objective__wdce__baseline="none"), False),
    (dict(objective__weighting="reward", objective__wdce__baseline="mean"), True),
    (
      dict(objective__weighting="reward", objective__wdce__baseline="mean", objective__wdce__baseline_strength=0.5),
      False,
    ),
    (
      dict(objective__name="wddo", objective__weighting="reward", objective__wdce__baseline="mean"),
      False,
    ),  # reads none
  ],
)
def test_which_losses_learn_from_differences_alone(changes, compares):
  assert phases.compares_rewards(tiny.config(**changes)) == compares
