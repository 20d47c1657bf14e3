"""The second family, Dream: its names, biases and shifted logits, against the formulas written out in NumPy."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import objectives
import pytest
from recorded_models import compiled, params_of, reader, tiny
from safetensors.numpy import load_file

from dmpo_jax.hub import layout, peft
from dmpo_jax.hub.model_config import model_config_from_hf, model_config_to_hf
from dmpo_jax.logprobs import make_score
from dmpo_jax.models.denoiser import completion_hidden, make_denoiser
from dmpo_jax.models.head import token_scores
from dmpo_jax.models.lora import LoraConfig
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.objectives import likelihood, wddo
from dmpo_jax.structs import Experience, Prompts, Scores

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "dream"
LOSSES = json.loads((GOLDENS / "losses.json").read_text())

HF = dict(
  model_type="Dream",
  architectures=["DreamModel"],
  hidden_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  intermediate_size=40,
  vocab_size=50,
  hidden_act="silu",
  rms_norm_eps=1e-6,
  rope_theta=1e6,
  rope_scaling=None,
  tie_word_embeddings=False,
  use_mrope=False,
  use_sliding_window=False,
  mask_token_id=48,
  bos_token_id=45,
  eos_token_id=46,
  pad_token_id=46,
)


def random_tensors(config, family="dream"):
  rng = np.random.default_rng(0)
  places = layout.checkpoint_places(config, family)
  shapes = {name: place.torch_shape for name, place in places.items()}
  return {name: rng.normal(size=shape, scale=0.4).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def dream():
  """(model, variables, tensors)"""
  config = model_config_from_hf(HF)
  tensors = random_tensors(config)
  params = params_of(tensors, config, "dream")
  return Transformer(config), {"params": params}, tensors


def forward(tensors, ids):
  """Logits of Qwen2.5's layers with attention in both directions, one row, in float64."""
  t = {name.removeprefix("model."): array.astype(np.float64) for name, array in tensors.items()}
  heads, kv_heads = HF["num_attention_heads"], HF["num_key_value_heads"]
  width = HF["hidden_size"] // heads
  frequency = HF["rope_theta"] ** -(np.arange(0, width, 2) / width)
  angle = np.outer(np.arange(len(ids)), frequency)
  cos, sin = (np.concatenate([f(angle)] * 2, axis=1)[:, None] for f in (np.cos, np.sin))

  def norm(x, name):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + HF["rms_norm_eps"]) * t[f"{name}.weight"]

  def rotate(x):
    return x * cos + np.concatenate([-x[..., width // 2 :], x[..., : width // 2]], axis=-1) * sin

  x = t["embed_tokens.weight"][ids]
  for i in range(HF["num_hidden_layers"]):

    def linear(y, name, layer=f"layers.{i}."):
      return y @ t[f"{layer}{name}.weight"].T + t.get(f"{layer}{name}.bias", 0)

    y = norm(x, f"layers.{i}.input_layernorm")
    q = rotate(linear(y, "self_attn.q_proj").reshape(len(ids), heads, width))
    k = rotate(linear(y, "self_attn.k_proj").reshape(len(ids), kv_heads, width)).repeat(heads // kv_heads, axis=1)
    v = linear(y, "self_attn.v_proj").reshape(len(ids), kv_heads, width).repeat(heads // kv_heads, axis=1)
    scores = np.exp(np.einsum("lnh,mnh->nlm", q, k) / np.sqrt(width))
    mixed = np.einsum("nlm,mnh->lnh", scores / scores.sum(-1, keepdims=True), v)
    x = x + linear(mixed.reshape(len(ids), -1), "self_attn.o_proj")
    y = norm(x, f"layers.{i}.post_attention_layernorm")
    gate = linear(y, "mlp.gate_proj")
    x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, "mlp.up_proj"), "mlp.down_proj")
  return norm(x, "norm") @ t["lm_head.weight"].T


def test_config_and_names():
  config = model_config_from_hf(HF)
  assert (config.d_model, config.num_kv_heads, config.mlp_hidden_size, config.embedding_size) == (24, 2, 40, 50)
  assert (config.qkv_bias, config.shift_logits, config.mask_token_id) == (True, True, 48)
  assert model_config_from_hf(model_config_to_hf(config, "dream")) == config
  names = layout.checkpoint_places(config, "dream")
  assert "model.layers.1.self_attn.k_proj.bias" in names
  assert "model.layers.1.self_attn.o_proj.bias" not in names
  with pytest.raises(ValueError, match="'use_sliding_window': True"):
    model_config_from_hf(HF | {"use_sliding_window": True})


def test_there_and_back(dream):
  model, variables, tensors = dream
  assert variables["params"]["blocks"]["k_proj"]["bias"].shape == (2, 12)
  back = dict(layout.to_tensors(reader(variables["params"]), layout.checkpoint_places(model.config, "dream")))
  assert back.keys() == tensors.keys()
  for name, array in tensors.items():
    np.testing.assert_array_equal(back[name], array)


def test_logits_are_the_formulas(dream):
  model, variables, tensors = dream
  ids = np.array([[3, 48, 7, 48, 48, 11, 2]])
  logits = compiled(model)(variables, ids)
  np.testing.assert_allclose(logits[0], forward(tensors, ids[0]), atol=1e-4)


def test_a_position_is_predicted_by_the_one_before_it(dream):
  model, variables, tensors = dream
  prompt, completion = np.array([[46, 3, 9]]), np.array([[48, 7, 48]])
  is_valid = np.array([[False, True, True]])  # padding on the left
  raw = forward(tensors, np.concatenate([prompt[0, 1:], completion[0]]))
  wanted = raw - np.log(np.exp(raw).sum(-1, keepdims=True))

  @jax.jit
  def run(prompt, is_valid, completion):
    denoiser = make_denoiser(model, variables, prompt, is_valid)
    hidden, _ = completion_hidden(model, variables, prompt, is_valid, completion)
    scores = token_scores(hidden[0], model.head_of(variables), jnp.array([5, 6, 7]))
    return denoiser.logits(denoiser.hidden(completion)), scores.log_prob

  (logits, _), log_prob = run(jnp.asarray(prompt), jnp.asarray(is_valid), jnp.asarray(completion))
  np.testing.assert_allclose(logits[0, :, 0], raw[1:4], atol=1e-4)
  np.testing.assert_allclose(log_prob, wanted[[1, 2, 3], [5, 6, 7]], atol=1e-4)


def load(name):
  """Give (config, params) of a recorded checkpoint."""
  config = model_config_from_hf(json.loads((GOLDENS / name / "config.json").read_text()))
  return config, params_of(load_file(GOLDENS / name / "model.safetensors"), config, "dream")


def test_calls_with_a_cache_give_the_official_logits():
  """Of a block's first token they know what the pass over the whole row said."""
  config, params = load("d_base")
  recorded = np.load(GOLDENS / "d_base" / "cached.npz")
  (start, end), before, after = recorded["c_block"], *(recorded[f"c_ids_{when}"] for when in ("full", "after"))
  size = end - start
  split = start - size  # the prompt ends a block earlier

  @jax.jit
  def run(prompt, before, after):
    denoiser = make_denoiser(Transformer(config), {"params": params}, prompt, jnp.ones(prompt.shape, bool))
    whole, cache = denoiser.prefill(before)
    dual = denoiser.block(after[:, size : 2 * size], jnp.int32(size), cache)
    prefix = denoiser.block(after[:, size:], jnp.int32(size), cache)
    return [denoiser.logits(hidden)[0][:, :, 0] for hidden in (whole, dual, prefix)]

  whole, dual, prefix = run(before[:, :split], before[:, split:], after[:, split:])
  np.testing.assert_allclose(whole, recorded["c_logits_full"][:, split - 1 : -1], atol=5e-4)
  for found, name in ((dual, "dual"), (prefix, "prefix")):
    np.testing.assert_allclose(found[:, 0], recorded["c_logits_full"][:, start - 1], atol=5e-4)
    np.testing.assert_allclose(found[:, 1:], recorded[f"c_logits_{name}"][:, :-1], atol=5e-4)


@pytest.mark.parametrize("shift", [False, True])
def test_a_shadow_sees_all_tokens_but_the_one_that_it_predicts(shift):
  model, variables = tiny(num_layers=1, shift_logits=shift)  # through a second layer it would
  prompt, completion = jnp.array([[5, 3, 9]]), jnp.array([[28, 7, 28, 11, 2]])

  @jax.jit
  def shadows(completion):
    denoiser = make_denoiser(model, variables, prompt, jnp.ones(prompt.shape, bool))
    return denoiser.shadowed(completion, jnp.int32(1), 2)[0], denoiser.hidden(completion)[0, 1:3]

  seen, whole = shadows(completion)
  np.testing.assert_allclose(seen[:2], whole, atol=1e-5)  # the row does not see them
  for position in range(5):
    changed = np.abs(shadows(completion.at[0, position].set(20))[0] - seen)[2:].max(-1) > 1e-4
    np.testing.assert_array_equal(changed, np.arange(1, 3) != position)


@pytest.mark.parametrize("name", LOSSES["cases"])
def test_recorded_losses_and_parameter_gradients(name):
  """As `test_objectives_gradients.py` has them for LLaDA, where the differences to our wddo are explained."""
  config, params = load("d_small")
  case, arrays = LOSSES["cases"][name], np.load(GOLDENS / "losses.npz")
  recorded = {key.split("/")[1]: jnp.asarray(arrays[key]) for key in arrays if key.startswith(f"{name}/")}
  rows, c = recorded["completion_ids"].shape
  is_masked = recorded["full_mask"][:, -c:].reshape(-1, rows, c).swapaxes(0, 1)[:, None]
  prompt = recorded["prompt_ids"]
  prompts = Prompts(prompt, jnp.ones(prompt.shape, bool), jnp.arange(rows, dtype=jnp.uint32))
  kept, weight = jnp.ones((1, rows), bool), recorded["advantages"][None]

  def compute(params):
    score = make_score(Transformer(config), {"params": params}, prompts, recorded["completion_ids"][:, None])
    log_prob, masks = (array.swapaxes(0, 1) for array in (score(is_masked).log_prob, is_masked))
    if name == "ddo":
      bounds, masks_drawn = likelihood.elbo(log_prob, masks, jnp.ones((1, rows, c), bool)).mean(-1), masks.shape[2]
      old, beta = recorded["log_prob_cur"][None] / masks_drawn, case["beta"] * masks_drawn
      real, fake = wddo.terms(bounds, bounds, old, weight, kept, beta=beta)[:2]
      return (real + rows * case["alpha_ddo"] * fake)[0] / rows, log_prob
    ones = jnp.ones((1, rows))
    experience = Experience(
      prompts=None,
      completion=recorded["completion_ids"][None],
      is_counted=jnp.ones((1, rows, c), bool),
      reward=ones,
      is_kept=kept,
      log_p_old=recorded["log_prob_cur"][None],
      log_p_ref=ones,
      weight=weight,
      negative_weight=recorded["negative_advantages"][None],
      committed_at=jnp.zeros((1, rows, c), jnp.int32),
    )
    objective = objectives.make("wdce", baseline=case["baseline"], baseline_strength=1.0)
    return objective.group_loss(Scores(log_prob, jnp.zeros_like(log_prob)), masks, experience)[0][0], log_prob

  (loss, log_prob), gradient = jax.jit(jax.value_and_grad(compute, has_aux=True))(params)
  losses = jnp.where(is_masked, -log_prob.swapaxes(0, 1), 0)[:, 0].swapaxes(0, 1).reshape(-1, c)
  np.testing.assert_allclose(losses, recorded["token_losses"][:, -c:], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(loss, case["loss"], rtol=1e-4)
  tensors = dict(layout.to_tensors(reader(gradient), layout.checkpoint_places(config, "dream")))
  norms = [np.linalg.norm(tensors[name]) for name in LOSSES["grad_norm_names"]]
  np.testing.assert_allclose(norms, recorded["grad_norms"], rtol=2e-3, atol=1e-4 * max(norms))
  expected = recorded["grad_0"]
  found = tensors["model.layers.0.self_attn.q_proj.weight"]
  np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4 * np.abs(expected).max())


def test_adapters_have_the_familys_names():
  lora = LoraConfig(2, 4.0, 0.0, ("q_proj", "attn_out", "ff_out"))
  config = model_config_from_hf(HF, lora=lora)
  about = peft.lora_config_to_peft(lora, "dream", "base")
  assert about["target_modules"] == ["q_proj", "o_proj", "down_proj"]
  places = layout.adapter_places(config, "dream")
  assert places["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].shape == (2, 24)
  assert peft.lora_config_from_peft(about, places, "dream") == lora
  with pytest.raises(ValueError, match=r"the adapter is on \['ff_proj'\]"):
    peft.lora_config_from_peft(about, ["x.ff_proj.lora_A.weight"], "dream")
