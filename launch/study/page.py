"""The pages of the study: learning curves with bands over the seeds, and tables with intervals."""

import html
import io
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from dmpo_jax import files

CURVES = (  # rows, key, label of the axis
  ("evaluations", "solve_rate", "held-out puzzles solved"),
  ("evaluations", "reward_mean", "held-out reward"),
  ("buffers", "reward_mean", "reward of the rollouts"),
  ("buffers", "sampled_nll", "-log p of a sampled token, nats"),
  ("buffers", "unique_rollouts", "different rollouts a group"),
)
STYLE = """
body { font: 15px sans-serif; margin: 2em; max-width: 110em }
table { border-collapse: collapse; margin: 1em 0 }
td, th { padding: .25em .7em; border-bottom: 1px solid #ccc; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left }
svg { max-width: 100%; height: auto }
"""
INTRODUCTION = (
  "All runs of a task and seed start from the same base, with the same prompts, rewards and budget of model calls (per "
  "rollout of a buffer; a backward pass counts as two). Evaluation is greedy, on held-out prompts. `solved` and "
  "`reward` are means over the seeds, after the last buffer and at the best evaluation, with 95 % t-intervals over the "
  "seeds (wide for three). `-log p` (nats per token) and `different` (rollouts of a group that differ) are those of "
  "the rollouts in the last quarter of the buffers, at temperature 1. The learning rates were chosen on another seed, "
  "by the held-out reward at the end: see `rates`."
)
FEWEST = 3  # seeds for an interval; for two it would be meaninglessly wide
COLUMNS = (
  *("", "seeds", "rate", "updates", "solved, last", "of each seed", "solved, best", "reward, last", "reward, best"),
  *("-log p", "different", "seconds"),
)


class Result(NamedTuple):
  """A finished run, as part of one question."""

  group: str
  name: str
  task: str
  seed: int
  data: dict[str, Any]


class Claim(NamedTuple):
  """A comparison of `name` with `other`, which may belong to another group of arms."""

  question: str
  group: str
  name: str
  other_group: str
  other: str


RIVALS = ("wd1", "diffu_grpo", "coupled_grpo", "spg", "gdpo", "tracerl", "dtm", "wddo")


def _claims() -> tuple[Claim, ...]:
  claims = []

  def add(question: str, group: str, name: str, other: str, other_group: str = "") -> None:
    claims.append(Claim(question, group, name, other_group or group, other))

  for rival in RIVALS:
    add("DMPO (wdce) against its rivals", "objectives", "wdce", rival)
  for size in (4, 8, 16):
    for name in ("negative", "mean", "model"):
      add("a baseline against none", "baselines", f"{name}, g = {size}", f"none, g = {size}")
  for size in (4, 8, 16):
    for name in ("mean", "model"):
      add("the negative baseline against the others", "baselines", f"negative, g = {size}", f"{name}, g = {size}")
  for name in ("none, clipped", "none, standardised"):
    negative, none = "plain alternatives against the negative baseline", "plain alternatives against nothing"
    add(negative, "alternatives", name, "negative, g = 8", "baselines")
    add(none, "alternatives", name, "none, g = 8", "baselines")
  for count, fewer in ((4, 1), (8, 1), (8, 4)):
    add("updates from one buffer", "reuse", f"{count} updates", f"{fewer} updates")
  for alpha in (0.02, 0.2):
    add("the target's temperature", "alpha", f"alpha = {alpha}", "alpha = 0.05")
  for count in (2, 8):
    add("masks of a rollout in an update", "mask samples", f"{count} mask samples", "4 mask samples")
  return tuple(claims)


CLAIMS = _claims()
CLAIM_COLUMNS = ("", "against", "task", "seeds", "solved", "reward", "-log p", "different")


def write(out: pathlib.Path, results: Sequence[Result], docs: pathlib.Path | None = None) -> None:
  """Write study.html into the study's folder, and study.md with its picture into the documents' folder, if any."""
  if not results:
    return
  files.write_whole(epath.Path(out / "study.html"), page(results))
  if docs:
    files.write_whole(epath.Path(docs / "study.md"), document(results))
    files.write_whole(epath.Path(docs / "study.svg"), overview(results))


def page(results: Sequence[Result]) -> str:
  """Lay out everything as one self-contained HTML page."""
  parts = [f"<!doctype html><meta charset=utf-8><title>Study of objectives</title><style>{STYLE}</style>"]
  introduction = re.sub("`(.*?)`", "<code>\\1</code>", html.escape(INTRODUCTION))
  parts.append(f"<h1>Objectives on equal terms</h1><p>{introduction}</p>")
  for question, rows in claim_rows(results).items():
    parts.append(f"<h2>{html.escape(question)}: differences, paired by seed</h2>" + _html_table(CLAIM_COLUMNS, rows))
  for group, task, members in _by_question(results):
    parts.append(f"<h2>{html.escape(group)}: {html.escape(task)}</h2>")
    parts.append(_html_table(COLUMNS, table_rows(members)))
    parts.append(_svg(_figure(members, CURVES)))
  return "\n".join(parts)


def document(results: Sequence[Result]) -> str:
  """Lay out the tables as Markdown, with a link to the picture of `overview`."""
  parts = ["# The study of objectives", INTRODUCTION, "![learning curves of the objectives](study.svg)"]
  parts += [summary(results)]
  parts += ["## Questions", "Differences, paired by task and seed: the same base, prompts and evaluation."]
  for question, rows in claim_rows(results).items():
    parts += [f"### {question}", _markdown_table(CLAIM_COLUMNS, rows)]
  for group, task, members in _by_question(results):
    parts += [f"## {group}, {task}", _markdown_table(COLUMNS, table_rows(members))]
  return "\n\n".join(parts) + "\n"


def overview(results: Sequence[Result]) -> str:
  """Draw the curves of the objectives on all tasks as one SVG picture."""
  questions = [members for group, _, members in _by_question(results) if group == "objectives"]
  curves = [CURVES[0], CURVES[3], CURVES[4]]
  if not questions:
    questions = [members for _, _, members in _by_question(results)][:1]
  figure, axes = plt.subplots(
    len(questions), len(curves), squeeze=False, figsize=(13, 3.4 * len(questions)), layout="constrained"
  )
  for row, members in zip(axes.tolist(), questions, strict=True):
    _draw_curves(row, members, curves)
    row[0].set_title(members[0].task, loc="left")
  _add_legend(figure, row[0])
  return _svg(figure)


def summary(results: Sequence[Result]) -> str:
  """Lay out the outcome of the objectives on all tasks as one Markdown table, the highest rewards first."""
  members = [result for result in results if result.group == "objectives"]
  tasks = list(dict.fromkeys(result.task for result in members))
  of_task = {task: table_rows([result for result in members if result.task == task]) for task in tasks}
  found = {(task, row[0]): dict(zip(COLUMNS, row, strict=True)) for task, rows in of_task.items() for row in rows}
  columns = ["", *(f"{task}: {what}" for task in tasks for what in ("solved", "reward", "rate, updates"))]

  def order(name: str) -> float:
    return sum(float(found[task, name]["reward, last"].split()[0]) for task in tasks if (task, name) in found)

  rows = []
  for name in sorted({name for _, name in found} - {"base"}, key=order, reverse=True) + ["base"] * bool(found):
    cells = [name]
    for task in tasks:
      row = found.get((task, name), dict.fromkeys(COLUMNS, ""))
      cells += [row["solved, last"], row["reward, last"], ", ".join(filter(None, (row["rate"], row["updates"])))]
    rows.append(cells)
  return _markdown_table(columns, rows)


def claim_rows(results: Sequence[Result]) -> dict[str, list[list[str]]]:
  """Compare arms, one row per comparison and task: mean differences over the seeds with both arms, and intervals."""
  found = {(r.group, r.name, r.task, r.seed): r.data for r in results}
  places = sorted({(r.task, r.seed) for r in results}, key=lambda place: (place[0] != "sudoku", place))
  rows: dict[str, list[list[str]]] = {}
  for claim in CLAIMS:
    for task in dict.fromkeys(task for task, _ in places):
      seeds = [seed for of, seed in places if of == task]
      keys = [((claim.group, claim.name, task, s), (claim.other_group, claim.other, task, s)) for s in seeds]
      pairs = [(_figures(found[a]), _figures(found[b])) for a, b in keys if a in found and b in found]
      if pairs:
        difference = np.array(pairs)[:, 0] - np.array(pairs)[:, 1]
        cells = [_signed(difference[:, 0], 100, " %"), *(_signed(difference[:, i], 1, "") for i in (1, 2, 3))]
        rows.setdefault(claim.question, []).append([claim.name, claim.other, task, str(len(pairs)), *cells])
  return rows


def table_rows(results: Sequence[Result]) -> list[list[str]]:
  """Return one row per arm, after the row of the bases."""
  bases = list({result.seed: result.data["evaluations"][0] for result in results}.values())
  rows = [_base_row(bases)]
  for name, members in _by_name(results).items():
    data = [member.data for member in members]
    last = np.array([_figures(one) for one in data])
    later = [one["evaluations"][1:] or one["evaluations"] for one in data]
    rates = sorted({one["learning_rate"] for one in data})
    rows.append(
      [
        name,
        str(len(data)),
        " ".join(f"{rate:g}" for rate in rates),
        f"{np.mean([one['num_buffers'] * one['updates_a_buffer'] for one in data]):.0f}",
        _interval(last[:, 0], 100, " %"),
        " ".join(f"{100 * value:.1f}" for value in last[:, 0]),
        f"{100 * np.mean([max(row['solve_rate'] for row in rows) for rows in later]):.1f} %",
        _interval(last[:, 1], 1, ""),
        f"{np.mean([max(row['reward_mean'] for row in rows) for rows in later]):.3f}",
        f"{np.mean(last[:, 2]):.3f}",
        f"{np.mean(last[:, 3]):.2f}",
        f"{np.mean([one['seconds'] for one in data]):.0f}",
      ]
    )
  return rows


def _base_row(bases: Sequence[dict[str, float]]) -> list[str]:
  solved, reward = (np.array([row[key] for row in bases]) for key in ("solve_rate", "reward_mean"))
  each = " ".join(f"{100 * value:.1f}" for value in solved)
  cells = ["base", str(len(bases)), "", "", _interval(solved, 100, " %"), each, "", _interval(reward, 1, "")]
  return cells + [""] * (len(COLUMNS) - len(cells))


def _figures(data: dict[str, Any]) -> tuple[float, float, float, float]:
  """Return the final solve rate and reward, and -log p and the number of different rollouts in the last quarter."""
  last, buffers = data["evaluations"][-1], data["buffers"]
  late = buffers[-max(1, len(buffers) // 4) :]
  log_p, different = (float(np.mean([row[key] for row in late])) for key in ("sampled_nll", "unique_rollouts"))
  return last["solve_rate"], last["reward_mean"], log_p, different


def half_width(values: np.ndarray) -> float:
  """Return half of the 95 % t-interval of the mean of at least two values."""
  return float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def _interval(values: np.ndarray, scale: float, unit: str) -> str:
  digits = 1 if scale > 1 else 3
  width = f" ± {scale * half_width(values):.{digits}f}" if len(values) >= FEWEST else ""
  return f"{scale * values.mean():.{digits}f}{width}{unit}"


def _signed(values: np.ndarray, scale: float, unit: str) -> str:
  """Format a mean difference with its interval; a star marks an interval without 0."""
  text = _interval(values, scale, unit)
  is_clear = len(values) >= FEWEST and abs(values.mean()) > half_width(values)
  return ("+" if values.mean() > 0 else "") + text + (" *" if is_clear else "")


def _by_question(results: Sequence[Result]) -> list[tuple[str, str, list[Result]]]:
  """Collect the runs of each group of arms and task with something to compare, the learning rates last."""
  questions = dict.fromkeys((result.group, result.task) for result in results)
  ordered = sorted(questions, key=lambda question: question[0] == "rates")
  found = [(group, task, [r for r in results if (r.group, r.task) == (group, task)]) for group, task in ordered]
  return [question for question in found if len(_by_name(question[2])) > 1]


def _by_name(results: Sequence[Result]) -> dict[str, list[Result]]:
  names = dict.fromkeys(result.name for result in results)
  return {name: [result for result in results if result.name == name] for name in names}


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  def line(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

  return "<table>" + line(columns, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
  return "\n".join(lines + ["| " + " | ".join(row).replace("*", r"\*") + " |" for row in rows])


def _figure(results: Sequence[Result], curves: Sequence[tuple[str, str, str]]) -> Figure:
  figure, axes = plt.subplots(1, len(curves), figsize=(5 * len(curves), 3.6), layout="constrained")
  _draw_curves(axes, results, curves)
  _add_legend(figure, axes[0])
  return figure


def _draw_curves(axes: Sequence[Axes], results: Sequence[Result], curves: Sequence[tuple[str, str, str]]) -> None:
  for axis, (rows, key, label) in zip(axes, curves, strict=True):
    for index, (name, members) in enumerate(_by_name(results).items()):
      style = ("-", "--", ":")[index // 10 % 3]
      _draw(axis, name, style, [_points(member.data[rows], key) for member in members])
    axis.set_xlabel("model calls a rollout")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)


def _add_legend(figure: Figure, axis: Axes) -> None:
  handles, labels = axis.get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), fontsize="small")


def _points(rows: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
  present = [(row["calls"], row[key]) for row in rows if row.get(key) is not None]
  return np.array([x for x, _ in present], float), np.array([y for _, y in present], float)


def _draw(axis: Axes, name: str, style: str, curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
  curves = [(x, y) for x, y in curves if len(x)]
  if not curves:
    return
  grid = curves[0][0]  # all seeds of an arm have the same points
  values = np.stack([np.interp(grid, x, y) for x, y in curves])
  (line,) = axis.plot(grid, values.mean(0), style, label=name)
  axis.fill_between(grid, values.min(0), values.max(0), color=line.get_color(), alpha=0.15)


def _svg(figure: Figure) -> str:
  buffer = io.StringIO()
  with matplotlib.rc_context({"svg.hashsalt": "dmpo_jax"}):
    figure.savefig(buffer, format="svg", metadata={"Date": None})
  plt.close(figure)
  return buffer.getvalue().split("?>", 1)[-1].split("\n", 1)[-1]
