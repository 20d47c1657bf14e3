"""The report page: runs and charts as one HTML file that opens from disk and loads nothing from the network.

Text by models and users is untrusted: the template escapes it, the page's script inserts it as text only, and the
page's content security policy allows just its two scripts, by their hashes.
"""

import base64
import datetime
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import vl_convert
from etils import epath
from markupsafe import Markup

from dmpo_jax import files, messages
from dmpo_jax.config import CHOICES
from dmpo_jax.run.report import charts
from dmpo_jax.run.report.denoising import animations, choose
from dmpo_jax.run.report.runs import Row, Run, is_number, read_runs
from dmpo_jax.run.report.shown import show_code, show_grid
from dmpo_jax.run.report.summary import buffers_of, lack_of_signal, outcome_of, tell
from dmpo_jax.run.report.tables import rank, settings_apart

HERE = pathlib.Path(__file__).parent
ABSENT = "absent"
MOST_STORIES = 3  # runs that are told in sentences


def write(workdirs: Sequence[epath.PathLike], path: epath.PathLike | None = None) -> epath.Path:
  """Write the report of some runs, by default to `report.html` in the first workdir; return its path.

  Raises:
    ValueError: a workdir holds nothing of a run.
  """
  runs = read_runs(workdirs)
  path = epath.Path(path) if path is not None else runs[0].workdir / "report.html"
  files.write_whole(path, render(runs).encode(errors="replace").decode())  # JSON can hold half of a surrogate pair
  return path


def render(runs: Sequence[Run]) -> str:
  """Render the page of some runs."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
  )
  environment.filters |= {"percent": lambda value: f"{value:.1%}" if is_number(value) else "unknown", "number": _number}
  environment.filters["tenths"] = lambda value: f"{value:.1f}" if is_number(value) else "unknown"
  environment.filters |= {"parts": lambda row: charts.list_parts([row]), "code": show_code, "grid": show_grid}
  figures, constant, absent = draw(runs)
  animated = {run.name: animations(run) for run in runs}
  if any(run.generations for run in runs) and not any(animated.values()):
    absent.append("Denoising")
  shown = [(run, buffers, rows) for run in runs for buffers, rows in [completions(run)] if rows]
  script = read_asset("denoising.js") + read_asset("page.js")
  return environment.get_template("page.html").render(
    runs=runs,
    title=" and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs",
    made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    facts=facts(runs),
    stories=[(run.name, told) for run in runs if len(runs) <= MOST_STORIES and (told := tell(run))],
    outcomes=[(run, *outcome_of(run)) for run in runs],
    lacking=[(run.name, lack) for run in runs for lack in lack_of_signal(buffers_of(run))],
    figures=figures,
    constant=constant,
    grid=_grid(runs),
    tasks=sorted({epath.Path(task).stem for run in runs if isinstance(task := run.config.get("task.name"), str)}),
    absent=absent,
    settings=settings(runs),
    differing=differing(settings(runs)),
    completions=shown,
    animations=[(name, found, choose(found)) for name, found in animated.items() if found],
    has_grids=any(pane["grid"] for found in animated.values() for one in found for pane in one["panes"]),
    has_answers=any(line and show_grid(line) for *_, rows in shown for _, lines in rows for line in lines),
    has_blocks=any(one["block_length"] for found in animated.values() for one in found),
    specs=_as_json({figure["id"]: figure["spec"] for figure in figures}),
    animation_data=_as_json(animated),
    style=Markup(read_asset("page.css")),
    vega=Markup(_vega()),
    script=Markup(script),
    hashes=" ".join(f"'sha256-{_digest(text)}'" for text in (_vega(), script)),
  )


def read_asset(name: str) -> str:
  """Return a part of the page, of which the served page has some too."""
  return (HERE / name).read_text()


def draw(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[tuple[str, str, list[str]]], list[str]]:
  """Return the charts; the figures that never change, which need none; and the titles of those that are missing.

  A figure is missing if every run should have it and none has.
  """
  held_out = [
    ("Held-out solve rate", "Policy on prompts that it is not trained on, 95% interval.", ("solve_rate", ".1%")),
    ("Held-out reward", "Mean over the same prompts.", ("reward_mean", ".3~g")),
    ("Model calls a prompt", "In evaluation.", ("model_calls", ".1f")),
  ]
  drawn = [(title, caption, how[1], charts.draw_held_out(runs, *how)) for title, caption, how in held_out]
  first, *others = charts.CURVES
  every = (first, charts.part_curves(runs), charts.task_curves(runs), *others)
  drawn += [(own.title, charts.caption_of(own, runs), own.form, charts.draw_curves(own, runs)) for own in every]
  parts = "Compilation belongs to the part that needs it; other is the start, data, saving and waiting."
  drawn.append(("Time by part", parts, "", charts.draw_times(runs)))
  figures, constant = [], []
  for number, (title, caption, form, spec) in enumerate(drawn):
    if spec and (values := charts.constant_values(spec, form, runs)):
      constant.append((title, caption, values))
    elif spec:
      figures.append({"id": f"chart-{number}", "title": title, "caption": caption, "spec": spec})
  special = {curves.title for curves in every if not curves.is_always}
  return figures, constant, [title for title, *_, spec in drawn if not spec and title not in special]


def _grid(runs: Sequence[Run]) -> list[tuple[Run, Row, str]]:
  """Return the rows of --mode=eval, the best first, with the settings that tell a row from those like it."""
  rows = [(run, row, apart) for run in runs for row, apart in zip(run.grid, settings_apart(run.grid), strict=True)]
  return sorted(rows, key=lambda entry: rank(entry[1]))


def facts(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
  """List facts on the runs: a label and the value of each run."""
  return [(label, [_fact(of, run) for run in runs]) for label, of in FACTS.items()]


def _fact(of: Callable[[Run], object], run: Run) -> str:
  try:
    return str(of(run))
  except (KeyError, IndexError, TypeError, ValueError):
    return "unknown"


FACTS: dict[str, Callable[[Run], object]] = {
  "task": lambda run: run.config["task.name"],
  "objective": lambda run: (
    f"{run.config['objective.name']}, alpha {run.config['objective.alpha']}, "
    f"baseline {run.config['objective.wdce.baseline']}"
  ),
  "sampler (decoding rule)": lambda run: (
    f"{run.config['sampler.name']}: {run.config['sampler.completion_length']} tokens in blocks of "
    f"{run.config['sampler.block_length']}, {run.config['sampler.steps']} steps, T {run.config['sampler.temperature']}"
  ),
  "model": lambda run: (
    f"transformer from {run.config['model.init_from'] or 'random weights'}, {run.config['model.num_layers']} layers of "
    f"{run.config['model.d_model']}"
    + (f", LoRA rank {run.config['model.lora.rank']}" if run.config["model.lora.rank"] else "")
  ),
  "warm start": lambda run: f"{run.config['warm_start.updates']} updates",
  "buffers": lambda run: f"{max(row['step'] for row in run.rows['train'])} of {run.config['train.num_buffers']}",
  "rollouts a buffer": lambda run: (
    f"{run.config['rollout.num_prompts']} prompts x {run.config['rollout.group_size']}, "
    f"{run.config['train.updates_per_buffer']} updates"
  ),
  "seed": lambda run: run.config["seed"],
  "devices": lambda run: run.starts[-1]["devices"],
  "processes": lambda run: run.starts[-1]["processes"],
  "starts": lambda run: len(run.starts) or "unknown",
  "seconds of the last start": lambda run: f"{run.result['seconds']:,.0f}",
  "arguments": lambda run: run.starts[-1]["arguments"],
  "version": lambda run: f"{run.starts[-1]['version']}",
  "revision": lambda run: f"{run.starts[-1]['revision']}, jax {run.starts[-1]['versions']['jax']}",
  "workdir": lambda run: run.workdir,
}


def settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
  """List the configurations: each key and its value in every run.

  Keys of choices that no run has made, such as another sampler's, are left out.
  """
  return [
    (path, [_shown(run.config[path]) if path in run.config else ABSENT for run in runs])
    for path in sorted(set().union(*(run.config for run in runs)))
    if any(_is_in_use(path, run) for run in runs)
  ]


def differing(rows: Sequence[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
  """Return the rows of `settings` in which the runs differ."""
  return [(path, values) for path, values in rows if len(set(values)) > 1]


def _is_in_use(path: str, run: Run) -> bool:
  section, *rest = path.split(".")
  chosen = (run.setting(f"{section}.name"), run.setting(f"{section}.likelihood"))
  return not (section in CHOICES and len(rest) > 1 and rest[0] not in chosen)


def _shown(value: object) -> str:
  return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False, default=str)


def completions(run: Run) -> tuple[list[int], list[tuple[str, list[Row | None]]]]:
  """Return the prompts, each with its completions in the first, the middle and the last evaluation."""
  buffers = list(run.generations)
  prompts: dict[str, list[Row | None]] = {}
  for column, buffer in enumerate(buffers):
    for line in run.generations[buffer]:
      row = prompts.setdefault(messages.show(line.get("prompt", "")), [None] * len(buffers))
      row[column] = row[column] or line
  return buffers, list(prompts.items())


def _number(value: object) -> str:
  return f"{value:.3f}" if is_number(value) and not (isinstance(value, float) and math.isnan(value)) else "unknown"


def _as_json(value: object) -> Markup:
  """Write JSON for a script element, such that no text in it can end the element."""
  return Markup(json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


@functools.cache
def _vega() -> str:
  """Return the bundle of Vega-Lite and its renderer, for a script element."""
  bundle = vl_convert.javascript_bundle()  # pyright: ignore[reportCallIssue]  # the snippet is optional
  return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _digest(text: str) -> str:
  return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
