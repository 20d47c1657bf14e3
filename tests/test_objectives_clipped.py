"""Clipped ratios and KL estimates at log-ratios of any size: against plain float64, and what one wild token does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objectives_rivals import LEARNERS, OLD, make_experience, run

from dmpo_jax.objectives.clipped import MAX_LOG_RATIO, clipped_surrogate, k3

CLIP, KL_WEIGHT = 0.5, 0.04
SIZES = np.array([0.1, 0.3, 5.0, 20.0, 29.0], np.float32)
WILD = np.array([31.0, 50.0, 88.7, 89.0, 200.0, 1e4], np.float32)


@jax.jit
def surrogate(log_ratio, advantage):
  """Values, gradients and what is called clipped of tokens by themselves."""
  advantage = jnp.full(log_ratio.shape, advantage)[None, None]

  def total(log_ratio):
    value, is_clipped = clipped_surrogate(log_ratio[None, None], advantage, CLIP)
    return value.sum(), (value[0, 0], is_clipped[0, 0])

  (_, found), gradient = jax.value_and_grad(total, has_aux=True)(log_ratio)
  return *found, gradient


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_a_ratio_is_plain_as_long_as_it_means_something(advantage):
  log_ratio = np.concatenate([-WILD, -SIZES, SIZES])
  ratio = np.exp(log_ratio.astype(np.float64))
  kept = np.clip(ratio, 1 - CLIP, 1 + CLIP)
  value, is_clipped, gradient = surrogate(log_ratio, advantage)
  is_stopped = kept * advantage < ratio * advantage
  np.testing.assert_allclose(value, np.minimum(ratio * advantage, kept * advantage), rtol=1e-5, atol=1e-30)
  np.testing.assert_array_equal(is_clipped, is_stopped)
  np.testing.assert_allclose(gradient, np.where(is_stopped, 0, ratio * advantage), rtol=1e-5, atol=1e-30)


def test_a_wild_ratio_is_finite_and_pulls_nothing():
  value, is_clipped, gradient = surrogate(WILD, 1.0)
  np.testing.assert_allclose(value, 1 + CLIP)
  np.testing.assert_array_equal(gradient, 0)
  assert is_clipped.all()
  value, is_clipped, gradient = surrogate(WILD, -1.0)  # nothing clips it, but it is bounded
  np.testing.assert_allclose(value, -np.exp(MAX_LOG_RATIO), rtol=1e-5)
  np.testing.assert_array_equal(gradient, 0)
  assert is_clipped.all()
  value, is_clipped, gradient = surrogate(WILD, 0.0)
  np.testing.assert_array_equal(value, 0)
  np.testing.assert_array_equal(gradient, 0)
  assert not is_clipped.any()


def test_the_kl_estimate_is_plain_and_then_constant():
  slope = jax.vmap(jax.value_and_grad(lambda log_p: k3(jnp.float32(0), log_p)))
  log_p = np.concatenate([-SIZES, SIZES, WILD])
  value, gradient = slope(log_p)
  distance = -log_p.astype(np.float64)
  np.testing.assert_allclose(value, np.exp(distance) - distance - 1, rtol=1e-4)
  np.testing.assert_allclose(gradient, 1 - np.exp(distance), rtol=1e-4)
  value, gradient = slope(-WILD)
  np.testing.assert_allclose(value, np.exp(MAX_LOG_RATIO), rtol=1e-5)
  np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("off", [200.0, -200.0])
def test_one_wild_token_throws_no_update_away(name, off):
  """Whether the old policy, the reference or the policy itself gave it."""
  old, old_of_all = np.array(OLD), np.array([[-1.5, -1.0]], np.float32)
  old[0, 1, 0] += off
  old_of_all[0, 1] += off
  tame = make_experience()
  cases = [(OLD, tame.replace(token_log_p_old=old, log_p_old=old_of_all)), (OLD, tame.replace(token_log_p_ref=old))]
  if off < 0:  # a probability is at most 1
    cases.append((old, tame))
  for log_p, experience in cases:
    value, metrics, gradient = run(name, log_p, experience)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert all(np.isfinite(metric) for metric in metrics.values())
    assert np.linalg.norm(np.asarray(gradient, np.float32)) < 1e15, "its square is finite"
  assert np.abs(gradient[0, 0]).max() > 0, "the other rollout still teaches"


def test_rewards_beyond_all_measure_tilt_finitely():
  value, _, gradient = run("dtm", experience=make_experience((1e3, -1e3)))
  assert np.isfinite(value)
  assert np.isfinite(gradient).all()
