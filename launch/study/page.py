"""The page of the study, drawn from the raw rows alone: how far it has come, tables with intervals, and a picture."""

import io
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmpo_jax import files
from launch.study import costs, design, rows, statistics
from launch.study.rows import Row

BASES = design.TEST_BASES
LEVELS = {1 / 3: "1/3", 1.0: "1", 3.0: "3", 10.0: "10"}
AXIS_NAMES = {"calls": "every model call counts once", "drawing_x8": "calls that draw rollouts count eight times"}
INTRODUCTION = """# The study of objectives

Written by `python -m launch.study` from the rows in [study/](study/), one line of JSON for each run; every table here
can be drawn again from them. [bench.md](bench.md) says what is the same for all objectives. `reward` is the held-out
reward of greedy decoding at the end of the budget, from the last parameters. 1x is 1,024 model calls for each of 64
rollouts where every call counts once, and 2,048 where drawing counts eight times. Means are over the bases, with 95 %
intervals by bootstrap over the bases. A difference is paired by base. One from published `wdce` has the p-value of the
exact sign-flip test over the bases, with Holm's correction for all that is compared on that task, axis and budget.
"""
SELECTED = """
The best by the mean reward at 1x over both axes and the tuning bases. `published`: the paper's settings at the best of
the learning rates. `tuned`: the best of these and the random candidates. The keys differ from `configs/bench_*.py`.
"""
TRIED = """
Mean reward at 1x over the runs from the tuning bases, on each axis. A random candidate is one draw for all objectives.
One that falls behind on the first base is given up: its rewards are from this base alone.
"""


def write(docs: pathlib.Path) -> None:
  """Write study.md and study.svg into the documents' folder, from the rows in its folder `study`."""
  folder = docs / "study"
  found = {stage: rows.read(folder, stage) for stage in rows.STAGES}
  selection = rows.read_selection(folder)
  parts = [
    INTRODUCTION,
    "## How far it has come",
    progress_table(found, selection),
    "## Bases",
    base_table(found["bases"]),
  ]
  if selection:
    parts += ["## What was selected", SELECTED, selection_table(selection)]
  if found["test"]:
    parts += ["## Tests", "![held-out reward against cost](study.svg)"]
    parts += [section for section in result_sections(found["test"], selection)]
    files.write_whole(epath.Path(docs / "study.svg"), picture(found["test"], selection))
  if found["questions"]:  # an arm may be what was tested already
    parts += ["## Questions", question_tables([*found["test"], *found["questions"]], selection)]
  if found["tune"]:
    parts += ["## Every candidate that was tried", TRIED, candidate_table(found["tune"])]
  files.write_whole(epath.Path(docs / "study.md"), "\n\n".join(part.strip() for part in parts) + "\n")


def progress_table(found: Mapping[str, Sequence[Row]], selection: Mapping[str, Any]) -> str:
  """Count the candidates and rows that there are, and those that the whole study would have."""
  each = len(design.TEST_BASES) * len(design.SEEDS)
  table = []
  for task, objective in itertools.product(design.TASKS, design.OBJECTIVES):
    names = design.tried(found["tune"], task, objective)
    published = [name for name in names if name.startswith(design.PUBLISHED)]
    tests = {
      (row["candidate"], row["base"], row["seed"])
      for row in found["test"]
      if (row["task"], row["objective"]) == (task, objective)
    }
    entries = {chosen["candidate"] for chosen in selection.get(task, {}).get(objective, {}).values()}
    cells = [f"{len(published)} of {len(design.PUBLISHED_RATES)}"]
    cells += [f"{len(names) - len(published)} of {design.SEARCHED}"]
    cells += [f"{len(tests)} of {len(entries) * each}" if entries else "nothing selected"]
    table.append([task, objective, *cells])
  return markdown(["task", "objective", "published rates", "random candidates", "test rows"], table)


def base_table(bases: Sequence[Row]) -> str:
  """List what there is to find from each base."""
  columns = [
    "base",
    "for",
    "pass@1",
    "pass@8",
    "ratio",
    "different of 8",
    "groups without variance",
    "greedy reward",
    "solved",
  ]
  table = []
  for row in sorted(bases, key=lambda row: (design.TASKS.index(row["task"]), row["base"])):
    ratio = row["pass_at_all"] / max(row["pass_at_1"], 1e-9)
    cells = [f"{100 * row['pass_at_1']:.1f} %", f"{100 * row['pass_at_all']:.1f} %", f"{ratio:.1f}"]
    cells += [f"{row['different']:.1f}", f"{100 * row['without_variance']:.1f} %"]
    cells += [f"{row['reward']:.3f}", f"{100 * row['solved']:.1f} %"]
    table.append([row["run"], "tuning" if row["base"] in design.TUNING_BASES else "tests", *cells])
  return markdown(columns, table)


def selection_table(selection: Mapping[str, Any]) -> str:
  """List the selected settings."""
  table = []
  for task, objectives in selection.items():
    for objective, entries in objectives.items():
      for entry, chosen in entries.items():
        what = ", ".join(f"`{key}={value}`" for key, value in chosen["changes"].items())
        cells = [entry, chosen["candidate"], str(chosen["tried"]), f"{chosen['reward']:.3f}", what]
        table.append([task, objective, *cells])
  return markdown(["task", "objective", "entry", "chosen", "among", "reward", "changed keys"], table)


Entry = tuple[str, str]  # objective; published, tuned, or both where they are the same
Scores = dict[Entry, dict[int, float]]  # mean over the seeds, by base


def scores(tests: Sequence[Row], selection: Mapping[str, Any], task: str, axis: str, level: float, key: str) -> Scores:
  """Average the final figures of each entry over the seeds, base by base; bases with all seeds count."""
  found: Scores = {}
  for objective, entries in selection.get(task, {}).items():
    names: dict[str, list[str]] = {}
    for entry, chosen in entries.items():
      names.setdefault(chosen["candidate"], []).append(entry)
    for candidate, own_entries in names.items():
      of = (task, objective, candidate)
      reaching = [r for r in tests if (r["task"], r["objective"], r["candidate"]) == of and r["budget"] >= level]
      # a run that was repeated with a larger budget counts once
      own = list({(r["base"], r["seed"]): r for r in sorted(reaching, key=lambda r: -r["budget"])}.values())
      values = {base: [costs.reading(r, axis, level)[key] for r in own if r["base"] == base] for base in BASES}
      whole = {base: float(np.mean(each)) for base, each in values.items() if len(each) == len(design.SEEDS)}
      if whole:
        found[objective, " = ".join(own_entries)] = whole
  return found


def result_sections(tests: Sequence[Row], selection: Mapping[str, Any]) -> list[str]:
  """Lay out the results of each task, axis and budget, the highest rewards first."""
  sections = []
  for task, axis, (level, name) in itertools.product(design.TASKS, costs.AXES, LEVELS.items()):
    if reward := scores(tests, selection, task, axis, level, "reward"):
      solved = scores(tests, selection, task, axis, level, "solved")
      sections += [f"### {task}, {name}x, {AXIS_NAMES[axis]}", result_table(reward, solved)]
  return sections


def result_table(reward: Scores, solved: Scores) -> str:
  """Compare the entries with DMPO as published, and with the one that has the highest mean."""
  reference = next((entry for entry in reward if entry[0] == "wdce" and entry[1].startswith(design.PUBLISHED)), None)
  order = sorted(reward, key=lambda entry: -np.mean(list(reward[entry].values())))
  others = [entry for entry in order if reference is not None and entry != reference]
  ours = reward[reference] if reference is not None else {}
  differences = {entry: paired(ours, reward[entry]) for entry in others}
  p_values = [statistics.sign_flip(differences[entry]) if differences[entry] else 1.0 for entry in others]
  adjusted = dict(zip(others, statistics.holm(p_values), strict=True))
  table = []
  for entry in order:
    values = list(reward[entry].values())
    cells = [*entry, str(len(values)), with_interval(values), f"{100 * np.mean(list(solved[entry].values())):.1f} %"]
    behind = paired(reward[order[0]], reward[entry]) if entry != order[0] else []
    cells.append(with_interval(behind, signed=True) if behind else "")
    if entry in others and differences[entry]:
      cells += [with_interval(differences[entry], signed=True), f"{adjusted[entry]:.3f}"]
    table.append(cells + [""] * (8 - len(cells)))
  columns = [
    "objective",
    "entry",
    "bases",
    "reward",
    "solved",
    "best minus this",
    "published wdce minus this",
    "p (Holm)",
  ]
  return markdown(columns, table)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
  """Return the differences on the bases that both have."""
  return [ours[base] - theirs[base] for base in ours if base in theirs]


def with_interval(values: Sequence[float], signed: bool = False) -> str:
  """Write a mean with its interval; one value has none."""
  sign = "+" if signed else ""
  mean = f"{np.mean(values):{sign}.3f}"
  if len(values) < 2:
    return mean
  low, high = statistics.interval(values)
  return f"{mean} ({low:{sign}.3f} to {high:{sign}.3f})"


def question_tables(found: Sequence[Row], selection: Mapping[str, Any]) -> str:
  """Lay out the answers to each question; equal arms share their runs."""
  by_run, parts = {row["run"]: row for row in found}, []
  for task, question in itertools.product(design.TASKS, design.QUESTIONS):
    table = []
    for arm in design.arms(selection, task, question):
      whole = []
      for base in BASES:
        runs = [design.Run("questions", task, arm, base, seed, design.QUESTION_BUDGET) for seed in design.SEEDS]
        members = [by_run[run.digest()] for run in runs if run.digest() in by_run]
        whole += [members] if len(members) == len(runs) else []
      if whole:
        means = [[design.mean_reward(members, axis) for members in whole] for axis in costs.AXES]
        table.append([arm.name, str(len(whole)), *map(with_interval, means)])
    if len(table) > 1:
      parts += [f"### {question}, {task}", markdown(["", "bases", *(f"reward, {axis}" for axis in costs.AXES)], table)]
  return "\n\n".join(parts)


def candidate_table(tune: Sequence[Row]) -> str:
  """List every candidate with its mean reward at 1x."""
  table = []
  for task, objective in itertools.product(design.TASKS, design.OBJECTIVES):
    for name, own in design.tried(tune, task, objective).items():
      what = ", ".join(f"`{key.rpartition('.')[2]}={value}`" for key, value in own[0]["changes"].items())
      cells = [
        "" if design.is_whole(own) else "given up",
        *(f"{design.mean_reward(own, axis):.3f}" for axis in costs.AXES),
      ]
      table.append([task, objective, name, *cells, what])
  return markdown(["task", "objective", "candidate", "", *costs.AXES, "changed keys"], table)


def picture(tests: Sequence[Row], selection: Mapping[str, Any]) -> str:
  """Draw the reward against the cost on both axes, against rollouts and against updates: a row of panels a task."""
  tasks = [task for task in design.TASKS if any(row["task"] == task for row in tests)]
  figure, axes = plt.subplots(len(tasks), 4, squeeze=False, figsize=(16, 3.4 * len(tasks)), layout="constrained")
  for task, panels in zip(tasks, axes.tolist(), strict=True):
    for panel, axis in zip(panels, costs.AXES, strict=False):
      _draw(panel, tests, selection, task, axis, None)
      panel.set_title(f"{task}: {AXIS_NAMES[axis]}", fontsize="small")
      panel.set_xlabel("budget")
    for panel, count in zip(panels[len(costs.AXES) :], ("rollouts", "updates"), strict=True):
      _draw(panel, tests, selection, task, costs.AXES[0], count)
      panel.set_title(f"{task}: {count}, where every call counts once", fontsize="small")
      panel.set_xlabel(count)
  handles, labels = axes[0][0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize="small")
  return _svg(figure)


def _draw(
  panel: Axes, tests: Sequence[Row], selection: Mapping[str, Any], task: str, axis: str, count: str | None
) -> None:
  """Draw each entry's reward against the level of the budget or, if one is named, a count of the run."""
  by_level = {level: scores(tests, selection, task, axis, level, "reward") for level in LEVELS}
  by_level = {level: found for level, found in by_level.items() if found}
  counts = {level: scores(tests, selection, task, axis, level, count) for level in by_level} if count else {}
  colours = {objective: f"C{index}" for index, objective in enumerate(design.OBJECTIVES)}
  for entry in dict.fromkeys(entry for found in by_level.values() for entry in found):
    levels = [level for level, found in by_level.items() if entry in found]
    places = [float(np.mean(list(counts[level][entry].values()))) if count else level for level in levels]
    means = [float(np.mean(list(by_level[level][entry].values()))) for level in levels]
    style = "--" if entry[1] == design.PUBLISHED else "-"
    panel.plot(places, means, style, marker=".", color=colours[entry[0]], label=" ".join(entry))
  if count is None:
    panel.set_xscale("log", base=3)
    panel.set_xticks(list(by_level), [f"{LEVELS[level]}x" for level in by_level])
  panel.set_ylabel("held-out reward")
  panel.grid(alpha=0.3)


def _svg(figure: Figure) -> str:
  buffer = io.StringIO()
  with matplotlib.rc_context({"svg.hashsalt": "dmpo_jax"}):
    figure.savefig(buffer, format="svg", metadata={"Date": None})
  plt.close(figure)
  return buffer.getvalue().split("?>", 1)[-1].split("\n", 1)[-1]


def markdown(columns: Sequence[str], table: Sequence[Sequence[str]]) -> str:
  """Lay out a table."""
  lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
  return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in table])
