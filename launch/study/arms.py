"""The arms of the study, the choice of their learning rates, and the order of the runs."""

import dataclasses
import importlib
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from dmpo_jax import phases

TASKS = ("sudoku", "countdown")
RATE = "optim.learning_rate"
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
ROLLOUTS = 64  # of a buffer, whatever the group size
TUNING_SEED = 3  # of the runs that choose the learning rates, and not among the seeds of the study
Rates = Mapping[tuple[str, str], float]  # the learning rate of (task, bench configuration)


@dataclasses.dataclass(frozen=True)
class Arm:
  """One way to train: a bench configuration with some keys changed."""

  group: str  # the question that it belongs to
  name: str
  config: str  # configs/bench_<config>.py
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Run:
  """An arm on a task, from the base of one seed."""

  arm: Arm
  task: str
  seed: int

  @property
  def changes(self) -> dict[str, Any]:
    """Return the keys that differ from the arm's bench configuration."""
    config = bench_config(self.arm.config, self.task)
    return {key: value for key, value in self.arm.changes.items() if get(config, key) != value}

  def path(self, out: pathlib.Path) -> pathlib.Path:
    """Return the JSON file of the run; equal configurations share one."""
    changes = [f"{key.split('.')[-1]}={value}" for key, value in sorted(self.changes.items())]
    return folder(out, self.task, self.seed) / ("-".join([self.arm.config, *changes]) + ".json")


def folder(out: pathlib.Path, task: str, seed: int) -> pathlib.Path:
  """Return the folder of the base and the runs of a task and seed."""
  return out / task / f"seed{seed}"


def _baseline(baseline: str, group_size: int) -> Arm:
  changes = {
    "objective.wdce.baseline": baseline,
    "rollout.group_size": group_size,
    "rollout.num_prompts": ROLLOUTS // group_size,
  }
  return Arm("baselines", f"{baseline}, g = {group_size}", "wdce", changes)


def _changed(group: str, name: str, **changes: Any) -> Arm:
  return Arm(group, name, "wdce", {key.replace("__", "."): value for key, value in changes.items()})


CONFIGS = ("wdce", "wddo", "diffu_grpo", "wd1", "coupled_grpo", "spg", "gdpo", "tracerl", "dtm")
ARMS = (
  *(Arm("objectives", name, name) for name in CONFIGS),
  *(_baseline(name, size) for size in (8, 4, 16) for name in ("none", "mean", "model", "negative")),
  _changed("alternatives", "none, clipped", objective__wdce__baseline="none", objective__max_weight=0.5),
  _changed(
    "alternatives", "none, standardised", objective__wdce__baseline="none", objective__reward_scaling="standardise"
  ),
  *(_changed("reuse", f"{count} updates", train__updates_per_buffer=count) for count in (1, 4, 8)),
  *(_changed("alpha", f"alpha = {alpha}", objective__alpha=alpha) for alpha in (0.02, 0.05, 0.2)),
  *(_changed("mask samples", f"{count} mask samples", objective__num_mask_samples=count) for count in (2, 4, 8)),
)
GROUPS = tuple(dict.fromkeys(arm.group for arm in ARMS))


def bench_config(name: str, task: str) -> ConfigDict:
  """Load configs/bench_<name>.py for a task."""
  return importlib.import_module(f"configs.bench_{name}").get_config(task)


def get(config: ConfigDict, path: str) -> Any:
  """Read a key by its dotted path."""
  for key in path.split("."):
    config = config[key]
  return config


def with_changes(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
  """Return a copy with some keys, given by dotted paths, changed."""
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(dict(changes))
  return config


def calls_a_buffer(config: ConfigDict) -> float:
  """Model calls for each rollout of a buffer: sampling, measuring, and three for each mask sample of an update.

  A teacher is called once more.
  """
  own, objective, updates = config.objective, phases.make_objective(config), config.train.updates_per_buffer
  scored = 2 * own.num_elbo_samples * objective.needs_weights
  if objective.needs_token_log_probs:
    views = 1 if own.likelihood == "trajectory" else updates
    scored = (1 + objective.needs_reference) * own.num_mask_samples * views
  scored += own.num_mask_samples * updates * objective.scores_updates
  sets = 2 if own.name == "wddo" and own.wddo.sets == "independent" else 1
  return config.sampler.steps + scored + (3 + objective.has_teacher) * sets * own.num_mask_samples * updates


def needed_rates(groups: Iterable[str], tasks: Sequence[str]) -> list[tuple[str, str]]:
  """List the (task, bench configuration) pairs whose learning rates the arms of some groups need."""
  configs = dict.fromkeys(arm.config for arm in ARMS if arm.group in groups)
  return [(task, config) for config in configs for task in tasks]


def tuning_run(task: str, config: str, rate: float) -> Run:
  """Return the run that tries a learning rate."""
  return Run(Arm("rates", f"{config}, {rate:g}", config, {RATE: rate}), task, TUNING_SEED)


def next_rate(scores: Mapping[float, float]) -> float | None:
  """Return the learning rate to try next, given the scores of those already tried; None: no other.

  First the two in the middle of `RATES`, then the outer neighbour of the better one: three runs for every objective.
  """
  low, high = RATES[1:3]
  for rate in (low, high):
    if rate not in scores:
      return rate
  outer = RATES[3] if scores[high] > scores[low] else RATES[0]
  return None if outer in scores else outer


def best_rate(scores: Mapping[float, float]) -> float:
  """Return the learning rate with the highest score, the smallest of several."""
  return max(scores, key=lambda rate: (scores[rate], -rate))


def plan(rates: Rates, groups: Iterable[str], tasks: Sequence[str], seeds: Sequence[int]) -> Iterator[Run]:
  """List the runs at the given rates: first the objectives for all seeds, then the other questions seed by seed."""
  for part in (("objectives",), GROUPS[1:]):
    for seed in seeds:
      for arm in ARMS:
        if arm.group in part and arm.group in groups:
          for task in tasks:
            if (task, arm.config) in rates:
              changed = dataclasses.replace(arm, changes={**arm.changes, RATE: rates[task, arm.config]})
              yield Run(changed, task, seed)
