"""Compare the objectives on equal terms: the same bases, prompts, rewards and budget of model calls, several seeds.

  python -m launch.study --out=runs/study                       # everything, resumable
  python -m launch.study --out=runs/study --seeds=0 --groups=objectives --minutes=30

One base a (task, seed) is trained on partly wrong demonstrations (configs/bench.py); every run starts from it. Runs are
taken in the order of `ARMS`, seed by seed; each that ends leaves one JSON file, and is not run again. The page
(`study.html`, beside them) is written after every run.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import absl.logging
import jax
from absl import app, flags
from etils import epath
from ml_collections import ConfigDict

from dmpo_jax import files, train
from dmpo_jax.config import validate
from dmpo_jax.objectives import OBJECTIVES
from launch import study_page


@dataclasses.dataclass(frozen=True)
class Arm:
  """One way to train: a bench configuration with some keys changed."""

  group: str  # the question that it belongs to
  name: str
  config: str  # configs/bench_<config>.py
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _baseline(baseline: str, group_size: int) -> Arm:
  changes = {
    "objective.baseline": baseline,
    "rollout.group_size": group_size,
    "rollout.num_prompts": 128 // group_size,
  }
  return Arm("baselines", f"{baseline}, g = {group_size}", "wdce", changes)


def _changed(group: str, name: str, **changes: Any) -> Arm:
  return Arm(group, name, "wdce", {key.replace("__", "."): value for key, value in changes.items()})


ARMS = (
  *(
    Arm("objectives", name, name)
    for name in ("wdce", "wddo", "diffu_grpo", "wd1", "coupled_grpo", "spg", "gdpo", "tracerl")
  ),
  *(_baseline(name, size) for size in (8, 4, 16) for name in ("none", "mean", "model", "negative")),
  _changed("alternatives", "none, clipped", objective__baseline="none", objective__max_weight=0.5),
  _changed("alternatives", "none, standardised", objective__baseline="none", objective__reward_scaling="standardise"),
  *(_changed("reuse", f"{count} updates", train__updates_per_buffer=count) for count in (1, 4, 8)),
  *(_changed("alpha", f"alpha = {alpha}", objective__alpha=alpha) for alpha in (0.02, 0.05, 0.2)),
  *(_changed("replicates", f"{count} replicates", objective__num_replicates=count) for count in (2, 4, 8)),
)
GROUPS = tuple(dict.fromkeys(arm.group for arm in ARMS))
TASKS = ("sudoku", "countdown")

_OUT = flags.DEFINE_string("out", "runs/study", "Folder of the study's runs, JSON files and page.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds, of bases and runs alike.")
_TASKS = flags.DEFINE_list("tasks", list(TASKS), "Tasks.")
_GROUPS = flags.DEFINE_list("groups", list(GROUPS), f"Questions to look at: {', '.join(GROUPS)}.")
_CALLS = flags.DEFINE_integer(
  "calls", 1536, "Model calls of a run for each rollout of a buffer; backward counts as two."
)
_MINUTES = flags.DEFINE_float("minutes", 180.0, "Start no run that would probably end after so many minutes.")
_CONFIG = flags.DEFINE_multi_string(
  "set", [], "key=value (JSON) for all configurations, such as warm_start.updates=600."
)


@dataclasses.dataclass(frozen=True)
class Run:
  """An arm on a task from one seed's base."""

  arm: Arm
  task: str
  seed: int

  def path(self, out: pathlib.Path) -> pathlib.Path:
    """Its JSON file; configurations that are the same share it."""
    changes = [f"{key.split('.')[-1]}={value}" for key, value in sorted(self.changes.items())]
    return out / self.task / f"seed{self.seed}" / ("-".join([self.arm.config, *changes]) + ".json")

  @property
  def changes(self) -> dict[str, Any]:
    """What differs from the arm's bench configuration."""
    config = bench_config(self.arm.config, self.task)
    return {key: value for key, value in self.arm.changes.items() if get(config, key) != value}


def main(argv: Sequence[str]) -> None:
  """Run what is missing, and write the page."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown argument {argv[1]!r}")
  for given, known in ((_GROUPS.value, GROUPS), (_TASKS.value, TASKS)):
    if set(given) - set(known):
      raise app.UsageError(f"{', '.join(sorted(set(given) - set(known)))}: must be among {', '.join(known)}")
  out = pathlib.Path(_OUT.value).expanduser().resolve()
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # hundreds of programs, most of them alike
    jax.config.update("jax_compilation_cache_dir", str(out / ".jax_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  common = dict(_parse(change) for change in _CONFIG.value)
  runs = list(plan())
  missing = {run.path(out): run for run in reversed(runs) if not run.path(out).exists()}
  missing = dict(reversed(missing.items()))  # configurations that are the same go by the first that has them
  start, taken = time.monotonic(), []
  for number, (path, run) in enumerate(missing.items(), start=1):
    left = _MINUTES.value * 60 - (time.monotonic() - start)
    pace = sum(taken) / len(taken) if taken else 0.0
    if pace > left:
      print(f"{len(missing) - number + 1} runs left out: {left / 60:.1f} minutes left, a run takes {pace / 60:.1f}")
      break
    begun = time.monotonic()
    result = execute(run, out, common, _CALLS.value)
    taken.append(time.monotonic() - begun)
    files.write_whole(epath.Path(path), json.dumps(result, indent=1))
    _write_page(out, runs)
    print(_line(number, len(missing), run, result, sum(taken) / number * (len(missing) - number)), flush=True)
  _write_page(out, runs)
  print(f"page: {out / 'study.html'}")


def plan() -> Iterator[Run]:
  """List the runs: the objectives of all seeds first, then the other questions seed by seed."""
  seeds = [int(seed) for seed in _SEEDS.value]
  for groups in (("objectives",), GROUPS[1:]):
    for seed in seeds:
      for arm in ARMS:
        if arm.group in groups and arm.group in _GROUPS.value:
          yield from (Run(arm, task, seed) for task in _TASKS.value)


def bench_config(name: str, task: str) -> ConfigDict:
  """Load configs/bench_<name>.py for a task."""
  return importlib.import_module(f"configs.bench_{name}").get_config(task)


def get(config: ConfigDict, path: str) -> Any:
  """Read a key by its dotted path."""
  for key in path.split("."):
    config = config[key]
  return config


def calls_a_buffer(config: ConfigDict) -> float:
  """Model calls for each rollout of a buffer: sampling, measuring, and three for each replicate of an update."""
  objective, updates = config.objective, config.train.updates_per_buffer
  needs = OBJECTIVES[objective.name].needs
  measured = {
    "rewards": 0,
    "weights": 2 * objective.num_elbo_replicates,
    "ratio": objective.num_replicates * (1 if objective.likelihood == "trajectory" else updates),
    "ratio_and_reference": 2 * objective.num_replicates * updates,
  }[needs]
  sets = 2 if objective.name == "wddo" and objective.wddo.sets == "independent" else 1
  return config.sampler.steps + measured + 3 * sets * objective.num_replicates * updates


def execute(run: Run, out: pathlib.Path, common: Mapping[str, Any], calls: int) -> dict[str, Any]:
  """Train from the base, which is trained first where it is missing, and gather the run's figures."""
  base = train_base(run.task, run.seed, out, common)
  config = bench_config(run.arm.config, run.task)
  cost = calls_a_buffer(_with(config, run.changes))
  num_buffers = max(1, round(calls / cost))
  changes = {
    **common,
    **run.changes,
    "seed": run.seed,
    "task.records_dir": str(out / "data"),
    "model.init_from": str(base / "base"),
    "warm_start.updates": 0,
    "train.num_buffers": num_buffers,
    "eval.every_buffers": max(1, round(num_buffers / 6)),
  }
  workdir = run.path(out).with_suffix("")
  start = time.monotonic()
  evaluations = _train(_with(config, changes), workdir)
  seconds = time.monotonic() - start
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
  rollouts_a_buffer = _with(config, run.changes).rollout
  return {
    "arm": run.arm.name,
    "task": run.task,
    "seed": run.seed,
    "changes": dict(run.changes),
    "calls_a_buffer": cost,
    "rollouts_a_buffer": rollouts_a_buffer.num_prompts * rollouts_a_buffer.group_size,
    "num_buffers": num_buffers,
    "seconds": seconds,
    "evaluations": [
      {"buffer": int(buffer), "calls": int(buffer) * cost, **figures} for buffer, figures in evaluations.items()
    ],
    "buffers": [{"calls": row["step"] * cost, **row} for row in rows if row["phase"] == "train" and row["step"]],
  }


def train_base(task: str, seed: int, out: pathlib.Path, common: Mapping[str, Any]) -> pathlib.Path:
  """Train the base of a task and seed on demonstrations, unless it is there; return its run's folder."""
  workdir = out / task / f"seed{seed}" / "base"
  if not (workdir / "policy").exists():
    changes = {**common, "seed": seed, "task.records_dir": str(out / "data"), "train.num_buffers": 0}
    _train(_with(bench_config("wdce", task), changes), workdir)
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
  return workdir


def _train(config: ConfigDict, workdir: pathlib.Path) -> dict[str, dict[str, float]]:
  validate(config)
  if workdir.exists() and not (workdir / "checkpoints").exists():
    shutil.rmtree(workdir)  # what is left of a run whose JSON file was removed
  return train.train(config, epath.Path(workdir))


def _with(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(dict(changes))
  return config


def _parse(change: str) -> tuple[str, Any]:
  key, _, value = change.partition("=")
  return key, json.loads(value)


def _write_page(out: pathlib.Path, runs: Sequence[Run]) -> None:
  results = [
    study_page.Result(run.arm.group, run.arm.name, run.task, run.seed, json.loads(run.path(out).read_text()))
    for run in runs
    if run.path(out).exists()
  ]
  if results:
    files.write_whole(epath.Path(out / "study.html"), study_page.page(results))
    files.write_whole(epath.Path(out / "study.md"), study_page.tables(results))


def _line(number: int, total: int, run: Run, result: Mapping[str, Any], seconds_left: float) -> str:
  base, last = result["evaluations"][0], result["evaluations"][-1]
  minutes, seconds = divmod(round(seconds_left), 60)
  return (
    f"{number}/{total}  {run.task}, {run.arm.name}, seed {run.seed}: solved {base['solve_rate']:.1%} -> "
    f"{last['solve_rate']:.1%}, reward {base['reward_mean']:.3f} -> {last['reward_mean']:.3f}, "
    f"{result['seconds']:.0f} s; {minutes}:{seconds:02} left"
  )


if __name__ == "__main__":
  absl.logging.set_verbosity(absl.logging.WARNING)
  app.run(main)
