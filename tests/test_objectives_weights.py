"""Importance weights, baselines and the figures about them: by hand, by properties, and against recorded values."""

import dataclasses
import json
import math
import pathlib

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import objectives
import pytest
from hypothesis import given, settings

from dmpo_jax.objectives import weights
from dmpo_jax.objectives.weights import Weighing

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "objectives"
RECORDED = json.loads((GOLDENS / "advantages.json").read_text())
PROXIMAL = json.loads((GOLDENS / "proximal.json").read_text())
KEPT = jnp.ones((3, 4), bool)

compute = jax.jit(weights.importance_weights, static_argnames=("weighting", "alpha", "kappa"))


def floats(low, high):
  return hnp.arrays(np.float32, (3, 4), elements=st.floats(low, high, width=32))


rewards, log_probs = floats(0, 1), floats(-20, 0)
choices = st.sampled_from([("tilt", 0.1, 1.0), ("tilt", 0.5, 0.5), ("softmax", 0.5, 1.0)])
quickly = settings(max_examples=25, deadline=None)


def test_weights_by_hand():
  reward, log_p_ref, log_p_old = (jnp.array([row]) for row in ([1.0, 0.0], [-3.0, -2.0], [-2.0, -3.0]))
  weight, negative = compute(
    reward, log_p_ref, log_p_old, jnp.ones((1, 2), bool), weighting="tilt", alpha=0.5, kappa=0.5
  )
  # a = (-1 + 2, 1 + 0), and (-1 - 2, 1 - 0) for the opposite target
  np.testing.assert_allclose(weight[0], [0.5, 0.5], rtol=1e-6)
  np.testing.assert_allclose(negative[0], [1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))], rtol=1e-6)


def test_the_softmax_of_the_reward_leaves_the_log_ratio_out():
  reward = jnp.array([[1.0, 0.0]])
  weight, negative = compute(
    reward, -7 * reward, reward, jnp.ones((1, 2), bool), weighting="softmax", alpha=0.5, kappa=0.5
  )
  share = 1 / (1 + math.exp(-0.5))
  np.testing.assert_allclose(weight[0], [share, 1 - share], rtol=1e-6)
  np.testing.assert_allclose(negative[0], [1 - share, share], rtol=1e-6)


@quickly
@given(rewards, log_probs, log_probs, hnp.arrays(bool, (3, 4)), choices)
def test_weights_sum_to_one_over_what_is_kept(reward, log_p_ref, log_p_old, is_kept, choice):
  weighting, alpha, kappa = choice
  for weight in compute(reward, log_p_ref, log_p_old, is_kept, weighting=weighting, alpha=alpha, kappa=kappa):
    np.testing.assert_allclose(weight.sum(-1), is_kept.any(-1), atol=1e-5)
    np.testing.assert_array_equal(weight[~is_kept], 0)
    assert (weight >= 0).all()


@quickly
@given(rewards, log_probs, log_probs, choices, st.floats(-3, 3, width=32))
def test_a_constant_added_to_all_rewards_changes_nothing(reward, log_p_ref, log_p_old, choice, constant):
  weighting, alpha, kappa = choice
  before = compute(reward, log_p_ref, log_p_old, KEPT, weighting=weighting, alpha=alpha, kappa=kappa)
  after = compute(reward + constant, log_p_ref, log_p_old, KEPT, weighting=weighting, alpha=alpha, kappa=kappa)
  np.testing.assert_allclose(before, after, atol=1e-4)


@quickly
@given(rewards, log_probs, log_probs, choices, st.permutations(range(4)))
def test_permuting_a_group_permutes_its_weights(reward, log_p_ref, log_p_old, choice, order):
  weighting, alpha, kappa = choice
  order = np.array(order)
  before = compute(reward, log_p_ref, log_p_old, KEPT, weighting=weighting, alpha=alpha, kappa=kappa)
  after = compute(
    reward[:, order], log_p_ref[:, order], log_p_old[:, order], KEPT, weighting=weighting, alpha=alpha, kappa=kappa
  )
  np.testing.assert_allclose(np.stack(before)[..., order], after, atol=1e-6)


@quickly
@given(rewards, log_probs, log_probs, hnp.arrays(bool, (3, 4)), choices)
def test_weights_equal_a_naive_oracle(reward, log_p_ref, log_p_old, is_kept, choice):
  weighting, alpha, kappa = choice
  got = compute(reward, log_p_ref, log_p_old, is_kept, weighting=weighting, alpha=alpha, kappa=kappa)
  for sign, weight in zip((1, -1), got, strict=True):
    for p in range(3):
      scores = {}
      for g in range(4):
        if is_kept[p, g]:
          ratio = float(log_p_ref[p, g]) - float(log_p_old[p, g]) if weighting == "tilt" else 0.0
          scores[g] = kappa * (ratio + sign * float(reward[p, g]) / (alpha if weighting == "tilt" else 1))
      highest = max(scores.values(), default=0)
      total = sum(math.exp(score - highest) for score in scores.values())
      expected = [math.exp(scores[g] - highest) / total if g in scores else 0 for g in range(4)]
      np.testing.assert_allclose(weight[p], expected, atol=2e-5)


def test_equal_rewards_leave_the_pull_of_the_log_ratio_alone():
  log_p_ref, log_p_old = -jnp.arange(12.0).reshape(3, 4) % 5, -jnp.arange(12.0).reshape(3, 4) % 7
  weight, negative = compute(jnp.full((3, 4), 0.3), log_p_ref, log_p_old, KEPT, weighting="tilt", alpha=0.1, kappa=0.5)
  np.testing.assert_allclose(weight, jax.nn.softmax(0.5 * (log_p_ref - log_p_old)), rtol=1e-4)
  np.testing.assert_allclose(weight, negative, rtol=1e-4)


def test_a_dropped_rollout_may_hold_anything():
  reward = jnp.array([[1.0, jnp.nan, 0.0], [jnp.nan, jnp.inf, -jnp.inf]])
  log_p = jnp.array([[-1.0, jnp.inf, -2.0], [jnp.nan, jnp.nan, 0.0]])
  is_kept = jnp.array([[True, False, True], [False, False, False]])
  weight, negative = compute(reward, log_p, 2 * log_p, is_kept, weighting="tilt", alpha=0.5, kappa=1.0)
  np.testing.assert_allclose(weight[0], [1 / (1 + math.exp(-1)), 0, 1 / (1 + math.exp(1))], rtol=1e-6)
  np.testing.assert_array_equal(weight[1], 0)
  np.testing.assert_array_equal(negative[1], 0)

  def total(log_p):
    return weights.importance_weights(reward, log_p, 2 * log_p, is_kept, weighting="tilt", alpha=0.5, kappa=1.0)[0][
      0, 0
    ]

  gradient = jax.grad(total)(log_p)
  share = weight[0, 0]
  np.testing.assert_allclose(gradient[0], [-share * (1 - share), 0, share * (1 - share)], rtol=1e-5)
  np.testing.assert_array_equal(gradient[1], 0)


def test_extreme_log_ratios_stay_finite():
  log_p = jnp.array([[-1e4, -2e4, 0.0, -1e4]])
  weight, negative = compute(jnp.zeros((1, 4)), log_p, -log_p, KEPT[:1], weighting="tilt", alpha=0.01, kappa=1.0)
  np.testing.assert_array_equal(weight, [[0, 0, 1, 0]])
  np.testing.assert_array_equal(negative, [[0, 0, 1, 0]])


@pytest.mark.parametrize(("alpha", "kappa"), [(-1.0, 1.0), (0.0, 1.0), (0.1, 0.0), (0.1, 1.5)])
def test_settings_out_of_range_are_refused(alpha, kappa):
  with pytest.raises(ValueError, match=r"^Weighing\.(alpha = (-1|0).*\(0, inf\)|kappa = (0\.0|1\.5).*\(0, 1\])$"):
    Weighing(alpha=alpha, kappa=kappa)


def test_every_setting_out_of_range_is_a_line():
  with pytest.raises(
    ValueError, match=r"weighting = 'tlit': one of .*; did you mean 'tilt'.*\n.*alpha = 0\.0"
  ) as caught:
    Weighing(alpha=0.0, weighting="tlit")
  assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("row", RECORDED, ids=[row["case"] for row in RECORDED])
def test_the_recorded_weights(row):
  # recorded from the official PyTorch code; its rewards are already summed over reward functions
  size = row["group_size"]
  num_groups = len(row["reward"]) // size

  def array(name):
    groups = np.reshape(np.asarray(row[name], np.float32), (num_groups, size))
    return jnp.asarray(np.pad(groups, ((0, 4 - num_groups), (0, 16 - size)), constant_values=np.nan))

  reward, log_p_ref, log_p_old = array("reward"), array("log_p_ref"), array("log_p_old")
  is_kept = ~jnp.isnan(reward)  # one shape for all cases, filled with dropped rollouts
  got = weights.importance_weights(
    reward,
    log_p_ref,
    log_p_old,
    is_kept,
    weighting="tilt" if row["alpha"] else "softmax",
    alpha=row["alpha"] or 1.0,
    kappa=row["kappa"],
  )
  for weight, name in zip(got, ("weight", "negative_weight"), strict=True):
    np.testing.assert_allclose(weight, jnp.nan_to_num(array(name)), rtol=1e-4, atol=1e-6)
  ess = weights.effective_sample_size(got[0])[:num_groups] * 16 / size
  np.testing.assert_allclose(ess, row["ess"], rtol=1e-4)


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("none", [[0, 0, 0], [0, 0, 0]]),
    ("mean", [[0.5, 0, 0.5], [0, 0, 0]]),
    ("model", [[0.75, 0, 0.25], [0, 0, 0]]),
    ("negative", [[0.1, 0, 0.9], [0, 0, 0]]),
  ],
)
def test_baselines_by_hand(name, expected):
  is_kept = jnp.array([[True, False, True], [False, False, False]])
  log_p_theta = jnp.array([[-1.0, jnp.nan, -2.0], [0.0, 0.0, 0.0]])
  log_p_old = log_p_theta - jnp.log(jnp.array([3.0, 1.0, 1.0]))
  negative = jnp.array([[0.1, jnp.nan, 0.9], [jnp.nan, 0.0, 0.0]])
  weight = jnp.array([[0.3, jnp.nan, 0.7], [jnp.nan, 0.0, 0.0]])

  def compute_baseline(log_p_theta):
    own = dict(weight=weight, negative_weight=negative, log_p_old=log_p_old, is_kept=is_kept)
    return weights.baseline(name, log_p_theta=log_p_theta, **own)

  np.testing.assert_allclose(compute_baseline(log_p_theta), expected, rtol=1e-6)
  gradient = jax.grad(lambda log_p: compute_baseline(log_p)[0, 0])(log_p_theta)
  np.testing.assert_array_equal(gradient, 0)


def test_an_unknown_baseline_is_refused_with_a_hint():
  with pytest.raises(ValueError, match=r"Wdce.baseline = 'negativ'.*did you mean 'negative'"):
    objectives.make("wdce", baseline="negativ")


def test_effective_sample_size_by_hand():
  weight = jnp.array([[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0]])
  np.testing.assert_allclose(weights.effective_sample_size(weight), [1, 0.25, 0.5, 0])
  np.testing.assert_allclose(weights.effective_sample_size(0.4 * weight), [1, 0.25, 0.5, 0], rtol=1e-6)  # cut ones
  cut = jnp.array([[0.5, 0.2, 0.1, 0.0]])
  np.testing.assert_allclose(weights.effective_sample_size(cut), 0.8**2 / (4 * 0.3), rtol=1e-6)
  assert weights.effective_sample_size(jnp.full((1, 7), 0.1)) <= 1


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_rollout_without_log_probabilities_is_as_if_it_had_not_been(value):
  own = dict(weighting="tilt", alpha=0.5, proximal="adaptive", kappa=1.0, min_ess=0.6, max_weight=0.5)
  own |= dict(reward_scaling="standardise")
  reward, log_p_ref = jnp.array([[0.0, 1.0, 0.3, 0.9]]), jnp.array([[-10.0, -11.0, -9.0, -10.0]])
  log_p_old = jnp.array([[-10.5, -11.0, -9.0, value]])
  alone = weights.weigh(reward[:, :3], log_p_ref[:, :3], log_p_old[:, :3], KEPT[:1, :3], Weighing(**own))
  for ref, old in ((log_p_ref, log_p_old), (log_p_ref.at[0, 3].set(value), jnp.nan_to_num(log_p_old))):
    old = old.at[0, :3].set(log_p_old[0, :3])
    found = weights.weigh(reward, ref, old, KEPT[:1], Weighing(**own))
    np.testing.assert_array_equal(found.is_kept, [[True, True, True, False]])
    np.testing.assert_allclose(found.weight, jnp.pad(alone.weight, ((0, 0), (0, 1))), rtol=1e-6)
    np.testing.assert_allclose(found.negative_weight, jnp.pad(alone.negative_weight, ((0, 0), (0, 1))), rtol=1e-6)
    np.testing.assert_allclose(found.kappa, alone.kappa, rtol=1e-6)


def test_groups_without_variance_by_hand():
  reward = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, jnp.nan], [0.0, 0.5, 0.0], [0.3, 0.3, 0.3]])
  is_kept = jnp.array([[1, 1, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
  assert weights.fraction_without_variance(reward, is_kept).item() == 0.75
  parts = jnp.stack([reward, 1 - reward], -1).at[3].set(0.5)  # whose sums are the same
  np.testing.assert_array_equal(weights.has_variance(parts, is_kept), [False, False, True, False])


def test_the_signal_kept_is_what_weights_and_their_opposites_differ_in_by_hand():
  reward = jnp.array([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])  # the second group has no variance
  weight = jnp.array([[0.9, 0.1], [0.5, 0.5], [0.7, 0.3]])
  opposite = jnp.array([[0.1, 0.9], [0.5, 0.5], [0.6, 0.4]])
  weighed = weights.Weights(weight, opposite, jnp.ones(3), reward >= 0)
  assert weights.signal_kept(weighed, reward).item() == pytest.approx((0.8 + 0.1) / 2)
  assert jnp.isnan(weights.signal_kept(weighed, jnp.ones((3, 2))))


def test_a_log_ratio_beyond_the_tilt_leaves_no_signal():
  reward, is_kept = jnp.array([[1.0, 0.0], [0.5, 0.5]]), jnp.ones((2, 2), bool)
  zeros = jnp.zeros((2, 2, 1))

  def kept(log_p_ref):
    return weights.weigh_buffer(reward, is_kept, log_p_ref, zeros, weights.Weighing(alpha=0.1))[1]["signal_kept"]

  assert kept(zeros).item() == pytest.approx(math.tanh(5), rel=1e-5)  # (w - w_negative)_0 of logits 10 and -10
  assert kept(zeros.at[0, 0].set(30.0)).item() == pytest.approx(0, abs=1e-6)


def test_the_reliability_is_the_share_of_the_spread_that_is_no_noise_by_hand():
  ratio = jnp.array([[[1.0, 3.0], [5.0, 7.0], [jnp.nan, 0.0]], [[0.0, 8.0], [3.0, 5.0], [4.0, 4.0]]])
  is_kept = jnp.array([[True, True, True], [True, True, True]])
  # means 2 and 6 of the first group, squared standard errors 1 each; the second group's means are all 4
  share = weights.reliability(ratio, 0 * ratio, is_kept)
  np.testing.assert_allclose(share, [(8 - 1) / 8, 0], rtol=1e-6)


def test_shrunk_log_ratios_weigh_by_what_is_no_noise():
  rng = np.random.default_rng(0)
  reward, is_kept = jnp.asarray(rng.random((2, 4)), jnp.float32), jnp.ones((2, 4), bool)
  ref, old = (jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32) for _ in range(2))
  plain = Weighing(alpha=0.5)
  shrunk, figures = weights.weigh_buffer(reward, is_kept, ref, old, dataclasses.replace(plain, shrinkage="reliability"))
  share = weights.reliability(ref, old, is_kept)
  expected = jax.nn.softmax(share[:, None] * (ref - old).mean(-1) + reward / 0.5, axis=-1)
  np.testing.assert_allclose(shrunk.weight, expected, rtol=1e-5)
  assert figures["reliability"].item() == pytest.approx(share.mean().item(), rel=1e-5)
  exact = ref.mean(-1, keepdims=True) + jnp.zeros(3), old.mean(-1, keepdims=True) + jnp.zeros(3)  # no noise, no change
  same, _ = weights.weigh_buffer(reward, is_kept, *exact, dataclasses.replace(plain, shrinkage="reliability"))
  np.testing.assert_allclose(same.weight, weights.weigh_buffer(reward, is_kept, *exact, plain)[0].weight, rtol=1e-5)


def test_what_is_noise_alone_is_taken_for_noise():
  """Where draws say that the log-ratio is noise, most of it goes; where they say that it is not, most of it stays."""
  rng = np.random.default_rng(1)
  noise = jnp.asarray(rng.normal(size=(400, 16, 4)), jnp.float32)
  is_kept = jnp.ones((400, 16), bool)
  signal = jnp.asarray(rng.normal(size=(400, 16, 1)), jnp.float32)
  assert weights.reliability(noise, 0 * noise, is_kept).mean() < 0.2
  # a spread of 1 beside an error of 1/2
  assert weights.reliability(signal + noise, 0 * noise, is_kept).mean().item() == pytest.approx(1 / 1.25, abs=0.05)


def test_log_ratio_figures_by_hand():
  log_p_old = jnp.zeros((2, 2, 4))
  log_p_ref = jnp.array([[[1.0, 1, 3, 3], [4, 4, 4, 4]], [[5.0, 5, 5, 5], [jnp.nan] * 4]])
  is_kept = jnp.array([[True, True], [True, False]])
  figures = weights.log_ratio_figures(log_p_ref, log_p_old, is_kept)
  assert figures["log_ratio_mean"].item() == pytest.approx((2 + 4 + 5) / 3)
  assert figures["log_ratio_std"].item() == pytest.approx(math.sqrt((1 + 1 + 0) / 3))
  error = np.std([1, 1, 3, 3], ddof=1) / 2
  assert figures["log_ratio_error"].item() == pytest.approx(math.sqrt(error**2 / 3))


KAPPA = np.load(GOLDENS / "kappa.npz")


def test_adaptive_kappa_meets_the_threshold_where_it_can():
  # Recorded from the official code, whose optimiser returns its starting point 0.5 where the softmax is saturated.
  is_kept = jnp.asarray(np.arange(16) < KAPPA["n"][:, None])
  log_rnd, reward = (jnp.asarray(np.nan_to_num(KAPPA[name]), jnp.float32) for name in ("log_rnds", "rewards"))
  alpha = jnp.asarray(KAPPA["alpha"], jnp.float32)[:, None]
  log_weight = jnp.where(alpha > 0, log_rnd + reward / jnp.where(alpha > 0, alpha, 1), reward)
  target = KAPPA["ess_threshold"].astype(np.float32)

  @jax.jit
  def solve(target):
    kappa = jax.vmap(lambda row, kept, ess: weights.adaptive_kappa(row[None], kept[None], ess)[0])(
      log_weight, is_kept, target
    )
    weight = weights.softmax_kept(kappa[:, None] * log_weight, is_kept)
    return kappa, weights.effective_sample_size(weight) * 16 / is_kept.sum(-1)

  kappa, ess = map(np.asarray, solve(jnp.asarray(target)))
  for name, count in (("reached", 12), ("stuck_near_x0", 12), ("lower_bound", 9), ("upper_bound", 12), ("flat", 12)):
    rows = KAPPA["category"] == name
    assert rows.sum() == count
    reachable = rows & (KAPPA["ess_at_099"] < target) & (target < KAPPA["ess_at_001"])
    assert reachable.sum() == {"reached": 12, "stuck_near_x0": 4}.get(name, 0)
    np.testing.assert_allclose(ess[reachable], target[reachable], atol=1e-3, err_msg=name)  # saturated or not
    if name == "reached":
      np.testing.assert_allclose(kappa[rows], KAPPA["coeff"][rows], atol=1e-3)
    if name == "stuck_near_x0":
      np.testing.assert_allclose(KAPPA["coeff"][rows], 0.5, atol=1e-3)
      assert (np.abs(kappa[reachable] - 0.5) > 0.01).all()
    if name == "lower_bound":
      np.testing.assert_allclose(kappa[rows], weights.MIN_KAPPA, atol=1e-4)
    if name in ("upper_bound", "flat"):
      np.testing.assert_allclose(kappa[rows], weights.MAX_KAPPA, atol=1e-4)


def test_kappa_and_effective_sample_size_are_of_each_group():
  log_weight = jnp.array([[0.0, 1.0, 2.0, 3.0], [0.0, 3.0, 6.0, 9.0]])
  both = weights.adaptive_kappa(log_weight, KEPT[:2], 0.6)
  alone = [weights.adaptive_kappa(row[None], KEPT[:1], 0.6)[0] for row in log_weight]
  np.testing.assert_allclose(both, alone, rtol=1e-6)
  np.testing.assert_allclose(both[0] / both[1], 3, rtol=1e-2)
  # dropped rollouts have no part in it
  padded = jnp.pad(log_weight, ((0, 0), (0, 2)), constant_values=jnp.nan)
  np.testing.assert_allclose(weights.adaptive_kappa(padded, jnp.pad(KEPT[:2], ((0, 0), (0, 2))), 0.6), both, rtol=1e-5)


def weigh_recorded(row, **own):
  def groups(name):
    values = np.asarray([np.nan if value is None else value for value in row[name]], np.float32)
    return jnp.asarray(values.reshape(-1, row["group_size"]))

  reward, log_p_ref, log_p_old = map(groups, ("reward", "log_p_ref", "log_p_old"))
  common = dict(
    alpha=max(row["alpha"], 0) or 1.0, kappa=1.0, min_ess=row["min_ess"], reward_scaling="none", max_weight=1.0
  )
  found = weights.weigh(reward, log_p_ref, log_p_old, ~jnp.isnan(reward), Weighing(**common, **own))
  return found, groups("weight"), groups("negative_weight")


ADAPTIVE = [row for row in PROXIMAL if row["alpha"] >= 0]


@pytest.mark.parametrize("row", ADAPTIVE, ids=[row["case"] for row in ADAPTIVE])
def test_the_recorded_adaptive_steps_and_ours_of_each_group(row):
  # The official code chooses one kappa for the rollouts of a process, be they a group, a part of one or several.
  found, weight, negative = weigh_recorded(row, weighting="tilt" if row["alpha"] else "softmax", proximal="adaptive")
  ess = weights.effective_sample_size(found.weight)
  is_bound = np.asarray(found.kappa > weights.MAX_KAPPA - 1e-6)
  np.testing.assert_allclose(ess[~is_bound], row["min_ess"], atol=1e-3)
  assert (ess[is_bound] >= row["min_ess"]).all()
  if row["batch"] == row["group_size"]:
    agree = is_bound | (np.abs(np.array(row["ess"]) - row["min_ess"]) < 1e-3)  # else it stayed where it began, at 0.5
    np.testing.assert_array_equal(np.array(row["kappa"])[~agree], 0.5)
    np.testing.assert_allclose(found.weight[agree], weight[agree], atol=1e-3)
    np.testing.assert_allclose(found.negative_weight[agree], negative[agree], atol=1e-3)
  else:
    theirs = np.repeat(row["kappa"], row["batch"]).reshape(weight.shape)
    assert np.abs(np.asarray(found.kappa)[:, None] - theirs).max() > 0.005


REWARDS = [row for row in PROXIMAL if row["alpha"] == -1]


@pytest.mark.parametrize("row", REWARDS, ids=[row["case"] for row in REWARDS])
def test_the_reward_as_weight_is_what_the_official_code_meant(row):
  # There alpha = -1 ends in an UnboundLocalError; what it would have returned was recorded.
  found, weight, negative = weigh_recorded(row, weighting="reward", proximal="fixed")
  np.testing.assert_allclose(found.weight, weight, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(found.negative_weight, negative, rtol=1e-4, atol=1e-6)


def test_the_reward_itself_as_the_weight():
  reward = jnp.array([[0.3, jnp.nan, -1.0]])
  is_kept = jnp.array([[True, False, True]])
  weight, negative = weights.importance_weights(
    reward, 9 * reward, reward, is_kept, weighting="reward", alpha=1.0, kappa=1.0
  )
  np.testing.assert_allclose(weight, [[0.3, 0, -1.0]], rtol=1e-6)
  np.testing.assert_allclose(negative, [[-0.3, 0, 1.0]], rtol=1e-6)


def test_standardised_rewards_and_clipped_weights():
  reward = jnp.array([[1.0, 3.0, jnp.nan, 5.0], [2.0, 2.0, 2.0, 2.0]])
  is_kept = jnp.array([[True, True, False, True], [True] * 4])
  scaled = weights.standardise(reward, is_kept)
  np.testing.assert_allclose(scaled, [[-1.2247449, 0, 0, 1.2247449], [0] * 4], rtol=1e-6)
  weighing = Weighing(alpha=1.0, reward_scaling="standardise")
  zeros = jnp.zeros((2, 4))
  free = weights.weigh(reward, zeros, zeros, is_kept, weighing)
  np.testing.assert_allclose(free.weight[0], weights.softmax_kept(scaled, is_kept)[0], rtol=1e-6)
  cut = weights.weigh(reward, zeros, zeros, is_kept, dataclasses.replace(weighing, max_weight=0.3))
  np.testing.assert_allclose(cut.weight, jnp.minimum(free.weight, 0.3))
  np.testing.assert_allclose(cut.negative_weight, jnp.minimum(free.negative_weight, 0.3))


def test_parts_are_standardised_apart_and_count_by_their_weights():
  """By hand: the parts of the first group are standardised to (-1, 1, -1, 1) and (1, -1, -1, 1), whatever their scale.

  In the second group the first part is the same for all kept rollouts, and says nothing.
  """
  parts = jnp.array(
    [[[0.0, 100], [2, 0], [0, 0], [2, 100]], [[5, 1], [5, 3], [9, jnp.nan], [5, 5]]]
  )  # fmt: skip
  is_kept = jnp.array([[True] * 4, [True, True, False, True]])
  reward = parts.sum(-1)
  plain = weights.scale_rewards(reward, parts, is_kept, "standardise_parts")
  np.testing.assert_allclose(plain, [[0, 0, -2, 2], [-1.2247449, 0, 0, 1.2247449]], rtol=1e-6, atol=1e-6)
  weighted = weights.scale_rewards(reward, parts, is_kept, "standardise_parts", (3.0, 0.5))
  np.testing.assert_allclose(weighted, [[-2.5, 2.5, -3.5, 3.5], [-0.6123724, 0, 0, 0.6123724]], rtol=1e-6, atol=1e-6)
  own = dict(weighting="tilt", alpha=0.5, proximal="fixed", kappa=1.0, min_ess=0.8, max_weight=1.0)
  own |= dict(reward_scaling="standardise_parts", part_weights=(3.0, 0.5))
  zeros = jnp.zeros((2, 4))
  found = weights.weigh(reward, zeros, zeros, is_kept, Weighing(**own), reward_parts=parts)
  np.testing.assert_allclose(found.weight, weights.softmax_kept(weighted / 0.5, is_kept), rtol=1e-6)
  shifted = weights.scale_rewards(reward, parts + 7, is_kept, "standardise_parts", (3.0, 0.5))
  np.testing.assert_allclose(shifted, weighted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ("changed", "expected"),
  [
    (dict(weighting="reward"), [[0, 0, 0, 0], [-1, 0, 1, 0], [0, 0, 0, 0]]),
    (dict(max_weight=0.2), [[0, 0, 0, 0], [-0.0733, 0.0367, 0.0367, 0], [0, 0, 0, 0]]),
  ],
)
def test_the_mean_baseline_leaves_nothing_of_equal_rewards_where_weights_do_not_sum_to_one(changed, expected):
  reward = jnp.array([[2.0, 2.0, 2.0, 2.0], [1.0, 2.0, 3.0, jnp.nan], [5.0, 9.0, 9.0, 9.0]])
  is_kept = jnp.array([[True] * 4, [True, True, True, False], [True, False, False, False]])
  zeros = jnp.zeros((3, 4))
  found = weights.weigh(reward, zeros, zeros, is_kept, Weighing(**dict(alpha=1.0) | changed))
  subtracted = weights.baseline(
    "mean",
    weight=found.weight,
    negative_weight=found.negative_weight,
    log_p_theta=zeros,
    log_p_old=zeros,
    is_kept=is_kept,
  )
  np.testing.assert_allclose(found.weight - subtracted, expected, atol=1e-4)


def test_unique_rollouts_by_hand():
  completion = jnp.array(
    [[[1, 2], [1, 2], [1, 3], [1, 2]], [[0, 0]] * 4, [[0, 0]] * 4, [[9, 1], [9, 2], [1, 9], [1, 1]]]
  )
  is_until_eos = jnp.ones(completion.shape, bool).at[3, :2, 1].set(False)
  is_kept = jnp.array([[True] * 4, [True, True, False, False], [False] * 4, [True] * 4])
  # shares 3/4 and 1/4; one of two; nothing; 1/2 that end at once, and two of 1/4
  wanted = [1 / (9 / 16 + 1 / 16), 1, 0, 1 / (1 / 4 + 2 / 16)]
  np.testing.assert_allclose(weights.unique_rollouts(completion, is_until_eos, is_kept), wanted, rtol=1e-6)
