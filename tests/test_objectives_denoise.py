"""The supervised loss: by hand, its expectation on the two-position model, and what it shares with every objective.

`goldens/objectives/denoise.*` are losses and gradients of dllm's MDLMTrainer.compute_loss (github.com/ZHZisZZ/dllm).
"""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import objectives
import pytest

from dmpo_jax import noise
from dmpo_jax.objectives import denoise
from dmpo_jax.objectives.masking import MaskSampling, place_masks
from dmpo_jax.structs import Experience, Prompts, Scores

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "objectives"
CASES = json.loads((GOLDENS / "denoise.json").read_text())["cases"]
P, G, C = 4, 1, 6
MASKS = MaskSampling(num=2, antithetic=False, min_ratio=0.001)


def demonstrations():
  ones = jnp.ones((P, G), jnp.float32)
  return Experience(
    prompts=Prompts(jnp.zeros((P, 1), jnp.int32), jnp.ones((P, 1), bool), jnp.arange(P, dtype=jnp.uint32)),
    completion=jnp.arange(P * C).reshape(P, G, C) % 5,
    is_counted=jnp.arange(C) < jnp.array([6, 6, 4, 1])[:, None, None],
    reward=0 * ones,
    is_kept=ones > 0,
    log_p_old=0 * ones,
    log_p_ref=0 * ones,
    weight=ones,
    negative_weight=0 * ones,
    committed_at=jnp.zeros((P, G, C), jnp.int32),
  )


@functools.partial(
  jax.jit,
  static_argnames=("name", "num_prompts"),
  compiler_options={"xla_backend_optimization_level": 0},  # noise takes long to compile, and little to run
)
def value_and_grad(theta, experience, *, name, num_prompts):
  objective = objectives.make(name, MASKS)

  def score(theta, is_masked, pairs=()):
    chosen = theta[jnp.arange(C), experience.completion][:, :, None]
    log_prob = jax.nn.log_sigmoid(jnp.broadcast_to(chosen, is_masked.shape))
    return Scores(log_prob=log_prob, entropy=jnp.ones(is_masked.shape))

  def compute(theta):
    keys = noise.row_keys(noise.step_key(0, "loss", 0), experience.prompts.prompt_id, G)
    return objective.loss(functools.partial(score, theta), experience, keys, num_prompts)

  return jax.value_and_grad(compute, has_aux=True)(theta)


def test_the_loss_by_hand():
  log_prob = jnp.log(jnp.array([[0.5, 0.25, 0.5, 0.1], [0.5, 0.25, 0.5, 0.1]]))[None, None]
  is_masked = jnp.array([[1, 1, 0, 0], [0, 0, 1, 0]], bool)[None, None]
  ratio = jnp.array([0.75, 0.25])[None, None]
  is_counted = jnp.array([1, 1, 1, 0], bool)[None, None]
  expected = (3 / (3 * 0.75) + 1 / (3 * 0.25)) / 2 * math.log(2)
  assert denoise.cross_entropy(log_prob, is_masked, ratio, is_counted).item() == pytest.approx(expected)


def test_a_ratio_of_zero_counts_as_nothing():
  nothing = jnp.zeros((1, 1, 1, 3), bool)

  def compute(log_prob):
    return denoise.cross_entropy(log_prob, nothing, jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 3), bool))[0, 0]

  value, gradient = jax.value_and_grad(compute)(jnp.full((1, 1, 1, 3), -2.0))
  assert value == 0
  np.testing.assert_array_equal(gradient, 0)


def test_over_all_ratios_the_loss_is_the_bound():
  # two positions, three tokens: log p of each position when both are masked, and when the other one is seen
  alone, seen = jnp.log(jnp.array([0.5, 0.2])), jnp.log(jnp.array([0.9, 0.3]))
  # a grid over (lambda, noise of position 1, noise of position 2), averaged as mask samples; lambda of it is masked
  ratios, noises = ((np.arange(n, dtype=np.float32) + 0.5) / n for n in (20, 40))
  u_ratio, first, second = (
    jnp.asarray(x.reshape(1, 1, -1)) for x in np.meshgrid(ratios, noises, noises, indexing="ij")
  )
  is_counted = jnp.ones((1, 1, 2), bool)
  is_masked, ratio = place_masks(
    u_ratio, jnp.stack([first, second], axis=-1), is_counted, MaskSampling(1, antithetic=False)
  )
  log_prob = jnp.where(is_masked.all(-1, keepdims=True), alone, seen)
  by_orders = [alone[0] + seen[1], alone[1] + seen[0]]
  bound = denoise.cross_entropy(log_prob, is_masked, ratio, is_counted).item()
  assert 2 * bound == pytest.approx(-np.mean(by_orders), rel=1e-4)


def test_what_takes_demonstrations_learns_from_its_first_step():
  theta, experience = jnp.zeros((C, 5)), demonstrations()
  for name in ("denoise", "wdce"):
    (loss, metrics), gradient = value_and_grad(theta, experience, name=name, num_prompts=P)
    assert np.isfinite([loss, *metrics.values(), *gradient.ravel()]).all(), name
    assert gradient.min() < 0, name
    (after, _), _ = value_and_grad(theta - 0.1 * gradient, experience, name=name, num_prompts=P)
    assert after < loss, name


def test_microbatches_add_up_and_uncounted_positions_teach_nothing():
  theta, experience = jax.random.normal(jax.random.key(0), (C, 5)), demonstrations()
  whole = value_and_grad(theta, experience, name="denoise", num_prompts=P)
  halves = [jax.tree.map(lambda x, s=start: x[s : s + 2], experience) for start in (0, 2)]
  parts = [value_and_grad(theta, half, name="denoise", num_prompts=P) for half in halves]
  total = jax.tree.map(lambda *leaves: sum(leaves), *parts)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), total, whole)
  # the last prompt counts one position, and dropping it leaves the others as they were
  without = experience.replace(is_kept=experience.is_kept.at[3].set(False))
  (_, metrics), gradient = value_and_grad(theta, without, name="denoise", num_prompts=P)
  first_three = np.zeros((C, 5), bool)
  first_three[np.arange(C), np.asarray(experience.completion[:3, 0])] = np.asarray(experience.is_counted[:3, 0])
  np.testing.assert_array_equal(np.asarray(gradient)[~first_three], 0)
  assert metrics["loss_entropy"] < whole[0][1]["loss_entropy"]


def published(name):
  """The arrays of one of dllm's cases, its settings, and our objective with them."""
  about = CASES[name]
  with np.load(GOLDENS / "denoise.npz") as arrays:
    case = {key.removeprefix(f"{name}/"): arrays[key] for key in arrays if key.startswith(f"{name}/")}
  masks = MaskSampling(num=1, antithetic=False, min_ratio=about["time_epsilon"])
  own = {key: about[key] for key in ("schedule", "weight", "normalisation")}
  return case, about, denoise.Denoise(masks, None, **own)


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_dllm(name):
  """Its masks from its uniform draws, its loss from its cross-entropy of every token, and the gradient by them."""
  case, _, objective = published(name)
  is_counted = (case["effective_labels"] != -100)[:, None]
  uniform = (jnp.asarray(case[name][:, None, None]) for name in ("u_t", "u_mask"))
  is_masked, divisor = objective.place(*uniform, jnp.asarray(is_counted))
  np.testing.assert_array_equal(is_masked[:, 0, 0], case["mask"])
  weight = objective.demonstration_weights(is_counted)

  def compute(token_nll):
    return (weight * denoise.cross_entropy(-token_nll, is_masked, divisor, jnp.asarray(is_counted))).mean()

  loss, gradient = jax.value_and_grad(compute)(jnp.asarray(case["token_nll"][:, None, None]))
  np.testing.assert_allclose(loss, case["loss"], rtol=2e-5)  # theirs rounds 1 - (1 - t)
  np.testing.assert_array_equal(gradient[:, 0, 0] != 0, case["mask"])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("antithetic", [True, False])
def test_the_bound_is_that_of_the_likelihood_whatever_the_schedule(schedule, antithetic):
  """As over all ratios above: over times, and over complements too."""
  log_p = jnp.log(jnp.array([0.5, 0.2]))  # independent positions: the bound is log p itself
  times, noises = ((np.arange(n, dtype=np.float32) + 0.5) / n for n in (200, 400))
  # a position alone is masked for a share p(t) of its noise
  u_time, u_first = (jnp.asarray(x.reshape(1, 1, -1)) for x in np.meshgrid(times, noises, indexing="ij"))
  masks = MaskSampling(2 if antithetic else 1, antithetic=antithetic)
  objective = denoise.Denoise(masks, None, schedule=schedule)
  is_counted = jnp.ones((1, 1, 2), bool)
  is_masked, divisor = objective.place(u_time, jnp.stack([u_first, 1 - u_first], axis=-1), is_counted)
  log_prob = jnp.broadcast_to(log_p, is_masked.shape)
  assert 2 * denoise.cross_entropy(log_prob, is_masked, divisor, is_counted).item() == pytest.approx(
    -log_p.sum().item(), rel=1e-2
  )


def test_a_buffers_weights_by_hand():
  is_counted = np.arange(6) < np.array([6, 4, 0, 2])[:, None, None]

  def weights(normalisation):
    return denoise.Denoise(MASKS, None, normalisation=normalisation).demonstration_weights(is_counted)[:, 0].tolist()

  assert weights("sequence") == [1, 1, 1, 1]
  assert weights("token") == [2, pytest.approx(4 / 3), 0, pytest.approx(2 / 3)]  # times 1 / (4 n): 1 / 12 a token
  assert weights("batch") == [6, 4, 0, 2]
