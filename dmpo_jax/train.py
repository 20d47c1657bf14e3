"""The story of a run: warm start -> for each buffer: rollouts, several updates, evaluation, save -> result.

Two phases run through one loop. The warm start learns from demonstrations (objective `denoise`); the training proper
collects rollouts of the current policy and learns from them by `config.objective`. The parameters between the two are
the base: the policy that training starts from, and the reference that it is measured against.
"""

import contextlib
import dataclasses
import logging
import time
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict
from rich.console import Console

from dmpo_jax import build, phases, sharding
from dmpo_jax.build import Parts
from dmpo_jax.config import ConfigError
from dmpo_jax.evaluate import best_buffer
from dmpo_jax.files import Unreadable
from dmpo_jax.phases import Phase
from dmpo_jax.processes import meet
from dmpo_jax.run import progress
from dmpo_jax.run.checkpoints import Checkpoints
from dmpo_jax.run.metrics import Metrics, read_result, write_parameter_overview, write_result
from dmpo_jax.run.params import is_saved, save_params
from dmpo_jax.run.preemption import Preempted, check_preemption
from dmpo_jax.run.report import summarize, tables
from dmpo_jax.run.report import write as write_report
from dmpo_jax.run.workdir import announce_start, save_config, take_over
from dmpo_jax.structs import TrainState

logger = logging.getLogger(__name__)

PAGE = "report.html"  # the run to look at, in the workdir


class Diverged(RuntimeError):
  """Too many updates in a row, or all of a run, were not finite; the last good parameters are in the checkpoint."""


@dataclasses.dataclass
class Position:
  """How far a phase has come and what it has still to report: all of its state that is not an array."""

  base: str = ""  # identity of the parameters that the phase began with
  buffer: int = 0  # finished buffers
  update: int = 0  # finished updates of the current one
  reported: int = -1  # buffers whose evaluation and metrics are done; -1: not even those of the beginning
  scalars: dict[str, float] = dataclasses.field(default_factory=dict)  # of the current buffer so far
  evaluations: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # by number of finished buffers


def main(config: ConfigDict, workdir: epath.Path) -> None:
  """Train, or go on training, and report; a run that has finished says so and stops."""
  start, result = time.monotonic(), read_result(workdir)
  if result is not None and result["buffers"] >= config.train.num_buffers:
    print(f"{workdir} has finished its {result['buffers']} buffers: nothing left to do.")
    is_page_due = not (workdir / PAGE).exists()
  else:
    evaluations = train(config, workdir)
    last = max(map(int, evaluations))  # more than were asked for, if more had begun
    result = {
      "objective": config.objective.name,
      "buffers": last,
      "base": evaluations["0"],
      "last": evaluations[str(last)],
      "best": evaluations[best_buffer(evaluations)] | {"buffers": int(best_buffer(evaluations))},
      "evaluations": evaluations,
      "seconds": time.monotonic() - start,  # of this start; a run that was resumed took longer
    }
    write_result(workdir, result)
    is_page_due = True
  if jax.process_index() == 0:
    report(result, workdir, write_page(workdir) if is_page_due else PAGE)


def train(config: ConfigDict, workdir: epath.Path) -> dict[str, dict[str, float]]:
  """Run `config` in `workdir`, or go on with it; return the evaluations by number of finished buffers.

  Raises:
    Diverged: after `optim.max_skips_in_a_row` updates in a row that were not finite.
  """
  parts = build.build_parts(config, workdir)
  if parts.model.config.lora and (workdir / "policy").exists():
    build.check_base(config, workdir, workdir / "policy")
  take_over(workdir, config)
  meet("the workdir is this run's")
  save_config(workdir, config)  # not before: a start that was refused leaves the workdir free for another configuration
  announce_start(workdir, config, parts.mesh, parts.rollout_mesh)
  log = Metrics(workdir, wandb_project=config.log.wandb_project, config=config.to_dict())
  with contextlib.closing(parts.grading), jax.set_mesh(parts.mesh), log as metrics:
    phase, state = phases.training_phase(config, workdir, parts, warm_start(config, workdir, parts, metrics))
    state, position = run(phase, state, config, workdir, metrics)
    save_params(workdir / "policy", state.trainable, build.about_policy(config, workdir, position.buffer))
  return position.evaluations


def warm_start(config: ConfigDict, workdir: epath.Path, parts: Parts, metrics: Metrics) -> Any:
  """Return the base parameters: as initialised, or after training on demonstrations (kept in `workdir/base`).

  A base that is not whole is written again, unless training has begun from it.

  Raises:
    Unreadable: the base is lost, and there are checkpoints that began from it.
  """
  if config.warm_start.updates and not is_saved(workdir / "base"):
    checkpoints = workdir / "checkpoints" / "train"
    if checkpoints.exists() and any(checkpoints.iterdir()):
      raise Unreadable(
        f"{workdir / 'base'} holds no whole parameters, and {checkpoints} began from those that it held: put a copy of "
        "them back, or start over with a new --workdir"
      )
    if (workdir / "base").exists():
      logger.warning("%s is not whole and is written again", workdir / "base")
    phase, state = phases.warm_start_phase(config, parts)
    state, _ = run(phase, state, config, workdir, metrics)
    save_params(workdir / "base", state.trainable)
  base = build.base_params(config, workdir, parts, are_trained=parts.model.config.lora is None)
  write_parameter_overview(workdir, base)
  return base


def run(
  phase: Phase, state: TrainState, config: ConfigDict, workdir: epath.Path, metrics: Metrics
) -> tuple[TrainState, Position]:
  """Run one phase from where its newest checkpoint stands to its end."""
  with Checkpoints(workdir / "checkpoints" / phase.name, config.checkpoint.keep) as checkpoints:
    state, experience, drawn, position = resume(phase, state, checkpoints)
    phase = with_begun(phase, position)
    if phase.is_pipelined:  # an extended run's next buffer is drawn by an earlier policy than its newest
      coming = position.buffer + (experience is not None)
      checkpoints.keep_steps(frozenset(map(phase.drawn_at, (coming, phase.num_buffers))))
    metrics.forget(phase.name, after=position.reported)
    with progress.Progress(phase.name, phase.num_buffers, done=max(position.reported, 0)) as shown:
      try:
        while True:
          is_new = position.reported < position.buffer
          finish_buffer(phase, state, position, metrics)
          if is_new and position.buffer:
            shown.advance(**position.scalars)
          step, is_done = int(state.step), position.buffer >= phase.num_buffers
          problem = find_problem(phase, state, config.optim.max_skips_in_a_row, is_done=is_done)
          is_last_draw = phase.is_pipelined and step == phase.drawn_at(phase.num_buffers)
          if is_done or problem or is_last_draw or (step and step % config.checkpoint.every_updates == 0):
            checkpoints.save(step, state, experience, dataclasses.asdict(position), drawn)
          if problem:
            raise Diverged(problem)
          if is_done:
            return state, position
          check_preemption()
          if experience is None:
            drawn = draw(phase, state, position.buffer, drawn, checkpoints)
            experience, position.scalars = phase.finish(state, drawn, position.buffer)
            drawn = None
          if phase.is_pipelined and position.buffer + 1 < phase.num_buffers:
            drawn = draw(phase, state, position.buffer + 1, drawn, checkpoints)
          state = update(phase, state, experience, position)
          if position.update == phase.updates_per_buffer:
            experience, position.buffer, position.update = None, position.buffer + 1, 0
      except Preempted as notice:
        drawn = drawn if notice.drawn is None else notice.drawn
        checkpoints.save(int(state.step), state, experience, dataclasses.asdict(position), drawn)
        raise


def find_problem(phase: Phase, state: TrainState, most_in_a_row: int, *, is_done: bool) -> str:
  """Say why the phase cannot go on, or has come to nothing, as its updates were not finite; "" where it can."""
  step, skipped, in_a_row = int(state.step), int(state.num_skipped), int(state.num_skipped_in_a_row)
  what = f"had a loss or gradient that was not finite (phase {phase.name}, update {step})"
  if in_a_row >= most_in_a_row:
    return f"{in_a_row} updates in a row {what}; a smaller optim.learning_rate or optim.clip_norm may help"
  if is_done and 0 < step == skipped:
    return f"all {step} updates {what} and were skipped, so nothing was learned"
  return ""


def with_begun(phase: Phase, position: Position) -> Phase:
  """Return the phase with as many buffers as have begun, where it was asked for fewer than it has learned from."""
  begun = position.buffer + (position.update > 0)
  if begun <= phase.num_buffers:
    return phase
  logger.warning("train.num_buffers=%d: %d have begun, so the run ends after these", phase.num_buffers, begun)
  return dataclasses.replace(phase, num_buffers=begun)


def draw(phase: Phase, state: TrainState, buffer: int, drawn: Any, checkpoints: Checkpoints) -> Any:
  """Draw a buffer, or the rest of it, by the policy of the step at which it is due.

  That of a pipelined run that had ended, and is now to go on, is the policy with which its last buffer began.
  """
  if drawn is not None and drawn.is_whole:
    return drawn
  step = phase.drawn_at(buffer)
  if step != int(state.step):
    earlier = checkpoints.restore_state(step, sharding.abstract(state))
    if earlier is None:
      logger.warning(
        "buffer %d is due to be drawn by the policy of step %d, of which there is no checkpoint: that of step %d draws "
        "it, and the run ends otherwise than if it had been asked for as many buffers at once",
        buffer, step, int(state.step),
      )  # fmt: skip
    state = state if earlier is None else earlier
  return phase.draw(state, buffer) if drawn is None else phase.draw(state, buffer, drawn)


def resume(phase: Phase, state: TrainState, checkpoints: Checkpoints) -> tuple[TrainState, Any, Any, Position]:
  """Return the newest checkpoint's state, live buffer, next buffer and position, or those of the beginning.

  Raises:
    ConfigError: the checkpoint was trained from another base.
  """
  restored = checkpoints.restore_latest(sharding.abstract(state))
  if restored is None:
    return state, None, None, Position(base=phase.base)
  position = Position(**restored.progress)
  if position.base != phase.base:
    raise ConfigError(
      f"{checkpoints.directory} was trained from the base {position.base or 'of random parameters'}, and this one is "
      f"{phase.base or 'random'}: give --workdir a new folder, or set model.init_from back"
    )
  # On the host, as buffers are that were never saved: so they are given to the same compiled programs.
  return restored.state, *jax.device_get((restored.experience, restored.drawn)), position


def update(phase: Phase, state: TrainState, experience: Any, position: Position) -> TrainState:
  """Take one gradient step and add its metrics to the buffer's.

  Raises:
    Preempted: before one of its microbatches; state and position are as they were.
  """
  start = time.monotonic()
  if phase.updates_per_buffer > 1:
    progress.part("update", position.update + 1, phase.updates_per_buffer)
  state, scalars = phase.update(state, phase.frozen, experience)
  for name, value in jax.device_get(scalars).items():
    position.scalars[name] = position.scalars.get(name, 0.0) + float(value) / phase.updates_per_buffer
  position.scalars["updates_skipped"] = float(state.num_skipped)
  position.scalars["seconds_update"] = position.scalars.get("seconds_update", 0.0) + time.monotonic() - start
  position.update += 1
  return state


def finish_buffer(phase: Phase, state: TrainState, position: Position, metrics: Metrics) -> None:
  """Evaluate the policy where it is time to, and write the buffer's one row of metrics; what is done is not done again.

  A run that is asked for fewer buffers than it has had is evaluated after its row was written.
  """
  is_new, number = position.reported < position.buffer, str(position.buffer)
  if position.update == 0 and phase.is_evaluated(position.buffer) and number not in position.evaluations:
    scalars = phase.evaluate(state.trainable, position.buffer)
    position.evaluations[number] = scalars
    if position.buffer and best_buffer(position.evaluations) == number:
      phase.keep_best(state.trainable, position.buffer)
    if is_new:
      position.scalars |= {f"eval_{name}": value for name, value in scalars.items()}
  if is_new and position.scalars:
    metrics.write(phase.name, position.buffer, position.scalars)
  position.reported = position.buffer


def report(result: dict[str, Any], workdir: epath.Path, page: str) -> None:
  """Print the run on one screen: base against trained policy, what was done, and where everything is."""
  console = Console()
  rows = {"base": result["base"], f"after {result['objective']}": result["last"]}
  if result["best"]["buffers"] != result["buffers"]:
    rows[f"best, after {result['best']['buffers']} buffers"] = result["best"]
  console.print(tables.outcome(rows))
  for line in summarize(workdir):
    console.print(line, highlight=False)
  for what, path in (
    ("policy", "policy"),
    ("checkpoints", "checkpoints"),
    ("generations", "generations"),
    ("metrics", "metrics.jsonl"),
    ("TensorBoard", "tensorboard"),
    ("result", "result.json"),
    ("report", page),
  ):
    console.print(f"{what:12} {workdir / path}", highlight=False, soft_wrap=True)


def write_page(workdir: epath.Path) -> str:
  """Write the workdir's report.html and return its name; a run has finished whether or not that succeeds."""
  try:
    return write_report([workdir], workdir / PAGE).name
  except Exception as error:  # whatever it is, the policy and the result stand
    logger.warning("the report could not be written: %r", error)
    return f"report.html could not be written ({error!r}); python -m launch.report --workdir={workdir} tries again"
