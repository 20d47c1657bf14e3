"""Does the runs that have no row yet, and adds their rows; runs of one configuration share its programs."""

import dataclasses
import gc
import itertools
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax

import dmpo_jax
from dmpo_jax.run import progress
from launch.study import design, rows
from launch.study.design import Run
from launch.study.lab import Lab, Programs

MOST_PROGRAMS = 12  # configurations whose programs are kept, as Linux bounds the memory maps of a process


class Clock:
  """The time in which runs may start."""

  def __init__(self, minutes: float):
    self._end = time.monotonic() + 60 * minutes

  def has_time(self) -> bool:
    """Return whether another run may start."""
    return time.monotonic() < self._end


@dataclasses.dataclass(frozen=True)
class Study:
  """Where the study's files are, and what this process does of it.

  Attributes:
    out: folder of what can be made again.
    folder: folder of the rows.
    share: (k, n): this process does the k-th of n shares of the configurations.
  """

  out: pathlib.Path
  folder: pathlib.Path
  share: tuple[int, int]
  clock: Clock

  def measure_bases(self, tasks: Sequence[str]) -> None:
    """Train the bases that are missing, and measure those that have no row."""
    done = {row["run"] for row in rows.read(self.folder, "bases")}
    for task, number in itertools.product(tasks, (*design.TUNING_BASES, *design.TEST_BASES)):
      run = f"{task} {number}"
      if run not in done and self.clock.has_time():
        row = {"run": run, "task": task, "base": number, **Lab(task, self.out, self.folder).measure_base(number)}
        rows.append(self.folder, "bases", row | versions())
        print(row, flush=True)

  def take(self, runs: Sequence[Run]) -> None:
    """Do the missing ones of these runs while there is time."""
    labs = {task: Lab(task, self.out, self.folder) for task in {run.task for run in runs}}
    done = {row["run"] for stage in rows.STAGES for row in rows.read(self.folder, stage)}
    missing = {run.digest(): run for run in runs if run.digest() not in done and self._is_mine(run)}
    programs: dict[str, Programs] = {}
    with progress.Progress("study", len(missing), unit="runs") as shown:
      for run in missing.values():
        if not self.clock.has_time():
          print("no time for the other runs")
          return
        shown.advance()
        if design.is_decided(run, rows.read(self.folder, "tune")):
          continue
        row = execute(run, labs[run.task], programs)
        rows.append(self.folder, run.stage, row)
        print(line(row), flush=True)

  def _is_mine(self, run: Run) -> bool:
    number, of = self.share
    return int(run.configuration(), 16) % of == number


def execute(run: Run, lab: Lab, programs: dict[str, Programs]) -> rows.Row:
  """Do a run, with the programs of its configuration if there are any, and return its row."""
  config, base = lab.config(run.config()), lab.base(run.base)
  parts, name = lab.parts(config), run.configuration()
  if name not in programs:
    if len(programs) == MOST_PROGRAMS:
      programs.clear()
      jax.clear_caches()
      gc.collect()
    programs[name] = Programs(config, parts, base.params, lab.work)
  found = programs[name].run(parts, base.params, config.seed, run.budget)
  return {
    "run": run.digest(),
    "task": run.task,
    "objective": run.candidate.objective,
    "candidate": run.candidate.name,
    "changes": dict(run.candidate.changes),
    "base": run.base,
    "base_identity": base.identity,
    "seed": run.seed,
    "budget": run.budget,
    **found,
    **versions(),
  }


def versions() -> dict[str, Any]:
  """Return what a row's numbers may depend on besides its settings."""
  return {"dmpo_jax": dmpo_jax.__version__, "jax": jax.__version__}


def line(row: rows.Row) -> str:
  """Say how a run went."""
  last = row["evaluations"][-1]
  return (
    f"{row['task']}, {row['objective']}, {row['candidate']}, base {row['base']}, seed {row['seed']}: "
    f"reward {last['reward']:.3f}, solved {last['solved']:.1%}, {last['updates']} updates, {row['seconds']:.0f} s"
  )
