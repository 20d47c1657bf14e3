"""Losses and bounds through a model: with respect to every parameter, recorded from the official PyTorch code."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import objectives
import pytest
from recorded_models import adapters_of, params_of, reader
from safetensors.numpy import load_file

from dmpo_jax.hub import layout
from dmpo_jax.logprobs import make_score
from dmpo_jax.models import lora
from dmpo_jax.models.config import ModelConfig
from dmpo_jax.models.trainable import Trainable
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.objectives import likelihood, wddo
from dmpo_jax.structs import Experience, Prompts, Scores

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "objectives"
RECORDED = json.loads((GOLDENS / "wdce.json").read_text())
CASES = RECORDED["cases"]
WDDO = json.loads((GOLDENS / "wddo.json").read_text())
G, R, C = 4, 4, 16
CONFIG = ModelConfig(
  vocab_size=256,
  embedding_size=256,
  d_model=48,
  num_layers=2,
  num_heads=6,
  num_kv_heads=2,
  mlp_hidden_size=96,
  mask_token_id=RECORDED["mask_token_id"],
  eos_token_id=251,
  pad_token_id=251,
  rope_theta=10000.0,
  rms_norm_eps=1e-5,
  lora=lora.LoraConfig(rank=4, alpha=2.0, targets=("q_proj", "k_proj", "v_proj", "up_proj")),
)
PARAMS = params_of(load_file(GOLDENS / "m2_gqa.safetensors"), CONFIG)
ADAPTERS = adapters_of(load_file(GOLDENS / "lora_adapter.safetensors"), CONFIG)


class Case:
  """A recorded batch: four prompts with one completion each, in our axes [4, 1, r, c], padded to four mask samples."""

  def __init__(self, file, name):
    arrays = np.load(GOLDENS / f"{file}.npz")
    self.arrays = {key.split("/")[1]: arrays[key] for key in arrays if key.startswith(f"{name}/")}
    self.rows = len(self["prompt_ids"])
    fill = ((0, G - self.rows), (0, 0))
    tokens = jnp.asarray(np.pad(self["prompt_ids"], fill), jnp.int32)
    self.prompts = Prompts(tokens, jnp.ones(tokens.shape, bool), jnp.arange(G, dtype=jnp.uint32))
    self.completion = jnp.asarray(np.pad(self["completion_ids"], fill), jnp.int32)[:, None]
    is_masked = self["mask"].reshape(-1, self.rows, C).swapaxes(0, 1)
    self.mask_samples = is_masked.shape[1]
    self.is_masked = self.fill(jnp.asarray(is_masked)[None])

  def __getitem__(self, name):
    return self.arrays[name]

  def fill(self, array):
    """From the recorded rows as one group, [1, rows, r, c], to what the model runs on."""
    return jnp.pad(array[0], ((0, G - self.rows), (0, R - self.mask_samples), (0, 0)))[:, None]

  def crop(self, array):
    """The way back."""
    return array[: self.rows, 0, : self.mask_samples][None]


@functools.partial(jax.jit, static_argnames="policy")
def log_prob_and_pullback(prompts, completion, is_masked, cotangent, *, policy):
  """Log-probabilities of the tokens, and the gradient by the policy's parameters of their product with `cotangent`."""

  def compute(trainable):
    variables = Trainable(policy == "adapters", "float32").policy(trainable, PARAMS)
    return make_score(Transformer(CONFIG), variables, prompts, completion)(is_masked).log_prob

  log_prob, pullback = jax.vjp(compute, ADAPTERS if policy == "adapters" else PARAMS)
  return log_prob, pullback(cotangent)[0]


def log_prob_of(case, policy):
  nothing = jnp.zeros(case.is_masked.shape, jnp.float32)
  return case.crop(log_prob_and_pullback(case.prompts, case.completion, case.is_masked, nothing, policy=policy)[0])


@functools.partial(jax.jit, static_argnames=("baseline", "strength"))
def loss_and_gradient(log_prob, is_masked, experience, *, baseline, strength):
  def compute(log_prob):
    scores = Scores(log_prob=log_prob, entropy=jnp.zeros_like(log_prob))
    objective = objectives.make("wdce", baseline=baseline, baseline_strength=strength)
    return objective.group_loss(scores, is_masked, experience)[0][0]

  return jax.value_and_grad(compute)(log_prob)


@pytest.mark.parametrize("name", CASES)
def test_recorded_losses_and_parameter_gradients(name):
  case, settings = Case("wdce", name), CASES[name]
  policy = "adapters" if name.startswith("lora") else "params"
  ones = jnp.ones((1, case.rows), jnp.float32)
  experience = Experience(
    prompts=None,
    completion=case.completion[None, : case.rows, 0],
    is_counted=jnp.ones((1, case.rows, C), bool),
    reward=ones,
    is_kept=ones > 0,
    log_p_old=jnp.asarray(case["log_prob_cur"])[None],
    log_p_ref=ones,
    weight=jnp.asarray(case["advantages"])[None],
    negative_weight=jnp.asarray(case["negative_advantages"])[None],
    committed_at=jnp.zeros((1, case.rows, C), jnp.int32),
  )
  loss, cotangent = loss_and_gradient(
    log_prob_of(case, policy),
    case.crop(case.is_masked),
    experience,
    baseline=settings["baseline"],
    strength=settings["strength"],
  )
  np.testing.assert_allclose(loss, settings["loss"], rtol=1e-4)
  _, gradient = log_prob_and_pullback(
    case.prompts, case.completion, case.is_masked, case.fill(cotangent), policy=policy
  )
  check_gradient(gradient, case, settings)


@functools.partial(jax.jit, static_argnames=("halves", "alpha_ddo", "beta"))
def wddo_and_gradient(log_prob, is_masked, log_p_old, weight, *, halves, alpha_ddo, beta):
  def compute(log_prob):
    bounds = likelihood.elbo(log_prob, is_masked, jnp.ones((1, G, C), bool))
    real, fake = (bounds[..., :2].mean(-1), bounds[..., 2:].mean(-1)) if halves else 2 * [bounds.mean(-1)]
    is_kept = jnp.ones((1, G), bool)
    terms = wddo.terms(real, fake, log_p_old, weight, is_kept, beta=beta)
    return objectives.make("wddo", alpha_ddo=alpha_ddo, scale="official").group_loss(*terms, is_kept)[0]

  return jax.value_and_grad(compute)(log_prob)


@pytest.mark.parametrize("name", WDDO)
def test_recorded_discriminative_losses_and_parameter_gradients(name):
  # The official code averages both terms over the batch, where the weights' softmax already sums to one: the scale
  # `official`. Without two sets it adds up the bounds of the mask samples, where we take their mean: R times beta, and
  # R times the old log-probability that it is compared with divided out.
  case, settings = Case("wddo", name), WDDO[name]
  is_shared = settings["sets"] == "shared"
  log_p_old = jnp.asarray(case["log_prob_cur"])[None]
  loss, cotangent = wddo_and_gradient(
    log_prob_of(case, "params"),
    case.crop(case.is_masked),
    log_p_old / R if is_shared else log_p_old,
    jnp.asarray(case["advantages"])[None],
    halves=not is_shared,
    alpha_ddo=settings["alpha_ddo"],
    beta=settings["beta"] * (R if is_shared else 1),
  )
  np.testing.assert_allclose(loss, settings["loss"], rtol=1e-4)
  _, gradient = log_prob_and_pullback(
    case.prompts, case.completion, case.is_masked, case.fill(cotangent), policy="params"
  )
  check_gradient(gradient, case, settings | {"grad_norm_names": None})
  if is_shared:  # the mean, as we have it, is another loss
    mean, _ = wddo_and_gradient(
      log_prob_of(case, "params"),
      case.crop(case.is_masked),
      log_p_old,
      jnp.asarray(case["advantages"])[None],
      halves=False,
      alpha_ddo=settings["alpha_ddo"],
      beta=settings["beta"],
    )
    assert abs(mean - settings["loss"]) > 0.01 * settings["loss"]


def check_gradient(gradient, case, settings):
  if settings["grad_norm_names"]:
    names, places = settings["grad_norm_names"], layout.adapter_places(CONFIG, "llada")
  else:
    names, places = RECORDED["grad_norm_names"], layout.checkpoint_places(CONFIG, "llada")
  tensors = dict(layout.to_tensors(reader(gradient), places))
  names = [name.replace(".default.", ".") for name in names]
  assert sorted(tensors) == sorted(names)
  norms = [np.linalg.norm(tensors[name]) for name in names]
  np.testing.assert_allclose(norms, case["grad_norms"], rtol=2e-3, atol=1e-4 * max(norms))
  for i, name in enumerate(settings["grads"]):
    expected, got = case[f"grad_{i}"], tensors[name.replace(".default.", ".")]
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-4 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("name", json.loads((GOLDENS / "elbo.json").read_text()))
def test_recorded_bounds_of_policy_and_reference(name):
  case = Case("elbo", name)
  is_masked, is_counted = case.crop(case.is_masked), jnp.ones((1, case.rows, C), bool)
  for policy, label in (("adapters", "cur"), ("params", "ref")):
    estimate = likelihood.elbo(log_prob_of(case, policy), is_masked, is_counted).mean(-1)
    np.testing.assert_allclose(estimate[0], case[f"seq_log_prob_{label}"], rtol=1e-4, err_msg=label)
