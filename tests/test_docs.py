"""The documents: what their commands and paths name exists."""

import pytest

from launch import docs_check


@pytest.mark.parametrize("name", docs_check.DOCUMENTS)
def test_what_a_document_names_exists(name):
  text = (docs_check.ROOT / name).read_text()
  assert docs_check.commands(text)
  assert docs_check.problems(text) == []


@pytest.mark.parametrize(
  ("line", "problem"),
  [
    ("    make supper", "no such target"),
    ("    python -m launch.absent --x=1", "no module launch.absent"),
    ("    python -m dmpo_jax.main --confg=configs/smoke.py", "no flag --confg"),
    ("    python -m dmpo_jax.main --config=configs/absent.py", "no file configs/absent.py"),
    ("    python -m dmpo_jax.main --config=configs/smoke.py \\\n      --config.optim.learning_rat=1", "no key"),
    ("see `dmpo_jax/absent.py`", "no such file"),
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
