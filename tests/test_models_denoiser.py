"""What samplers and objectives get from the model: completions only, the right softmax, and little memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded_models import TINY, compiled, tiny

from dmpo_jax import sharding
from dmpo_jax.models import head as head_module
from dmpo_jax.models.denoiser import completion_hidden, make_denoiser
from dmpo_jax.models.head import Split, divergence, split_vocabulary, token_scores
from dmpo_jax.models.lora import LoraConfig
from dmpo_jax.samplers import prediction

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
  @jax.jit
  def run(variables, inputs, own):
    hidden, _ = completion_hidden(model, variables, *inputs[:3], **own)
    head, num_ids = model.head_of(variables), model.config.vocab_size
    found = token_scores(hidden.reshape(-1, TINY.d_model), head, inputs[3].reshape(-1), num_ids)
    return jax.tree.map(lambda array: array.reshape(inputs[3].shape), found)

  return run(variables, inputs, own)


def test_scores_are_of_the_softmax_over_the_vocabulary():
  model, variables = tiny()
  inputs = batch()
  logits = np.asarray(full_logits(model, variables, *inputs[:3]), np.float64)[..., : TINY.vocab_size]
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  actual = scores(model, variables, inputs)
  np.testing.assert_allclose(actual.log_prob, np.take_along_axis(log_p, inputs[3][..., None], -1)[..., 0], atol=1e-5)
  np.testing.assert_allclose(actual.entropy, -(np.exp(log_p) * log_p).sum(-1), atol=1e-5)


def test_scores_do_not_depend_on_padding_or_batch():
  model, variables = tiny(lora=LoraConfig(rank=2, alpha=4.0, dropout=0.3, targets=("v_proj",)))
  keys = jax.random.split(jax.random.key(3), ROWS)
  wanted = scores(model, variables, batch(), dropout_keys=keys)
  alone = jax.tree.map(lambda array: array[1:2], batch(padding=3))
  actual = scores(model, variables, alone, dropout_keys=keys[1:2])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[1:2], atol=1e-5), actual, wanted)


@pytest.fixture(scope="module", params=[TINY.head_dim, 6])
def looks(request):
  """What a guided denoiser gives in each of its ways, for a batch and for a row alone with other padding."""
  model, variables = tiny(head_dim=request.param)
  start, size = 2, 2
  inputs = batch()[:3]
  alone = [array[1:2] for array in batch(padding=3)[:3]]

  @jax.jit
  def look(variables, prompt, is_valid, noised):
    denoiser = make_denoiser(model, variables, prompt, is_valid, guidance=0.5)
    changed = noised.at[:, start].set(1)
    first, cache = denoiser.prefill(noised[:, :4])
    whole = denoiser.hidden(noised[:, :4])
    return {
      "whole": whole,
      "first": first,
      "block": denoiser.block(noised[:, start:4], jnp.int32(start), cache),
      "suffix": denoiser.suffix(noised[:, :4], jnp.int32(start), cache, size),
      "changed block": denoiser.block(changed[:, start:4], jnp.int32(start), cache),
      "changed suffix": denoiser.suffix(changed[:, :4], jnp.int32(start), cache, size),
      "shadowed": denoiser.shadowed(noised[:, :4], jnp.int32(start), size),
      "twice": denoiser.hidden(jnp.repeat(noised[:, :4], 2, axis=0)),
      "logits": denoiser.logits(whole)[0][:, :, 0],
      "apart": [
        make_denoiser(model, variables, p, is_valid).logits(
          make_denoiser(model, variables, p, is_valid).hidden(noised[:, :4])
        )[0][:, :, 0]
        for p in (prompt, jnp.full_like(prompt, TINY.mask_token_id))
      ],
    }

  return look(variables, *inputs), look(variables, *alone), (start, size)


def test_a_cache_of_the_same_row_changes_nothing(looks):
  (found, _, (start, size)) = looks
  np.testing.assert_allclose(found["first"], found["whole"], atol=1e-5)
  for name in ("block", "suffix"):
    np.testing.assert_allclose(found[name], found["whole"][:, start : start + size], atol=1e-5)
  # the block is the end of the row: with the same prefix cached both ways are one
  np.testing.assert_allclose(found["changed block"], found["changed suffix"], atol=1e-5)
  assert np.abs(found["changed block"] - found["block"]).max() > 1e-3


def test_the_row_does_not_see_the_shadow(looks):
  (found, _, (start, size)) = looks
  np.testing.assert_allclose(found["shadowed"][:, :size], found["whole"][:, start : start + size], atol=1e-5)
  assert found["shadowed"].shape[1] == 2 * size


def test_several_rows_for_a_prompt_are_its_rows(looks):
  (found, *_) = looks
  np.testing.assert_allclose(found["twice"], np.repeat(found["whole"], 2, axis=0), atol=1e-5)


def test_guidance_is_the_published_combination(looks):
  (found, *_) = looks
  cond, uncond = (np.asarray(logits)[..., : TINY.vocab_size] for logits in found["apart"])
  actual = np.asarray(found["logits"])
  np.testing.assert_allclose(actual[..., : TINY.vocab_size], uncond + 1.5 * (cond - uncond), atol=1e-4)
  assert np.isneginf(actual[..., TINY.vocab_size :]).all()


def test_no_way_depends_on_padding_or_batch(looks):
  found, alone, _ = looks
  for name in ("whole", "first", "block", "suffix", "changed block", "changed suffix", "shadowed"):
    np.testing.assert_allclose(alone[name][0], found[name][1], atol=1e-5, err_msg=name)


def test_negative_guidance_is_refused():
  model, variables = tiny()
  with pytest.raises(ValueError, match=r"sampler\.guidance=-1\.0: must be a number from 0"):
    make_denoiser(model, variables, *batch()[:2], guidance=-1.0)


def test_a_vocabulary_read_in_chunks_is_the_whole_one(monkeypatch):
  """Tokens, probabilities, entropy and noise are the same in one chunk and in several, whatever their width."""
  model, variables = tiny(vocab_size=1000, embedding_size=1003, mask_token_id=999)
  prompt, is_valid, _, _ = batch()
  hidden = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, 2, TINY.d_model)), jnp.float32)
  keys = jax.random.wrap_key_data(jnp.arange(2 * ROWS, dtype=jnp.uint32).reshape(ROWS, 2))
  given = jnp.array([[0, 998], [127, 128], [500, 640]])

  @jax.jit
  def whole(variables):
    denoiser = make_denoiser(model, variables, prompt, is_valid)
    return denoiser.logits(hidden)[0][:, :, 0]

  def in_chunks(chunk_size, temperature):
    monkeypatch.setattr(head_module, "CHUNK_SIZE", chunk_size)
    denoiser = make_denoiser(model, variables, prompt, is_valid)
    assert denoiser.num_chunks == -(-1003 // chunk_size)
    read = jax.jit(
      lambda hidden: (
        prediction.predict(denoiser, hidden, keys, jnp.arange(2), temperature),
        prediction.log_probs(denoiser, hidden, given),
      )
    )
    assert f"f32[{ROWS},2,1003]" not in str(jax.make_jaxpr(read)(hidden))
    return read(hidden)

  logits = np.asarray(whole(variables), np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  chosen, given_log_p = in_chunks(384, 0.0)
  tokens = np.where(np.arange(1003) == 999, -np.inf, logits).argmax(-1)
  np.testing.assert_array_equal(chosen.tokens, tokens)
  picked = np.take_along_axis(log_p, tokens[..., None], -1)[..., 0]
  np.testing.assert_allclose(chosen.confidence, np.exp(picked), rtol=1e-4)
  np.testing.assert_allclose(chosen.log_prob, picked, atol=1e-5)
  finite = log_p[..., :1000]
  np.testing.assert_allclose(chosen.entropy, -(np.exp(finite) * finite).sum(-1), rtol=1e-4)
  np.testing.assert_allclose(
    given_log_p, np.take_along_axis(log_p, np.asarray(given)[..., None], -1)[..., 0], atol=1e-5
  )
  wide, narrow = in_chunks(640, 2.0)[0], in_chunks(128, 2.0)[0]
  np.testing.assert_array_equal(wide.tokens, narrow.tokens)
  np.testing.assert_allclose(wide.confidence, narrow.confidence, rtol=1e-4)
  assert (np.asarray(wide.tokens) != tokens).any(), "the noise has chosen"


def test_a_vocabulary_split_over_devices_is_the_whole_one(monkeypatch):
  """Each device reads runs of its own share, 9 tiles: other chunks, the same tokens, noise and probabilities."""
  monkeypatch.setattr(head_module, "CHUNK_SIZE", 512)
  model, variables = tiny(vocab_size=1000, embedding_size=1152, mask_token_id=999)
  prompt, is_valid, _, _ = batch()
  hidden = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, 2, TINY.d_model)), jnp.float32)
  keys = jax.random.wrap_key_data(jnp.arange(2 * ROWS, dtype=jnp.uint32).reshape(ROWS, 2))

  def read(variables, hidden):
    denoiser = make_denoiser(model, variables, prompt, is_valid)
    return prediction.predict(denoiser, hidden, keys, jnp.arange(2), 2.0)

  alone = jax.jit(read)(variables, hidden)
  with jax.set_mesh(sharding.make_mesh(data=2, tensor=4)):
    assert split_vocabulary(1152) == Split(4, 288, 128)
    split = jax.jit(read)(variables, hidden)
  np.testing.assert_array_equal(split.tokens, alone.tokens)
  for name in ("confidence", "log_prob", "entropy"):
    np.testing.assert_allclose(getattr(split, name), getattr(alone, name), rtol=1e-4)


@pytest.mark.parametrize(("chunk_size", "tensor"), [(1152, 1), (384, 1), (512, 4)])
def test_samplers_and_scores_have_one_distribution(monkeypatch, chunk_size, tensor):
  """Over the vocabulary's 800 ids, whatever other rows the table has: read whole, in chunks, in shares without ids."""
  monkeypatch.setattr(head_module, "CHUNK_SIZE", chunk_size)
  model, variables = tiny(vocab_size=800, embedding_size=1152, mask_token_id=799)
  prompt, is_valid, _, _ = batch()
  rng = np.random.default_rng(0)
  hidden, taught = (jnp.asarray(rng.normal(size=(ROWS, 2, TINY.d_model)), jnp.float32) for _ in range(2))
  keys = jax.random.wrap_key_data(jnp.arange(2 * ROWS, dtype=jnp.uint32).reshape(ROWS, 2))

  def read(variables, hidden, taught):
    denoiser, head = make_denoiser(model, variables, prompt, is_valid), model.head_of(variables)
    chosen = prediction.predict(denoiser, hidden, keys, jnp.arange(2), 1.0)
    flat, others = (states.reshape(-1, TINY.d_model) for states in (hidden, taught))

    def score(head):
      return token_scores(flat, head, chosen.tokens.reshape(-1), 800)

    everything = token_scores(jnp.repeat(flat, 800, axis=0), head, jnp.tile(jnp.arange(800), len(flat)), 800)
    slope = jax.grad(lambda head: score(head).log_prob.sum())(head)
    return chosen, score(head), everything.log_prob, slope, divergence(flat, head, others, head, 800)

  with jax.set_mesh(sharding.make_mesh(data=2, tensor=4) if tensor > 1 else sharding.make_mesh(data=8)):
    chosen, scores, log_p, slope, apart = jax.jit(read)(variables, hidden, taught)
  log_p = np.asarray(log_p, np.float64).reshape(-1, 800)
  np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, rtol=1e-5)
  np.testing.assert_allclose(chosen.log_prob.ravel(), scores.log_prob, atol=1e-5)
  np.testing.assert_allclose(chosen.confidence.ravel(), np.exp(scores.log_prob), rtol=1e-5)
  np.testing.assert_allclose(chosen.entropy.ravel(), scores.entropy, rtol=1e-5)
  np.testing.assert_allclose(scores.entropy, -(np.exp(log_p) * log_p).sum(-1), rtol=1e-4)
  logits = np.asarray(taught.reshape(-1, TINY.d_model) @ model.head_of(variables), np.float64)[:, :800]
  other = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  np.testing.assert_allclose(apart, (np.exp(other) * (other - log_p)).sum(-1), rtol=1e-4)
  assert (slope[:, 800:] == 0).all()
  assert (jnp.abs(slope[:, :800]).max(0) > 0).all()
