"""Losses and bounds through a model: with respect to every parameter, recorded from the official PyTorch code."""

import dataclasses
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
from dmpo_jax.hub.families import family_of
from dmpo_jax.hub.model_config import model_config_from_hf
from dmpo_jax.logprobs import make_score
from dmpo_jax.models import lora
from dmpo_jax.models.config import ModelConfig
from dmpo_jax.models.trainable import Trainable
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.objectives import likelihood, wddo
from dmpo_jax.objectives.denoise import Denoise, cross_entropy
from dmpo_jax.objectives.masking import MaskSampling
from dmpo_jax.structs import Experience, Prompts, Scores

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "objectives"
MODELS = GOLDENS.parent / "models"
RECORDED = json.loads((GOLDENS / "wdce.json").read_text())
CASES = RECORDED["cases"]
WDDO = json.loads((GOLDENS / "wddo.json").read_text())
DENOISE = json.loads((GOLDENS / "denoise.json").read_text())  # dllm's MDLMTrainer.compute_loss
A2D = {"q3_gqa": GOLDENS / "q3_gqa", "q3_tied": MODELS / "a2d_qwen3", "q2_bias": MODELS / "a2d_qwen2"}
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


@functools.cache
def a2d_model(name, mask_token_id, shift_logits):
  """A checkpoint of dllm's autoregressive-to-diffusion models: its family, config and parameters."""
  hf = json.loads((A2D[name] / "config.json").read_text()) | {"mask_token_id": mask_token_id}
  config = dataclasses.replace(model_config_from_hf(hf), shift_logits=shift_logits)
  return family_of(hf), config, params_of(load_file(A2D[name] / "model.safetensors"), config, family_of(hf))


def supervised_log_probs(config, params, case):
  """Log-probs [b, 1, 1, l - 1] of whole rows without the first token, which is never a target; 0 of padding."""
  ids = jnp.asarray(case["effective_input_ids"], jnp.int32)
  is_counted = jnp.asarray(case["effective_labels"] != -100)
  attended = case.get("attention_mask", np.ones(ids.shape, int)).sum(1)
  rows = []
  for row, length in enumerate(attended):  # padding is attended to by nothing: a row ends before it
    tokens, prompts = (
      ids[row, None, 1:length],
      Prompts(ids[row, None, :1], jnp.ones((1, 1), bool), jnp.zeros(1, "uint32")),
    )
    score = make_score(
      Transformer(config),
      {"params": params},
      prompts,
      tokens[None],
      is_counted=is_counted[row, None, None, 1:length],
      uncounted=tokens[None],
    )
    log_prob = score(jnp.asarray(case["mask"][row, None, None, None, 1:length])).log_prob
    rows.append(jnp.pad(log_prob, [(0, 0)] * 3 + [(0, ids.shape[1] - length)]))
  return jnp.concatenate(rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", DENOISE["cases"])
def test_supervised_losses_and_gradients_are_those_of_dllm(name):
  about = DENOISE["cases"][name]
  with np.load(GOLDENS / "denoise.npz") as arrays:
    case = {key.removeprefix(f"{name}/"): arrays[key] for key in arrays if key.startswith(f"{name}/")}
  family, config, params = a2d_model(about["checkpoint"], about["mask_token_id"], about["shift_logits"])
  masks = MaskSampling(num=1, antithetic=False, min_ratio=about["time_epsilon"])
  objective = Denoise(masks, None, **{key: about[key] for key in ("schedule", "weight", "normalisation")})
  is_counted = jnp.asarray(case["effective_labels"] != -100)[:, None]
  uniform = (jnp.asarray(case[key][:, None, None]) for key in ("u_t", "u_mask"))
  is_masked, divisor = objective.place(*uniform, is_counted)
  weight = objective.demonstration_weights(np.asarray(is_counted))

  @jax.jit
  def compute(params):
    log_prob = supervised_log_probs(config, params, case)
    return (weight * cross_entropy(log_prob, is_masked[..., 1:], divisor, is_counted[..., 1:])).mean()

  loss, gradient = jax.value_and_grad(compute)(params)
  np.testing.assert_allclose(loss, case["loss"], rtol=1e-4, atol=1e-6)
  found = dict(layout.to_tensors(reader(gradient), layout.checkpoint_places(config, family)))
  np.testing.assert_allclose(
    found[about["grad"]], case["grad"], rtol=2e-3, atol=1e-4 * np.abs(case["grad"]).max() + 1e-12
  )
  norms = {key: np.linalg.norm(found[key]) for key in DENOISE["parameters"][about["checkpoint"]]}
  recorded = dict(zip(norms, case["grad_norms"], strict=True))
  if name == "padding_as_eos_targets":  # torch gives the pad token's row, here a target, no gradient
    del norms["model.embed_tokens.weight"], recorded["model.embed_tokens.weight"]
  np.testing.assert_allclose(list(norms.values()), list(recorded.values()), rtol=2e-3, atol=1e-6)
