"""A run in a few lines, printed at its end: amounts, time, first and last figures, warnings."""

import math
from collections.abc import Iterator, Sequence

from etils import epath

from dmpo_jax.run.report.charts import times
from dmpo_jax.run.report.runs import Row, Run, read_runs

# figures that count failures, and their texts
COUNTED = {
  "updates_skipped": "updates skipped: loss or gradient not finite",
  "rewards_failed": "rollouts dropped: their reward failed",
  "scores_failed": "rollouts dropped: log-probs not finite",
  "grading_timeouts": "completions graded 0: grading took too long",
  "grading_crashes": "completions graded 0: grading crashed",
  "prompts_skipped": "prompts skipped: too long",
  "prompts_cut": "prompts cut: too long",
}
SUPERVISED, DMPO = "denoise", ("wdce", "wddo")  # objectives
FAINT = 0.1  # of `signal_kept`: next to nothing is learned below
RUNNING = (
  "updates_skipped",
  "prompts_skipped",
  "prompts_cut",
)  # totals of the run; the others are of one buffer


def summarize(workdir: epath.PathLike) -> list[str]:
  """Describe a run in a few lines; what it has not recorded is left out."""
  (run,) = read_runs([workdir])
  rows = buffers_of(run)
  return [*_amounts(run, rows), *_first_and_last(rows), *_warnings(rows)]


def buffers_of(run: Run) -> list[Row]:
  """Return the rows of buffers with updates, without the evaluation before them."""
  return [row for row in run.rows.get("train", ()) if row["step"]]


def outcome_of(run: Run) -> tuple[Row | None, Row | None, int]:
  """Return the figures of the base and of the last evaluation, and the number of buffers before the latter."""
  last = max(run.evaluations, default=0)
  return run.evaluations.get(0), run.evaluations.get(last) if last else None, last


def tell(run: Run) -> str:
  """Tell a run in a few sentences: what the base is, what it learned from, and what came of it; "" if little is known.

  Parts that the run has not recorded are left out.
  """
  before, now, last = outcome_of(run)
  if before is None or now is None:
    return ""
  return " ".join(filter(None, (_tell_base(run), _tell_training(run, last), _tell_outcome(before, now))))


def _tell_base(run: Run) -> str:
  start, task, updates = run.config.get("model.init_from"), run.config.get("task.name"), run.count("warm_start.updates")
  if not isinstance(start, str) or not isinstance(task, str):
    return ""
  model = f"The model {epath.Path(start).name}" if start else "A model with random weights"
  name = "a mixture of tasks" if task == "mixture" else epath.Path(task).stem
  if not updates:
    return f"{model} is the base; its task is {name}."
  return f"{model} first learned from demonstrations of {name}, in {updates:,} updates: this is the base."


def _tell_training(run: Run, last: int) -> str:
  objective, group = run.config.get("objective.name"), run.count("rollout.group_size")
  prompts = run.count("rollout.num_prompts")
  if not isinstance(objective, str) or prompts is None or group is None:
    return ""
  if objective == SUPERVISED:
    return f"Then it learned from demonstrations, {prompts:,} in each of {last:,} buffers."
  label = f"DMPO's {objective}" if objective in DMPO else objective
  return f"Then {label} taught it from rewards for its own answers, {prompts * group:,} in each of {last:,} buffers."


def _tell_outcome(before: Row, now: Row) -> str:
  whole = f"{now['num_prompts']:,.0f} held-out prompts" if "num_prompts" in now else "the held-out prompts"
  return f"It now solves {now['solve_rate']:.1%} of {whole}; the base solved {before['solve_rate']:.1%}."


def _amounts(run: Run, rows: Sequence[Row]) -> Iterator[str]:
  spent = times(run)
  prompts, group, updates = map(run.count, ("rollout.num_prompts", "rollout.group_size", "train.updates_per_buffer"))
  if rows and prompts is not None and group is not None and updates is not None:
    is_supervised = run.config.get("objective.name") == SUPERVISED
    content = f"{prompts:,} demonstrations" if is_supervised else f"{prompts * group:,} rollouts"
    yield f"{len(rows)} buffers of {content}, {len(rows) * updates:,} updates"
  if spent:
    shown = (f"{part} {seconds:,.{0 if seconds >= 10 else 1}f} s" for part, seconds in spent.items() if seconds >= 0.05)
    other = " (start, data, saving)" if spent.get("other", 0.0) >= 0.05 else ""
    yield f"time, compilation included: {', '.join(shown)}{other}"


def _first_and_last(rows: Sequence[Row]) -> Iterator[str]:
  shown = (
    ("reward", ("reward_mean",), "{:.3f}"),
    ("solved", ("solve_rate",), "{:.1%}"),
    ("effective sample size", ("effective_sample_size",), "{:.2f}"),
    ("signal kept", ("signal_kept",), "{:.2f}"),
    ("entropy", ("entropy", "loss_entropy"), "{:.3f}"),  # the updates' own, if nothing is scored before them
  )
  ranges = []
  for label, names, form in shown:
    found = ([row[name] for row in rows if name in row] for name in names)
    values = next(filter(None, found), [])
    if values:
      ranges.append(f"{label} {form.format(values[0])} to {form.format(values[-1])}")
  if ranges:
    yield "rollouts, first buffer to last: " + ", ".join(ranges)


def lack_of_signal(rows: Sequence[Row]) -> list[str]:
  """Report in how many buffers rewards or weights had no signal, each cause a sentence; empty if they had one.

  A few noisy buffers are normal: at the end of a successful run rewards hardly differ. So noise and weights that cancel
  are reported where most buffers have them.
  """
  found = []
  if count := sum(row.get("without_signal") == 1 for row in rows):
    found.append(f"no signal in {count} of {len(rows)} buffers: all rewards equal in every group")
  noisy = [row for row in rows if row.get("log_ratio_error", 0.0) > row.get("tilt_std", math.inf)]
  if len(noisy) > len(rows) / 2:
    found.append(
      f"the log-ratio's noise exceeded the spread of reward / alpha in {len(noisy)} of {len(rows)} buffers: weights "
      "follow the noise. More objective.num_elbo_samples lower it; objective.sync_reference_every = "
      "train.updates_per_buffer leaves no log-ratio"
    )
  faint = [row for row in rows if row.get("signal_kept", 1.0) < FAINT]
  if len(faint) > len(rows) / 2:
    found.append(
      f"next to nothing was learned in {len(faint)} of {len(rows)} buffers: weights and those of the opposite target "
      f"hardly differed (signal_kept below {FAINT}). {_remedy(faint)}"
    )
  return found


def _remedy(rows: Sequence[Row]) -> str:
  """Say what brings weights and their opposites apart: what the log-ratio leaves of the tilt, or a larger tilt."""
  covered = sum(row.get("log_ratio_std", 0.0) > row.get("tilt_std", math.inf) for row in rows)
  if covered > len(rows) / 2:
    return "The log-ratio's spread exceeded that of reward / alpha: let the reference follow, or lower objective.alpha"
  return "The spread of reward / alpha was small: lower objective.alpha, or raise objective.kappa"


def _warnings(rows: Sequence[Row]) -> Iterator[str]:
  for lack in lack_of_signal(rows):
    yield f"warning: {lack}"
  for name, what in COUNTED.items():
    values = [row[name] for row in rows if name in row]
    count = (values[-1] if name in RUNNING else sum(values)) if values else 0
    if count:
      yield f"warning: {count:,.0f} {what}"
