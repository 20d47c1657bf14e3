"""Does the runs of the study: the choice of learning rates, the bases, and the runs that are still missing."""

import dataclasses
import json
import pathlib
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app
from etils import epath
from ml_collections import ConfigDict

from dmpo_jax import files, train
from dmpo_jax.config import validate
from dmpo_jax.hub.pretrained import filled
from dmpo_jax.run import progress
from launch.study import arms, page
from launch.study.arms import GROUPS, TASKS, TUNING_SEED, Rates, Run, bench_config, with_changes

SETTINGS = "settings.json"  # of the runs in the folder, beside what their names say


class Clock:
  """Predicts whether another run would end in time, and how long the remaining runs will take."""

  def __init__(self, minutes: float):
    self._end, self._taken = time.monotonic() + 60 * minutes, []

  def has_time(self) -> bool:
    """Return whether another run would probably end in time."""
    return time.monotonic() + self.pace() < self._end

  def add(self, seconds: float) -> None:
    """Note the duration of a run, without the training of its base."""
    self._taken.append(seconds)

  def pace(self) -> float:
    """Return the median seconds of the latest runs, as the load of the machine changes."""
    return statistics.median(self._taken[-7:]) if self._taken else 0.0


@dataclasses.dataclass(frozen=True)
class Study:
  """The settings that all runs share, and what can be done with them.

  Attributes:
    out: the folder of all runs.
    calls: budget of a run, in model calls for each rollout of a buffer.
    changes: of every configuration, by dotted path.
  """

  out: pathlib.Path
  calls: int
  changes: Mapping[str, Any]

  def check_folder(self) -> None:
    """Refuse a folder whose runs had another budget or other changes, since their files have the same names.

    Raises:
      UsageError: it is such a folder.
    """
    path, settings = self.out / SETTINGS, {"calls": self.calls, "set": dict(self.changes)}
    before = json.loads(path.read_text()) if path.exists() else settings
    if before != settings:
      raise app.UsageError(
        f"--out={self.out} holds runs with --calls={before['calls']} and --set {before['set']}, and this command has "
        f"--calls={self.calls} and --set {settings['set']}: give another --out, or the flags of those runs"
      )
    files.write_whole(epath.Path(path), json.dumps(settings) + "\n")

  def tune(self, needed: Sequence[tuple[str, str]], clock: Clock) -> bool:
    """Do the runs that choose the learning rates; return whether all rates are chosen."""
    while True:
      rates = {who: arms.next_rate(scores(*who, self.out)) for who in needed}
      runs = [arms.tuning_run(*who, rate) for who, rate in rates.items() if rate is not None]
      if not runs:
        return True
      if not self.take(runs, clock):
        return False

  def take(self, runs: Sequence[Run], clock: Clock) -> bool:
    """Do the missing ones of these runs while there is time; return whether none is left."""
    missing = missing_runs(runs, self.out)
    with progress.Progress("study", len(missing), unit="runs") as shown:
      for number, (path, run) in enumerate(missing.items(), start=1):
        if not clock.has_time():
          print(f"no time for the last {len(missing) - number + 1} runs; a run takes {clock.pace():.0f} s")
          return False
        result = self.execute(run)
        clock.add(result["seconds"])
        files.write_whole(epath.Path(path), files.to_json(result, indent=1))
        page.write(self.out, find_results(self.out))
        print(_line(number, len(missing), run, result, clock.pace() * (len(missing) - number)), flush=True)
        shown.advance()
    return True

  def execute(self, run: Run) -> dict[str, Any]:
    """Train from the base, which is trained first if it is missing, and collect the figures of the run."""
    base = self.train_base(run.task, run.seed)
    config = with_changes(bench_config(run.arm.config, run.task), run.changes)
    cost = arms.calls_a_buffer(config)
    num_buffers = max(1, round(self.calls / cost))
    own = {
      "model.init_from": str(base / "base"),
      "warm_start.updates": 0,
      "train.num_buffers": num_buffers,
      "eval.every_buffers": max(1, round(num_buffers / 3)),
    }
    workdir = run.path(self.out).with_suffix("")
    start = time.monotonic()
    evaluations = self._train(config, own | {"seed": run.seed}, workdir)
    seconds = time.monotonic() - start
    rows = files.read_lines(workdir / "metrics.jsonl").rows
    shutil.rmtree(workdir)  # only the figures are kept, not the checkpoints of a hundred policies
    return {
      "arm": run.arm.name,
      "task": run.task,
      "seed": run.seed,
      "changes": dict(run.changes),
      "learning_rate": config.optim.learning_rate,
      "calls_a_buffer": cost,
      "rollouts_a_buffer": config.rollout.num_prompts * config.rollout.group_size,
      "updates_a_buffer": config.train.updates_per_buffer,
      "num_buffers": num_buffers,
      "seconds": seconds,
      "evaluations": [
        {"buffer": int(buffer), "calls": int(buffer) * cost, **figures} for buffer, figures in evaluations.items()
      ],
      "buffers": [{"calls": row["step"] * cost, **row} for row in rows if row["phase"] == "train" and row["step"]],
    }

  def train_base(self, task: str, seed: int) -> pathlib.Path:
    """Train the base of a task and seed on demonstrations, unless it exists; return its workdir."""
    workdir = arms.folder(self.out, task, seed) / "base"
    if not (workdir / "policy").exists():
      self._train(bench_config("wdce", task), {"seed": seed, "train.num_buffers": 0}, workdir)
      shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    return workdir

  def _train(self, config: ConfigDict, own: Mapping[str, Any], workdir: pathlib.Path) -> dict[str, dict[str, float]]:
    config = with_changes(config, {**self.changes, "task.records_dir": str(self.out / "data"), **own})
    validate(config)
    return train.train(filled(config), epath.Path(workdir))


def scores(task: str, config: str, out: pathlib.Path) -> dict[float, float]:
  """Read the held-out reward at the end of the run of every learning rate tried so far."""
  tried = {rate: arms.tuning_run(task, config, rate).path(out) for rate in arms.RATES}
  results = {rate: files.read_object(path) for rate, path in tried.items() if path.exists()}
  return {rate: result["evaluations"][-1]["reward_mean"] for rate, result in results.items()}


def chosen_rates(needed: Sequence[tuple[str, str]], out: pathlib.Path) -> Rates:
  """Choose the learning rates whose runs are all done."""
  tried = {who: scores(*who, out) for who in needed}
  return {who: arms.best_rate(found) for who, found in tried.items() if arms.next_rate(found) is None}


def missing_runs(runs: Sequence[Run], out: pathlib.Path) -> dict[pathlib.Path, Run]:
  """List the runs without a JSON file, in order; a run that several arms share belongs to the first of them."""
  missing: dict[pathlib.Path, Run] = {}
  for run in runs:
    if not run.path(out).exists():
      missing.setdefault(run.path(out), run)
  return missing


def find_results(out: pathlib.Path) -> list[page.Result]:
  """Read the results in a folder, each under every question that it answers."""
  needed = arms.needed_rates(GROUPS, TASKS)
  seeds = sorted({int(path.name.removeprefix("seed")) for path in out.glob("*/seed*")} - {TUNING_SEED})
  tried = [arms.tuning_run(*who, rate) for who in needed for rate in arms.RATES]
  runs = [*tried, *arms.plan(chosen_rates(needed, out), GROUPS, TASKS, seeds)]
  return [
    page.Result(run.arm.group, run.arm.name, run.task, run.seed, files.read_object(run.path(out)))
    for run in runs
    if run.path(out).exists()
  ]


def _line(number: int, total: int, run: Run, result: Mapping[str, Any], seconds_left: float) -> str:
  base, last = result["evaluations"][0], result["evaluations"][-1]
  minutes, seconds = divmod(round(seconds_left), 60)
  return (
    f"{number}/{total}  {run.task}, {run.arm.name}, seed {run.seed}: solved {base['solve_rate']:.1%} -> "
    f"{last['solve_rate']:.1%}, reward {base['reward_mean']:.3f} -> {last['reward_mean']:.3f}, "
    f"{result['seconds']:.0f} s; {minutes}:{seconds:02} left"
  )
