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

from dmpo_jax import build, phases, policy, rollout, sharding
from dmpo_jax.build import Parts
from dmpo_jax.config import ConfigError
from dmpo_jax.evaluate import best_buffer
from dmpo_jax.files import Unreadable
from dmpo_jax.phases import Phase
from dmpo_jax.processes import meet
from dmpo_jax.rollout_metrics import pool_figures
from dmpo_jax.run import progress, suggestions
from dmpo_jax.run.checkpoints import Checkpoints
from dmpo_jax.run.metrics import Metrics, read_result, write_parameter_overview, write_result
from dmpo_jax.run.params import is_saved, save_params
from dmpo_jax.run.preemption import Preempted, check_preemption
from dmpo_jax.run.report import summarize, tables
from dmpo_jax.run.report import write as write_report
from dmpo_jax.run.report.runs import STEPS, read_prompts
from dmpo_jax.run.workdir import announce_start, save_config, take_over
from dmpo_jax.structs import Experience, PendingRollouts, TrainState

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
  batch: int = 0  # batches of prompts that the current one has been collected from so far
  further: int = 0  # batches that this and earlier buffers took beyond one each: the prompts go on behind them
  is_short: bool = False  # the current buffer lacks groups that updates learn from
  is_by_length: bool = False  # the order of the rows that were generated of the next one, see `Phase`
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
  if parts.trainable.has_adapters and (workdir / "policy").exists():
    policy.check_base(config, workdir, workdir / "policy")
  take_over(workdir, config)
  meet("the workdir is this run's")
  save_config(workdir, config)  # not before: a start that was refused leaves the workdir free for another configuration
  announce_start(workdir, config, parts.mesh, parts.rollout_mesh)
  log = Metrics(workdir, wandb_project=config.log.wandb_project, config=config.to_dict())
  with contextlib.closing(parts.grading), jax.set_mesh(parts.mesh), log as metrics:
    phase, state = phases.training_phase(config, workdir, parts, warm_start(config, workdir, parts, metrics))
    state, position = run(phase, state, config, workdir, metrics)
    about = policy.policy_metadata(config, workdir, position.buffer, parts.model.config)
    save_params(workdir / "policy", state.trainable, about)
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
    save_params(workdir / "base", state.trainable, policy.model_metadata(parts.model.config))
  base = policy.base_params(config, workdir, parts, are_trained=not parts.trainable.has_adapters)
  write_parameter_overview(workdir, base)
  return base


def run(
  phase: Phase, state: TrainState, config: ConfigDict, workdir: epath.Path, metrics: Metrics
) -> tuple[TrainState, Position]:
  """Run one phase from where its newest checkpoint stands to its end."""
  with Checkpoints(workdir / "checkpoints" / phase.name, config.checkpoint.keep) as checkpoints:
    now = resume(phase, state, checkpoints)
    phase = with_begun(phase, now.position)
    metrics.forget(phase.name, after=now.position.reported)
    done, unit = max(now.position.reported, 0), STEPS[phase.name]
    with progress.Progress(phase.name, phase.num_buffers, done=done, unit=unit) as shown:
      try:
        report_buffer(phase, now, metrics, shown)
        now.save_if_due(phase, config)
        while now.position.buffer < phase.num_buffers:
          while now.position.update < phase.updates_per_buffer:
            check_preemption()
            now.collect(phase)
            now.learn(phase)
            if now.position.update < phase.updates_per_buffer:
              now.save_if_due(phase, config)
          now.next_buffer()
          report_buffer(phase, now, metrics, shown)
          now.save_if_due(phase, config)
        return now.state, now.position
      except Preempted as notice:
        now.pending = notice.pending or now.pending
        now.save()
        raise


@dataclasses.dataclass
class Now:
  """Where a phase stands: all that a checkpoint holds."""

  checkpoints: Checkpoints
  state: TrainState
  position: Position
  experience: Experience | None = None  # the live buffer, where updates on it are still to come
  pending: PendingRollouts | None = None  # the buffer after it, or as much of it as has been generated

  def collect(self, phase: Phase) -> None:
    """Complete the buffer to learn from, unless it is there; in a pipelined run, generate the next one too."""
    now = self.position
    while self.experience is None or now.is_short:
      self.pending = self._generate(phase, now.buffer)  # kept, as completing it may be interrupted too
      batch, figures = phase.buffers.complete(self.state, now.buffer, self.pending, now.further)
      now.batch += 1
      self.experience = batch if self.experience is None else rollout.pool(self.experience, batch)
      now.scalars = pool_figures(now.scalars, figures, now.batch)
      now.is_short = phase.buffers.wants_more(self.experience, now.batch)
      now.further += now.is_short
      self.pending = None
    if phase.is_pipelined and self.position.buffer + 1 < phase.num_buffers:
      self.pending = self._generate(phase, self.position.buffer + 1)

  def _generate(self, phase: Phase, buffer: int) -> Any:
    """Generate a buffer, or the rest of it, by the policy of the step at which it is due.

    That of a pipelined run that had ended, and is now extended, is the policy with which its last buffer began.
    """
    state, step = self.state, phase.generated_at(buffer)
    if step != int(state.step) and not (self.pending is not None and self.pending.is_whole):
      earlier = self.checkpoints.restore_state(step, sharding.abstract(state))
      if earlier is None:
        logger.warning(
          "buffer %d is due to be generated by the policy of step %d, of which there is no checkpoint: that of step %d "
          "does it, and the run ends otherwise than if it had been asked for as many buffers at once",
          buffer, step, int(state.step),
        )  # fmt: skip
      state = state if earlier is None else earlier
    return phase.buffers.generate(state, buffer, self.pending, self.position.further)

  def learn(self, phase: Phase) -> None:
    """Take one gradient step, and add its metrics to the buffer's.

    Raises:
      Preempted: before one of its microbatches; nothing has changed.
    """
    start, scalars = time.monotonic(), self.position.scalars
    if phase.updates_per_buffer > 1:
      progress.part("update", self.position.update + 1, phase.updates_per_buffer)
    assert self.experience is not None  # `collect` comes first
    self.state, found = phase.update(self.state, phase.frozen, self.experience)
    for name, value in jax.device_get(found).items():
      scalars[name] = scalars.get(name, 0.0) + float(value) / phase.updates_per_buffer
    scalars["updates_skipped"] = float(self.state.num_skipped)
    scalars["seconds_update"] = scalars.get("seconds_update", 0.0) + time.monotonic() - start
    self.position.update += 1

  def next_buffer(self) -> None:
    """Go on to the next buffer."""
    now = self.position
    self.experience, now.buffer, now.update, now.batch = None, now.buffer + 1, 0, 0

  def save_if_due(self, phase: Phase, config: ConfigDict) -> None:
    """Save every so many updates, at the end, and where a pipelined run that is extended later will start from.

    Raises:
      Diverged: after saving, where updates were not finite (`find_problem`).
    """
    step, is_done = int(self.state.step), self.position.buffer >= phase.num_buffers
    problem = find_problem(phase, self.state, config.optim.max_skips_in_a_row, is_done=is_done)
    is_last_start = phase.is_pipelined and step == phase.generated_at(phase.num_buffers)
    if is_done or problem or is_last_start or (step and step % config.checkpoint.every_updates == 0):
      self.save()
    if problem:
      raise Diverged(problem)

  def save(self) -> None:
    """Save everything, to go on from here."""
    self.checkpoints.save(
      int(self.state.step), self.state, self.experience, dataclasses.asdict(self.position), self.pending
    )


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


def resume(phase: Phase, state: TrainState, checkpoints: Checkpoints) -> Now:
  """Return where the newest checkpoint stands, or the beginning.

  Raises:
    ConfigError: the checkpoint was trained from another base.
  """
  restored = checkpoints.restore_latest(sharding.abstract(state))
  if restored is None:
    now = Now(checkpoints, state, Position(base=phase.base))
  else:
    # Buffers are put on the host, as those are that were never saved: so the same compiled programs take them.
    experience, pending = jax.device_get((restored.experience, restored.pending))
    now = Now(checkpoints, restored.state, Position(**restored.progress), experience, pending)
  now.pending = if_in_order(now.pending, now.position, phase.is_by_length)
  if now.position.base != phase.base:
    raise ConfigError(
      f"{checkpoints.directory} was trained from the base {now.position.base or 'of random parameters'}, and this one "
      f"is {phase.base or 'random'}: give --workdir a new folder, or set model.init_from back"
    )
  if phase.is_pipelined:  # an extended run's next buffer is generated by an earlier policy than its newest
    coming = now.position.buffer + (now.experience is not None)
    checkpoints.keep_steps(frozenset(map(phase.generated_at, (coming, phase.num_buffers))))
  return now


def if_in_order(pending: PendingRollouts | None, position: Position, is_by_length: bool) -> PendingRollouts | None:
  """Return what has been generated of a buffer, unless another order of its prompts is asked for; note the order."""
  if pending is not None and position.is_by_length != is_by_length:
    logger.warning("rollout.prompt_lengths: the buffer that had begun is generated again, in another order")
    pending = None
  position.is_by_length = is_by_length
  return pending


def report_buffer(phase: Phase, now: Now, metrics: Metrics, shown: progress.Progress) -> None:
  """Evaluate the policy where it is time to, and write the buffer's row of metrics, unless that was done before.

  A run that is asked for fewer buffers than it has had is evaluated after its row was written.
  """
  position = now.position
  is_new, number = position.reported < position.buffer, str(position.buffer)
  if position.update == 0 and phase.is_evaluated(position.buffer) and number not in position.evaluations:
    scalars = phase.evaluate(now.state.trainable, position.buffer)
    position.evaluations[number] = scalars
    if position.buffer and best_buffer(position.evaluations) == number:
      phase.keep_best(now.state.trainable, position.buffer)
    if is_new:
      position.scalars |= {f"eval_{name}": value for name, value in scalars.items()}
  if is_new and position.scalars:
    metrics.write(phase.name, position.buffer, position.scalars)
  position.reported = position.buffer
  if is_new and position.buffer:
    shown.advance(1, **position.scalars)


def report(result: dict[str, Any], workdir: epath.Path, page: str) -> None:
  """Print the run on one screen: base against trained policy, what was done, and where everything is."""
  console = Console()
  rows = {"base": result["base"], f"after {result['objective']}": result["last"]}
  if result["best"]["buffers"] != result["buffers"]:
    rows[f"best solve rate, after {result['best']['buffers']} buffers"] = result["best"]
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
  if jax.process_count() == 1:  # the others are commands of one process
    console.print(f"\nTry next: open {workdir / PAGE} in a browser, or", highlight=False, soft_wrap=True)
    prompts = read_prompts(workdir, 1)
    for what, command in suggestions.suggest(suggestions.typed(), prompts[0] if prompts else ""):
      console.print(f"  {what}\n    {command}", highlight=False, soft_wrap=True, markup=False)


def write_page(workdir: epath.Path) -> str:
  """Write the workdir's report.html and return its name; a run has finished whether or not that succeeds."""
  try:
    return write_report([workdir], workdir / PAGE).name
  except Exception as error:  # whatever it is, the policy and the result stand
    logger.warning("the report could not be written: %r", error)
    return f"report.html could not be written ({error!r}); python -m launch.report --workdir={workdir} tries again"
