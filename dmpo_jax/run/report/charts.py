"""Charts of the report: a table of what is drawn, and its Vega-Lite specifications for given runs.

A specification contains its values but no colours; the page has those, for light and dark.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dmpo_jax.run.report.runs import STEPS, Row, Run, is_number

MOST_POINTS = 300  # per curve; longer ones are drawn as means of neighbouring rows

Spec = dict[str, Any]
# no label without a gap to its neighbour, one for every 70 pixels, and the first and the last under their ticks too
SPACED: Spec = {
  "labelOverlap": "greedy",
  "labelSeparation": 8,
  "labelFlush": False,
  "tickCount": {"expr": "ceil(width / 70)"},
}


@dataclasses.dataclass(frozen=True)
class Curves:
  """A chart of one or more figures over the steps of a phase."""

  title: str
  figures: dict[str, str]  # name in the metrics -> label in the chart
  caption: str
  form: str = ".3~g"  # how values are written, as a d3 format
  phase: str = "train"
  is_always: bool = True  # False: only some objectives or settings record it


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
    "Signal kept",
    {"signal_kept": "share"},
    "How far weights and those of the opposite target come apart, of what they could; near 0 nothing is learned.",
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
    "-log p of the tokens when they were sampled; the same for every objective.",
  ),
  Curves(
    "Log-ratio noise",
    {"log_ratio_error": "noise", "tilt_std": "tilt, reward / alpha", "log_ratio_std": "log-ratio"},
    "Standard error of log p_ref - log p_old, and the spreads inside a group: noise above the tilt hides the signal.",
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
      "eval_loss": "on held-out demonstrations",
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
    "To the policy that the objective stays close to, nats a token, mean over a buffer's updates.",
    is_always=False,
  ),
  Curves(
    "Weight less baseline",
    {"loss_coefficient": "sum"},
    "Absolute, summed over a group; 0 if both pick the same rollout.",
    is_always=False,
  ),
  Curves(
    "Held back",
    {"loss_clipped": "clipped tokens", "loss_stopped": "stopped rollouts"},
    "Share without a gradient, clipped or at the bound of unlearning.",
    ".1%",
    is_always=False,
  ),
  Curves(
    "Load of experts",
    {"router_max_load": "busiest"},
    "Of each layer's busiest expert, as a multiple of an even share; mean over the layers and a buffer's updates.",
    is_always=False,
  ),
  Curves(
    "Entropy of routers",
    {"router_load_entropy": "of the load's shares", "router_entropy": "of a token's probabilities"},
    "Nats, at most ln(number of experts); mean over the layers with experts and a buffer's updates.",
    is_always=False,
  ),
  Curves("Tokens per model call", {"tokens_per_call": "tokens"}, "Decided by the sampler."),
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
WHOLE_REWARD = ("reward_mean", "reward_std")  # every other reward_<part> is the mean of a part
TIMES = {  # parts of a run's time, by their figures
  "warm_start/seconds_update": "warm start",
  "train/seconds_sample": "sampling",
  "train/seconds_reward": "rewards",
  "train/seconds_score": "scoring",
  "train/seconds_update": "updates",
  "train/eval_seconds": "evaluation",
}
SYMBOLS = {"symbolOpacity": 1, "symbolStrokeWidth": 2}  # of a legend; by default those of the faintest layer


def list_parts(rows: Iterable[Mapping[str, Any]]) -> list[str]:
  """Return the names of the reward's parts, of which rows of figures have the means."""
  found = dict.fromkeys(name for row in rows for name in row if name.startswith("reward_"))
  return [name.removeprefix("reward_") for name in found if name not in WHOLE_REWARD]


def part_curves(runs: Sequence[Run]) -> Curves:
  """Describe the chart of the reward's parts, which a task names."""
  names = list_parts(row for run in runs for row in run.rows.get("train", ()))
  figures = {f"reward_{name}": name for name in names}
  return Curves("Reward by part", figures, "Mean over a buffer's rollouts.", is_always=False)


def task_curves(runs: Sequence[Run]) -> Curves:
  """Describe the chart of the solve rates of a mixture's tasks."""
  found = dict.fromkeys(name for run in runs for row in run.rows.get("train", ()) for name in row)
  figures = {name: name.removeprefix("solve_rate_") for name in found if name.startswith("solve_rate_")}
  return Curves("Solve rate by task", figures, "At the temperature of the rollouts.", ".1%", is_always=False)


def draw_curves(curves: Curves, runs: Sequence[Run]) -> Spec | None:
  """Draw a chart of `CURVES`; None if no run has any of its figures."""
  values = [
    {"run": run.name, "figure": label, "x": row["step"], "y": row[name]}
    for run in runs
    for name, label in curves.figures.items()
    for row in _thin(_rows_with(run, curves.phase, name), name)
  ]
  return _lines(values, STEPS[curves.phase], curves.form, runs) if values else None


def caption_of(curves: Curves, runs: Sequence[Run]) -> str:
  """Return the caption of a chart; that of the warm start's loss says where and why it jumps."""
  switches = {run.name: switch for run in runs if (switch := last_correct(run))}
  if curves.phase != "warm_start" or "loss" not in curves.figures or not switches:
    return curves.caption
  where = " or ".join(f"{switch:,}" for switch in sorted(set(switches.values())))
  return (
    f"{curves.caption} Up to update {where} these are correct and complete. Then come the task's own, whose gaps and "
    "errors nobody can predict, so the loss jumps. It is meant to: the base shall leave something to learn."
  )


def last_correct(run: Run) -> int | None:
  """Return the last update of the warm start on correct demonstrations; None if all or none of them are."""
  updates, share = run.count("warm_start.updates"), run.config.get("warm_start.correct_share")
  last = round(share * updates) if updates and is_number(share) else 0
  return last if updates and 0 < last < updates else None


def constant_values(spec: Spec, form: str, runs: Sequence[Run]) -> list[str]:
  """Return the values of a chart whose lines are all level, each as text; [] for any other chart.

  Args:
    form: how values are written, as a d3 format.
  """
  lines: dict[tuple[str, str], set[float]] = {}
  for value in spec["data"]["values"]:
    if "y" not in value:
      return []
    lines.setdefault((value["run"], value["figure"]), set()).add(value["y"])
  if any(len(found) > 1 for found in lines.values()):
    return []
  is_single, labels = len(runs) == 1, {figure for _, figure in lines}
  return [
    " ".join([*([] if is_single else [run]), *([figure] if len(labels) > 1 else []), format(y, form.replace("~", ""))])
    for (run, figure), (y,) in lines.items()
  ]


def draw_held_out(runs: Sequence[Run], figure: str, form: str) -> Spec | None:
  """Draw a figure of the evaluations over the buffers, with its 95 % interval if recorded."""
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
  """Draw the seconds that each run spent on each part."""
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
      "y": {"field": "run", "type": "nominal", "title": None, "sort": [run.name for run in runs]}
      | {"axis": None if len(runs) == 1 else {"labelLimit": 110}},  # a phone has room for the legend beside them
      "x": {"field": "seconds", "type": "quantitative", "title": "seconds", "axis": SPACED},
      "color": {
        "field": "part",
        "type": "nominal",
        "sort": [*TIMES.values(), "other"],
        "legend": {"orient": "bottom", "title": None, "columns": 2},
      },
      "order": {"field": "order"},
      "tooltip": _tooltip(("run", "run", ""), ("part", "part", ""), ("seconds", "seconds", ",.1f")),
    },
  }


def times(run: Run) -> dict[str, float]:
  """Return the seconds that a run spent on each part; `other` (start, data, saving) if it finished in one start."""
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
  """Draw lines over steps: colours tell runs apart and dashes figures; with one run, colours tell figures apart."""
  is_single, labels = len(runs) == 1, list(dict.fromkeys(value["figure"] for value in values))
  names, field = (labels, "figure") if is_single else ([run.name for run in runs], "run")
  below = {"orient": "bottom", "title": None, "columns": 3, "labelLimit": 160} | SYMBOLS
  legend = None if len(names) == 1 else below
  shared: Spec = {
    "x": {"field": "x", "type": "quantitative", "title": steps, "axis": SPACED | {"tickMinStep": 1, "grid": False}},
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
  # points are a layer of their own, so that the legend of dashes shows lines
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
  """Return the phase's rows that have a figure; the KL is minus the mean log-ratio."""
  source = "log_ratio_mean" if name == "kl_to_reference" else name
  sign = -1.0 if source != name else 1.0
  return [{"step": row["step"], name: sign * row[source]} for row in run.rows.get(phase, ()) if source in row]


def _thin(rows: Sequence[Row], name: str) -> Iterable[Row]:
  """Yield at most MOST_POINTS rows: means of neighbouring rows, at the step of the last of them."""
  width = math.ceil(len(rows) / MOST_POINTS) if rows else 1
  for start in range(0, len(rows), width):
    part = rows[start : start + width]
    yield {"step": part[-1]["step"], name: sum(row[name] for row in part) / len(part)}
