"""Adapters: against recorded ones, on and off, fresh, under dropout; and which projections may carry them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded_models import TINY, adapters_of, compiled, load, recorded, settings, tensors, tiny

from dmpo_jax.hub.peft import lora_config_from_peft
from dmpo_jax.models.layers import drop
from dmpo_jax.models.lora import TARGETS, LoraConfig
from dmpo_jax.models.trainable import Trainable

ADAPTERS, PARAMETERS = Trainable(True, "float32"), Trainable(False, "float32")
LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.5, targets=("q_proj", "ff_out"))


def test_adapters_on_and_off_give_the_recorded_logits():
  stored = tensors("adapter")
  model, base = load("m2_gqa", lora=lora_config_from_peft(settings("adapter"), stored))
  adapters = adapters_of(stored, model.config)
  arrays = recorded("adapter")
  policy = ADAPTERS.policy(adapters, base["params"])
  np.testing.assert_allclose(compiled(model)(policy, arrays["ids"]), arrays["logits_adapter"], rtol=0, atol=5e-4)
  reference = ADAPTERS.reference(base["params"])
  np.testing.assert_allclose(compiled(model)(reference, arrays["ids"]), arrays["logits_base"], rtol=0, atol=5e-4)


def test_fresh_adapters_change_nothing():
  model, variables = tiny(lora=LORA)

  @jax.jit
  def fresh(key):
    return jax.tree.map(lambda box: box.value, model.init(key, jnp.zeros((1, 1), jnp.int32))["lora"], is_leaf=is_box)

  adapters = fresh(jax.random.key(0))
  assert set(adapters["blocks"]) == set(LORA.targets)
  a, b = adapters["blocks"]["ff_out"]["A"], adapters["blocks"]["ff_out"]["B"]
  assert a.shape == (TINY.num_layers, TINY.mlp_hidden_size, 3)
  assert b.shape == (TINY.num_layers, 3, TINY.d_model)
  bound = TINY.mlp_hidden_size**-0.5
  assert 0.8 * bound < jnp.abs(a).max() <= bound
  assert not b.any()
  tokens = jnp.arange(10).reshape(2, 5)
  on = compiled(model)(ADAPTERS.policy(adapters, variables["params"]), tokens)
  off = compiled(model)(ADAPTERS.reference(variables["params"]), tokens)
  np.testing.assert_array_equal(on, off)


def is_box(leaf):
  return hasattr(leaf, "names")


def test_full_fine_tuning_trains_the_parameters_themselves():
  assert PARAMETERS.policy("trained", "frozen") == {"params": "trained"}
  assert ADAPTERS.policy("trained", "frozen") == {"params": "frozen", "lora": "trained"}
  assert PARAMETERS.reference("frozen") == {"params": "frozen"}
  assert PARAMETERS.reference("frozen", "copy") == {"params": "copy"}
  assert ADAPTERS.reference("frozen", "copy") == {"params": "frozen", "lora": "copy"}


def test_dropout_noise_belongs_to_the_row_and_the_position():
  model, variables = tiny(lora=LORA)
  run = compiled(model, "hidden")
  keys = jax.random.split(jax.random.key(1), 4)
  tokens = jax.random.randint(jax.random.key(2), (4, 5), 0, TINY.vocab_size)
  left = dict(tokens=jnp.pad(tokens, ((0, 0), (3, 0))), is_valid=jnp.tile(jnp.arange(8) >= 3, (4, 1)))
  wanted = run(variables, **left, dropout_keys=keys)[0][:, 3:]
  order = jnp.array([2, 0, 3, 1])  # another layout: rows elsewhere, padding on the right
  right = dict(tokens=jnp.pad(tokens, ((0, 0), (0, 3)))[order], is_valid=jnp.tile(jnp.arange(8) < 5, (4, 1)))
  moved = run(variables, **right, dropout_keys=keys[order])[0][:, :5]
  np.testing.assert_allclose(moved, wanted[order], atol=1e-5)
  other = run(variables, **left, dropout_keys=jnp.roll(keys, 1))[0][:, 3:]
  without = run(variables, **left)[0][:, 3:]
  assert jnp.abs(other - wanted).max() > 1e-2
  assert jnp.abs(without - wanted).max() > 1e-2


def test_dropout_keeps_the_mean():
  keys = jax.random.split(jax.random.key(0), (2, 50))
  dropped = np.asarray(jax.jit(drop, static_argnums=2)(jnp.ones((2, 50, 100)), keys, 0.25))
  np.testing.assert_allclose(np.unique(dropped), [0, 4 / 3], rtol=1e-6)
  assert abs(dropped.mean() - 1) < 0.02
  assert not np.array_equal(dropped[0, 0], dropped[0, 1])


def test_targets_are_checked():
  assert LoraConfig(1, 1.0, targets=("all",)).targets == TARGETS
  assert LoraConfig(1, 1.0, targets=("up_proj", "q_proj")).targets == ("q_proj", "up_proj")
  with pytest.raises(ValueError, match=r"no projection 'gate_proj'.*ff_proj"):
    LoraConfig(1, 1.0, targets=("q_proj", "gate_proj"))
  with pytest.raises(ValueError, match="did you mean 'up_proj'"):
    LoraConfig(1, 1.0, targets=("upproj",))
  with pytest.raises(ValueError, match=r"model\.lora\.targets is empty"):
    LoraConfig(1, 1.0, targets=())
  with pytest.raises(ValueError, match=r"model\.lora\.rank=0"):
    LoraConfig(0, 1.0)
  with pytest.raises(ValueError, match=r"model\.lora\.dropout=1"):
    LoraConfig(1, 1.0, dropout=1.0)
