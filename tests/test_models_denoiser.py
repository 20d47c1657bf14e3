"""What samplers and objectives get from the model: completions only, the right softmax, and little memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded_models import TINY, compiled, tiny

from dmpo_jax.models.denoiser import completion_scores, make_denoiser
from dmpo_jax.models.lora import LoraConfig

ROWS, PROMPT, COMPLETION = 3, 4, 5


def batch(padding=0):
  """Prompts of different lengths, noised completions and targets; `padding` more positions on the left."""
  keys = jax.random.split(jax.random.key(0), 3)
  prompt = jax.random.randint(keys[0], (ROWS, PROMPT), 0, TINY.vocab_size)
  is_valid = jnp.arange(PROMPT) >= jnp.arange(ROWS)[:, None]
  targets = jax.random.randint(keys[1], (ROWS, COMPLETION), 0, TINY.vocab_size)
  noised = jnp.where(jax.random.bernoulli(keys[2], 0.5, targets.shape), TINY.mask_token_id, targets)
  prompt = jnp.pad(prompt, ((0, 0), (padding, 0)), constant_values=TINY.pad_token_id)
  return prompt, jnp.pad(is_valid, ((0, 0), (padding, 0))), noised, targets


def full_logits(model, variables, prompt, is_valid, noised):
  tokens = jnp.concatenate([prompt, noised], axis=1)
  is_valid = jnp.concatenate([is_valid, jnp.ones(noised.shape, bool)], axis=1)
  return compiled(model)(variables, tokens, is_valid=is_valid)[:, prompt.shape[1] :]


def test_denoiser_gives_the_logits_of_completions_and_of_tokens_only():
  model, variables = tiny()
  prompt, is_valid, noised, _ = batch()

  @jax.jit
  def denoise(variables, noised):
    denoiser = make_denoiser(model, variables, prompt, is_valid)
    hidden = denoiser.hidden(noised)
    return hidden, denoiser.logits(hidden[:, 1:3])[0][:, :, 0]

  hidden, logits = denoise(variables, noised)
  assert hidden.shape == (ROWS, COMPLETION, TINY.d_model)
  is_token = np.arange(TINY.embedding_size) < TINY.vocab_size
  assert np.isneginf(logits[..., ~is_token]).all()
  wanted = full_logits(model, variables, prompt, is_valid, noised)[:, 1:3]
  np.testing.assert_allclose(logits[..., is_token], wanted[..., is_token], atol=1e-5)
  denoiser = make_denoiser(model, variables, prompt, is_valid)
  assert (denoiser.mask_token_id, denoiser.eos_token_id) == (TINY.mask_token_id, TINY.eos_token_id)


def scores(model, variables, inputs, **own):
  return jax.jit(lambda variables, inputs, own: completion_scores(model, variables, *inputs, **own))(
    variables, inputs, own
  )


def test_scores_are_of_the_softmax_over_the_whole_table():
  model, variables = tiny()
  inputs = batch()
  logits = np.asarray(full_logits(model, variables, *inputs[:3]), np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  actual = scores(model, variables, inputs)
  np.testing.assert_allclose(actual.log_prob, np.take_along_axis(log_p, inputs[3][..., None], -1)[..., 0], atol=1e-5)
  np.testing.assert_allclose(actual.entropy, -(np.exp(log_p) * log_p).sum(-1), atol=1e-5)


def test_chunks_change_no_number_and_hold_few_logits():
  model, variables = tiny()
  inputs = batch()

  def loss(params, chunk):
    result = completion_scores(model, {**variables, "params": params}, *inputs, chunk=chunk)
    return (result.log_prob * jnp.arange(COMPLETION)).sum() + result.entropy.sum(), result

  gradient = jax.value_and_grad(loss, has_aux=True)
  whole, chunked = (jax.jit(gradient, static_argnums=1)(variables["params"], chunk) for chunk in (0, 2))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), whole, chunked)
  all_logits = (f"f32[{ROWS},{COMPLETION},{TINY.embedding_size}]", f"f32[{ROWS * COMPLETION},{TINY.embedding_size}]")
  for chunk, is_there in ((0, True), (2, False)):
    program = str(jax.make_jaxpr(lambda params, chunk=chunk: gradient(params, chunk))(variables["params"]))
    assert any(shape in program for shape in all_logits) == is_there


def test_scores_do_not_depend_on_padding_or_batch():
  model, variables = tiny(lora=LoraConfig(rank=2, alpha=4.0, dropout=0.3, targets=("v_proj",)))
  keys = jax.random.split(jax.random.key(3), ROWS)
  wanted = scores(model, variables, batch(), dropout_keys=keys)
  alone = jax.tree.map(lambda array: array[1:2], batch(padding=3))
  actual = scores(model, variables, alone, dropout_keys=keys[1:2])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[1:2], atol=1e-5), actual, wanted)


def test_a_negative_chunk_is_refused():
  model, variables = tiny()
  with pytest.raises(ValueError, match=r"model\.loss_chunk=-1"):
    completion_scores(model, variables, *batch(), chunk=-1)
