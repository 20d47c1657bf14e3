"""The optimizer against AdamW by hand, and the learning rates' courses at their corners."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmpo_jax import optim


def adamw_by_hand(param, gradients, *, rate, b1, b2, decay, clip):
  m, v = np.zeros_like(param), np.zeros_like(param)
  for count, gradient in enumerate(gradients, 1):
    gradient = gradient * min(1.0, clip / np.linalg.norm(gradient))
    m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
    step = (m / (1 - b1**count)) / (np.sqrt(v / (1 - b2**count)) + 1e-8)
    param = param - rate * (step + decay * param)
  return param


def run(params, gradients, **keywords):
  optimizer = optim.make_optimizer(0.1, **keywords)
  state = optimizer.init(params)
  for gradient in gradients:
    changes, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, changes)
  return params


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_clipped_adamw_as_computed_by_hand(decay):
  kernel = np.array([[1.0, -2.0], [0.5, 3.0]])
  gradients = [np.array([[3.0, 0.0], [-4.0, 1.0]]), np.full((2, 2), 0.01), np.array([[-9.0, 2.0], [1.0, 1.0]])]
  params = run(
    {"kernel": jnp.array(kernel)},
    [{"kernel": jnp.array(gradient)} for gradient in gradients],
    **dict(b1=0.8, b2=0.95, weight_decay=decay, clip_norm=1.5),
  )
  expected = adamw_by_hand(kernel, gradients, rate=0.1, b1=0.8, b2=0.95, decay=decay, clip=1.5)
  np.testing.assert_allclose(params["kernel"], expected, rtol=1e-5)


@pytest.mark.slow
def test_norms_are_not_decayed_even_where_layers_are_stacked():
  params = {
    "blocks": {"norm": {"scale": jnp.ones((3, 4))}, "ffn": {"kernel": jnp.ones((3, 4, 2))}},
    "head": jnp.ones(2),
  }
  after = run(params, [jax.tree.map(jnp.zeros_like, params)], b1=0.9, b2=0.9, weight_decay=0.5, clip_norm=1.0)
  assert (after["blocks"]["norm"]["scale"] == 1).all()
  np.testing.assert_allclose(after["blocks"]["ffn"]["kernel"], 0.95)
  np.testing.assert_allclose(after["head"], 0.95)


def test_moments_can_be_laid_out_as_their_parameters_are():
  schedule = optim.warmup_constant(0.1, 5)
  optimizer = optim.make_optimizer(schedule, b1=0.9, b2=0.9, weight_decay=0.1, clip_norm=1.0)
  params = {"kernel": jnp.ones((2, 3)), "scale": jnp.ones(3)}
  state = jax.eval_shape(optimizer.init, params)
  named = optax.tree_map_params(
    optimizer, lambda _, name: name, state, {"kernel": "k", "scale": "s"}, transform_non_params=lambda _: "count"
  )
  assert sorted(jax.tree.leaves(named)) == ["count", "count", "k", "k", "s", "s"]


def test_warmup_then_constant():
  rates = jax.vmap(optim.warmup_constant(0.8, 3))(jnp.arange(6))
  np.testing.assert_allclose(rates, [0.2, 0.4, 0.6, 0.8, 0.8, 0.8], rtol=1e-6)
  np.testing.assert_allclose(jax.vmap(optim.warmup_constant(0.8, 0))(jnp.arange(3)), 0.8)


def test_warmup_then_cosine_to_zero():
  rates = np.asarray(jax.vmap(optim.warmup_cosine(2.0, num_updates=20))(jnp.arange(22)))
  np.testing.assert_allclose(rates[:3], [2 / 3, 4 / 3, 2.0], rtol=1e-6)
  np.testing.assert_allclose(rates[11], 1.0, rtol=1e-6)  # half-way down
  np.testing.assert_allclose(rates[20:], 0.0, atol=1e-6)
  assert (np.diff(rates[2:]) <= 0).all()
  assert rates[19] > 0
  for num_updates in (1, 2, 9):  # too few for a warm-up
    assert np.isfinite(jax.vmap(optim.warmup_cosine(2.0, num_updates=num_updates))(jnp.arange(num_updates))).all()


def test_parameters_that_would_lose_small_updates_are_refused():
  optimizer = optim.make_optimizer(1e-6, b1=0.9, b2=0.99, weight_decay=0.1, clip_norm=0.2)
  params = {"blocks": {"kernel": jnp.ones((2, 2), jnp.bfloat16)}, "head": jnp.ones(2)}
  with pytest.raises(ValueError, match=r"trained in float32.*blocks/kernel is bfloat16"):
    optimizer.init(params)
