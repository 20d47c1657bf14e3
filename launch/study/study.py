"""Compare the objectives on equal terms: the same bases, prompts, rewards and budget of model calls, several seeds.

  python -m launch.study --out=runs/study                       # everything, resumable
  python -m launch.study --out=runs/study --seeds=0 --groups=objectives --minutes=30
  python -m launch.study --out=runs/study --minutes=0 --docs=docs    # nothing but the pages of what there is

One base a (task, seed) is trained on partly wrong demonstrations (configs/bench.py); every run starts from it. First
each objective's learning rate is chosen by runs on a seed that the study does not have (`arms.next_rate`); all
variants of one take its rate. Then runs are taken in the order of `arms.plan`; each that ends leaves one JSON
file and is not run again. The page (`study.html`, beside them) is written after every run. Several processes may share
the folder if each has tasks of its own (--tasks).
"""

import json
import os
import pathlib
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import app, flags
from etils import epath
from ml_collections import ConfigDict

from dmpo_jax import files, train
from dmpo_jax.config import validate
from dmpo_jax.hub.pretrained import filled
from dmpo_jax.run import buckets, progress
from launch.study import arms, page
from launch.study.arms import GROUPS, TASKS, TUNING_SEED, Rates, Run, bench_config, with_changes

_OUT = flags.DEFINE_string("out", "runs/study", "Folder of the study's runs, JSON files and page.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds, of bases and runs alike.")
_TASKS = flags.DEFINE_list("tasks", list(TASKS), "Tasks.")
_GROUPS = flags.DEFINE_list("groups", list(GROUPS), f"Questions to look at: {', '.join(GROUPS)}.")
_CALLS = flags.DEFINE_integer(
  "calls", 1024, "Model calls of a run for each rollout of a buffer; backward counts as two.", lower_bound=1
)
_MINUTES = flags.DEFINE_float("minutes", 180.0, "Start no run that would probably end after so many minutes.")
flags.adopt_module_key_flags(progress)  # --quiet
_CONFIG = flags.DEFINE_multi_string(
  "set", [], "key=value (JSON) for all configurations, such as warm_start.updates=600."
)
_DOCS = flags.DEFINE_string("docs", "", "Folder in which to write study.md and study.svg, too.")

SETTINGS = "settings.json"  # of the runs in the folder, beside what their names say


class Clock:
  """Says whether there is time for a further run, and how long those that are left will take."""

  def __init__(self, minutes: float):
    self._end, self._taken = time.monotonic() + 60 * minutes, []

  def has_time(self) -> bool:
    """Whether a run would probably end in time."""
    return time.monotonic() + self.pace() < self._end

  def add(self, seconds: float) -> None:
    """Note what a run took, without the training of its base."""
    self._taken.append(seconds)

  def pace(self) -> float:
    """Seconds of a run: the median of the last ones, as the machine's load changes."""
    return statistics.median(self._taken[-7:]) if self._taken else 0.0


def main(argv: Sequence[str]) -> None:
  """Run what is missing, and write the page."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown argument {argv[1]!r}")
  for given, known in ((_GROUPS.value, GROUPS), (_TASKS.value, TASKS)):
    if set(given) - set(known):
      raise app.UsageError(f"{', '.join(sorted(set(given) - set(known)))}: must be among {', '.join(known)}")
  seeds, changes = _read_seeds(_SEEDS.value), dict(_parse(change) for change in _CONFIG.value)
  for task in _TASKS.value:
    validate(_changed(bench_config("wdce", task), changes))
  for option, path in (("--out", _OUT.value), ("--docs", _DOCS.value)):
    buckets.refuse(option, path)
  out = pathlib.Path(_OUT.value).expanduser().resolve()
  _check_folder(out, {"calls": _CALLS.value, "set": changes})
  os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")  # on a CPU a third of a run was compiling
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # hundreds of programs, many of them the same
    jax.config.update("jax_compilation_cache_dir", str(out / ".jax_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  clock = Clock(_MINUTES.value)
  needed = arms.needed_rates(_GROUPS.value, _TASKS.value)
  if tune(needed, out, clock):
    take(list(arms.plan(chosen_rates(needed, out), _GROUPS.value, _TASKS.value, seeds)), out, clock)
  page.write(out, _find_results(out), pathlib.Path(_DOCS.value) if _DOCS.value else None)
  print(f"page: {out / 'study.html'}")


def _read_seeds(given: Sequence[str]) -> list[int]:
  wrong = [seed for seed in given if not seed.isdecimal() or int(seed) == TUNING_SEED]
  if wrong:
    raise app.UsageError(
      f"--seeds={','.join(given)}: {wrong[0]!r} cannot be used; give whole numbers, and not {TUNING_SEED}, on which "
      "learning rates are chosen"
    )
  return [int(seed) for seed in given]


def _check_folder(out: pathlib.Path, settings: Mapping[str, Any]) -> None:
  """Refuse a folder whose runs had another budget or other changes: they would pass for those that are asked for."""
  path = out / SETTINGS
  before = json.loads(path.read_text()) if path.exists() else settings
  if before != settings:
    raise app.UsageError(
      f"--out={out} holds runs with --calls={before['calls']} and --set {before['set']}, and this command has "
      f"--calls={settings['calls']} and --set {settings['set']}: give another --out, or these flags back"
    )
  files.write_whole(epath.Path(path), json.dumps(settings) + "\n")


def tune(needed: Sequence[tuple[str, str]], out: pathlib.Path, clock: Clock) -> bool:
  """Run what the choice of learning rates still lacks; return whether all of them are chosen."""
  while True:
    rates = {(task, config): arms.next_rate(scores(task, config, out)) for task, config in needed}
    runs = [arms.tuning_run(*who, rate) for who, rate in rates.items() if rate is not None]
    if not runs:
      return True
    if not take(runs, out, clock):
      return False


def scores(task: str, config: str, out: pathlib.Path) -> dict[float, float]:
  """Read what the learning rates that were tried came to: held-out reward at the end of the run."""
  tried = {rate: arms.tuning_run(task, config, rate).path(out) for rate in arms.RATES}
  results = {rate: files.read_object(path) for rate, path in tried.items() if path.exists()}
  return {rate: result["evaluations"][-1]["reward_mean"] for rate, result in results.items()}


def chosen_rates(needed: Sequence[tuple[str, str]], out: pathlib.Path) -> Rates:
  """Choose the learning rates for which all runs are there."""
  tried = {(task, config): scores(task, config, out) for task, config in needed}
  return {who: arms.best_rate(found) for who, found in tried.items() if arms.next_rate(found) is None}


def take(runs: Sequence[Run], out: pathlib.Path, clock: Clock) -> bool:
  """Take the runs that are missing while there is time; return whether none is left."""
  missing = missing_runs(runs, out)
  common = dict(_parse(change) for change in _CONFIG.value)
  with progress.Progress("study", len(missing), unit="runs") as shown:
    for number, (path, run) in enumerate(missing.items(), start=1):
      if not clock.has_time():
        print(f"{len(missing) - number + 1} runs left out for want of time; a run takes {clock.pace():.0f} s")
        return False
      result = execute(run, out, common, _CALLS.value)
      clock.add(result["seconds"])
      files.write_whole(epath.Path(path), files.to_json(result, indent=1))
      page.write(out, _find_results(out))
      print(_line(number, len(missing), run, result, clock.pace() * (len(missing) - number)), flush=True)
      shown.advance()
  return True


def missing_runs(runs: Sequence[Run], out: pathlib.Path) -> dict[pathlib.Path, Run]:
  """List the runs without a JSON file in their order; what several arms ask for goes by the first of them."""
  missing: dict[pathlib.Path, Run] = {}
  for run in runs:
    if not run.path(out).exists():
      missing.setdefault(run.path(out), run)
  return missing


def execute(run: Run, out: pathlib.Path, common: Mapping[str, Any], calls: int) -> dict[str, Any]:
  """Train from the base, which is trained first where it is missing, and gather the run's figures."""
  base = train_base(run.task, run.seed, out, common)
  config = with_changes(bench_config(run.arm.config, run.task), run.changes)
  cost = arms.calls_a_buffer(config)
  num_buffers = max(1, round(calls / cost))
  changes = {
    **common,
    "seed": run.seed,
    "task.records_dir": str(out / "data"),
    "model.init_from": str(base / "base"),
    "warm_start.updates": 0,
    "train.num_buffers": num_buffers,
    "eval.every_buffers": max(1, round(num_buffers / 3)),
  }
  workdir = run.path(out).with_suffix("")
  start = time.monotonic()
  evaluations = _train(with_changes(config, changes), workdir)
  seconds = time.monotonic() - start
  rows = files.read_lines(workdir / "metrics.jsonl").rows
  shutil.rmtree(workdir)  # the figures stay; a hundred policies with their checkpoints do not
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


def train_base(task: str, seed: int, out: pathlib.Path, common: Mapping[str, Any]) -> pathlib.Path:
  """Train the base of a task and seed on demonstrations, unless it is there; return its run's folder."""
  workdir = arms.folder(out, task, seed) / "base"
  if not (workdir / "policy").exists():
    changes = {**common, "seed": seed, "task.records_dir": str(out / "data"), "train.num_buffers": 0}
    _train(with_changes(bench_config("wdce", task), changes), workdir)
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
  return workdir


def _train(config: ConfigDict, workdir: pathlib.Path) -> dict[str, dict[str, float]]:
  validate(config)
  return train.train(filled(config), epath.Path(workdir))


def _changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
  try:
    return with_changes(config, changes)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise app.UsageError(f"--set: {error}") from error


def _parse(change: str) -> tuple[str, Any]:
  key, _, value = change.partition("=")
  try:
    return key, json.loads(value)
  except ValueError as error:
    raise app.UsageError(f'--set={change}: must be key=value, the value as JSON, such as model.name="llada"') from error


def _find_results(out: pathlib.Path) -> list[page.Result]:
  """Read what the folder holds, whoever ran it, each run under every question that it answers."""
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
