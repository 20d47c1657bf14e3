"""Random-order decoding: recorded orders, tokens and log-probabilities, and these against exact ones."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_denoiser import MASK, contextual, keys, run
from recorded_models import adapters_of, load, settings, tensors

from dmpo_jax.hub.peft import lora_config_from_peft
from dmpo_jax.models.denoiser import make_denoiser
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.samplers import Plan, loop, prediction, random_order

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "samplers"
CASES = json.loads((GOLDENS / "random_order.json").read_text())
RECORDED = np.load(GOLDENS / "random_order.npz")


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_log_probabilities_recorded_from_the_official_code(monkeypatch, name):
  """The policy is the adapted model, the reference the model without adapters; noise and order are recorded."""
  lora = lora_config_from_peft(settings("adapter"), tensors("adapter"))
  model, variables = load("m2_gqa", lora=lora)
  model = Transformer(dataclasses.replace(model.config, vocab_size=model.config.embedding_size))
  adapters = adapters_of(tensors("adapter"), model.config)
  case = dict(CASES[name])
  guidance, plan = case.pop("guidance"), Plan(steps=case["completion_length"], **case)
  prompt, order = jnp.asarray(RECORDED[f"{name}_prompt"]), np.moveaxis(RECORDED[f"{name}_order"], 0, 1)
  order = jnp.asarray(order.reshape(len(prompt), -1))

  # A call's number stands for its keys, so that the recorded noise of the call can be looked up.
  def fold(keys, number):
    return jax.random.wrap_key_data(jnp.tile(jnp.stack([jnp.uint32(0), number.astype(jnp.uint32)]), (len(prompt), 1)))

  def gumbel(keys, positions, num_ids):
    noise = jnp.asarray(RECORDED[f"{name}_gumbel"])[jax.random.key_data(keys)[0, 1]]
    return jnp.broadcast_to(noise[:, None], (len(prompt), len(positions), num_ids))

  for module in (loop, random_order):
    monkeypatch.setattr(module, "fold_calls", fold)
  monkeypatch.setattr(random_order, "uniform_noise", lambda keys, positions: 1 - order[:, positions])
  monkeypatch.setattr(prediction, "gumbel_noise", gumbel)

  @jax.jit
  def decode(variables, keys):
    is_valid, reference = jnp.ones(prompt.shape, bool), {"params": variables["params"]}
    denoiser = make_denoiser(model, variables, prompt, is_valid, guidance=guidance, reference=reference)
    return random_order.sample(denoiser, keys, plan, random_order.Options())

  rollouts = decode({**variables, "lora": adapters}, keys(len(prompt)))
  np.testing.assert_array_equal(rollouts.completion, RECORDED[f"{name}_completion"])
  np.testing.assert_allclose(rollouts.log_p_old, RECORDED[f"{name}_log_p_old"], atol=5e-4)
  np.testing.assert_allclose(rollouts.log_p_ref, RECORDED[f"{name}_log_p_ref"], atol=5e-4)
  assert np.abs(rollouts.log_p_old - rollouts.log_p_ref).max() > 0.01


def test_log_probabilities_are_those_of_the_order_that_was_drawn():
  policies = contextual(seed=0), contextual(seed=1)
  denoiser = policies[0]._replace(reference=policies[1])
  rollouts = run("random_order", denoiser, keys(32), completion_length=2, temperature=0.7)
  for row in range(32):
    first = int(rollouts.committed_at[row, 1] == 0)  # the position
    state = np.full((1, 2), MASK)
    for position in (first, 1 - first):
      token = rollouts.completion[row, position]
      for policy, log_p in zip(policies, (rollouts.log_p_old, rollouts.log_p_ref), strict=True):
        logits = np.asarray(policy.hidden(jnp.asarray(state)), np.float64)[0, position]
        np.testing.assert_allclose(log_p[row, position], logits[token] - np.log(np.exp(logits).sum()), atol=1e-5)
      state[0, position] = token
  assert rollouts.log_p_old.dtype == rollouts.log_p_ref.dtype == np.float32


def test_without_a_reference_there_are_no_log_probabilities_of_it():
  rollouts = run("random_order", contextual(eos_token_id=1), keys(8), completion_length=2, early_exit=True)
  assert rollouts.log_p_ref is None
  is_filled = np.arange(2) >= rollouts.num_tokens[:, None]
  np.testing.assert_array_equal(rollouts.log_p_old == 0, is_filled)
