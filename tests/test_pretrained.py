"""What a configuration leaves open of its model is the checkpoint's, and what it says must be."""

import dataclasses
import json

import jax
import pytest
import tiny
from etils import epath
from ml_collections import ConfigDict
from recorded_models import TINY

from configs import base, dream_7b, llada_8b
from dmpo_jax import build, config, policy
from dmpo_jax.config import ConfigError
from dmpo_jax.hub import pretrained
from dmpo_jax.run import params as params_lib


def described(folder, **fields):
  """Write the description of a checkpoint: TINY with other fields."""
  about = {"family": "llada"} | {name: getattr(TINY, name) for name in pretrained.FIELDS} | fields
  (folder / "model.json").write_text(json.dumps(about))
  return str(folder)


def sizes(filled):
  return {name: filled.model[name] for name in pretrained.SMALL}


def test_without_a_checkpoint_it_is_the_small_one():
  assert sizes(pretrained.filled(base.get_config())) == pretrained.SMALL
  small = pretrained.SMALL
  given = dict(d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, mlp_hidden_size=32, rope_theta=1000.0)
  assert sizes(pretrained.filled(tiny.config())) == small | given


def test_what_is_left_open_is_the_checkpoints(tmp_path):
  given = base.get_config()
  given.model.init_from = described(epath.Path(tmp_path), qkv_bias=True, shift_logits=True, quantization="int8")
  found = sizes(pretrained.filled(given))
  assert found == {name: getattr(TINY, name) for name in pretrained.SMALL} | {
    "qkv_bias": True, "shift_logits": True, "quantization": "int8"
  }  # fmt: skip
  assert given.model.d_model is None, "the configuration itself is left alone"
  with pytest.raises(ConfigError, match=r"^1 problem.*\n.*model.lora.rank.*, as model.quantization = 'int8'"):
    config.validate(given)


def test_a_description_of_before_there_was_a_width_of_heads(tmp_path):
  path = epath.Path(described(epath.Path(tmp_path)))
  about = json.loads((path / "model.json").read_text())
  assert about.pop("head_dim") == TINY.head_dim == 4
  (path / "model.json").write_text(json.dumps(about))
  assert pretrained.read_model(path).fields["head_dim"] == 4
  given = base.get_config()
  given.model.init_from = str(path)
  now = pretrained.filled(given)
  assert now.model.head_dim == 4
  older = now.to_dict()
  del older["model"]["head_dim"]
  assert config.differences(older, now) == []
  assert config.fingerprint(older) == config.fingerprint(now)
  now.model.head_dim = 6
  assert config.differences(older, now) == ["config.model.head_dim: 'absent' -> 6"]


def test_a_float_is_the_checkpoints_but_for_rounding(tmp_path):
  given = base.get_config()
  given.model.init_from = described(epath.Path(tmp_path), rms_norm_eps=9.999999747378752e-06)
  given.model.rms_norm_eps = 1e-5
  assert pretrained.filled(given).model.rms_norm_eps == 9.999999747378752e-06
  given.model.rms_norm_eps = 1.001e-5
  assert pretrained.filled(given).model.rms_norm_eps == 1.001e-5, "which is another number, and refused as such"


def test_a_description_that_cannot_be_read_is_one_message(tmp_path):
  (tmp_path / "model.json").write_text("{")
  given = base.get_config()
  given.model.init_from = str(tmp_path)
  with pytest.raises(ConfigError, match=r"config.model.init_from: .*model.json"):
    config.validate(given)


@pytest.mark.parametrize("module", [llada_8b, dream_7b])
def test_a_model_that_is_planned_without_its_checkpoint_says_every_size(module):
  """All that a compiled program depends on; the head and the numbers' kind are those of most models."""
  left_open = {name for name in pretrained.SMALL if module.get_config().model[name] is None}
  of_most = {"rms_norm_eps", "rotary_fraction", "rope_scaling", "weight_tying", "qkv_bias", "qk_norm", "shift_logits"}
  of_experts = {name for name in pretrained.SMALL if "expert" in name} | {"router", "clip_qkv", "out_bias"}
  assert left_open <= of_most | of_experts | {"quantization", "block_length"}


def test_a_run_of_before_sizes_could_be_left_open_is_the_same_run():
  older = base.get_config().to_dict()
  older["model"] |= pretrained.SMALL
  now = pretrained.filled(base.get_config())
  assert config.differences(older, now) == []
  assert config.fingerprint(older) == config.fingerprint(now)
  now.model.d_model = 32
  assert config.differences(older, now) == ["config.model.d_model: 64 -> 32"]


def test_a_policy_on_a_checkpoint_needs_nothing_but_its_folder(use_devices, tmp_path):
  """From the description to parameters that fit: a small one as launch/convert_hf.py leaves it, in other sizes."""
  use_devices(1)
  folder = epath.Path(tmp_path / "checkpoint")
  given = tiny.config(model__d_model=24, model__num_layers=1, model__rope_theta=77.0, model__head_dim=6)
  parts = build.build_model_parts(given)
  with jax.set_mesh(parts.mesh):
    params_lib.save_params(folder / "params", policy.initial_params(given, parts))
  pretrained.write_model(folder, "llada", parts.model.config, origin="")
  left_open = base.get_config()
  left_open.model.init_from = str(folder)
  found = build.build_model_parts(left_open)
  assert found.model.config == dataclasses.replace(parts.model.config, remat=left_open.model.remat)
  left_open.model.num_layers = 2
  with pytest.raises(ConfigError, match=r"is of another model:\n  config.model has num_layers = 2, the checkpoint 1$"):
    build.build_model_parts(left_open)
  left_open.model.update(num_layers=None, block_length=4)
  with pytest.raises(ConfigError, match=r"has block_length = 4, the checkpoint 0\n  \(model.allow_other_blocks=True"):
    build.build_model_parts(left_open)
  left_open.model.allow_other_blocks = True
  assert build.build_model_parts(left_open).model.config.block_length == 4


def test_a_runs_parameters_say_what_model_they_are_of(use_devices, tmp_path):
  """What no shape depends on included: a run that begins with them needs no more than their folder."""
  use_devices(1)
  given = tiny.config(model__shift_logits=True, model__rope_theta=77.0, warm_start__updates=0)
  parts = build.build_model_parts(given)
  with jax.set_mesh(parts.mesh):
    about = policy.policy_metadata(given, epath.Path(tmp_path), 3, parts.model.config)
    params_lib.save_params(tmp_path / "policy", policy.initial_params(given, parts), about)
  left_open = base.get_config()
  left_open.model.init_from = str(tmp_path / "policy")
  found = build.build_model_parts(left_open)
  assert found.model.config == dataclasses.replace(parts.model.config, remat=left_open.model.remat)
  left_open.model.shift_logits = False
  with pytest.raises(ConfigError, match=r"config.model has shift_logits = False, the checkpoint True"):
    build.build_model_parts(left_open)


def test_a_runs_older_configuration_still_describes_its_model(tmp_path):
  older = base.get_config().to_dict()
  older["model"] |= {
    "init_from": described(epath.Path(tmp_path), mask_token_id=4, eos_token_id=2, pad_token_id=0),
    "num_layers": TINY.num_layers,
  }
  del older["model"]["allow_other_blocks"], older["model"]["layer_rows"]
  tokenizer = build.make_tokenizer(base.get_config())
  assert build.build_model(ConfigDict(older), tokenizer).config.d_model == TINY.d_model
