"""The installed package: what it depends on, what it holds, and its command, away from a checkout."""

import importlib.metadata
import os
import pathlib
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def listed(name):
  """The requirements in a file of the root."""
  lines = (ROOT / name).read_text().splitlines()
  return {str(Requirement(line.partition("  #")[0])) for line in lines if line and not line.startswith("#")}


def extra(name):
  return {str(Requirement(line)) for line in PROJECT["optional-dependencies"][name]}


def test_extras_are_those_of_the_lists():
  assert extra("dev") == listed("requirements-dev.txt")
  assert extra("torch") == listed("requirements-torch.txt")
  assert extra("gguf") <= listed("requirements-dev.txt")
  assert extra("serve") | extra("report") <= listed("requirements.txt")
  (jax,) = (Requirement(line) for line in listed("requirements.txt") if Requirement(line).name == "jax")
  for name in ("tpu", "cuda"):
    (own,) = map(Requirement, extra(name))
    assert (own.name, own.specifier, own.extras) == ("jax", jax.specifier, {name})


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """The package, installed without its dependencies into a folder."""
  folder = tmp_path_factory.mktemp("installed")
  options = ["--no-deps", "--quiet", "--disable-pip-version-check", "--target", folder]
  done = subprocess.run([sys.executable, "-m", "pip", "install", *options, ROOT], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return folder


@pytest.mark.slow
def test_the_package_needs_what_a_run_needs(installed):
  (found,) = importlib.metadata.distributions(name="dmpo-jax", path=[str(installed)])
  needed = [Requirement(line) for line in found.requires]
  assert {str(line) for line in needed if line.marker is None} == listed("requirements.txt")
  (command,) = found.entry_points
  assert (command.name, command.value) == ("dmpo-jax", "dmpo_jax.main:start")


@pytest.mark.slow
def test_the_installed_command_trains_away_from_the_checkout(installed, tmp_path):
  environment = os.environ | {"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
  own = ["--config.warm_start.updates=2", "--config.train.num_buffers=1", "--config.eval.num_prompts=8"]
  command = [installed / "bin" / "dmpo-jax", "--config=configs/smoke.py", "--workdir=run", *own]
  done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  assert (tmp_path / "run" / "report.html").exists()
  program = "import dmpo_jax; from dmpo_jax import objectives, samplers; print(dmpo_jax.__file__)"
  done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert pathlib.Path(done.stdout.strip()).is_relative_to(installed)
