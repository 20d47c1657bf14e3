"""The second family, Dream: its names, biases and shifted logits, against the formulas written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded_models import compiled, params_of, reader

from dmpo_jax.hub import layout, peft
from dmpo_jax.hub.model_config import model_config_from_hf, model_config_to_hf
from dmpo_jax.models.denoiser import completion_hidden, make_denoiser
from dmpo_jax.models.head import token_scores
from dmpo_jax.models.lora import LoraConfig
from dmpo_jax.models.transformer import Transformer

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


def random_tensors(config):
  rng = np.random.default_rng(0)
  places = layout.checkpoint_places(config, "dream")
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
    hidden = completion_hidden(model, variables, prompt, is_valid, completion)
    scores = token_scores(hidden[0], model.head_of(variables), jnp.array([5, 6, 7]))
    return denoiser.logits(denoiser.hidden(completion)), scores.log_prob

  (logits, _), log_prob = run(jnp.asarray(prompt), jnp.asarray(is_valid), jnp.asarray(completion))
  np.testing.assert_allclose(logits[0, :, 0], raw[1:4], atol=1e-4)
  np.testing.assert_allclose(log_prob, wanted[[1, 2, 3], [5, 6, 7]], atol=1e-4)


def test_caches_are_refused(dream):
  model, variables, _ = dream
  denoiser = make_denoiser(model, variables, jnp.array([[3, 9]]), jnp.array([[True, True]]))
  with pytest.raises(ValueError, match=r"choose a sampler.name that runs whole rows"):
    denoiser.prefill(jnp.array([[48, 7, 48]]))


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
