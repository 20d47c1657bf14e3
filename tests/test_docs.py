"""The documents: what their commands and paths name exists."""

import importlib.util

import documents
import pytest

from dmpo_jax.config import validate
from dmpo_jax.tasks import make_task
from launch import docs_check


@pytest.mark.parametrize("name", docs_check.DOCUMENTS)
def test_what_a_document_names_exists(name):
  path = docs_check.ROOT / name
  assert docs_check.problems(path.read_text(), path.parent) == []


def test_the_readme_is_short_and_has_commands():
  text = (docs_check.ROOT / "README.md").read_text()
  assert len(docs_check.commands(text)) > 8
  assert text.count("\n") <= 400


@pytest.mark.parametrize(
  ("line", "problem"),
  [
    ("    make supper", "no such target"),
    ("    python -m launch.absent --x=1", "no module launch.absent"),
    ("    python -m dmpo_jax.main --confg=configs/smoke.py", "no flag --confg"),
    ("    python -m dmpo_jax.main --config=configs/absent.py", "no file configs/absent.py"),
    ("    python -m dmpo_jax.main --config=configs/smoke.py \\\n      --config.optim.learning_rat=1", "no key"),
    ("see `dmpo_jax/absent.py`", "no such file"),
    ("see [there](docs/absent.md)", "a link to nothing"),
  ],
)
def test_what_does_not_exist_is_found(line, problem):
  (found,) = docs_check.problems(line)
  assert problem in found


def test_commands_that_need_no_pod_are_run_on_the_smoke_configuration(tmp_path):
  text = """
    python -m dmpo_jax.main --config=configs/sudoku_tiny.py --workdir=runs/x    # trains
    python -m dmpo_jax.main --config=configs/llada_8b.py --workdir=gs://bucket/run
    python -m launch.plan --config=configs/llada_8b.py
"""
  (command,) = docs_check.runnable(text, tmp_path)
  assert command[1:] == ["-m", "dmpo_jax.main", "--config=configs/smoke.py", f"--workdir={tmp_path}/x"]


@pytest.mark.parametrize(
  ("page", "n", "prompt", "answer"),
  [
    ("../README.md", 91, "Which is the smallest prime factor of 91?", "7"),
    ("extending.md", 12, "How many divisors has 12?", "6"),
  ],
)
def test_the_tasks_that_the_documents_add(tmp_path, page, n, prompt, answer):
  path = tmp_path / "task.py"
  path.write_text(documents.code(page, "def records("))
  task = make_task(str(path), options={"grader": "exact"}, prompt="default", rewards="default", grader="default")
  assert task.prompt({"n": n}) == prompt
  assert (task.reward({"n": n}, answer), task.reward({"n": n}, "5")) == (1.0, 0.0)
  assert len(task.records("test")) == 100


def test_the_configuration_that_the_documents_add(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(documents.code("extending.md", "from configs"))
  spec = importlib.util.spec_from_file_location("mine", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  validate(config)
  assert (config.sampler.name, config.objective.baseline, config.rollout.group_size) == ("wino", "mean", 16)
