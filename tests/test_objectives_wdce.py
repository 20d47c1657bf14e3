"""DMPO's loss: by hand, against a naive oracle, its invariances, and the recorded losses."""

import functools
import json
import math
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import objectives
import pytest

from dmpo_jax import noise
from dmpo_jax.objectives import wdce, weights
from dmpo_jax.structs import Experience, Prompts, Scores

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "objectives"
CASES = json.loads((GOLDENS / "wdce.json").read_text())["cases"]
THETA = np.random.default_rng(1).standard_normal((6, 5)).astype(np.float32)
P, G, C = 4, 3, 6
WEIGH = jax.jit(weights.importance_weights, static_argnames=("weighting", "alpha", "kappa"))


def make_experience(seed=0, p=P, g=G, c=C, **changes):
  """Random rollouts, in NumPy; the second one of the first prompt is dropped."""
  rng = np.random.default_rng(seed)
  arrays = dict(
    # the prompt's id is all that these tests need of it
    prompts=Prompts(np.zeros((p, 1), np.int32), np.ones((p, 1), bool), np.arange(p, dtype=np.uint32) + 100),
    completion=rng.integers(0, 5, (p, g, c), np.int32),
    is_counted=np.arange(c) < rng.integers(2, c + 1, (p, g, 1)),
    reward=rng.random((p, g), np.float32),
    is_kept=np.arange(p * g).reshape(p, g) != 1,
    log_p_old=-4 * rng.random((p, g), np.float32),
    log_p_ref=-4 * rng.random((p, g), np.float32),
  )
  arrays |= changes
  names = ("reward", "log_p_ref", "log_p_old", "is_kept")
  weight, negative_weight = WEIGH(*(arrays[name] for name in names), weighting="tilt", alpha=0.5, kappa=1.0)
  return Experience(
    **arrays,
    weight=np.array(weight),
    negative_weight=np.array(negative_weight),
    committed_at=np.zeros_like(arrays["completion"]),
  )


def change(array, where, value):
  array = array.copy()
  array[where] = value
  return array


def make_score(theta, experience):
  """A policy with a parameter a position and token, in which every further masked position costs confidence."""

  def score(is_masked, pairs=()):
    chosen = jnp.asarray(theta)[jnp.arange(is_masked.shape[-1]), experience.completion][:, :, None]
    logit = chosen - 0.1 * is_masked.sum(-1, keepdims=True)
    return Scores(log_prob=jax.nn.log_sigmoid(logit), entropy=jnp.exp(-(logit**2)))

  return score


def draw_masks(experience):
  """A complementary pair of masks of each rollout from NumPy's noise, which belongs to the prompt and the position."""
  g, c = experience.completion.shape[1:]
  noises = [np.random.default_rng(prompt_id).random((20, g, 1, 1)) for prompt_id in experience.prompts.prompt_id]
  is_drawn = np.concatenate([n[1 : 1 + c] < n[:1] for n in noises], axis=-1).transpose(3, 1, 2, 0)
  return np.concatenate([is_drawn, ~is_drawn], axis=2) & experience.is_counted[:, :, None]


def run(experience, baseline="negative", num_prompts=None, theta=THETA):
  """The loss, its metrics and its gradient by theta."""
  num_prompts = num_prompts or len(experience.reward)
  return value_and_grad(theta, experience, draw_masks(experience), baseline=baseline, num_prompts=num_prompts)


@functools.partial(jax.jit, static_argnames=("baseline", "num_prompts"))
def value_and_grad(theta, experience, is_masked, *, baseline, num_prompts):
  def compute(theta):
    # JAX's noise takes long to compile
    with mock.patch.object(wdce, "draw", return_value=(is_masked, None, None)):
      keys = jax.random.wrap_key_data(jnp.zeros((*is_masked.shape[:2], 2), jnp.uint32))
      objective = objectives.make("wdce", baseline=baseline)
      return objective.loss(make_score(theta, experience), experience, keys, num_prompts)

  (loss, metrics), gradient = jax.value_and_grad(compute, has_aux=True)(theta)
  return loss, metrics, gradient


@functools.partial(jax.jit, static_argnames=("baseline", "strength", "min_log_ratio"))
def group_loss(log_prob, is_masked, experience, *, baseline, strength, min_log_ratio=None):
  """Each prompt's loss and metrics under given masks, and the gradient of the losses' sum by the log-probabilities."""

  def compute(log_prob):
    scores = Scores(log_prob=log_prob, entropy=jnp.zeros_like(log_prob))
    own = {} if min_log_ratio is None else dict(unlearning="bounded", min_log_ratio=min_log_ratio)
    own |= dict(old_masks="buffer" if experience.token_log_p_old is None else "update")
    objective = objectives.make("wdce", baseline=baseline, baseline_strength=strength, **own)
    loss, metrics = objective.group_loss(scores, is_masked, experience)
    return loss.sum(), (loss, metrics)

  (_, (loss, metrics)), gradient = jax.value_and_grad(compute, has_aux=True)(log_prob)
  return loss, metrics, gradient


def test_the_loss_by_hand():
  # two rollouts, two replicates, three positions
  probability = np.array([[[0.5, 0.1, 0.25], [0.5, 0.125, 0.9]], [[0.25, 0.25, 0.5], [0.9, 0.9, 0.9]]], np.float32)
  is_masked = np.array([[[1, 0, 1], [0, 1, 0]], [[0, 1, 1], [0, 0, 0]]], bool)
  everything = np.ones((1, 2, 3), bool)
  experience = make_experience(p=1, g=2, c=3, is_kept=everything[..., 0], is_counted=everything).replace(
    weight=np.array([[0.8, 0.2]], np.float32),
    negative_weight=np.array([[0.3, 0.7]], np.float32),
    log_p_old=np.array([[-3.0, -2.0]], np.float32),
  )
  loss, metrics, _ = group_loss(
    np.log(probability)[None], is_masked[None], experience, baseline="negative", strength=0.5
  )
  # in units of log 2: (1 + 2) / 2 and 3, then (2 + 1) / 2 and nothing
  first, second = (1.5 + 3) / 2 * math.log(2), (1.5 + 0) / 2 * math.log(2)
  assert loss.item() == pytest.approx((0.8 - 0.15) * first + (0.2 - 0.35) * second)
  assert metrics["loss_cross_entropy"].item() == pytest.approx((first + second) / 2)
  assert metrics["loss_coefficient"].item() == pytest.approx(0.65 + 0.15)
  log_p_theta = np.array([(4.5 + 9) / 2, (4.5 + 0) / 2]) * -math.log(2)
  assert metrics["loss_log_ratio"].item() == pytest.approx(np.mean(log_p_theta) + 2.5)


def oracle(log_prob, is_masked, e, baseline, strength):
  """The losses of the prompts, in plain loops."""
  losses = []
  for p in range(len(log_prob)):
    kept = [g for g in range(len(log_prob[p])) if e.is_kept[p, g]]
    cross_entropy, ratio = {}, {}
    for g in kept:
      masks, terms = is_masked[p, g], log_prob[p, g]
      sums = [sum(terms[r, l] for l in range(C) if masks[r, l]) / max(masks[r].sum(), 1) for r in range(len(masks))]
      cross_entropy[g] = -sum(sums) / len(sums)
      ratio[g] = e.is_counted[p, g].sum() * -cross_entropy[g] - float(e.log_p_old[p, g])
    total = sum(math.exp(value) for value in ratio.values())
    subtracted = {
      "none": lambda g: 0.0,
      "mean": lambda g, kept=kept: 1 / len(kept),
      "model": lambda g, total=total, ratio=ratio: math.exp(ratio[g]) / total,
      "negative": lambda g, p=p: float(e.negative_weight[p, g]),
    }[baseline]
    losses.append(sum((float(e.weight[p, g]) - strength * subtracted(g)) * cross_entropy[g] for g in kept))
  return losses


@pytest.mark.parametrize("baseline", weights.BASELINES)
def test_the_loss_equals_a_naive_oracle(baseline):
  rng = np.random.default_rng(4)
  experience = make_experience(4)
  is_masked = (rng.random((P, G, 2, C)) < rng.random((P, G, 2, 1))) & experience.is_counted[:, :, None]
  assert not is_masked.any(-1).all()  # an empty mask is among them
  log_prob = np.log(rng.random(is_masked.shape, np.float32))
  loss, _, _ = group_loss(log_prob, is_masked, experience, baseline=baseline, strength=0.7)
  np.testing.assert_allclose(loss, oracle(log_prob, is_masked, experience, baseline, 0.7), rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_mean_of_its_groups_on_masks_from_the_keys():
  objective = objectives.make("wdce", baseline="model")

  @jax.jit
  def compute(experience):
    seen = []

    def score(is_masked, pairs=()):
      seen.append(is_masked)
      return make_score(THETA, experience)(is_masked)

    keys = noise.row_keys(noise.step_key(0, "loss", 0), experience.prompts.prompt_id, G)
    whole = objective.loss(score, experience, keys, P)
    return seen[0], whole, objective.group_loss(score(seen[0]), seen[0], experience)

  experience = make_experience()
  is_masked, whole, by_group = compute(experience)
  assert is_masked.shape == (P, G, 2, C)
  np.testing.assert_array_equal(is_masked[:, :, 0] ^ is_masked[:, :, 1], experience.is_counted)
  by_mean = jax.tree.map(lambda values: values.mean(), by_group)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), whole, by_mean)


@pytest.mark.parametrize("baseline", weights.BASELINES)
def test_microbatches_add_up_to_the_full_batch(baseline):
  experience = make_experience()
  whole = run(experience, baseline)
  parts = [run(jax.tree.map(lambda x, s=start: x[s : s + 2], experience), baseline, num_prompts=P) for start in (0, 2)]
  total = jax.tree.map(lambda *leaves: sum(leaves), *parts)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), total, whole)


def test_more_of_the_same_prompts_change_neither_loss_nor_gradient():
  # there the sum over a device's batch is not divided, so that the learning rate's meaning depends on the batch
  experience = make_experience()
  once, twice = run(experience), run(jax.tree.map(lambda x: np.concatenate([x, x]), experience))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), twice, once)


def test_the_order_of_prompts_and_padding_change_nothing():
  experience = make_experience()
  loss, metrics, gradient = run(experience)
  order = np.array([2, 0, 3, 1])
  shuffled = run(jax.tree.map(lambda x: x[order], experience))
  np.testing.assert_allclose(shuffled[0], loss, rtol=1e-5)
  padding = ((0, 0), (0, 0), (0, 3))
  padded = experience.replace(
    completion=np.pad(experience.completion, padding), is_counted=np.pad(experience.is_counted, padding)
  )
  padded_loss, padded_metrics, padded_gradient = run(padded, theta=np.pad(THETA, ((0, 3), (0, 0))))
  np.testing.assert_allclose(padded_loss, loss, rtol=1e-5)
  np.testing.assert_allclose(padded_gradient, np.pad(gradient, ((0, 3), (0, 0))), rtol=1e-4, atol=1e-6)
  for name, value in metrics.items():
    np.testing.assert_allclose(padded_metrics[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("baseline", ["mean", "model", "negative"])
def test_a_group_of_one_gives_no_update(baseline):
  loss, metrics, gradient = run(make_experience(p=1, g=1), baseline)
  assert loss.item() == pytest.approx(0, abs=1e-6)
  assert metrics["loss_coefficient"].item() == pytest.approx(0, abs=1e-6)
  np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_without_a_baseline_a_group_of_one_is_imitated():
  loss, metrics, gradient = run(make_experience(p=1, g=1), "none")
  assert loss.item() == pytest.approx(metrics["loss_cross_entropy"].item())
  assert np.abs(gradient).max() > 0.01


def test_equal_rewards_leave_nothing_but_the_log_ratio():
  equal = make_experience(reward=np.full((P, G), 0.3, np.float32))
  loss, _, gradient = run(equal, "negative")
  assert loss.item() == pytest.approx(0, abs=1e-5)
  np.testing.assert_allclose(gradient, 0, atol=1e-5)
  # without a difference between the policies either, the mean baseline leaves nothing
  same = make_experience(reward=np.full((P, G), 0.3, np.float32), log_p_ref=equal.log_p_old)
  np.testing.assert_allclose(run(same, "mean")[2], 0, atol=1e-5)
  np.testing.assert_array_less(0.01, np.abs(run(equal, "mean")[2]).max())


def test_a_step_down_the_gradient_raises_the_better_rollout():
  # every group: token 0 everywhere is better than token 1 everywhere, and a third rollout that is dropped
  tokens = np.broadcast_to(np.arange(G, dtype=np.int32)[:, None], (P, G, C))
  weight = np.broadcast_to(np.array([0.9, 0.1, 0.0], np.float32), (P, G))
  experience = make_experience(completion=tokens, is_counted=np.ones((P, G, C), bool)).replace(
    weight=weight, negative_weight=weight[:, [1, 0, 2]], is_kept=weight > 0
  )
  for baseline in ("none", "mean", "negative"):
    _, _, gradient = run(experience, baseline)
    assert (gradient[:, 0] < 0).all()
    assert ((gradient[:, 1] > 0) == (baseline != "none")).all()  # without a baseline the worse one is pushed up too
    np.testing.assert_array_equal(gradient[:, 2:], 0)


@pytest.mark.parametrize("baseline", weights.BASELINES)
def test_a_dropped_rollout_poisons_nothing(baseline):
  results = []
  for value in (np.nan, 7.0):
    values = change(np.full((P, G), -1.5, np.float32), (0, 1), value)
    experience = make_experience(reward=values, log_p_ref=values, log_p_old=values)
    # even where weights were computed without regard to what is kept
    experience = experience.replace(weight=change(experience.weight, (0, 1), value))
    results.append(run(experience, baseline))
  assert np.isfinite(results[0][2]).all()
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_a_group_with_nothing_kept_adds_nothing():
  experience = make_experience()
  without = experience.replace(is_kept=change(experience.is_kept, 2, False))
  others = jax.tree.map(lambda x: x[[0, 1, 3, 3]], experience)
  last = jax.tree.map(lambda x: x[[3, 3]], experience)
  loss, _, gradient = run(without, "mean")
  expected = [run(part, "mean", num_prompts=P) for part in (others, last)]
  # prompts 0, 1, 3: those of `others` less one half of `last`
  np.testing.assert_allclose(loss, expected[0][0] - expected[1][0] / 2, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(gradient, expected[0][2] - expected[1][2] / 2, rtol=1e-3, atol=1e-6)


def recorded(case):
  """One group of all rows of a recorded batch: its experience, masks and tokens' log-probabilities, [1, g, r, c]."""
  file = np.load(GOLDENS / "wdce.npz")
  arrays = {key.split("/")[1]: file[key] for key in file.files if key.startswith(f"{case}/")}
  rows, positions = arrays["completion_ids"].shape

  def by_row(name):
    return arrays[name].reshape(-1, rows, positions).swapaxes(0, 1)[None]

  ones = np.ones((1, rows), np.float32)
  experience = Experience(
    prompts=None,
    completion=arrays["completion_ids"].astype(np.int32)[None],
    is_counted=np.ones((1, rows, positions), bool),
    reward=ones,
    is_kept=ones > 0,
    log_p_old=arrays["log_prob_cur"][None],
    log_p_ref=ones,
    weight=arrays["advantages"][None],
    negative_weight=arrays["negative_advantages"][None],
    committed_at=np.zeros((1, rows, positions), np.int32),
  )
  return arrays, experience, by_row("mask"), -by_row("token_losses")


@pytest.mark.parametrize("case", CASES)
def test_the_recorded_losses_and_their_gradients(case):
  # recorded from the official PyTorch code: one batch is one group, and the loss is not divided by prompts
  arrays, experience, is_masked, log_prob = recorded(case)
  settings = CASES[case]
  loss, _, gradient = group_loss(
    log_prob, is_masked, experience, baseline=settings["baseline"], strength=settings["strength"]
  )
  np.testing.assert_allclose(loss, [settings["loss"]], rtol=1e-4)
  rows, replicates = is_masked.shape[1:3]
  coefficient = arrays["advantages_centered"].reshape(replicates, rows).T[None, :, :, None]
  num_masked = np.maximum(is_masked.sum(-1, keepdims=True), 1)
  expected = np.where(is_masked, -coefficient / num_masked / replicates, 0)
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_unlearning_stops_below_the_bound():
  everything = np.ones((1, 2, 3), bool)
  experience = make_experience(p=1, g=2, c=3, is_kept=everything[..., 0], is_counted=everything).replace(
    weight=np.array([[0.9, 0.1]], np.float32),
    negative_weight=np.array([[0.1, 0.9]], np.float32),
    log_p_old=np.array([[-1.0, -1.0]], np.float32),
  )
  log_prob = np.full((1, 2, 1, 3), -1.0, np.float32)  # log p_theta is -3: two below log p_old for both
  is_masked = np.ones((1, 2, 1, 3), bool)
  free = group_loss(log_prob, is_masked, experience, baseline="negative", strength=1.0)
  loose = group_loss(log_prob, is_masked, experience, baseline="negative", strength=1.0, min_log_ratio=-2.5)
  np.testing.assert_array_equal(loose[2], free[2])
  assert loose[1]["loss_stopped"] == 0
  _, metrics, gradient = group_loss(
    log_prob, is_masked, experience, baseline="negative", strength=1.0, min_log_ratio=-1.5
  )
  np.testing.assert_array_equal(gradient[0, 1], 0)
  np.testing.assert_array_equal(gradient[0, 0], free[2][0, 0])
  assert metrics["loss_stopped"] == 0.5
  # under the update's own masks: the mean of two draws is -2, one nat above log p_theta
  measured = experience.replace(token_log_p_old=np.array([[[-1.0, -3.0], [-1.0, -3.0]]], np.float32))
  _, metrics, gradient = group_loss(
    log_prob, is_masked, measured, baseline="negative", strength=1.0, min_log_ratio=-1.5
  )
  np.testing.assert_array_equal(gradient, free[2])
  assert metrics["loss_log_ratio"] == -1
