"""Scores through the model: complementary masks share a pass of the head, a part of the vocabulary at a time."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import arrays_of, equations, products_of
from recorded_models import tiny

from dmpo_jax import sharding
from dmpo_jax.logprobs import make_log_probs, make_score
from dmpo_jax.models import head as head_module
from dmpo_jax.models.lora import LoraConfig
from dmpo_jax.objectives.estimators import Elbo
from dmpo_jax.objectives.masking import Completions, MaskSampling, draw_masks
from dmpo_jax.policy import Policies
from dmpo_jax.structs import Prompts

P, G, R, Q, C = 1, 1, 4, 3, 4
MASKS = MaskSampling(R, min_ratio=0.2, max_ratio=0.8)
PAIRS = MASKS.pairs()
WIDE = dict(vocab_size=301, embedding_size=304, mask_token_id=300)  # rows of the table that no token has
ADAPTERS = LoraConfig(rank=2, alpha=4.0, dropout=0.3, targets=("up_proj",))
CASES = {
  "all parameters": {},
  "tied, shifted by one": dict(weight_tying=True, shift_logits=True),
  "adapters, dropout": dict(lora=ADAPTERS),  # and a teacher
}


def make_inputs():
  keys = jax.random.split(jax.random.key(0), 4)
  prompts = Prompts(
    jax.random.randint(keys[0], (P, Q), 0, 300), jnp.arange(Q)[None] > 0, jnp.arange(P, dtype=jnp.uint32)
  )
  completion = jax.random.randint(keys[1], (P, G, C), 0, 300)
  is_counted = (jnp.arange(C) < C - 1)[None, None]
  is_masked, _ = draw_masks(jax.random.split(keys[2], (P, G)), is_counted, MASKS)
  return prompts, completion, is_masked, jax.random.split(keys[3], (P, G))


def loss(model, trainable, params, inputs, pairs):
  """A number that depends on every score that is read."""
  prompts, completion, is_masked, dropout_keys = inputs
  has_adapters = model.config.lora is not None
  variables = {"params": params, "lora": trainable} if has_adapters else {"params": trainable}
  keys = dropout_keys if has_adapters else None
  teacher = jax.lax.stop_gradient(jax.tree.map(lambda array: 1.2 * array, variables)) if has_adapters else None
  score = make_score(model, variables, prompts, completion, dropout_keys=keys, teacher=teacher)
  scores = score(is_masked, pairs=pairs)
  read = jax.tree.map(lambda array: jnp.where(is_masked, array, 0), scores)
  total = read.log_prob if read.divergence is None else read.log_prob - read.divergence
  return (total * jnp.arange(1, 1 + C)).sum(), read


def gradient_of(model, inputs, pairs):
  return jax.value_and_grad(lambda trainable, params: loss(model, trainable, params, inputs, pairs), has_aux=True)


def parts_of(case):
  model, variables = tiny(**WIDE, **CASES[case])
  if model.config.lora is None:
    return model, variables["params"], {}
  return model, variables["lora"], variables["params"]


@functools.cache
def plainly(case):
  """Every mask sample's own hidden states, and all logits at one time."""
  model, trainable, params = parts_of(case)
  return jax.jit(gradient_of(model, make_inputs(), ()))(trainable, params)


def assert_close(actual, wanted):
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), actual, wanted)


@pytest.mark.parametrize("case", CASES)
def test_pairs_and_parts_change_no_number(monkeypatch, case):
  wanted = plainly(case)
  monkeypatch.setattr(head_module, "CHUNK_SIZE", 128)
  model, trainable, params = parts_of(case)
  assert_close(jax.jit(gradient_of(model, make_inputs(), PAIRS))(trainable, params), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 1, 1), (1, 8, 1)])
def test_devices_change_no_number(monkeypatch, sizes):
  """Four rows on as many devices, on three and on eight; the head's eight or so positions are spread, too."""
  wanted = plainly("adapters, dropout")
  monkeypatch.setattr(head_module, "CHUNK_SIZE", 128)
  monkeypatch.setattr(head_module, "WIDTH_MULTIPLE", 8)
  model, trainable, params = parts_of("adapters, dropout")
  with jax.set_mesh(sharding.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])):
    program = jax.jit(gradient_of(model, make_inputs(), PAIRS))
    assert_close(program(trainable, params), wanted)
    assert rows_of_head(jax.make_jaxpr(program)(trainable, params)) == {9 if sizes[0] == 3 else 8}


def rows_of_head(program):
  """How many rows meet a part of the head in the products of a program."""
  return {left[0] for left, right in products_of(program) if right[-1] > 100 and len(left) == 2}


@pytest.mark.parametrize(("pairs", "rows"), [((), P * G * R * C), (PAIRS, P * G * R * C // 2)])
def test_a_pair_has_one_row_of_the_head_for_each_position(monkeypatch, pairs, rows):
  monkeypatch.setattr(head_module, "CHUNK_SIZE", 128)
  model, trainable, params = parts_of("adapters, dropout")
  program = jax.make_jaxpr(gradient_of(model, make_inputs(), pairs))(trainable, params)
  assert rows_of_head(program) == {rows}
  assert not [shape for shape in arrays_of(program) if {301, 304} & set(shape) and 16 not in shape]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("antithetic", [True, False])
def test_both_policies_are_scored_under_masks_that_are_drawn_once(monkeypatch, per_token, antithetic):
  """One program draws them as often as the estimator alone, and pairs share the head's rows for each policy."""
  monkeypatch.setattr(head_module, "CHUNK_SIZE", 128)
  estimator = Elbo(MaskSampling(R, antithetic, min_ratio=0.1))
  model, trainable, params = parts_of("adapters, dropout")
  prompts, completion, is_masked, keys = make_inputs()
  is_counted, committed_at = is_masked[:, :, 0], jnp.zeros_like(completion)
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  program = make_log_probs(model, mesh, estimator, per_token=per_token)
  about = prompts, completion, is_counted, committed_at, jax.random.key(0)
  traced = program.trace(Policies(trainable, params), *about).jaxpr
  alone = jax.make_jaxpr(lambda keys: estimator.views(keys, Completions(is_counted, committed_at, prompts.is_valid)))
  assert num_draws(traced) == num_draws(alone(keys)) > 0
  assert rows_of_head(traced) == {P * G * R * C // (2 if antithetic else 1)}


def num_draws(program):
  """How often a program draws random bits."""
  return sum(equation.primitive.name == "random_bits" for equation in equations(program))


def test_mask_samples_without_a_partner_keep_their_own():
  """As in the coupled estimate: the full mask, then a pair."""
  model, variables = tiny(**WIDE)
  prompts, completion, is_masked, _ = make_inputs()
  everything = (is_masked[:, :, :1] | is_masked[:, :, 2:3]).at[:].set(True)
  is_masked = jnp.concatenate([everything, is_masked[:, :, ::2]], axis=2)
  score = make_score(model, {"params": variables["params"]}, prompts, completion)
  packed, own = jax.jit(lambda masks: (score(masks, pairs=((1, 2),)), score(masks)))(is_masked)
  for actual, wanted in ((packed.log_prob, own.log_prob), (packed.entropy, own.entropy)):
    np.testing.assert_allclose(actual[:, :, 0], wanted[:, :, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.where(is_masked, actual, 0), np.where(is_masked, wanted, 0), rtol=1e-5, atol=1e-6)


def test_what_is_not_counted_is_masked_and_only_a_replay_says_otherwise():
  model, variables = tiny(**WIDE)
  prompts, completion, is_masked, _ = make_inputs()
  is_counted = jnp.broadcast_to(jnp.arange(C) < 2, completion.shape)
  is_masked &= is_counted[:, :, None]
  other = jnp.where(is_counted, completion, 7)

  @jax.jit
  def score(tokens, masks, is_counted, uncounted):
    return make_score(model, variables, prompts, tokens, is_counted=is_counted, uncounted=uncounted)(masks).log_prob

  def read(log_prob):
    return np.where(is_masked, log_prob, 0)

  wanted = read(score(completion, is_masked | ~is_counted[:, :, None], None, None))
  np.testing.assert_array_equal(read(score(completion, is_masked, is_counted, None)), wanted)
  np.testing.assert_array_equal(read(score(other, is_masked, is_counted, None)), wanted)
  seen = read(score(completion, is_masked, None, None))
  np.testing.assert_array_equal(read(score(other, is_masked, is_counted, completion)), seen)
  assert np.abs(seen - wanted).max() > 0.01
