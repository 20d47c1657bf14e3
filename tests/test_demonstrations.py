"""Demonstrations: buffers that follow the settings of the likelihood, and the loss on held-out ones."""

import jax
import numpy as np
import pytest
import tiny
from etils import epath

from dmpo_jax import build, phases, policy
from dmpo_jax.demonstrations import Demonstrations, make_held_out_loss
from dmpo_jax.structs import TrainState

STATE = TrainState(step=0, trainable={}, opt_state=(), num_skipped=0, num_skipped_in_a_row=0)  # nothing is read of it


@pytest.fixture
def parts(tmp_path, use_devices):
  use_devices(1)
  config = tiny.config(objective__name="denoise", warm_start__updates=0)
  return build.build_parts(config, epath.Path(tmp_path / "run"))


def test_buffers_count_and_weigh_what_the_objective_asks_for(parts):
  config = tiny.config(objective__name="denoise", objective__denoise__normalisation="token")
  config.sampler.completion_length = 20  # four more than a demonstration has: EOS
  objective = phases.make_objective(config)
  for counted, num in (("all", 20), ("until_eos", 17)):
    buffers = Demonstrations(config, parts, objective, 4, counted=counted)
    experience, _ = buffers.complete(STATE, 0, buffers.generate(STATE, 0))
    assert experience.is_counted.sum(-1).tolist() == [[num]] * 4
    np.testing.assert_allclose(experience.weight, 1)


def test_batches_do_not_change_the_held_out_loss(parts):
  losses = []
  for size in (16, 5):  # of 16 records: the last batch of 5 is filled up
    config = tiny.config(objective__name="denoise", warm_start__updates=0, eval__batch_size=size)
    with jax.set_mesh(parts.mesh):
      params = policy.initial_params(config, parts)
      loss = make_held_out_loss(config, parts, phases.make_objective(config), {})
      losses += [loss(params), loss(params)]
  assert losses[0] > 1  # nats a token of a random model
  np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
