"""A tiny model that attends by blocks, sampled in slots: shared by the tests of continuous batching and of serving."""

import functools

import jax
import pytest
import tiny

from dmpo_jax import build, policy

BLOCKS = dict(
  model__block_length=4,
  sampler__name="parallel",
  sampler__parallel__threshold=0.4,
  sampler__block_length=4,
  sampler__completion_length=12,
  sampler__steps=12,
  sampler__slots=3,
)


@functools.cache
def load(num_devices=1, **changes):
  """The configuration, its parts, and a policy that is sure of some tokens and often ends."""
  with pytest.MonkeyPatch.context() as patch:
    devices = jax.devices()
    patch.setattr(jax, "devices", lambda: devices[:num_devices])
    config = tiny.config(**BLOCKS | changes)
    parts = build.build_model_parts(config)
  with jax.set_mesh(parts.mesh):
    params = policy.initial_params(config, parts)
    head = params["head"] * 4  # of which that of EOS varies most
    params["head"] = head.at[:, parts.tokenizer.eos_token_id].multiply(1.7)
  return config, parts, policy.Policies(params, {})
