"""What the study runs: tasks, bases, budgets, the published entries, the common random search and the questions."""

import dataclasses
import functools
import importlib
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs import base, bench
from dmpo_jax.config import ConfigError, validate
from dmpo_jax.config.identity import deciding
from launch.measure import changed
from launch.study import costs, rows

TASKS = bench.TASKS
OBJECTIVES = ("wdce", "wdce_proximal", "coupled_grpo", "wd1", "spg", "espo")
TUNING_BASES, TEST_BASES = (0, 1, 2), tuple(range(3, 11))
SEEDS = (0, 1)  # of the runs from one base
RATE, DROP, SYNC = "optim.learning_rate", "rollout.drop_equal_groups", "objective.sync_reference_every"
PUBLISHED_RATES = (1e-4, 2e-4, 4e-4, 5e-5, 2.5e-5, 8e-4)  # the papers' are those of other models
SEARCHED = 24  # random candidates of the whole study
LEAST_AT_FIRST = 0.8  # of the best candidate's reward from the first tuning base: below it, a candidate is given up
PUBLISHED, TUNED = "published", "tuned"
LATER = {DROP: False, "objective.masks": "random"}  # keys that came after the first rows, and what these had
TUNING_BUDGET = QUESTION_BUDGET = 1.0  # in multiples of 1x


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
  """One way to train by an objective: keys of its bench configuration that are changed."""

  objective: str  # configs/bench_<objective>.py
  name: str
  changes: Mapping[str, Any]


def _reference(updates: int, masks: int, is_proximal: bool) -> dict[str, Any]:
  return {"train.updates_per_buffer": updates, "objective.num_mask_samples": masks, SYNC: updates * is_proximal}


def _baseline(name: str, size: int, drops: bool) -> dict[str, Any]:
  return {
    "objective.wdce.baseline": name,
    "rollout.group_size": size,
    "rollout.num_prompts": costs.ROLLOUTS // size,
    DROP: drops,
  }


QUESTIONS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {  # arms of `wdce`, all at its published learning rate
  "reference and reuse": {
    f"{'proximal' if proximal else 'fixed'}, {updates} updates, {masks} masks": _reference(updates, masks, proximal)
    for proximal in (False, True)
    for updates in (2, 8)
    for masks in (2, 4)
  },
  "baselines and dropping": {
    f"{name}, g = {size}, {'dropping' if drops else 'keeping'} equal groups": _baseline(name, size, drops)
    for size in (8, 4, 16)
    for name in ("none", "mean", "negative")
    for drops in (False, True)
  },
  "unlearning": {name: {"objective.wdce.unlearning": name} for name in ("unbounded", "bounded")},
  "shrinkage": {name: {"objective.shrinkage": name} for name in ("none", "reliability")},
}


@dataclasses.dataclass(frozen=True)
class Run:
  """A candidate on a task, from one base, with one seed."""

  stage: str  # tune, test, questions
  task: str
  candidate: Candidate
  base: int
  seed: int
  budget: float  # in multiples of both axes' 1x

  def config(self) -> ConfigDict:
    """Return the run's configuration, without its base."""
    config = changed(bench_config(self.candidate.objective, self.task), self.candidate.changes)
    return changed(config, {"seed": 100 * (self.base + 1) + self.seed})

  def configuration(self) -> str:
    """Return the identity of what runs that differ by base and seed alone have in common."""
    return rows.digest({"task": self.task, "settings": self.settings()})

  def settings(self) -> dict[str, Any]:
    """Return the keys that decide the result and are not as in configs/base.py, whatever keys that has besides."""
    return _settings(self.task, self.candidate.objective, tuple(sorted(self.candidate.changes.items())))

  def digest(self) -> str:
    """Return the identity of the run, by its content."""
    own = {"task": self.task, "base": self.base, "seed": self.seed, "budget": self.budget}
    return rows.digest({**own, "settings": self.settings()})


@functools.cache
def _settings(task: str, objective: str, changes: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
  default = deciding(base.get_config()) | LATER
  found = deciding(changed(bench_config(objective, task), dict(changes)))
  own = {key: value for key, value in found.items() if value != default.get(key)}
  own |= {"task.name": pathlib.PurePath(found["task.name"]).name} if "task.name" in own else {}  # wherever its file is
  return own | {"objective": objective}


def bench_config(name: str, task: str) -> ConfigDict:
  """Load configs/bench_<name>.py for a task."""
  return importlib.import_module(f"configs.bench_{name}").get_config(task)


def published(objective: str, rate: float) -> Candidate:
  """Return the published settings of an objective at a learning rate."""
  return Candidate(objective, f"{PUBLISHED} {rate:g}", {RATE: rate})


def draw(index: int) -> dict[str, Any]:
  """Draw a candidate of the common search: every objective gets the same ones."""
  rng = np.random.default_rng((19, index))
  return {
    "temperature": float(rng.choice([1.0, 1.5, 2.0])),
    "updates": int(rng.choice([1, 2, 4, 8])),
    "masks": int(rng.choice([1, 2, 4])),
    "rate": 2.5e-5 * 2.0 ** int(rng.integers(6)),  # 2.5e-5 to 8e-4
    "kind": str(rng.choice(["random", "trajectory", "stratified"])),
    "drops_equal_groups": bool(rng.integers(2)),
  }


@functools.cache
def searched(objective: str, task: str, index: int) -> Candidate:
  """Return a candidate of the common search as the keys of an objective.

  An objective whose likelihood has no masks of the drawn kind has random ones; one that cannot have the drawn number of
  masks has the next number that it can have.
  """
  drawn, config = draw(index), bench_config(objective, task)
  changes = {
    "sampler.temperature": drawn["temperature"],
    "train.updates_per_buffer": drawn["updates"],
    RATE: drawn["rate"],
    DROP: drawn["drops_equal_groups"],
  }
  if config.objective.sync_reference_every == config.train.updates_per_buffer:
    changes[SYNC] = drawn["updates"]
  for masks, kind in itertools.product(range(drawn["masks"], drawn["masks"] + 3), (drawn["kind"], "random")):
    own = {"objective.num_mask_samples": masks, "objective.masks": kind}
    for choice in (own, own | {"objective.antithetic": False}):
      try:
        validate(changed(config, changes | choice))
      except ConfigError:
        continue
      return Candidate(objective, f"random {index}", changes | choice)
  raise AssertionError(f"{objective}: no valid candidate {index}")


def candidates(objective: str, task: str, num: int) -> list[Candidate]:
  """Return the published settings at each rate, then `num` candidates of the common search."""
  known = [published(objective, rate) for rate in PUBLISHED_RATES]
  return known + [searched(objective, task, index) for index in range(num)]


def tuning(tasks: Sequence[str], objectives: Sequence[str], num: int) -> Iterator[Run]:
  """List the tuning runs, one candidate of all objectives after the other, so that all have had as many at any time."""
  for index in range(len(PUBLISHED_RATES) + num):
    for task in tasks:
      for objective in objectives:
        candidate = candidates(objective, task, num)[index]
        for start in TUNING_BASES:
          for seed in SEEDS:
            yield Run("tune", task, candidate, start, seed, TUNING_BUDGET)


def tests(
  selection: Mapping[str, Any], tasks: Sequence[str], objectives: Sequence[str], budget: float
) -> Iterator[Run]:
  """List the test runs of what was selected, base by base, so that all entries of a task have as many at any time."""
  for task in tasks:
    chosen = {}
    for objective in objectives:
      for found in selection.get(task, {}).get(objective, {}).values():
        chosen[objective, found["candidate"]] = Candidate(objective, found["candidate"], found["changes"])
    for start, candidate, seed in itertools.product(TEST_BASES, chosen.values(), SEEDS):
      yield Run("test", task, candidate, start, seed, budget)


def arms(selection: Mapping[str, Any], task: str, question: str) -> list[Candidate]:
  """Return what is compared on a question: `wdce` at its published learning rate; nothing where none is selected."""
  if "wdce" not in selection.get(task, {}):
    return []
  rate = selection[task]["wdce"][PUBLISHED]["changes"][RATE]
  return [Candidate("wdce", name, {RATE: rate, **changes}) for name, changes in QUESTIONS[question].items()]


def questions(selection: Mapping[str, Any], tasks: Sequence[str]) -> Iterator[Run]:
  """List the runs that change one thing at a time, on the test bases, question by question."""
  for question, task in itertools.product(QUESTIONS, tasks):
    for arm in arms(selection, task, question):
      candidate = dataclasses.replace(arm, name=f"{question}: {arm.name}")
      for start, seed in itertools.product(TEST_BASES, SEEDS):
        yield Run("questions", task, candidate, start, seed, QUESTION_BUDGET)


def tried(found: Sequence[rows.Row], task: str, objective: str) -> dict[str, list[rows.Row]]:
  """Return the tuning rows at 1x of each candidate that is decided, by its name.

  A candidate is decided if it has run from all tuning bases with all seeds, or if it is given up: with all seeds from
  the first base it reached less than LEAST_AT_FIRST of what the best one did.
  """
  by_run, own = {row["run"]: row for row in found}, {}
  names = {row["candidate"] for row in found if row["task"] == task}  # candidates that are the same share their runs
  indices = [index for index in range(SEARCHED) if f"random {index}" in names]
  known = [published(objective, rate) for rate in PUBLISHED_RATES]
  for candidate in known + [searched(objective, task, index) for index in indices]:
    runs = [Run("tune", task, candidate, start, seed, TUNING_BUDGET) for start in TUNING_BASES for seed in SEEDS]
    own[candidate.name] = [by_run[run.digest()] for run in runs if run.digest() in by_run]
  first = {name: [row for row in members if row["base"] == TUNING_BASES[0]] for name, members in own.items()}
  scores = {name: score(members) for name, members in first.items() if len(members) == len(SEEDS)}
  least = LEAST_AT_FIRST * max(scores.values(), default=0.0)
  return {
    name: members for name, members in own.items() if is_whole(members) or (name in scores and scores[name] < least)
  }


def is_whole(members: Sequence[rows.Row]) -> bool:
  """Return whether a candidate has run from all tuning bases with all seeds."""
  return len(members) == len(TUNING_BASES) * len(SEEDS)


def is_decided(run: Run, found: Sequence[rows.Row]) -> bool:
  """Return whether a run is of the search, and its candidate needs no more runs."""
  return run.stage == "tune" and run.candidate.name in tried(found, run.task, run.candidate.objective)


def choose(found: Sequence[rows.Row], tasks: Sequence[str], objectives: Sequence[str]) -> dict[str, Any]:
  """Choose each objective's best published rate and its best candidate, by the mean reward at 1x over both axes.

  Returns:
    {task: {objective: {entry: {candidate, changes, reward, tried}}}}
  """
  selection: dict[str, Any] = {}
  for task, objective in itertools.product(tasks, objectives):
    known = tried(found, task, objective)
    scores = {name: score(own) for name, own in known.items() if is_whole(own)}
    for entry, prefix in ((PUBLISHED, PUBLISHED), (TUNED, "")):
      if among := [name for name in scores if name.startswith(prefix)]:
        best = max(among, key=scores.__getitem__)
        chosen = {"candidate": best, "changes": known[best][0]["changes"], "reward": round(scores[best], 5)}
        num = sum(name.startswith(prefix) for name in known)
        selection.setdefault(task, {}).setdefault(objective, {})[entry] = chosen | {"tried": num}
  return selection


def score(members: Sequence[rows.Row]) -> float:
  """Average the held-out rewards at 1x over both axes."""
  return float(np.mean([mean_reward(members, axis) for axis in costs.AXES]))


def mean_reward(members: Sequence[rows.Row], axis: str) -> float:
  """Average the held-out rewards at 1x."""
  return float(np.mean([costs.reading(row, axis, 1.0)["reward"] for row in members]))
