"""What the report draws: a table of charts, and their Vega-Lite specifications for some runs.

A specification has its values in it and no colours: the page has those, light and dark.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from dmpo_jax.run.report.runs import Row, Run

MOST_POINTS = 300  # of one curve; longer ones are drawn as means of neighbouring rows

Spec = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Curves:
  """A chart of figures over the steps of a phase: some of `figures`, under their labels."""

  title: str
  figures: dict[str, str]  # name in the metrics -> label
  caption: str
  form: str = ".3~g"  # of the values, in d3's language
  phase: str = "train"
  is_always: bool = True  # a run without it lacks something; else some objectives or settings have it


CURVES = (
  Curves("Reward of the rollouts", {"reward_mean": "mean", "reward_std": "spread"}, "Over a buffer's rollouts."),
  Curves("Solve rate of the rollouts", {"solve_rate": "solved"}, "At the temperature of the rollouts.", ".1%"),
  Curves("Groups without a signal", {"groups_without_variance": "share"}, "Groups whose rewards are all equal.", ".1%"),
  Curves(
    "Different rollouts", {"unique_rollouts": "rollouts"}, "Effective number of different completions in a group."
  ),
  Curves(
    "Effective sample size",
    {"effective_sample_size": "ESS"},
    "Of the importance weights, as a share of the group.",
    is_always=False,
  ),
  Curves(
    "Entropy",
    {"entropy": "as the buffer is scored", "loss_entropy": "in its updates"},
    "Of the policy at masked positions, mean, nats.",
  ),
  Curves(
    "Surprise of drawn tokens",
    {"sampled_nll": "nats"},
    "-log p as they were drawn, the same measure for every objective.",
  ),
  Curves(
    "Log-ratio noise",
    {"log_ratio_error": "noise", "tilt_std": "tilt, reward / alpha", "log_ratio_std": "log-ratio"},
    "Standard error of log p_ref - log p_old against the spreads inside a group: above the tilt the signal drowns.",
    is_always=False,
  ),
  Curves(
    "KL to the reference",
    {"kl_to_reference": "nats"},
    "Estimate of E[log p_old - log p_ref] over the rollouts, nats a completion.",
    is_always=False,
  ),
  Curves("Gradient norm", {"grad_norm": "norm"}, "Before clipping, mean over a buffer's updates."),
  Curves(
    "Loss",
    {
      "loss": "loss",
      "loss_cross_entropy": "cross-entropy",
      "loss_log_ratio": "log-ratio",
      "loss_real": "real term",
      "loss_fake": "fake term",
      "loss_gap": "gap of the bounds",
    },
    "Mean over a buffer's updates.",
  ),
  Curves(
    "KL in the updates",
    {"loss_kl": "nats"},
    "To the policy that the objective keeps to, nats a token, mean over a buffer's updates.",
    is_always=False,
  ),
  Curves(
    "Weight less baseline",
    {"loss_coefficient": "sum"},
    "Absolute, summed over a group; 0 where both pick the same rollout.",
    is_always=False,
  ),
  Curves(
    "Held back",
    {"loss_clipped": "clipped tokens", "loss_stopped": "stopped rollouts"},
    "Share without a gradient, by clipping or at the bound of unlearning.",
    ".1%",
    is_always=False,
  ),
  Curves("Tokens per model call", {"tokens_per_call": "tokens"}, "That the sampler commits."),
  Curves("Completion length", {"completion_length": "tokens"}, "Before EOS."),
  Curves("Completions with EOS", {"eos_rate": "share"}, "Share of the rollouts.", ".1%"),
  Curves(
    "Throughput",
    {"tokens_per_second_sample": "sampling", "tokens_per_second_score": "scoring"},
    "Completion tokens a second.",
    ",.0f",
  ),
  Curves("Warm start: loss", {"loss": "loss"}, "On demonstrations.", phase="warm_start", is_always=False),
  Curves("Warm start: gradient norm", {"grad_norm": "norm"}, "Before clipping.", phase="warm_start", is_always=False),
)
TIMES = {  # where the seconds of a run go
  "warm_start/seconds_update": "warm start",
  "train/seconds_sample": "sampling",
  "train/seconds_reward": "rewards",
  "train/seconds_score": "scoring",
  "train/seconds_update": "updates",
  "train/eval_seconds": "evaluation",
}
SYMBOLS = {"symbolOpacity": 1, "symbolStrokeWidth": 2}  # a legend's: else those of the faintest layer
STEPS = {"train": "buffers", "warm_start": "updates"}


def draw_curves(curves: Curves, runs: Sequence[Run]) -> Spec | None:
  """Draw a chart of `CURVES`; None if no run has any of its figures."""
  values = [
    {"run": run.name, "figure": label, "x": row["step"], "y": row[name]}
    for run in runs
    for name, label in curves.figures.items()
    for row in _thin(_rows_with(run, curves.phase, name), name)
  ]
  return _lines(values, STEPS[curves.phase], curves.form, runs) if values else None


def draw_held_out(runs: Sequence[Run], figure: str, form: str) -> Spec | None:
  """Draw a figure of the evaluations over the buffers, with its 95 % interval where that is known."""
  values = [
    {"run": run.name, "figure": "held-out prompts", "x": buffer, "y": row[figure]}
    | ({"low": row[f"{figure}_low"], "high": row[f"{figure}_high"]} if f"{figure}_low" in row else {})
    for run in runs
    for buffer, row in run.evaluations.items()
    if figure in row
  ]
  if not values:
    return None
  spec = _lines(values, STEPS["train"], form, runs)
  if not any("low" in value for value in values):
    return spec
  bars = {
    "transform": [{"filter": "isValid(datum.low)"}],
    "mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.55},
    "encoding": {"y": {"field": "low"}, "y2": {"field": "high"}},
  }
  return spec | {"layer": [bars, *spec["layer"]]}


def draw_times(runs: Sequence[Run]) -> Spec | None:
  """Draw the seconds of each run by what they went to."""
  values = [
    {"run": run.name, "part": part, "seconds": seconds, "order": order}
    for run in runs
    for order, (part, seconds) in enumerate(times(run).items())
  ]
  if not values:
    return None
  return {
    "data": {"values": values},
    "mark": {"type": "bar"},
    "height": 60 + 36 * len(runs),
    "encoding": {
      "y": {"field": "run", "type": "nominal", "title": None, "sort": [run.name for run in runs]},
      "x": {"field": "seconds", "type": "quantitative", "title": "seconds"},
      "color": {"field": "part", "type": "nominal", "title": None, "sort": [*TIMES.values(), "other"]},
      "order": {"field": "order"},
      "tooltip": _tooltip(("run", "run", ""), ("part", "part", ""), ("seconds", "seconds", ",.1f")),
    },
  }


def times(run: Run) -> dict[str, float]:
  """The seconds of a run by what they went to; `other` (compiling, saving) where it ran in one go and has finished."""
  spent = {}
  for path, label in TIMES.items():
    phase, name = path.split("/")
    seconds = sum(row.get(name, 0.0) for row in run.rows.get(phase, ()))
    if seconds > 0:
      spent[label] = seconds
  whole = run.result.get("seconds", 0.0)
  if spent and len(run.starts) == 1 and whole > sum(spent.values()):
    spent["other"] = whole - sum(spent.values())
  return spent


def _lines(values: list[Row], steps: str, form: str, runs: Sequence[Run]) -> Spec:
  """Lines over steps: a run has its colour and a figure its dashes; with one run, figures have colours."""
  is_single, labels = len(runs) == 1, list(dict.fromkeys(value["figure"] for value in values))
  names, field = (labels, "figure") if is_single else ([run.name for run in runs], "run")
  below = {"orient": "bottom", "title": None, "columns": 3, "labelLimit": 160} | SYMBOLS
  legend = None if len(names) == 1 else below
  shared: Spec = {
    "x": {"field": "x", "type": "quantitative", "title": steps, "axis": {"tickMinStep": 1, "grid": False}},
    "y": {"field": "y", "type": "quantitative", "title": None, "axis": {"format": form}, "scale": {"zero": False}},
    "color": {"field": field, "type": "nominal", "scale": {"domain": names}, "legend": legend},
  }
  if not is_single and len(labels) > 1:
    dashes = {"symbolType": "stroke", "symbolSize": 400}
    shared["strokeDash"] = {"field": "figure", "type": "nominal", "scale": {"domain": labels}, "legend": below | dashes}
  hover = {
    "params": [
      {"name": "near", "select": {"type": "point", "on": "pointerover", "nearest": True, "clear": "pointerout"}}
    ],
    "mark": {"type": "point", "filled": True, "size": 64, "strokeWidth": 0},
    "encoding": {
      "opacity": {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0},
      "strokeDash": {"value": [1, 0]},
      "tooltip": _tooltip(("run", "run", ""), ("figure", "figure", ""), ("x", steps, ","), ("y", "value", form))
      + [
        {"field": name, "type": "quantitative", "format": form}
        for name in ("low", "high")
        if any(name in value for value in values)
      ],
    },
  }
  line = {"mark": {"type": "line", "strokeWidth": 2}}
  is_sparse = len(values) < 12 * len(labels) * len(runs)
  # points of a layer of their own: the legend of dashes is the lines'
  points = {
    "mark": {"type": "point", "filled": True, "size": 30, "opacity": 1},
    "encoding": {"strokeDash": {"value": [1, 0]}},
  }
  return {"data": {"values": values}, "encoding": shared, "layer": [line, *([points] if is_sparse else []), hover]}


def _tooltip(*fields: tuple[str, str, str]) -> list[Spec]:
  return [
    {"field": name, "title": title} | ({"format": form, "type": "quantitative"} if form else {"type": "nominal"})
    for name, title, form in fields
  ]


def _rows_with(run: Run, phase: str, name: str) -> list[Row]:
  """The phase's rows that have a figure; the KL is made from the log-ratio, whose sign it turns."""
  source = "log_ratio_mean" if name == "kl_to_reference" else name
  sign = -1.0 if source != name else 1.0
  return [{"step": row["step"], name: sign * row[source]} for row in run.rows.get(phase, ()) if source in row]


def _thin(rows: Sequence[Row], name: str) -> Iterable[Row]:
  """Yield at most MOST_POINTS rows: each the mean of neighbours, at the step of the last of them."""
  width = math.ceil(len(rows) / MOST_POINTS) if rows else 1
  for start in range(0, len(rows), width):
    part = rows[start : start + width]
    yield {"step": part[-1]["step"], name: sum(row[name] for row in part) / len(part)}
