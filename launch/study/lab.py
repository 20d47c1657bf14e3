"""Trains and measures bases, and does runs: those of one configuration share its compiled programs in one process."""

import dataclasses
import hashlib
import os
import pathlib
import time
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import PyTree
from ml_collections import ConfigDict

from dmpo_jax import build, phases, rollout, sharding
from dmpo_jax.build import Parts
from dmpo_jax.graded_rollouts import GradedRollouts
from dmpo_jax.hub.pretrained import filled
from dmpo_jax.structs import TrainState
from launch.measure import changed, measure_diversity
from launch.study import costs, design

SAMPLES = 8  # of each prompt, to measure a base
LOGGED = (  # means over the last quarter of the buffers
  *("unique_rollouts", "groups_without_variance", "sampled_nll", "reward_mean"),
  *("tilt_std", "log_ratio_std", "log_ratio_error", "signal_kept"),
)


@dataclasses.dataclass(frozen=True)
class Base:
  """A policy that runs start from."""

  params: PyTree
  identity: str  # of its numbers


class Lab:
  """A task's bases, and what its runs share.

  Args:
    out: folder of what can be made again.
    folder: folder of the rows, with the bases beside them: the rounding of another machine would give others.
  """

  def __init__(self, task: str, out: pathlib.Path, folder: pathlib.Path):
    self._task, self._out, self._folder = task, out, folder
    self._parts: dict[int, Parts] = {}
    self._bases: dict[int, Base] = {}

  def base(self, number: int) -> Base:
    """Return a base, which is trained on demonstrations if there is no file of it."""
    if number not in self._bases:
      path = self._folder / "bases" / f"{self._task}_{number}.npz"
      if not path.exists():
        save_base(path, train_base(self._base_config(number)))
      self._bases[number] = load_base(path)
    return self._bases[number]

  @property
  def work(self) -> pathlib.Path:
    """A folder for what a run leaves."""
    return self._out / "work" / str(os.getpid())

  def config(self, config: ConfigDict) -> ConfigDict:
    """Return a run's configuration with the folder of the records, starting from parameters that are given."""
    return filled(changed(config, {"task.records_dir": str(self._out / "data"), "warm_start.updates": 0}))

  def _base_config(self, number: int) -> ConfigDict:
    own = {"seed": number, "task.records_dir": str(self._out / "data")}
    return filled(changed(design.bench_config("wdce", self._task), own))

  def parts(self, config: ConfigDict) -> Parts:
    """Return tokenizer, task, prompts and model; those of a seed are built once, and all share one grading."""
    if config.seed not in self._parts:
      built, others = build.build_parts(config, epath.Path(self.work)), list(self._parts.values())
      self._parts[config.seed] = dataclasses.replace(built, grading=others[0].grading) if others else built
    return self._parts[config.seed]

  def measure_base(self, number: int) -> dict[str, Any]:
    """Measure what there is to find: figures of SAMPLES rollouts of every held-out prompt, drawn as in training."""
    config, start = self.config(self._base_config(number)), self.base(number)
    found = measure_diversity(config, self.parts(config), start.params, {}, epath.Path(self.work), SAMPLES)
    return {"base_identity": start.identity, **dataclasses.asdict(found)}


def train_base(config: ConfigDict) -> PyTree:
  """Train a base on demonstrations, as a run's warm start does."""
  parts = build.build_parts(config, epath.Path(config.task.records_dir))
  with jax.set_mesh(parts.mesh):
    phase, state = phases.warm_start_phase(config, parts)
    for buffer in range(phase.num_buffers):
      experience, _ = phase.buffers.complete(state, buffer, phase.buffers.generate(state, buffer))
      state, _ = phase.update(state, phase.frozen, experience)
    return jax.device_get(state.trainable)


def save_base(path: pathlib.Path, params: PyTree) -> None:
  """Save parameters, rounded to float16."""
  path.parent.mkdir(parents=True, exist_ok=True)
  arrays = flax.traverse_util.flatten_dict(params, sep="/")
  flat: dict[str, Any] = {name: np.asarray(array, np.float16) for name, array in arrays.items()}
  part = path.with_suffix(".part.npz")
  np.savez_compressed(part, **flat)
  part.rename(path)


def load_base(path: pathlib.Path) -> Base:
  """Load what `save_base` saved, as float32."""
  digest, flat = hashlib.sha256(), {}
  with np.load(path) as arrays:
    for name in sorted(arrays.files):
      digest.update(name.encode() + arrays[name].tobytes())
      flat[name] = arrays[name].astype(np.float32)
  return Base(flax.traverse_util.unflatten_dict(flat, sep="/"), digest.hexdigest()[:12])


class Programs:
  """A configuration's compiled programs, and the runs that share them: they differ by base and seed."""

  def __init__(self, config: ConfigDict, parts: Parts, params: PyTree, work: pathlib.Path):
    self._config, self._work = config, work
    with jax.set_mesh(parts.mesh):
      params = jax.device_put(params, sharding.replicated(parts.mesh))
      self._phase, self._first = phases.training_phase(config, epath.Path(work), parts, params)
      where = jax.tree.map(lambda array: array.sharding, self._first), sharding.replicated(parts.mesh)
      self._update = phases.training_update(config, parts.model, phases.training_optimizer(config), where)

  def run(self, parts: Parts, base: PyTree, seed: int, budget: float) -> dict[str, Any]:
    """Train from a base until the budget is spent on every axis; evaluate at the levels of every axis.

    Args:
      parts: with the prompts of the seed.
    """
    config, start = self._config, time.monotonic()
    levels = [*(level for level in costs.LEVELS if level < budget), budget]
    due = [(axis, costs.budget(axis, level)) for axis in costs.AXES for level in levels]
    spent, logged, evaluations, buffer = dict.fromkeys(costs.AXES, 0.0), [], [], 0
    with jax.set_mesh(parts.mesh):
      base = jax.device_put(base, sharding.replicated(parts.mesh))
      buffers, state, key = self._buffers(parts, base, seed), self._state(base), jax.random.key(seed)
      while due:
        experience, figures = buffers.complete(state, buffer, buffers.generate(state, buffer))
        cost = costs.of_buffer(config, buffer * config.train.updates_per_buffer)
        for _ in range(config.train.updates_per_buffer):
          state, found = self._update(state, base, experience, key)
        logged.append(figures | {name: float(value) for name, value in jax.device_get(found).items()})
        buffer += 1
        informative = 1 - figures.get("groups_dropped", 0) / config.rollout.num_prompts
        spent = {axis: spent[axis] + cost.on(axis, informative) for axis in costs.AXES}
        passed = [(axis, wanted) for axis, wanted in due if spent[axis] + cost.on(axis) / 2 > wanted]
        if passed:
          due = [one for one in due if one not in passed]
          evaluations.append(self._evaluate(state, buffer) | spent)
    late = logged[-max(1, len(logged) // 4) :]
    means = {name: float(np.mean([row[name] for row in late])) for name in LOGGED if name in late[0]}
    return {"evaluations": evaluations, "late": means, "seconds": time.monotonic() - start}

  def _evaluate(self, state: TrainState, buffer: int) -> dict[str, float]:
    figures, own = self._phase.evaluate(state.trainable, buffer), self._config
    return {
      "buffers": buffer,
      "updates": buffer * own.train.updates_per_buffer,
      "rollouts": buffer * own.rollout.num_prompts * own.rollout.group_size,
      "reward": figures["reward_mean"],
      "solved": figures["solve_rate"],
    }

  def _buffers(self, parts: Parts, base: PyTree, seed: int) -> phases.Buffers:
    own = self._phase.buffers
    assert isinstance(own, GradedRollouts)  # all entries learn from rollouts
    assert parts.prompts is not None
    scoring = own.collector.scoring
    if isinstance(scoring, rollout.EstimatedWeights | rollout.TokenLogProbs):
      scoring = dataclasses.replace(scoring, seed=seed)
    collector = dataclasses.replace(own.collector, seed=seed, scoring=scoring)
    return dataclasses.replace(own, collector=collector, prompts=parts.prompts, base=base)

  def _state(self, base: PyTree) -> TrainState:
    state = jax.tree.map(jnp.copy, self._first)
    reference = None if state.reference is None else jax.tree.map(jnp.copy, base)
    return dataclasses.replace(state, trainable=jax.tree.map(jnp.copy, base), reference=reference)
