"""Tables of evaluations for a terminal."""

import math
from collections.abc import Mapping, Sequence

from etils import epath
from rich.table import Table

from dmpo_jax.run.report.charts import list_parts
from dmpo_jax.run.report.runs import Row, is_number

NEEDED = {  # keys that a row of `evaluations` must have
  *("policy", "buffers", "task", "completion_length", "sampler", "steps", "is_as_in_training", "num_prompts"),
  *("solve_rate", "solve_rate_low", "solve_rate_high", "format_rate", "eos_rate", "effective_tokens"),
  *("model_calls", "tokens_per_second", "settings", "generations"),
}
NAMED = ("policy", "buffers", "task", "completion_length", "sampler", "steps")  # columns that identify a row


def settings_apart(rows: Sequence[Row]) -> list[str]:
  """Return for each row the settings in which it differs from rows with the same policy, task, sampler and length."""
  names = [str([row.get(name) for name in NAMED]) for row in rows]
  settings = [row["settings"] if isinstance(row.get("settings"), Mapping) else {} for row in rows]
  labels = []
  for name, own in zip(names, settings, strict=True):
    others = [other for like, other in zip(names, settings, strict=True) if like == name]
    paths = sorted({path for other in others for path in other.keys() | own.keys() if other.get(path) != own.get(path)})
    labels.append(", ".join(f"{path.removeprefix('sampler.')}={own.get(path)}" for path in paths))
  return labels


def rank(row: Row) -> tuple[str, float, float, float]:
  """Return what evaluations are sorted by: task, completion length, the best first, and of equals the fewest calls."""
  length, calls = (value if is_number(value := row.get(name)) else 0 for name in ("completion_length", "model_calls"))
  return str(row.get("task")), length, -row["solve_rate"], calls


def _decimals(value: float | None) -> str:
  return "" if value is None else f"{value:.2f}"


def outcome(rows: Mapping[str, Mapping[str, float]]) -> Table:
  """Lay out the figures of evaluations by name."""
  num_prompts = int(next(iter(rows.values()))["num_prompts"])
  layout = Table(title=f"{num_prompts} held-out prompts")
  parts = list_parts(rows.values())
  for column in ("", "solved", "95% interval", "reward", *parts):
    layout.add_column(column, justify="right" if column else "left")
  for name, row in rows.items():
    low, high = row["solve_rate_low"], row["solve_rate_high"]
    rewards = [f"{row.get(f'reward_{part}', math.nan):.3f}" for part in ("mean", *parts)]
    layout.add_row(name, f"{row['solve_rate']:.1%}", f"{low:.1%} to {high:.1%}", *rewards)
  return layout


def evaluations(rows: Sequence[Row]) -> Table:
  """Lay out the evaluations of a workdir; a star marks a sampler or setting that training did not use.

  The best come first. Columns with the same value in all rows become one line below the table, so that it fits a
  narrow terminal.
  """
  rows = sorted(rows, key=rank)
  k = max((int(name.rpartition("_")[2]) for row in rows for name in row if name.startswith("pass_at_")), default=0)
  columns: dict[str, list[str]] = {
    "policy": [f"{row['policy']} ({row['buffers']})" for row in rows],
    "task": [epath.Path(row["task"]).name for row in rows],
    "tokens": [str(row["completion_length"]) for row in rows],
    "sampler": [f"{row['sampler']}/{row['steps']}" + "*" * (not row["is_as_in_training"]) for row in rows],
    "with": settings_apart(rows),
    "prompts": [str(row["num_prompts"]) for row in rows],
    "solved": [f"{row['solve_rate']:.1%}" for row in rows],
    "95% interval": [f"{row['solve_rate_low']:.1%} to {row['solve_rate_high']:.1%}" for row in rows],
    f"pass@{k}": [f"{row[f'pass_at_{k}']:.1%}" if f"pass_at_{k}" in row else "" for row in rows],
    **{part: [_decimals(row.get(f"reward_{part}")) for row in rows] for part in list_parts(rows)},
    "form": [f"{row['format_rate']:.1%}" for row in rows],
    "EOS": [f"{row['eos_rate']:.1%}" for row in rows],
    "effective": [f"{row['effective_tokens']:.0f}" for row in rows],
    "calls": [f"{row['model_calls']:.0f}" for row in rows],
    "tokens/s": [f"{row['tokens_per_second']:,.0f}" for row in rows],
  }
  always = ("policy", "sampler", "solved", "95% interval")
  shared = {name: values[0] for name, values in columns.items() if name not in always and len(set(values)) == 1}
  common = ", ".join(f"{name} {value}" for name, value in shared.items() if value)
  layout = Table(
    title="held-out prompts; * another setting than in training; tokens/s without compiling",
    caption=common and f"in all rows: {common}",
  )
  kept = {name: values for name, values in columns.items() if name not in shared}
  for name in kept:
    is_text = name in ("policy", "task", "sampler", "with")
    layout.add_column(name, justify="left" if is_text else "right", overflow="fold")
  for row in zip(*kept.values(), strict=True):
    layout.add_row(*row)
  return layout
