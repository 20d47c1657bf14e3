"""The study's page: learning curves with bands over the seeds, and tables with intervals, in one HTML file."""

import html
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

CURVES = (  # what, of which rows, and how the axis reads
  ("evaluations", "solve_rate", "held-out puzzles solved"),
  ("evaluations", "reward_mean", "held-out reward"),
  ("buffers", "reward_mean", "reward of the rollouts"),
  ("buffers", "entropy", "entropy, nats a token"),
  ("buffers", "unique_rollouts", "different rollouts a group"),
)
STYLE = """
body { font: 15px sans-serif; margin: 2em; max-width: 80em }
table { border-collapse: collapse; margin: 1em 0 }
td, th { padding: .25em .7em; border-bottom: 1px solid #ccc; text-align: right }
td:first-child, th:first-child { text-align: left }
"""
COLUMNS = (
  "",
  "seeds",
  "solved, last",
  "95 % interval",
  "solved, best",
  "reward, last",
  "reward, best",
  "seconds",
  "calls",
)


class Result(NamedTuple):
  """A finished run, as part of one question."""

  group: str
  name: str
  task: str
  seed: int
  data: dict[str, Any]


def page(results: Sequence[Result]) -> str:
  """Lay everything out as one self-contained HTML page."""
  parts = [f"<!doctype html><meta charset=utf-8><title>Study of objectives</title><style>{STYLE}</style>"]
  parts.append(
    "<h1>Objectives on the same bases, prompts, rewards and model calls</h1><p>Lines: means over the seeds; bands: "
    "from the lowest to the highest seed. Model calls: for each rollout of a buffer, a backward pass as two.</p>"
  )
  for group, task, members in _by_question(results):
    parts.append(f"<h2>{html.escape(group)}: {html.escape(task)}</h2>")
    parts.append(_html_table(_rows(members)))
    parts.append(_figure(members))
  return "\n".join(parts)


def tables(results: Sequence[Result]) -> str:
  """Lay the tables out as Markdown."""
  parts = []
  for group, task, members in _by_question(results):
    lines = [f"**{group}, {task}**", "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row) + " |" for row in _rows(members)]
    parts.append("\n".join(lines))
  return "\n\n".join(parts) + "\n"


def _by_question(results: Sequence[Result]) -> list[tuple[str, str, list[Result]]]:
  questions = dict.fromkeys((result.group, result.task) for result in results)
  return [(group, task, [r for r in results if (r.group, r.task) == (group, task)]) for group, task in questions]


def _by_name(results: Sequence[Result]) -> dict[str, list[Result]]:
  names = dict.fromkeys(result.name for result in results)
  return {name: [result for result in results if result.name == name] for name in names}


def _rows(results: Sequence[Result]) -> list[list[str]]:
  """One row an arm after the bases'. Intervals: Wilson's, 95 %, over the prompts of all seeds together."""
  first = list({result.seed: result for result in results}.values())
  rows = [_row("base", first, lambda evaluations: evaluations[:1], is_base=True)]
  for name, members in _by_name(results).items():
    rows.append(_row(name, members, lambda evaluations: evaluations[1:] or evaluations, is_base=False))
  return rows


def _row(name: str, members: Sequence[Result], choose: Callable, *, is_base: bool) -> list[str]:
  chosen = [choose(member.data["evaluations"]) for member in members]
  last = [evaluations[-1] for evaluations in chosen]
  num_prompts = sum(int(row["num_prompts"]) for row in last)
  num_solved = round(sum(row["solve_rate"] * row["num_prompts"] for row in last))
  interval = stats.binomtest(num_solved, num_prompts).proportion_ci(method="wilson")
  best_solved = [max(row["solve_rate"] for row in evaluations) for evaluations in chosen]
  best_reward = [max(row["reward_mean"] for row in evaluations) for evaluations in chosen]
  cost = [member.data["num_buffers"] * member.data["calls_a_buffer"] for member in members]
  return [
    name,
    str(len(members)),
    f"{num_solved / num_prompts:.1%}",
    f"{interval.low:.1%} to {interval.high:.1%}",
    "" if is_base else f"{np.mean(best_solved):.1%}",
    f"{np.mean([row['reward_mean'] for row in last]):.3f}",
    "" if is_base else f"{np.mean(best_reward):.3f}",
    "" if is_base else f"{np.mean([member.data['seconds'] for member in members]):.0f}",
    "" if is_base else f"{np.mean(cost):.0f}",
  ]


def _html_table(rows: Sequence[Sequence[str]]) -> str:
  def line(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

  return "<table>" + line(COLUMNS, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _figure(results: Sequence[Result]) -> str:
  figure, axes = plt.subplots(1, len(CURVES), figsize=(5 * len(CURVES), 3.6), layout="constrained")
  for axis, (rows, key, label) in zip(axes, CURVES, strict=True):
    for name, members in _by_name(results).items():
      _draw(axis, name, [_points(member.data[rows], key) for member in members])
    axis.set_xlabel("model calls a rollout")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
  axes[0].legend(fontsize="small")
  buffer = io.StringIO()
  figure.savefig(buffer, format="svg")
  plt.close(figure)
  return buffer.getvalue().split("?>", 1)[-1].split("\n", 1)[-1]


def _points(rows: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
  present = [(row["calls"], row[key]) for row in rows if row.get(key) is not None]
  return np.array([x for x, _ in present], float), np.array([y for _, y in present], float)


def _draw(axis: Any, name: str, curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
  curves = [(x, y) for x, y in curves if len(x)]
  if not curves:
    return
  grid = curves[0][0]  # the seeds of an arm have the same points
  values = np.stack([np.interp(grid, x, y) for x, y in curves])
  (line,) = axis.plot(grid, values.mean(0), label=name)
  axis.fill_between(grid, values.min(0), values.max(0), color=line.get_color(), alpha=0.15)
