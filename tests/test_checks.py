"""What does not fit, or is not there, is refused before work starts; the figures are those of the shapes."""

import jax
import numpy as np
import pytest
import tiny
from etils import epath

from dmpo_jax import build, policy, sharding
from dmpo_jax.config import ConfigError
from dmpo_jax.run import checks
from dmpo_jax.run import params as params_lib


@pytest.fixture(autouse=True)
def one_device(use_devices, monkeypatch):
  use_devices(1)
  monkeypatch.setattr(jax, "local_device_count", lambda: 1)


def num_parameters(config):
  parts = build.build_model_parts(config)
  return sum(leaf.size for leaf in jax.tree.leaves(policy.abstract_collection(parts.model, parts.mesh, "params")))


@pytest.mark.parametrize(
  ("changes", "needed"),
  [
    ({}, 16),  # what is trained, two moments and the reference, float32
    (dict(model__param_dtype="bfloat16"), 14),  # the reference in bfloat16
    (dict(objective__name="denoise"), 12),  # no reference
  ],
)
def test_parameters_fit_to_the_byte(monkeypatch, changes, needed):
  config = tiny.config(**changes)
  count, size = num_parameters(config), 2 if "model__param_dtype" in changes else 4
  for is_training, least, what in ((False, size, "the parameters"), (True, needed, "the optimizer's moments")):
    monkeypatch.setattr(checks, "host_bytes", lambda least=least: least * count)
    build._build_model_parts(config, is_training)
    monkeypatch.setattr(checks, "host_bytes", lambda least=least: least * count - 1)
    with pytest.raises(ValueError, match=f"{what} take .* GB of a device's memory"):
      build._build_model_parts(config, is_training)


def test_a_model_beyond_any_machine_is_one_message():
  with pytest.raises(ConfigError, match=r"take 32,000,\d{3},\d{3}\.\d GB of a device's memory, which has"):
    build.build_model_parts(tiny.config(model__d_model=10**9))


@pytest.mark.parametrize(
  ("changes", "needed", "named"),
  [
    (
      dict(rollout__num_prompts=4, rollout__group_size=50),
      12 * 4 * 50 * 16,
      "rollout.num_prompts * rollout.group_size",
    ),
    (dict(objective__num_elbo_samples=500), 4 * 4 * 500 * 16, "objective.num_elbo_samples masks"),
    (dict(warm_start__batch_size=1000), 4 * 1000 * 34, "warm_start.batch_size demonstrations"),
    (dict(task__num_train=2000), 4 * 2004 * 18, "task.num_train + task.num_test prompts"),
    (dict(eval__num_samples=40, eval__batch_size=16), 12 * 16 * 40 * 16, "eval.batch_size * eval.num_samples"),
    (
      dict(rollout__num_prompts=4, rollout__group_size=4, objective__num_mask_samples=6),
      4 * 4 * 6 * 34 * 2,
      "a gradient step's 96 rows",
    ),
  ],
)
def test_batches_fit_to_the_byte(monkeypatch, changes, needed, named):
  """What a small number of bytes is exceeded by is the batch that was made large, and it alone."""
  config, mesh = tiny.config(**dict(task__num_train=4, task__num_test=4) | changes), sharding.make_mesh()
  monkeypatch.setattr(checks, "host_bytes", lambda: needed)
  checks.check_rows(config, 1, mesh)
  monkeypatch.setattr(checks, "host_bytes", lambda: needed - 1)
  with pytest.raises(ValueError, match=named.replace("*", r"\*").replace("+", r"\+")):
    checks.check_rows(config, 1, mesh)


def test_a_folder_without_parameters_is_refused_before_data_is_made(tmp_path):
  (tmp_path / "folder").mkdir()
  for key in ("model__init_from", "model__lora__init_from"):
    config = tiny.config(**{"model__lora__rank": 2, key: str(tmp_path / "folder")})
    with pytest.raises(ConfigError, match="folder: no parameters there; give a folder that a run"):
      build.build_parts(config, epath.Path(tmp_path / "run"))
  params_lib.save_params(tmp_path / "other", {"embedding": np.zeros((3, 3))})
  with pytest.raises(ConfigError, match=r"other holds the parameters of another model:\n  blocks"):
    build.build_parts(tiny.config(model__init_from=str(tmp_path / "other")), epath.Path(tmp_path / "run"))
  assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "other"]


def test_a_container_has_what_it_may_use(monkeypatch, tmp_path):
  whole = checks.host_bytes()
  monkeypatch.setattr(checks, "CGROUP", tmp_path / "memory.max")
  physical = checks.host_bytes()
  assert 0 < whole <= physical
  for text, limit in (("max\n", physical), ("1000000\n", 1000000), (f"{2 * physical}\n", physical)):
    (tmp_path / "memory.max").write_text(text)
    assert checks.host_bytes() == limit
