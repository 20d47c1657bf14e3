"""The command that converts: which folder it takes, and mistakes in its flags."""

import json
import subprocess
import sys

import pytest
from etils import epath
from programs import ROOT
from recorded_models import write_checkpoint

from dmpo_jax.hub import convert, pretrained
from dmpo_jax.hub.adapt import Adaptation
from launch import convert_hf


def test_a_folder_says_what_it_was_converted_from(tmp_path, monkeypatch):
  source = write_checkpoint(tmp_path / "hf", "m3_tied")
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(convert_hf, "find_folder", lambda hf, revision: epath.Path("hf"))
  for hf, origin in (("someone/model", "someone/model"), ("hf", str(source))):
    out = epath.Path(tmp_path / f"from_{hf.replace('/', '_')}")
    convert_hf.run(hf, None, out, None, "same")
    assert pretrained.read_model(out).origin == origin
  about = json.loads((out / "model.json").read_text())
  del about["origin"]
  (out / "model.json").write_text(json.dumps(about))
  assert pretrained.read_model(out).origin == ""


def test_mistakes_on_the_command_line(tmp_path, capsys):
  def complain(*args):
    command = [sys.executable, "-m", "launch.convert_hf", *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr[-2000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line

  assert "neither a folder nor the name of a repository" in complain("--hf=/no/such", f"--out={tmp_path / 'out'}")
  with pytest.raises(ValueError, match=r"config.json is missing"):
    convert.convert_model(epath.Path(tmp_path), epath.Path(tmp_path / "out"))
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
  with pytest.raises(ValueError, match="model_type='gpt2' is not supported"):
    convert.convert_model(epath.Path(tmp_path), epath.Path(tmp_path / "out"))


def test_flags_that_would_do_nothing(tmp_path):
  source, out = write_checkpoint(tmp_path / "hf", "m3_tied"), epath.Path(tmp_path / "out")
  with pytest.raises(ValueError, match=r"--base=.* holds a model and no adapter_config.json"):
    convert_hf.run(str(source), None, out, source, "same")
  with pytest.raises(ValueError, match=r"--revision=main: .* is a folder"):
    convert_hf.run(str(source), "main", out, None, "same")
  (source / "adapter_config.json").write_text("{}")
  with pytest.raises(ValueError, match=r"--dtype=bfloat16: .* holds an adapter"):
    convert_hf.run(str(source), None, out, source, "bfloat16")
  with pytest.raises(
    ValueError, match=r"holds an adapter: leave out --adapt, --mask_token, --shift_logits and --block_length"
  ):
    convert_hf.run(str(source), None, out, source, "same", Adaptation(is_wanted=True))
  assert not out.exists()


def test_the_hub_is_asked_for_what_is_no_folder(monkeypatch, tmp_path):
  import huggingface_hub

  def download(name, *, revision, allow_patterns):
    assert (name, revision) == ("GSAI-ML/LLaDA-8B-Base", "main")
    assert "*.safetensors" in allow_patterns
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  assert convert_hf.find_folder("GSAI-ML/LLaDA-8B-Base", "main") == epath.Path(tmp_path)

  def fail(*args, **keywords):
    raise OSError("no route")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
  with pytest.raises(ValueError, match=r"the hub does not provide it \(no route\)"):
    convert_hf.find_folder("GSAI-ML/LLaDA-8B-Base")
