"""Compare the objectives on equal terms: the same bases, prompts, rewards and budget of model calls, several seeds.

    python -m launch.study --out=runs/study                       # everything; running it again resumes it
    python -m launch.study --out=runs/study --seeds=0 --groups=objectives --minutes=30
    python -m launch.study --out=runs/study --minutes=0 --docs=docs    # only the pages of the runs that exist

All runs of a task and seed start from one base, which is trained on partly wrong demonstrations (configs/bench.py).
First, runs on a seed of their own choose the learning rate of each objective (`arms.next_rate`), which all its variants
use. Then the runs are done in the order of `arms.plan`. Each leaves one JSON file and is not repeated. The page
(`study.html`) is written after every run. Several processes may share the folder if each has its own --tasks.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict

from dmpo_jax.config import command, validate
from dmpo_jax.run import buckets, progress
from launch.study import arms, page, runs
from launch.study.arms import GROUPS, TASKS, TUNING_SEED, bench_config, with_changes


def define_flags() -> None:
  """Declare the command's flags; not on import, as every command has an --out of its own."""
  flags.DEFINE_string("out", "runs/study", "Folder of the study's runs, JSON files and page.")
  flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the bases and the runs.")
  flags.DEFINE_list("tasks", list(TASKS), "Tasks.")
  flags.DEFINE_list("groups", list(GROUPS), f"Questions: {', '.join(GROUPS)}.")
  about = "Budget of a run: model calls for each rollout of a buffer, a backward pass as two."
  flags.DEFINE_integer("calls", 1024, about, lower_bound=1)
  flags.DEFINE_float("minutes", 180.0, "Start no run that would probably end later than this.")
  flags.adopt_module_key_flags(progress)  # --quiet
  flags.DEFINE_multi_string("set", [], "key=value (JSON) for all configurations, such as warm_start.updates=600.")
  flags.DEFINE_string("docs", "", "A folder for study.md and study.svg.")


def main(argv: Sequence[str]) -> None:
  """Do the runs that are missing, and write the page."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  given = flags.FLAGS
  for chosen, known in ((given.groups, GROUPS), (given.tasks, TASKS)):
    if set(chosen) - set(known):
      raise app.UsageError(f"{', '.join(sorted(set(chosen) - set(known)))}: must be among {', '.join(known)}")
  seeds, changes = read_seeds(given.seeds), dict(read_change(change) for change in given["set"].value or ())
  for task in given.tasks:
    validate(_changed(bench_config("wdce", task), changes))
  for option in ("out", "docs"):
    buckets.refuse(f"--{option}", given[option].value or "")
  study = runs.Study(pathlib.Path(given.out).expanduser().resolve(), given.calls, changes)
  study.check_folder()
  os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")  # a third of a run on CPUs was compilation
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # hundreds of programs, many of them the same
    jax.config.update("jax_compilation_cache_dir", str(study.out / ".jax_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  clock, needed = runs.Clock(given.minutes), arms.needed_rates(given.groups, given.tasks)
  if study.tune(needed, clock):
    study.take(list(arms.plan(runs.chosen_rates(needed, study.out), given.groups, given.tasks, seeds)), clock)
  page.write(study.out, runs.find_results(study.out), pathlib.Path(given.docs) if given.docs else None)
  print(f"page: {study.out / 'study.html'}")


def read_seeds(given: Sequence[str]) -> list[int]:
  """Read the value of --seeds.

  Raises:
    UsageError: a seed is not a whole number, or is that of the learning rates.
  """
  wrong = [seed for seed in given if not seed.isdecimal() or int(seed) == TUNING_SEED]
  if wrong:
    raise app.UsageError(
      f"--seeds={','.join(given)}: {wrong[0]!r} cannot be used; give whole numbers other than {TUNING_SEED}, the seed "
      "that chooses the learning rates"
    )
  return [int(seed) for seed in given]


def read_change(change: str) -> tuple[str, Any]:
  """Read a value of --set.

  Raises:
    UsageError: it is not key=value with a value in JSON.
  """
  key, _, value = change.partition("=")
  try:
    return key, json.loads(value)
  except ValueError as error:
    raise app.UsageError(f"--set={change}: must be key=value, the value as JSON, such as sampler.steps=16") from error


def _changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
  try:
    return with_changes(config, changes)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise app.UsageError(f"--set: {error}") from error


if __name__ == "__main__":
  define_flags()
  command.run(main)
