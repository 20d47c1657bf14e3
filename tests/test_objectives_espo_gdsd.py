"""ESPO and GDSD against what their authors' PyTorch code recorded: losses, estimates of log p, and their gradients."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import objectives
import pytest

from dmpo_jax.objectives.estimators import Elbo, Unweighted
from dmpo_jax.objectives.likelihood import Views
from dmpo_jax.objectives.masking import Completions, MaskSampling
from dmpo_jax.structs import Experience

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "objectives"
CASES = json.loads((GOLDENS / "espo_gdsd.json").read_text())
ARRAYS = np.load(GOLDENS / "espo_gdsd.npz")
PAIR = MaskSampling(2)


def arrays_of(case):
  return {key.split("/")[1].removesuffix("_f64"): ARRAYS[key] for key in ARRAYS if key.startswith(f"{case}/")}


def experience_of(arrays, length, num_rollouts, num_draws, has_reference):
  """One group of rollouts with the recorded log-probabilities."""
  shape = (1, num_rollouts, num_draws)
  zeros, is_counted = jnp.zeros((1, num_rollouts)), jnp.ones((1, num_rollouts, length), bool)
  return Experience(
    prompts=None,
    completion=jnp.zeros(is_counted.shape, jnp.int32),
    is_counted=is_counted,
    reward=zeros,
    is_kept=zeros == 0,
    log_p_old=zeros,
    log_p_ref=zeros,
    weight=zeros,
    negative_weight=zeros,
    committed_at=jnp.zeros(is_counted.shape, jnp.int32),
    token_log_p_old=jnp.asarray(arrays["log_p_old"].reshape(shape)),
    token_log_p_ref=jnp.asarray(arrays["log_p_ref"].reshape(shape)) if has_reference else None,
  )


@pytest.mark.parametrize("case", [name for name in CASES if "loss" in CASES[name]])
def test_recorded_losses_and_gradients(case):
  args, arrays = CASES[case]["args"], arrays_of(case)
  name = "espo" if case.startswith("espo") else "gdsd"
  own = dict(clip=args["eps"], kl_weight=args["beta"]) | ({"guidance": args["psi"]} if name == "gdsd" else {})
  if args["num_iterations"] == 1:  # nothing was measured: the policy is compared with itself
    arrays["log_p_old"] = arrays["log_p"]
  with jax.enable_x64(True):  # the published clip is below what float32 resolves at such log-probabilities
    objective = objectives.make(name, **own)
    experience = experience_of(arrays, args["L"], args["bs"], args["mc"], objective.needs_reference)
    advantage = jnp.asarray(arrays["advantages"], jnp.float64)[None]

    def loss(log_p):
      log_p = log_p.reshape(1, args["bs"], args["mc"])
      losses, metrics = objective.group_loss(log_p[..., 0] if name == "espo" else log_p, advantage, experience)
      return losses[0], metrics

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(arrays["log_p"]))
    np.testing.assert_allclose(value, arrays["loss"], rtol=1e-6)
    np.testing.assert_allclose(gradient, arrays["grad_log_p"], rtol=1e-5, atol=1e-9)
    if name == "gdsd" and args["num_iterations"] > 1:
      assert 1 - metrics["loss_clipped"].item() == pytest.approx(CASES[case]["fraction_inside_clip"], abs=1e-6)


@pytest.mark.parametrize("case", [name for name in CASES if "loss" not in CASES[name]])
def test_recorded_estimates_of_log_p_and_their_gradients(case):
  # one pair of complementary masks a draw; rows are draw by draw
  args, arrays = CASES[case]["args"], arrays_of(case)
  rows, length = args["bs"] * args["num_mc"], args["L"]
  is_masked = jnp.stack([arrays["mask"], ~arrays["mask"]], axis=1)[:, None]
  targets = jnp.asarray(np.tile(arrays["input_ids"][:, -length:], (args["num_mc"], 1)))
  likelihood = (Unweighted if case.startswith("gdsd") else Elbo)(PAIR)
  num_masked = is_masked.sum(-1, keepdims=True)
  share = jnp.where(is_masked, 1 / 2 if case.startswith("gdsd") else length / num_masked / 2, 0)
  # theirs has (n + 1) / m where ours has n / m, which an empty mask shrinks
  scale = 1 if case.startswith("gdsd") else (length + 1) / length

  def total(logits, coupled):
    both = jnp.stack([logits, coupled], axis=1)[:, None, :, -length:]
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(both), targets[:, None, None, :, None], -1)[..., 0]
    log_p = scale * likelihood.estimates(log_prob, Views(is_masked, share))
    log_p = log_p.reshape(args["num_mc"], args["bs"]).T.reshape(arrays["log_p"].shape)
    return (log_p * arrays["weights"]).sum(), log_p

  ours = jnp.asarray(arrays["logits"]), jnp.asarray(arrays["coupled_logits"])
  gradients, log_p = jax.grad(total, argnums=(0, 1), has_aux=True)(*ours)
  assert is_masked.shape[0] == rows
  np.testing.assert_allclose(log_p, arrays["log_p"], rtol=1e-5)
  for found, name in zip(gradients, ("grad_logits", "grad_coupled_logits"), strict=True):
    np.testing.assert_allclose(found, arrays[name], rtol=2e-3, atol=1e-4 * np.abs(arrays[name]).max())


def test_centred_logits_say_the_same():
  # what distinguishes the published variant TLC, beside its weights: no more than rounding
  logits = jnp.asarray(arrays_of("tlc_logits")["logits"])

  def chosen(logits, is_centred):
    mean = jax.lax.stop_gradient(logits.mean(-1, keepdims=True))
    return jax.nn.log_softmax(logits - mean * is_centred)[..., 0].sum()

  plain, centred = (jax.value_and_grad(chosen)(logits, is_centred) for is_centred in (False, True))
  np.testing.assert_allclose(plain[0], centred[0], rtol=1e-5)
  np.testing.assert_allclose(plain[1], centred[1], atol=1e-6)


@pytest.mark.parametrize("likelihood", [Unweighted, Elbo])
def test_the_estimators_share_is_what_the_recorded_estimates_take(likelihood):
  keys = jax.random.split(jax.random.key(0), (3, 2))
  is_counted = jnp.ones((3, 2, 7), bool)
  views = likelihood(PAIR).views(keys, Completions(is_counted, jnp.zeros((3, 2, 7), jnp.int32), jnp.ones((3, 4), bool)))
  weight = 1 / 2 if likelihood is Unweighted else 7 / jnp.maximum(views.is_masked.sum(-1, keepdims=True), 1) / 2
  np.testing.assert_allclose(views.share, jnp.where(views.is_masked, weight, 0), rtol=1e-6)
  np.testing.assert_array_equal(views.is_masked[:, :, 0], ~views.is_masked[:, :, 1])
