"""What is wrong on a command line, or in the file of a configuration, ends in one message, for every command alike."""

import sys

import pytest
from absl import app, flags
from conftest import ROOT
from ml_collections import config_flags

from dmpo_jax.config import command


def parse(monkeypatch, *args):
  """Parse a command line that has a configuration and a mode."""
  monkeypatch.setattr(sys, "argv", ["program", *args])
  monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the configuration that was loaded before
  known = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "", flag_values=known)
  flags.DEFINE_enum("mode", "train", ["train", "serve"], "", flag_values=known)
  flags.mark_flag_as_required("config", flag_values=known)
  return command.parse(sys.argv, known), known


SMOKE = f"--config={ROOT}/configs/smoke.py"


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ([], "error: --config is missing; --help says what it is\n"),
    (
      [f"--config={ROOT}/configs/bench.py:foo"],
      "foo: must be one of sudoku, countdown, sorting (ROOT/configs/bench.py, line",
    ),
    ([f"--config={ROOT}/configs/throughput.py:foo", "--config.seed=1"], "foo: must be one of training, iteration,"),
    (["--config=absent.py", "--config.seed=1"], "error: --config=absent.py: no such file\n"),
    ([SMOKE, "--mode=srve"], "--mode=srve: value should be one of <train|serve>"),
    ([SMOKE, "--mod=serve"], "Unknown command line flag 'mod'. Did you mean: mode ?"),
    ([SMOKE, "--config.optim.learning_rate=abc"], "--config.optim.learning_rate=abc: could not convert"),
    (
      [SMOKE, "--config.train.num_bufers=3"],
      "--config.train.num_bufers: no such key; did you mean 'train.num_buffers'?",
    ),
    ([SMOKE, "--config.optm.b1=3"], "--config.optm.b1: no such key; did you mean 'optim.b1'?"),
    ([SMOKE, "--config.seed"], "Missing value for flag --config.seed"),
  ],
)
def test_a_mistake_in_a_flag(monkeypatch, capsys, args, message):
  with pytest.raises(SystemExit) as ended:
    parse(monkeypatch, *args)
  assert ended.value.code == 2
  said = capsys.readouterr().err.replace(str(ROOT), "ROOT")
  assert message in said
  assert "Traceback" not in said


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("def get_config(:", "SyntaxError: invalid syntax (mine.py, line 1)"),
    ("import absent_module", "No module named 'absent_module'"),
    ("def get_config():\n  return 1 / 0", "mine.py: ZeroDivisionError: division by zero (FOLDER/mine.py, line 2)"),
    ("def get_config():\n  return int('x')", "invalid literal for int() with base 10: 'x' (FOLDER/mine.py, line 2)"),
    ("def get_config():\n  open('/absent')", "mine.py: [Errno 2] No such file or directory: '/absent'"),
    ("def get_config():\n  return {'seed': 1}", "must return a ConfigDict"),
    ("seed = 1", "has no attribute 'get_config'"),
  ],
)
def test_a_mistake_in_the_file_of_a_configuration(monkeypatch, capsys, tmp_path, text, message):
  (tmp_path / "mine.py").write_text(text)
  with pytest.raises(SystemExit) as ended:
    parse(monkeypatch, f"--config={tmp_path}/mine.py")
  assert ended.value.code == 2
  said = capsys.readouterr().err.replace(str(tmp_path), "FOLDER")
  assert message in said
  assert "Traceback" not in said


@pytest.mark.parametrize("args", [["--help"], [SMOKE, "-h"], ["--helpfull"], ["--config=absent.py", "--help"]])
def test_help_is_no_mistake(monkeypatch, capsys, args):
  with pytest.raises(SystemExit) as ended:
    parse(monkeypatch, *args)
  assert ended.value.code == 0
  said = capsys.readouterr()
  assert (said.err, bool(said.out)) == ("", True)


def test_what_is_right_is_left_alone(monkeypatch, capsys):
  rest, known = parse(monkeypatch, SMOKE, "--config.seed=7", "--mode=serve", "more")
  assert rest == ["program", "more"]
  assert (known["config"].value.seed, known["mode"].value) == (7, "serve")
  assert capsys.readouterr().err == ""


def test_what_a_configuration_leaves_open_can_be_given(monkeypatch):
  overrides = {"d_model": "48", "rope_theta": "5", "qkv_bias": "true", "quantization": "int8"}
  _, known = parse(monkeypatch, SMOKE, *(f"--config.model.{key}={value}" for key, value in overrides.items()))
  model = known["config"].value.model
  assert [model[key] for key in overrides] == [48, 5.0, True, "int8"]


def test_an_argument_too_many(capsys):
  def main(argv):
    raise app.UsageError("unexpected arguments: ['x']")

  with pytest.raises(SystemExit) as ended:
    command._call(main, ["program", "x"])
  assert (ended.value.code, capsys.readouterr().err) == (2, "error: unexpected arguments: ['x']\n")


def test_a_folder_that_cannot_be_written_to(capsys):
  def main(argv):
    raise PermissionError(13, "Permission denied", "/root/x")

  with pytest.raises(SystemExit) as ended:
    command._call(main, ["program"])
  assert (ended.value.code, capsys.readouterr().err) == (1, "stopped: [Errno 13] Permission denied: '/root/x'\n")


def test_every_command_starts_so():
  paths = [*(ROOT / "launch").glob("*.py"), ROOT / "dmpo_jax" / "main.py"]
  assert [path.name for path in paths if "app.run(" in path.read_text()] == []
