"""A run in a few lines, for the end of its output: how much was done, where the time went, what is worth a look."""

from collections.abc import Iterator, Sequence

from etils import epath

from dmpo_jax.run.report.charts import times
from dmpo_jax.run.report.runs import Row, Run, read_runs

# figures that count something that went wrong, and how they are told
COUNTED = {
  "updates_skipped": "updates skipped, as their loss or gradient was not finite",
  "rewards_failed": "rollouts dropped, as their reward failed",
  "scores_failed": "rollouts dropped, as their log-probabilities were not finite",
  "grading_timeouts": "completions worth 0, as grading them took too long",
  "grading_crashes": "completions worth 0, as grading them crashed",
  "prompts_skipped": "prompts skipped, as they are too long",
  "prompts_cut": "prompts cut, as they are too long",
}
RUNNING = ("updates_skipped", "prompts_skipped", "prompts_cut")  # of the run so far; the others are of one buffer


def summarize(workdir: epath.PathLike) -> list[str]:
  """Say in a few lines what a run has done; what it has not recorded is left out."""
  (run,) = read_runs([workdir])
  rows = buffers_of(run)
  return [*_amounts(run, rows), *_first_and_last(rows), *_warnings(rows)]


def buffers_of(run: Run) -> list[Row]:
  """Return the rows of the buffers that were learned from."""
  return [row for row in run.rows.get("train", ()) if row["step"]]


def _amounts(run: Run, rows: Sequence[Row]) -> Iterator[str]:
  spent = times(run)
  prompts, group, updates = map(run.count, ("rollout.num_prompts", "rollout.group_size", "train.updates_per_buffer"))
  if rows and None not in (prompts, group, updates):
    yield f"{len(rows)} buffers of {prompts * group:,} rollouts, {len(rows) * updates:,} updates"
  if spent:
    yield "time: " + ", ".join(
      f"{part} {seconds:,.{0 if seconds >= 10 else 1}f} s" for part, seconds in spent.items() if seconds >= 0.05
    )


def _first_and_last(rows: Sequence[Row]) -> Iterator[str]:
  shown = (
    ("reward", ("reward_mean",), "{:.3f}"),
    ("solved", ("solve_rate",), "{:.1%}"),
    ("effective sample size", ("effective_sample_size",), "{:.2f}"),
    ("entropy", ("entropy", "loss_entropy"), "{:.3f}"),  # where nothing is measured before the updates, theirs
  )
  told = []
  for label, names, form in shown:
    found = ([row[name] for row in rows if name in row] for name in names)
    values = next(filter(None, found), [])
    if values:
      told.append(f"{label} {form.format(values[0])} to {form.format(values[-1])}")
  if told:
    yield "rollouts, first buffer to last: " + ", ".join(told)


def lack_of_signal(rows: Sequence[Row]) -> str:
  """Say how many buffers had rewards that teach nothing; "" if none had."""
  count = sum(row.get("without_signal") == 1 for row in rows)
  return f"no signal in {count} of {len(rows)} buffers: all rewards equal in every group" if count else ""


def _warnings(rows: Sequence[Row]) -> Iterator[str]:
  if lack := lack_of_signal(rows):
    yield f"worth a look: {lack}"
  for name, what in COUNTED.items():
    values = [row[name] for row in rows if name in row]
    count = (values[-1] if name in RUNNING else sum(values)) if values else 0
    if count:
      yield f"worth a look: {count:,.0f} {what}"
  noisy = sum(row.get("log_ratio_error", 0.0) > row.get("tilt_std", float("inf")) for row in rows)
  if noisy > len(rows) / 2:  # at the end of a run that succeeds it is so, as rewards no longer differ
    yield f"worth a look: the log-ratio's noise exceeded the spread of reward / alpha in {noisy} of {len(rows)} buffers"
