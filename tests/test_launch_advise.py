"""Advice for a base: what each figure makes the command say, and a base measured whole."""

import pytest
from etils import epath

from dmpo_jax import build, policy
from dmpo_jax.config import ConfigError
from dmpo_jax.hub.pretrained import filled
from launch import advise
from launch.measure import Diversity, measure_diversity
from tests import tiny

GOOD = dict(group_size=8, reward=0.2, solved=0.1, pass_at_1=0.1, pass_at_all=0.5, different=7.0, without_variance=0.05)
CHEAP = advise.Seconds(drawing=1.0, scoring=0.5, update=2.0)


def advice(seconds=CHEAP, noise=None, **figures):
  config = tiny.config(train__updates_per_buffer=4)
  return list(advise.advise(config, Diversity(**(GOOD | figures)), seconds, noise))


def test_a_base_with_something_to_find_gets_no_warning():
  (only,) = advice(noise=advise.Noise(log_ratio_error=0.4, tilt_std=1.0))
  assert only.startswith("Drawing is 11% of a buffer's time with 4 updates on it")  # 1 of 1 + 0.5 + 4 * 2 s
  assert only.endswith("drawing that is cheap.")


@pytest.mark.parametrize(
  ("figures", "said"),
  [
    (dict(pass_at_1=0.0, pass_at_all=0.0), "No rollout is right (pass@8 = 0)"),
    (dict(pass_at_1=0.2, pass_at_all=0.5), "pass@8 is 2.5 times pass@1"),
    (dict(different=4.9), "4.9 of 8 rollouts differ"),
    (dict(without_variance=0.25), "25% of the groups have equal rewards"),
    (dict(noise=advise.Noise(log_ratio_error=0.6, tilt_std=1.0)), "The log-ratio's error is 0.60 nats"),
    (dict(seconds=advise.Seconds(drawing=9.0, scoring=0.0, update=0.25)), "Drawing is 90% of a buffer's time"),
  ],
)
def test_each_figure_has_its_advice(figures, said):
  assert said in advice(**figures)[0]


def test_where_drawing_is_dear():
  assert advice(seconds=advise.Seconds(9.0, 0.0, 0.25))[0].endswith("drawing that is dear.")


def test_without_a_base_there_is_nothing_to_measure(tmp_path):
  with pytest.raises(ConfigError, match="no base to measure: give --workdir of a run that has one"):
    advise.with_base(tiny.config(), "", 4)
  own = advise.with_base(tiny.config(), str(tmp_path), 4)
  assert (own.model.init_from, own.warm_start.updates, own.eval.num_prompts) == (str(tmp_path / "base"), 0, 4)


@pytest.mark.slow
def test_a_base_is_measured_whole(tmp_path):
  config = filled(tiny.config(warm_start__updates=0, task__records_dir=str(tmp_path / "data"), eval__num_prompts=8))
  work = epath.Path(tmp_path)
  parts = build.build_parts(config, work)
  params = policy.initial_params(config, parts, are_trained=True)
  found = measure_diversity(config, parts, params, params, work, group_size=4)
  assert found.group_size == 4
  assert 1 <= found.different <= 4
  assert found.pass_at_1 <= found.pass_at_all
  seconds, noise = advise.measure_training(config, parts, params)
  assert seconds.drawing > 0
  assert seconds.update > 0
  assert noise is None  # the rewards of random weights are all 0, so nothing was learned and there is no log-ratio
