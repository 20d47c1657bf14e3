"""The documents: what their commands and paths name exists."""

import importlib.util
import re

import docs_check
import documents
import nbformat
import pytest

from dmpo_jax.config import validate
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.objectives.estimators import ESTIMATORS
from dmpo_jax.samplers import SAMPLERS
from dmpo_jax.tasks import TASKS, make_task
from dmpo_jax.tasks.judge import judge


@pytest.mark.parametrize("name", docs_check.DOCUMENTS)
def test_what_a_document_names_exists(name):
  path = docs_check.ROOT / name
  assert docs_check.problems(path.read_text(), path.parent) == []


def test_what_the_notebook_names_exists_and_its_outputs_are_small():
  path = docs_check.ROOT / docs_check.NOTEBOOK
  text = docs_check.notebook_text(path)
  assert docs_check.problems(text, path.parent) == []
  assert [command.split()[2] for command in docs_check.commands(text)] == ["dmpo_jax.main"] * 3
  assert path.stat().st_size < 200_000


@pytest.mark.parametrize(
  ("cell", "problem"), [("!exit 3", "AssertionError"), ("1 / 0", "ZeroDivisionError"), ("1", "")]
)
def test_a_notebook_whose_cell_fails_is_found(tmp_path, cell, problem):
  book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
  nbformat.write(book, tmp_path / "book.ipynb")
  found = docs_check.execute_notebook(tmp_path / "book.ipynb", tmp_path)
  assert problem in found
  assert bool(found) == bool(problem)


def test_the_readme_is_short_and_has_commands():
  text = (docs_check.ROOT / "README.md").read_text()
  assert len(docs_check.commands(text)) > 8
  assert text.count("\n") <= 170


CONFIGS = [path.stem for path in (docs_check.ROOT / "configs").glob("*.py")]
LIKELIHOODS = [*ESTIMATORS, "sampler"]


@pytest.mark.parametrize(
  ("page", "head", "names"),
  [
    ("runs.md", "configuration", CONFIGS),
    ("samplers.md", "`sampler.name`", SAMPLERS),
    ("objectives.md", "`objective.name`", OBJECTIVES),
    ("objectives.md", "`objective.likelihood`", LIKELIHOODS),
    ("tasks.md", "task", TASKS),
  ],
)
def test_a_documents_table_has_every_name_once(page, head, names):
  text = (docs_check.ROOT / "docs" / page).read_text()
  table = re.search(rf"^\| {re.escape(head)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.M)[1]
  cells = [row.split("|")[1] for row in table.splitlines()]
  found = [re.sub(r"^configs/|\.py|:.*", "", name) for cell in cells for name in re.findall(r"`(.+?)`", cell)]
  assert sorted(found) == sorted(names)


@pytest.mark.parametrize(
  ("row", "names"), [("Tasks", TASKS), ("Objectives", OBJECTIVES), ("Likelihoods", LIKELIHOODS), ("Samplers", SAMPLERS)]
)
def test_the_readme_names_what_is_supported(row, names):
  text = (docs_check.ROOT / "README.md").read_text()
  cell = re.search(rf"^\| {row} \|(.*)\|$", text, re.M)[1]
  assert sorted(re.findall(r"`(.+?)`", cell)) == sorted(names)


def test_the_readme_lists_every_document():
  text = (docs_check.ROOT / "README.md").read_text()
  assert set(re.findall(r"\]\((docs/\w+\.md)\)", text)) == {
    f"docs/{p.name}" for p in (docs_check.ROOT / "docs").glob("*.md")
  }


@pytest.mark.parametrize(
  ("line", "problem"),
  [
    ("    make supper", "no such target"),
    ("    python -m launch.absent --x=1", "no module launch.absent"),
    ("    python -m launch.rehearse --hosts=4", "no flag --hosts"),
    ("    python -m dmpo_jax.main --confg=configs/smoke.py", "no flag --confg"),
    ("    python -m dmpo_jax.main --config=configs/absent.py", "no file configs/absent.py"),
    ("    python -m dmpo_jax.main --config=configs/smoke.py \\\n      --config.optim.learning_rat=1", "no key"),
    ("    python -m dmpo_jax.main --config=configs/smoke.py --config.model.lora.rnk=0", "no key"),
    ("    python -m dmpo_jax.main --config=configs/smoke.py --config.sharding.rollout.fdsp=1", "no key"),
    ("    python -m dmpo_jax.main --config=configs/smoke.py --config.sampler.wino.treshold=1", "no key"),
    ("more with `optim.learning_rat`", "optim.learning_rat: no such key"),
    ('with `objective.likelyhood = "elbo"`', "objective.likelyhood: no such key"),
    ("by `--config.task.sudoku.min_blank=3`", "task.sudoku.min_blank: no such key"),
    ("see `dmpo_jax/absent.py`", "no such file"),
    ("see [there](docs/absent.md)", "a link to nothing"),
    ("see [there](docs/objectives.md#absent)", "no such heading"),
    ("see [above](#absent)", "no such heading"),
  ],
)
def test_what_does_not_exist_is_found(line, problem):
  (found,) = docs_check.problems(line)
  assert problem in found


def test_headings_are_found():
  text = "## What is attended to, scored & `counted`\nsee [above](#what-is-attended-to-scored--counted)"
  assert docs_check.problems(text) == []


def test_keys_and_sections_of_keys_are_known():
  text = "`model.lora.rank`, `model.lora`, `sampler.wino.threshold = 0.5`, `sampler.<name>`, `model.json`, `a.b`"
  assert docs_check.problems(text) == []


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
  assert [judge(task, {"n": n}, text, True).reward for text in (answer, "5")] == [1.0, 0.0]
  assert len(task.records("test")) == 100


def test_the_configuration_that_the_documents_add(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(documents.code("extending.md", "from configs"))
  spec = importlib.util.spec_from_file_location("mine", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  validate(config)
  assert (config.sampler.name, config.objective.wdce.baseline, config.rollout.group_size) == ("wino", "mean", 16)
