"""Measure a base for a few minutes, and print what docs/choosing.md advises for it, each line with its figure.

    python -m launch.advise --config=configs/sudoku_tiny.py --workdir=runs/sudoku_tiny    # the base of a run
    python -m launch.advise --config=configs/llada_8b.py --config.model.init_from=gs://BUCKET/llada_8b

It decodes rollouts of held-out prompts as training does, and then trains on a few buffers, for the noise of the
log-ratio and the seconds of each part. Nothing that it learns is kept.
"""

import dataclasses
import math
import tempfile
import time
from collections.abc import Iterator

import jax
from absl import flags
from etils import epath
from jaxtyping import PyTree
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from dmpo_jax import build, phases, policy
from dmpo_jax.build import Parts
from dmpo_jax.config import ConfigError, validate
from dmpo_jax.hub.pretrained import filled
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.run import buckets, progress
from launch import commands
from launch.measure import Diversity, changed, measure_diversity

LEAST_DIFFERENT = 5 / 8  # of a group's rollouts
MOST_FLAT = 0.2  # share of groups without variance
LEAST_TO_FIND = 3.0  # pass@g over pass@1
MOST_NOISE = 0.5  # error of the log-ratio over the spread of reward / alpha
DEAR = 32.0  # forward passes that a rollout's drawing costs; the study's axes have 8 to 16, and 64 to 128
BUFFERS = 3  # that are trained on; the first compiles


@dataclasses.dataclass(frozen=True)
class Seconds:
  """Seconds of a buffer, compiled."""

  drawing: float
  scoring: float
  update: float  # of one


@dataclasses.dataclass(frozen=True)
class Noise:
  """Noise of the log-ratio after the first updates, nats, where there is a log-ratio."""

  log_ratio_error: float  # standard error of log p_ref - log p_old
  tilt_std: float  # spread of reward / alpha in a group


def measure_training(config: ConfigDict, parts: Parts, base: PyTree) -> tuple[Seconds, Noise | None]:
  """Train on a few buffers, and return the figures of the last one."""
  with jax.set_mesh(parts.mesh), tempfile.TemporaryDirectory() as folder:
    phase, state = phases.training_phase(config, epath.Path(folder), parts, base)
    figures, seconds = {}, 0.0
    for buffer in range(BUFFERS):
      experience, figures = phase.buffers.complete(state, buffer, phase.buffers.generate(state, buffer))
      start = time.monotonic()
      for _ in range(phase.updates_per_buffer):
        state, _ = phase.update(state, phase.frozen, experience)
      jax.block_until_ready(state)
      seconds = time.monotonic() - start
  parts_of = Seconds(figures["seconds_sample"], figures["seconds_score"], seconds / phase.updates_per_buffer)
  error = figures.get("log_ratio_error", math.nan)
  if not error or math.isnan(error):  # no log-ratio, or one whose error is not estimated
    return parts_of, None
  return parts_of, Noise(error, figures["tilt_std"])


def advise(config: ConfigDict, found: Diversity, seconds: Seconds, noise: Noise | None) -> Iterator[str]:
  """Yield a sentence for each thing that the figures ask for."""
  size, every = found.group_size, config.train.updates_per_buffer
  if found.pass_at_all == 0:
    yield (
      f"No rollout is right (pass@{size} = 0): there is nothing to reinforce but partial rewards. Train on "
      "demonstrations first, or choose easier prompts."
    )
  elif found.pass_at_all < LEAST_TO_FIND * found.pass_at_1:
    yield (
      f"pass@{size} is {found.pass_at_all / found.pass_at_1:.1f} times pass@1; the study had no base below "
      f"{LEAST_TO_FIND:g} times in random order. Expect less (docs/choosing.md)."
    )
  if found.different < LEAST_DIFFERENT * size:
    yield (
      f"{found.different:.1f} of {size} rollouts differ: decode rollouts in random order (sampler.name='random_order', "
      "or sampler.llada.remasking='random'), or raise sampler.temperature."
    )
  if found.without_variance > MOST_FLAT:
    yield (
      f"{found.without_variance:.0%} of the groups have equal rewards and teach nothing: keep "
      "rollout.drop_equal_groups=True, and make the rollouts differ or change the prompts (docs/choosing.md)."
    )
  if noise is not None and noise.log_ratio_error > MOST_NOISE * noise.tilt_std:
    yield (
      f"The log-ratio's error is {noise.log_ratio_error:.2f} nats beside a spread of reward / alpha of "
      f"{noise.tilt_std:.2f}: set objective.sync_reference_every={every}, so that no log-ratio is needed, or raise "
      f"objective.num_elbo_samples."
    )
  share = seconds.drawing / (seconds.drawing + seconds.scoring + every * seconds.update)
  passes = seconds.drawing * 3 * config.objective.num_mask_samples / seconds.update  # a backward pass counts as two
  yield (
    f"Drawing is {share:.0%} of a buffer's time with {every} updates on it, and costs as much as {passes:.0f} forward "
    f"passes: start with the settings that docs/choosing.md has for drawing that is "
    f"{'dear' if passes > DEAR else 'cheap'}."
  )


def define_flags() -> None:
  """Declare the command's flags; not on import, as every command has its own."""
  config_flags.DEFINE_config_file("config", None, "Configuration file; override a key with --config.section.key=value.")
  flags.adopt_module_key_flags(progress)
  flags.DEFINE_string("workdir", "", "A run whose base is measured, if the configuration names no model.init_from.")
  flags.DEFINE_integer("prompts", 64, "Held-out prompts to measure on.", lower_bound=1)
  flags.mark_flags_as_required(["config"])


def main() -> None:
  """Measure the base that the flags name, and print advice."""
  given = flags.FLAGS
  buckets.check({"config.model.init_from": given.config.model.init_from}, {"--workdir": given.workdir})
  config = with_base(given.config, given.workdir, given.prompts)
  validate(config)
  if OBJECTIVES[config.objective.name].learns_from_demonstrations:
    raise ConfigError(
      f"config.objective.name = {config.objective.name!r} draws no rollouts: give the configuration that would go on "
      "from this base by rewards"
    )
  config, console = filled(config), Console()
  with tempfile.TemporaryDirectory() as folder:
    work = epath.Path(folder)
    parts = build.build_parts(
      changed(config, {"task.records_dir": config.task.records_dir or str(work / "data")}), work
    )
    base = policy.base_params(config, work, parts, are_trained=not parts.trainable.has_adapters)
    trained = policy.initial_adapters(config, work, parts) if parts.trainable.has_adapters else base
    found = measure_diversity(config, parts, trained, base, work, config.rollout.group_size)
    seconds, noise = measure_training(config, parts, base)
  for text in describe(found, seconds, noise):
    console.print(text, highlight=False)
  for text in advise(config, found, seconds, noise):
    console.print(f"- {text}", highlight=False, soft_wrap=True)


def with_base(config: ConfigDict, workdir: str, prompts: int) -> ConfigDict:
  """Return the configuration without a warm start, from the base of a run or the checkpoint that it names.

  Prompts are decoded as many at a time as the configuration does it.

  Raises:
    ConfigError: there is neither.
  """
  base = config.model.init_from or (str(epath.Path(workdir).expanduser() / "base") if workdir else "")
  if not base:
    raise ConfigError("no base to measure: give --workdir of a run that has one, or set config.model.init_from")
  size = min(prompts, config.eval.num_prompts or prompts)
  at_a_time = min(size, config.eval.batch_size, config.rollout.chunk_prompts or config.rollout.num_prompts)
  own = {"warm_start.updates": 0, "model.init_from": base, "eval.num_prompts": size, "eval.batch_size": at_a_time}
  return changed(config, own)


def describe(found: Diversity, seconds: Seconds, noise: Noise | None) -> Iterator[str]:
  """Yield the figures."""
  size = found.group_size
  yield f"greedy         {found.solved:.1%} solved, reward {found.reward:.3f}"
  yield f"rollouts       pass@1 {found.pass_at_1:.1%}, pass@{size} {found.pass_at_all:.1%}"
  equal = f"{found.without_variance:.0%} of groups have equal rewards"
  yield f"diversity      {found.different:.1f} of {size} differ; {equal}"
  if noise is not None:
    yield f"log-ratio      error {noise.log_ratio_error:.2f} nats, spread of reward / alpha {noise.tilt_std:.2f}"
  scoring, update = f"scoring {seconds.scoring:.2f} s", f"an update {seconds.update:.2f} s"
  yield f"a buffer       drawing {seconds.drawing:.2f} s, {scoring}, {update}"


if __name__ == "__main__":
  define_flags()
  commands.start(main)
