"""Importance weights, baselines and the figures about them: by hand, by properties, and against recorded values."""

import json
import math
import pathlib

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from dmpo_jax.objectives import weights

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "objectives"
RECORDED = json.loads((GOLDENS / "advantages.json").read_text())
KEPT = jnp.ones((3, 4), bool)

compute = jax.jit(weights.importance_weights, static_argnames=("alpha", "kappa"))


def floats(low, high):
  return hnp.arrays(np.float32, (3, 4), elements=st.floats(low, high, width=32))


rewards, log_probs = floats(0, 1), floats(-20, 0)
choices = st.sampled_from([(0.1, 1.0), (0.5, 0.5), (0.0, 1.0)])
quickly = settings(max_examples=25, deadline=None)


def test_weights_by_hand():
  reward, log_p_ref, log_p_old = (jnp.array([row]) for row in ([1.0, 0.0], [-3.0, -2.0], [-2.0, -3.0]))
  weight, negative = compute(reward, log_p_ref, log_p_old, jnp.ones((1, 2), bool), alpha=0.5, kappa=0.5)
  # a = (-1 + 2, 1 + 0), and (-1 - 2, 1 - 0) for the opposite target
  np.testing.assert_allclose(weight[0], [0.5, 0.5], rtol=1e-6)
  np.testing.assert_allclose(negative[0], [1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))], rtol=1e-6)


def test_alpha_zero_leaves_the_log_ratio_out():
  reward = jnp.array([[1.0, 0.0]])
  weight, negative = compute(reward, -7 * reward, reward, jnp.ones((1, 2), bool), alpha=0.0, kappa=0.5)
  share = 1 / (1 + math.exp(-0.5))
  np.testing.assert_allclose(weight[0], [share, 1 - share], rtol=1e-6)
  np.testing.assert_allclose(negative[0], [1 - share, share], rtol=1e-6)


@quickly
@given(rewards, log_probs, log_probs, hnp.arrays(bool, (3, 4)), choices)
def test_weights_sum_to_one_over_what_is_kept(reward, log_p_ref, log_p_old, is_kept, choice):
  alpha, kappa = choice
  for weight in compute(reward, log_p_ref, log_p_old, is_kept, alpha=alpha, kappa=kappa):
    np.testing.assert_allclose(weight.sum(-1), is_kept.any(-1), atol=1e-5)
    np.testing.assert_array_equal(weight[~is_kept], 0)
    assert (weight >= 0).all()


@quickly
@given(rewards, log_probs, log_probs, choices, st.floats(-3, 3, width=32))
def test_a_constant_added_to_all_rewards_changes_nothing(reward, log_p_ref, log_p_old, choice, constant):
  alpha, kappa = choice
  before = compute(reward, log_p_ref, log_p_old, KEPT, alpha=alpha, kappa=kappa)
  after = compute(reward + constant, log_p_ref, log_p_old, KEPT, alpha=alpha, kappa=kappa)
  np.testing.assert_allclose(before, after, atol=1e-4)


@quickly
@given(rewards, log_probs, log_probs, choices, st.permutations(range(4)))
def test_permuting_a_group_permutes_its_weights(reward, log_p_ref, log_p_old, choice, order):
  alpha, kappa = choice
  order = np.array(order)
  before = compute(reward, log_p_ref, log_p_old, KEPT, alpha=alpha, kappa=kappa)
  after = compute(reward[:, order], log_p_ref[:, order], log_p_old[:, order], KEPT, alpha=alpha, kappa=kappa)
  np.testing.assert_allclose(np.stack(before)[..., order], after, atol=1e-6)


@quickly
@given(rewards, log_probs, log_probs, hnp.arrays(bool, (3, 4)), choices)
def test_weights_equal_a_naive_oracle(reward, log_p_ref, log_p_old, is_kept, choice):
  alpha, kappa = choice
  got = compute(reward, log_p_ref, log_p_old, is_kept, alpha=alpha, kappa=kappa)
  for sign, weight in zip((1, -1), got, strict=True):
    for p in range(3):
      scores = {}
      for g in range(4):
        if is_kept[p, g]:
          ratio = float(log_p_ref[p, g]) - float(log_p_old[p, g]) if alpha else 0.0
          scores[g] = kappa * (ratio + sign * float(reward[p, g]) / (alpha or 1))
      highest = max(scores.values(), default=0)
      total = sum(math.exp(score - highest) for score in scores.values())
      expected = [math.exp(scores[g] - highest) / total if g in scores else 0 for g in range(4)]
      np.testing.assert_allclose(weight[p], expected, atol=2e-5)


def test_equal_rewards_leave_the_pull_of_the_log_ratio_alone():
  log_p_ref, log_p_old = -jnp.arange(12.0).reshape(3, 4) % 5, -jnp.arange(12.0).reshape(3, 4) % 7
  weight, negative = compute(jnp.full((3, 4), 0.3), log_p_ref, log_p_old, KEPT, alpha=0.1, kappa=0.5)
  np.testing.assert_allclose(weight, jax.nn.softmax(0.5 * (log_p_ref - log_p_old)), rtol=1e-4)
  np.testing.assert_allclose(weight, negative, rtol=1e-4)


def test_a_dropped_rollout_may_hold_anything():
  reward = jnp.array([[1.0, jnp.nan, 0.0], [jnp.nan, jnp.inf, -jnp.inf]])
  log_p = jnp.array([[-1.0, jnp.inf, -2.0], [jnp.nan, jnp.nan, 0.0]])
  is_kept = jnp.array([[True, False, True], [False, False, False]])
  weight, negative = compute(reward, log_p, 2 * log_p, is_kept, alpha=0.5, kappa=1.0)
  np.testing.assert_allclose(weight[0], [1 / (1 + math.exp(-1)), 0, 1 / (1 + math.exp(1))], rtol=1e-6)
  np.testing.assert_array_equal(weight[1], 0)
  np.testing.assert_array_equal(negative[1], 0)

  def total(log_p):
    return weights.importance_weights(reward, log_p, 2 * log_p, is_kept, alpha=0.5, kappa=1.0)[0][0, 0]

  gradient = jax.grad(total)(log_p)
  share = weight[0, 0]
  np.testing.assert_allclose(gradient[0], [-share * (1 - share), 0, share * (1 - share)], rtol=1e-5)
  np.testing.assert_array_equal(gradient[1], 0)


def test_extreme_log_ratios_stay_finite():
  log_p = jnp.array([[-1e4, -2e4, 0.0, -1e4]])
  weight, negative = compute(jnp.zeros((1, 4)), log_p, -log_p, KEPT[:1], alpha=0.01, kappa=1.0)
  np.testing.assert_array_equal(weight, [[0, 0, 1, 0]])
  np.testing.assert_array_equal(negative, [[0, 0, 1, 0]])


@pytest.mark.parametrize(("alpha", "kappa"), [(-1.0, 1.0), (0.1, 0.0), (0.1, 1.5)])
def test_settings_out_of_range_are_refused(alpha, kappa):
  with pytest.raises(ValueError, match=r"objective\.(alpha=-1|kappa=(0\.0|1\.5)).*must be"):
    weights.importance_weights(*[jnp.zeros((3, 4))] * 3, KEPT, alpha=alpha, kappa=kappa)


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
  got = weights.importance_weights(reward, log_p_ref, log_p_old, is_kept, alpha=row["alpha"], kappa=row["kappa"])
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

  def compute_baseline(log_p_theta):
    return weights.baseline(
      name, negative_weight=negative, log_p_theta=log_p_theta, log_p_old=log_p_old, is_kept=is_kept
    )

  np.testing.assert_allclose(compute_baseline(log_p_theta), expected, rtol=1e-6)
  gradient = jax.grad(lambda log_p: compute_baseline(log_p)[0, 0])(log_p_theta)
  np.testing.assert_array_equal(gradient, 0)


def test_an_unknown_baseline_is_refused_with_a_hint():
  arrays = dict(negative_weight=jnp.zeros((3, 4)), log_p_theta=jnp.zeros((3, 4)), log_p_old=jnp.zeros((3, 4)))
  with pytest.raises(ValueError, match=r"objective.baseline='negativ'.*did you mean 'negative'"):
    weights.baseline("negativ", **arrays, is_kept=KEPT)


def test_effective_sample_size_by_hand():
  weight = jnp.array([[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0]])
  np.testing.assert_allclose(weights.effective_sample_size(weight), [1, 0.25, 0.5, 0])


def test_groups_without_variance_by_hand():
  reward = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, jnp.nan], [0.0, 0.5, 0.0], [0.3, 0.3, 0.3]])
  is_kept = jnp.array([[1, 1, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
  assert weights.fraction_without_variance(reward, is_kept).item() == 0.75


def test_log_ratio_figures_by_hand():
  log_p_old = jnp.zeros((2, 2, 4))
  log_p_ref = jnp.array([[[1.0, 1, 3, 3], [4, 4, 4, 4]], [[5.0, 5, 5, 5], [jnp.nan] * 4]])
  is_kept = jnp.array([[True, True], [True, False]])
  figures = weights.log_ratio_figures(log_p_ref, log_p_old, is_kept, antithetic=False)
  assert figures["log_ratio_mean"].item() == pytest.approx((2 + 4 + 5) / 3)
  assert figures["log_ratio_std"].item() == pytest.approx(math.sqrt((1 + 1 + 0) / 3))
  error = np.std([1, 1, 3, 3], ddof=1) / 2
  assert figures["log_ratio_error"].item() == pytest.approx(math.sqrt(error**2 / 3))
  # the pairs of the first rollout, (1, 3) and (1, 3), agree
  figures = weights.log_ratio_figures(log_p_ref, log_p_old, is_kept, antithetic=True)
  assert figures["log_ratio_error"].item() == 0
