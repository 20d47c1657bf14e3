"""Likelihood estimators: by exact enumeration on a three-position, three-token model, by hand, and by their claims."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax.objectives import estimators
from dmpo_jax.objectives.estimators import Coupled, Elbo, ElboQuadrature, Eubo, OneStep, Trajectory, make_estimator
from dmpo_jax.objectives.likelihood import Estimator, elbo
from dmpo_jax.objectives.masking import Completions, MaskSampling, mask_along_trajectory

MASK, C = 3, 3
COMPLETIONS = np.array(list(itertools.product(range(3), repeat=C)))  # all 27
# log p(token | state of the row) at each position; a position's state is its token, or MASK
LOGITS = 1.5 * np.random.default_rng(5).standard_normal((4, 4, 4, C, 3))
TABLE = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))
CASES = {
  "one_step": OneStep(MaskSampling(1), prompt_mask_ratio=0.0),
  "elbo": Elbo(MaskSampling(2)),
  "elbo_quadrature": ElboQuadrature(MaskSampling(2), num_points=2),
  "eubo": Eubo(MaskSampling(2, antithetic=False), beta=1.0, mixture=1.0),
  "coupled": Coupled(MaskSampling(3, min_ratio=0.2, max_ratio=0.8)),
  "trajectory": Trajectory(MaskSampling(3)),
  "elbo along the trajectory": Elbo(MaskSampling(2, antithetic=False, kind="trajectory")),
  "elbo, stratified": Elbo(MaskSampling(8, antithetic=False, kind="stratified")),
  "elbo, independent": Elbo(MaskSampling(8, antithetic=False)),
}


def token_log_prob(is_masked):
  """log p(y_l | y with the masked positions hidden), [27, g, r, 3]."""
  tokens = COMPLETIONS[:, None, None]
  state = jnp.where(is_masked, MASK, tokens)
  rows = jnp.asarray(TABLE, jnp.float32)[state[..., 0], state[..., 1], state[..., 2]]
  return jnp.take_along_axis(rows, jnp.broadcast_to(tokens, is_masked.shape)[..., None], axis=-1)[..., 0]


def along(completion, order):
  """Log-probability of a completion decided one position after the other."""
  state, total = [MASK] * C, 0.0
  for position in order:
    total += TABLE[tuple(state)][position, completion[position]]
    state[position] = completion[position]
  return total


ORDERS = list(itertools.permutations(range(C)))
BY_ORDER = np.array([[along(y, order) for order in ORDERS] for y in COMPLETIONS])
EXACT = np.log(np.exp(BY_ORDER).mean(-1))
BOUND = BY_ORDER.mean(-1)


def completions(group_size, committed_at=None):
  shape = (len(COMPLETIONS), group_size, C)
  committed_at = jnp.zeros(shape, jnp.int32) if committed_at is None else committed_at
  return Completions(jnp.ones(shape, bool), committed_at, jnp.ones((len(COMPLETIONS), 4), bool))


@functools.cache
def drawn(name, group_size=512):
  """Estimates of all completions from independent keys, [27, g], and their parts by draw and by token."""
  case = CASES[name]
  keys = jax.random.split(jax.random.key(0), (len(COMPLETIONS), group_size))
  committed_at = jnp.broadcast_to(jnp.array([2, 0, 1]), (len(COMPLETIONS), group_size, C))

  @jax.jit
  def compute(keys):
    views = case.views(keys, completions(group_size, committed_at))
    log_prob = token_log_prob(views.is_masked)
    return case.tokens(log_prob, views), case.estimates(log_prob, views)

  return tuple(map(np.asarray, compute(keys)))


def within_noise(estimates, expected, most=4.5):
  error = estimates.std(-1, ddof=1) / math.sqrt(estimates.shape[-1]) + 1e-5
  return (np.abs(estimates.mean(-1) - expected) / error).max() < most


def test_the_tiny_model_is_a_distribution_and_its_bound_lies_below():
  assert np.exp(EXACT).sum() == pytest.approx(1, abs=1e-6)
  assert (BOUND <= EXACT + 1e-9).all()


@pytest.mark.parametrize("name", CASES)
def test_the_draws_average_to_the_sum_over_tokens(name):
  tokens, estimates = drawn(name)
  assert isinstance(CASES[name], Estimator)
  np.testing.assert_allclose(estimates.mean(-1), tokens.sum(-1), rtol=1e-4, atol=1e-5)


def test_one_step_is_the_mean_field_and_the_trajectory_the_sampled_order():
  tokens, _ = drawn("one_step")
  mean_field = [sum(TABLE[MASK, MASK, MASK, l, y[l]] for l in range(C)) for y in COMPLETIONS]
  np.testing.assert_allclose(tokens[:, 0].sum(-1), mean_field, rtol=1e-5)
  tokens, _ = drawn("trajectory")  # position 1 was decided first, then 2, then 0
  np.testing.assert_allclose(tokens[:, 0].sum(-1), [along(y, (1, 2, 0)) for y in COMPLETIONS], rtol=1e-5)


def test_fewer_chunks_count_neighbours_as_independent():
  committed_at = jnp.broadcast_to(jnp.array([2, 0, 1]), (len(COMPLETIONS), 1, C))
  keys = jax.random.split(jax.random.key(0), (len(COMPLETIONS), 1))
  one = Trajectory(MaskSampling(1))
  views = one.views(keys, completions(1, committed_at))
  np.testing.assert_allclose(one.tokens(token_log_prob(views.is_masked), views), drawn("one_step")[0][:, :1], rtol=1e-5)
  views = Trajectory(MaskSampling(2)).views(keys, completions(1, committed_at))
  np.testing.assert_array_equal(views.share[0, 0], [[0, 1, 1], [1, 0, 0]])
  np.testing.assert_array_equal(views.is_masked[0, 0], [[1, 1, 1], [1, 0, 0]])


def test_a_chunk_sees_what_was_decided_before_it_counted_or_not():
  # position 2 was decided first and position 3 filled in after 3 calls; neither counts
  about = Completions(
    jnp.array([[[True, True, False, False]]]), jnp.array([[[1, 2, 0, 3]]], jnp.int32), jnp.ones((1, 4), bool)
  )
  views = Trajectory(MaskSampling(3)).views(jax.random.split(jax.random.key(0), (1, 1)), about)
  np.testing.assert_array_equal(views.is_masked[0, 0], [[1, 1, 1, 1], [1, 1, 0, 1], [0, 1, 0, 1]])
  np.testing.assert_array_equal(views.share[0, 0], [[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]])


def test_the_elbo_equals_its_plain_form_and_the_bound():
  keys = jax.random.split(jax.random.key(3), (len(COMPLETIONS), 1))
  case = CASES["elbo"]
  views = case.views(keys, completions(1))
  log_prob = token_log_prob(views.is_masked)
  plain = elbo(log_prob, views.is_masked, jnp.ones((len(COMPLETIONS), 1, C), bool)).mean(-1)
  np.testing.assert_allclose(case.tokens(log_prob, views).sum(-1), plain, rtol=1e-5)
  # every size of mask is as frequent, and the empty one counts as nothing
  assert within_noise(drawn("elbo")[1].mean(-1), expected_by_size().sum(-1) / (C + 1))


def expected_by_size():
  """E[(n/m) sum_{l in M} log p(y_l | M)] over the masks of each size m = 1..3, [27, 3]."""
  columns = []
  for size in range(1, C + 1):
    masks = list(itertools.combinations(range(C), size))
    is_masked = np.array([[l in mask for l in range(C)] for mask in masks])
    log_prob = np.asarray(token_log_prob(jnp.broadcast_to(is_masked, (len(COMPLETIONS), 1, len(masks), C))))[:, 0]
    columns.append((C / size * np.where(is_masked, log_prob, 0).sum(-1)).mean(-1))
  return np.stack(columns, axis=-1)


def along_trajectory(committed_at):
  """The expected estimate under masks along a trajectory: each point of three as often, [27]."""
  shape = (len(COMPLETIONS), 1, C)
  ratio = jnp.broadcast_to((jnp.arange(C) + 0.5) / C, shape)
  is_counted = jnp.ones(shape, bool)
  is_masked, _ = mask_along_trajectory(ratio, jnp.broadcast_to(jnp.asarray(committed_at), shape), is_counted)
  return np.asarray(elbo(token_log_prob(is_masked), is_masked, is_counted).mean(-1))[:, 0]


def test_masks_along_the_trajectory_take_a_calls_choice_for_a_random_one():
  # position 1 was decided first, then 2, then 0: next is any of those that are masked
  states = [[MASK, MASK, MASK], [MASK, None, MASK], [MASK, None, None]]
  expected = []
  for y in COMPLETIONS:
    total = 0.0
    for state in states:
      hidden = [l for l in range(C) if state[l] == MASK]
      row = TABLE[tuple(MASK if l in hidden else y[l] for l in range(C))]
      total += np.mean([row[l, y[l]] for l in hidden])
    expected.append(total)
  np.testing.assert_allclose(along_trajectory([2, 0, 1]), expected, rtol=1e-5)
  assert within_noise(drawn("elbo along the trajectory")[1].mean(-1), np.array(expected))


def test_over_random_orders_masks_along_the_trajectory_give_the_bound():
  by_order = [along_trajectory(np.argsort(order)) for order in ORDERS]
  np.testing.assert_allclose(np.mean(by_order, axis=0), BOUND, rtol=1e-5)


def test_positions_of_one_call_are_masked_together():
  np.testing.assert_allclose(along_trajectory([0, 0, 0]), drawn("one_step")[0][:, 0].sum(-1), rtol=1e-5)


def test_stratified_ratios_leave_the_expectation_and_take_noise():
  stratified, independent = (drawn(f"elbo, {kind}")[1].mean(-1) for kind in ("stratified", "independent"))
  assert within_noise(stratified, expected_by_size().sum(-1) / (C + 1))
  assert (stratified.std(-1) ** 2).mean() < 0.9 * (independent.std(-1) ** 2).mean()


def test_the_bound_is_the_mean_over_sizes():
  np.testing.assert_allclose(expected_by_size().mean(-1), BOUND, rtol=1e-5)


def test_two_gauss_points_are_exact_for_three_positions():
  # the integrand is a polynomial of degree 2; so one point, exact to degree 1, is not enough
  assert within_noise(drawn("elbo_quadrature")[1].mean(-1), BOUND)

  def expected(num_points):
    nodes, weights = np.polynomial.legendre.leggauss(num_points)
    t, w = (nodes + 1) / 2, weights / 2
    sizes = np.arange(1, C + 1)
    ways = np.array([math.comb(C, m) for m in sizes])
    # sum_i w_i / t_i E[sum_{l in M}] = sum_m size_m * (m / n) * sum_i w_i C(n, m) t^(m - 1) (1 - t)^(n - m)
    share = (w[:, None] * ways * t[:, None] ** (sizes - 1) * (1 - t[:, None]) ** (C - sizes)).sum(0) * sizes / C
    return expected_by_size() @ share

  np.testing.assert_allclose(expected(2), BOUND, rtol=1e-6)
  assert np.abs(expected(1) - BOUND).max() > 1e-3


def test_the_coupled_estimate_reads_each_position_once_a_pair_and_once_in_full():
  case = CASES["coupled"]
  keys = jax.random.split(jax.random.key(1), (len(COMPLETIONS), 8))
  views = case.views(keys, completions(8))
  is_read = np.asarray(views.share > 0)
  assert is_read[:, :, 0].all()
  np.testing.assert_array_equal(is_read[:, :, 1] ^ is_read[:, :, 2], True)
  share = np.asarray(views.share)
  np.testing.assert_allclose(share[:, :, 0], 0.5)
  pair = [share[:, :, i].max(-1) for i in (1, 2)]
  both = (pair[0] > 0) & (pair[1] > 0)
  np.testing.assert_allclose(0.5 / pair[0][both] + 0.5 / pair[1][both], 1, rtol=1e-5)  # lambda and 1 - lambda


def test_the_upper_bound_lies_above_the_lower_on_the_same_masks():
  upper = Eubo(MaskSampling(64, antithetic=False), beta=1.0, mixture=1.0)
  half = Eubo(MaskSampling(64, antithetic=False), beta=1.0, mixture=0.5)
  keys = jax.random.split(jax.random.key(2), (len(COMPLETIONS), 16))
  views = upper.views(keys, completions(16))
  log_prob = token_log_prob(views.is_masked)
  lower = super(Eubo, upper).tokens(log_prob, views)
  eubo = upper.tokens(log_prob, views)
  # the logarithm of a mean with these shares against the mean of the logarithms; the shares sum to n / (n + 1) or so
  total = views.share.sum(2)
  above = np.asarray(eubo - jnp.log(total) - lower / total)
  assert above.min() > -1e-4
  assert above.mean() > 0.05
  np.testing.assert_allclose(half.tokens(log_prob, views), (eubo + lower) / 2, rtol=1e-4)


def test_the_upper_bound_by_hand():
  case = Eubo(MaskSampling(2, antithetic=False), beta=2.0, mixture=1.0)
  share = jnp.array([[1.5, 0.0, 1.5], [0.0, 0.0, 1.5]])[None, None] / 2
  views = estimators.Views(share > 0, share)
  tokens = case.tokens(jnp.log(jnp.array([[0.5, 0.1, 0.2], [0.3, 0.3, 0.4]]))[None, None], views)[0, 0]
  expected = [math.log(0.75 * 0.25) / 2, 0, math.log(0.75 * 0.04 + 0.75 * 0.16) / 2]
  np.testing.assert_allclose(tokens, expected, rtol=1e-5)


def test_the_upper_bound_is_right_where_powers_underflow():
  case = Eubo(MaskSampling(2, antithetic=False), beta=1.5, mixture=0.5)
  share = jnp.array([0.75, 0.5])[None, None, :, None]

  def mixed(log_prob):
    return case.tokens(log_prob[None, None, :, None], estimators.Views(share > 0, share))[0, 0, 0]

  for log_prob in ((-1.0, -2.0), (-59.0, -60.0), (-68.0, -66.0), (-80.0, -80.0), (-5000.0, -5001.0)):
    value, gradient = jax.value_and_grad(mixed)(jnp.array(log_prob))
    powers = [math.log(s) + 1.5 * lp for s, lp in zip((0.75, 0.5), log_prob, strict=True)]
    highest = max(powers)
    shares = np.exp(np.array(powers) - highest)
    upper = (highest + math.log(shares.sum())) / 1.5
    lower = 0.75 * log_prob[0] + 0.5 * log_prob[1]
    assert value == pytest.approx((upper + lower) / 2, rel=1e-5)
    np.testing.assert_allclose(gradient, (shares / shares.sum() + [0.75, 0.5]) / 2, rtol=1e-3)


def test_the_upper_bound_of_what_no_mask_sample_masked_has_no_gradient():
  case = Eubo(MaskSampling(2, antithetic=False), beta=1.5, mixture=1.0)
  share = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])[None, None]

  def total(log_prob):
    return case.upper(log_prob, estimators.Views(share > 0, share)).sum()

  value, gradient = jax.value_and_grad(total)(jnp.full((1, 1, 2, 3), -70.0))
  assert value == pytest.approx(-140, rel=1e-6)
  np.testing.assert_allclose(gradient[0, 0], [[1, 0, 0], [0, 0, 1]], rtol=1e-6)


def test_masked_prompt_tokens_belong_to_the_token_not_to_its_padding():
  case = OneStep(MaskSampling(2), prompt_mask_ratio=0.5)
  keys = jax.random.split(jax.random.key(0), (64, 2))
  counted = jnp.ones((64, 2, 3), bool)

  def masks(width, padding):
    is_valid = jnp.broadcast_to(jnp.arange(width) >= padding, (64, width))
    return np.asarray(case.views(keys, Completions(counted, 0 * counted.astype(jnp.int32), is_valid)).prompt_is_masked)

  short, long = masks(6, 0), masks(9, 3)
  np.testing.assert_array_equal(long[..., 3:], short)
  assert not long[..., :3].any()
  assert 0.4 < short.mean() < 0.6
  assert case.draws == (0, 1)


def test_blocks_hide_what_comes_after():
  case = Elbo(MaskSampling(4, min_ratio=0.2, max_ratio=0.8, block_length=2))
  keys = jax.random.split(jax.random.key(0), (16, 2))
  is_counted = jnp.broadcast_to(jnp.arange(6) < 5, (16, 2, 6))
  views = case.views(keys, Completions(is_counted, jnp.zeros((16, 2, 6), jnp.int32), jnp.ones((16, 4), bool)))
  is_read, is_masked = np.asarray(views.share > 0), np.asarray(views.is_masked)
  block = np.arange(6) // 2
  seen = set()
  for row in np.ndindex(16, 2, 4):
    blocks = set(block[is_read[row]])
    assert len(blocks) <= 1
    for chosen in blocks:
      seen.add(chosen)
      assert is_masked[row][block > chosen].all()
      assert not is_masked[row][block < chosen].any()
      np.testing.assert_array_equal(is_masked[row] & (block == chosen), is_read[row])
  assert seen == {0, 1, 2}


@pytest.mark.parametrize(
  ("name", "num", "message"),
  [
    ("elbo", 3, "must be even"),
    ("eubo", 3, "must be even"),
    ("coupled", 4, "must be odd"),
    ("coupled", 1, "must be odd"),
    ("elbo_quadrature", 3, "multiple of objective.elbo_quadrature.num_points = 2"),
    ("elbow", 2, "did you mean 'elbo'"),
  ],
)
def test_what_an_estimator_cannot_have_is_refused(name, num, message):
  own = {"elbo_quadrature": dict(num_points=2), "eubo": dict(beta=1.5, mixture=0.5)}.get(name, {})
  with pytest.raises(ValueError, match=message):
    make_estimator(name, MaskSampling(num), **own)
