"""Old names of keys: refused in a command or a file with the new one, read in the workdir of an old run."""

import json

import pytest
from conftest import ROOT
from test_command import SMOKE, parse

from configs import base
from dmpo_jax import config as config_lib
from dmpo_jax.config.renamed import RENAMED, current
from dmpo_jax.run import workdir as workdir_lib


def with_old_names(config):
  """The nested dict of a run from before the renaming."""
  leaves = config_lib.flatten(config)
  for old, news in RENAMED.items():
    values = [leaves.pop(new) for new in news]
    leaves[old] = values[0] if values else "llada"
  nested = {}
  for path, value in leaves.items():
    *sections, key = path.split(".")
    section = nested
    for name in sections:
      section = section.setdefault(name, {})
    section[key] = value
  return json.loads(json.dumps(nested))


def test_each_new_name_is_a_key_and_no_old_one():
  leaves = config_lib.flatten(base.get_config())
  assert {new for names in RENAMED.values() for new in names} <= leaves.keys()
  assert not RENAMED.keys() & leaves.keys()


@pytest.mark.parametrize(
  ("old", "new"),
  [
    ("objective.num_replicates", "objective.num_mask_samples"),
    ("objective.baseline", "objective.wdce.baseline"),
    ("objective.kl_weight", "objective.diffu_grpo.kl_weight or config.objective.coupled_grpo.kl_weight or"),
    ("warm_start.flawless", "warm_start.correct_share"),
  ],
)
def test_an_old_name_is_refused_with_the_new_one(monkeypatch, capsys, old, new):
  with pytest.raises(SystemExit):
    parse(monkeypatch, SMOKE, f"--config.{old}=1")
  assert f"error: --config.{old}: is now config.{new}" in capsys.readouterr().err
  config = base.get_config()  # not locked, so that a file may add keys
  config.update_from_flattened_dict({old: 1})
  with pytest.raises(config_lib.ConfigError, match=f"^1 problem.*\n  config.{old} = 1: is now config.{new}"):
    config_lib.validate(config)


@pytest.mark.parametrize("line", ["c.objective.replicates = 'adaptive'", "print(c.objective.replicates)"])
def test_an_old_name_in_a_file_that_extends_a_locked_configuration(monkeypatch, capsys, tmp_path, line):
  text = f"from configs import sudoku_tiny\ndef get_config():\n  c = sudoku_tiny.get_config()\n  {line}\n  return c\n"
  (tmp_path / "mine.py").write_text(text)
  monkeypatch.syspath_prepend(ROOT)
  with pytest.raises(SystemExit):
    parse(monkeypatch, f"--config={tmp_path}/mine.py")
  assert "; objective.replicates is now config.objective.elbo_rounds" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["wdce", "gdpo", "wd1"])
def test_a_run_of_before_is_the_same_run(tmp_path, name):
  config = base.get_config()
  config.objective.name = name
  if name == "gdpo":
    for clipped in ("diffu_grpo", "coupled_grpo", "gdpo", "tracerl"):
      config.objective[clipped].clip = 0.3
  older = with_old_names(config)
  assert ("clip" in older["objective"], "gdpo" in older["objective"]) == (True, False)
  assert config_lib.differences(older, config) == []
  assert config_lib.fingerprint(older) == config_lib.fingerprint(config)
  (tmp_path / workdir_lib.FILE).write_text(json.dumps(older))
  (tmp_path / "base").mkdir()
  workdir_lib.check_workdir(tmp_path, config)
  config.objective.num_mask_samples = 4
  config.objective.gdpo.kl_weight = 0.0
  with pytest.raises(config_lib.ConfigError) as caught:
    workdir_lib.check_workdir(tmp_path, config)
  assert "  config.objective.num_mask_samples: 2 -> 4" in str(caught.value)
  assert ("config.objective.gdpo.kl_weight: 0.04 -> 0.0" in str(caught.value)) == (name == "gdpo")


def test_names_of_today_stay():
  assert current({"seed": 1, "objective.clip": 0.2}) == {
    "seed": 1,
    **{f"objective.{name}.clip": 0.2 for name in ("diffu_grpo", "coupled_grpo", "gdpo", "tracerl")},
  }
