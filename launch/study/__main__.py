"""Compare the objectives on equal terms: the same bases, prompts, rewards and cost, tuned by one common search.

    python -m launch.study                                      # goes on where the rows in docs/study/ end
    python -m launch.study --stages=tune --tasks=sudoku --searched=4 --minutes=30
    python -m launch.study --stages=                            # only the page, from the rows

Stages: `bases` are trained on partly wrong demonstrations and measured; `tune` tries every objective's published
settings and a common random search on the tuning bases, and gives up a candidate that falls behind on the first;
`select` writes down each objective's best ones; `test` runs these on the test bases; `questions` changes one thing at a
time. Every run is one line of JSON in docs/study/ and is never repeated. Several processes may share the folder, each
with its own --share. The page is drawn from the rows.
"""

import json
import os
import pathlib
from collections.abc import Sequence

import jax
from absl import app, flags
from etils import epath

from dmpo_jax import files
from dmpo_jax.config import command
from dmpo_jax.run import buckets, progress
from launch.study import design, page, rows, runs

STAGES = ("bases", "tune", "select", "test", "questions")


def define_flags() -> None:
  """Declare the command's flags; not on import, as every command has an --out of its own."""
  flags.DEFINE_string("out", "runs/study", "Folder of bases, data and compiled programs, which can be made again.")
  flags.DEFINE_string("docs", "docs", "Folder of the page; its folder `study` has the rows.")
  flags.DEFINE_list("stages", list(STAGES), "Stages, in this order.")
  flags.DEFINE_list("tasks", list(design.TASKS), "Tasks.")
  flags.DEFINE_list("objectives", list(design.OBJECTIVES), "Objectives.")
  flags.DEFINE_integer("searched", design.SEARCHED, "Candidates of the random search.", lower_bound=0)
  flags.DEFINE_float("test_budget", 3.0, "Budget of a test run, as a multiple of 1x.")
  flags.DEFINE_float("minutes", 600.0, "Start no run after this.")
  flags.DEFINE_string("share", "0/1", "k/n: do only the k-th of n shares of the configurations, counted from 0.")
  flags.adopt_module_key_flags(progress)  # --quiet


def main(argv: Sequence[str]) -> None:
  """Do the runs that are missing, and write the page."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  given = flags.FLAGS
  for option, known in (("stages", STAGES), ("tasks", design.TASKS), ("objectives", design.OBJECTIVES)):
    if unknown := set(given[option].value or ()) - set(known):
      raise app.UsageError(f"--{option}={','.join(sorted(unknown))}: must be among {', '.join(known)}")
  for option in ("out", "docs"):
    buckets.refuse(f"--{option}", given[option].value or "")
  out, docs = (pathlib.Path(folder).expanduser().resolve() for folder in (given.out, given.docs))
  study = runs.Study(out, docs / "study", read_share(given.share), runs.Clock(given.minutes))
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(out / ".jax_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
  chosen = given.tasks, given.objectives
  for stage in [stage for stage in STAGES if stage in given.stages]:
    match stage:
      case "bases":
        study.measure_bases(given.tasks)
      case "tune":
        study.take(list(design.tuning(*chosen, given.searched)))
      case "select":
        select(docs / "study", *chosen)
      case "test":
        study.take(list(design.tests(rows.read_selection(docs / "study"), *chosen, given.test_budget)))
      case "questions":
        study.take(list(design.questions(rows.read_selection(docs / "study"), given.tasks)))
  page.write(docs)
  print(f"page: {docs / 'study.md'}")


def select(folder: pathlib.Path, tasks: Sequence[str], objectives: Sequence[str]) -> None:
  """Write down the best settings of every objective among all candidates so far; their test rows may exist already."""
  before = rows.read_selection(folder)
  new = design.choose(rows.read(folder, "tune"), tasks, objectives)
  joined = before | {task: before.get(task, {}) | found for task, found in new.items()}
  files.write_whole(epath.Path(folder / rows.SELECTION), json.dumps(joined, indent=1) + "\n")


def read_share(given: str) -> tuple[int, int]:
  """Read the value of --share.

  Raises:
    UsageError: it is not k/n with k below n.
  """
  number, _, of = given.partition("/")
  if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
    raise app.UsageError(f"--share={given}: must be k/n with k from 0 to n - 1, such as 0/2 and 1/2")
  return int(number), int(of)


if __name__ == "__main__":
  define_flags()
  command.run(main)
