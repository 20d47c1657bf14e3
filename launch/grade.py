"""Grade saved generations, and show where the published and the default grader disagree.

    python -m launch.grade --task=gsm8k --grader=published --generations=runs/x/generations/000020.jsonl
    python -m launch.grade --task=sudoku --grader=published --generations out/sudoku_*_generations.json --json

Reads the generations of an evaluation here (JSON lines), and those of the evaluations of d1 and DMPO (one JSON object
with `generations`), as published or with trailing end tokens replaced by their count. Files that differ only in the
number of their shard are one setting. The published accuracy of Sudoku counts blank cells, not puzzles.
"""

import collections
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags
from etils import epath
from rich.console import Console
from rich.table import Table
from scipy import stats

from configs import base
from dmpo_jax import files, tasks
from dmpo_jax.grading import Grading
from dmpo_jax.run import buckets
from dmpo_jax.tasks import Grade, answers
from dmpo_jax.tasks.builtin import END, BuiltinTask
from dmpo_jax.tasks.judge import Verdict
from dmpo_jax.tasks.published import GRADERS
from launch import commands

_STOP = re.compile(r"<\|eot_id\|>|<\|endoftext\|>")


class Item(NamedTuple):
  """One saved generation."""

  file: str
  index: int
  generation: str  # as the published graders see it, including end tokens
  completion: str  # up to the first end token
  question: str
  gold: Any  # as the published graders see it
  record: dict[str, Any]  # of our task
  prompt: str  # name of the prompt


class Row(NamedTuple):
  """The grades of an item by both graders."""

  item: Item
  published: Grade
  verdict: Verdict  # by the default rewards and grader

  @property
  def default(self) -> Grade:
    """The default grader's grade."""
    return self.verdict.grade


def read_items(path: str, task: str) -> list[Item]:
  """Read a file of generations, ours or published.

  Raises:
    ValueError: there is no such file, or some rows cannot be used; the message lists them.
  """
  if not epath.Path(path).is_file():
    raise ValueError(f"{path}: no such file")
  try:
    text = epath.Path(path).read_text()
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not a text file in UTF-8 ({error})") from error
  try:
    whole = json.loads(text)
  except json.JSONDecodeError:
    whole = None  # several lines
  is_published = isinstance(whole, dict) and "generations" in whole
  lines: list[Any] = [line for line in text.split("\n") if line.strip()]
  if isinstance(whole, dict) and "generations" in whole:
    lines = whole["generations"]
  if not isinstance(lines, list):
    raise ValueError(f"{path}: `generations` is not a list")
  items, problems = [], []
  for index, line in enumerate(lines):
    try:
      make = _published_item if is_published else _our_item
      items.append(make(path, index, line if is_published else json.loads(line), task))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      problems.append(f"  row {index + 1}: {type(error).__name__}: {error}")
  if problems:
    raise ValueError(f"{path}: {len(problems)} of {len(lines)} rows cannot be used\n" + "\n".join(problems[:20]))
  return items


def _published_item(path: str, index: int, row: dict[str, Any], task: str) -> Item:
  text, question, gold = row["generations"], row.get("question", ""), row["ground_truth"]
  generation = text + END * row.get("endoftext_run", 0)
  record = _RECORDS[task](question, gold)
  return Item(path, index, generation, _STOP.split(text)[0], question, gold, record, "published_eval")


def _our_item(path: str, index: int, row: dict[str, Any], task: str) -> Item:
  record, text, prompt = row["record"], row["completion"], row.get("prompt_name", "default")
  ours = tasks.make_task(**spec(task, prompt=prompt))
  assert isinstance(ours, BuiltinTask)  # --task names one
  question, gold = ours.published_question(record)
  return Item(path, index, text + END * row.get("is_ended", True), text, question, gold, record, prompt)


def _sudoku_record(question: str, gold: str) -> dict[str, str]:
  puzzle = re.search(r"[0-9]{16}", question)
  if puzzle is None or len(gold) != 16:
    raise ValueError(f"no puzzle of 16 digits in {question!r}, or no such solution: {gold!r}")
  return {"puzzle": puzzle[0], "solution": gold}


def _countdown_record(question: str, gold: Sequence) -> dict[str, Any]:
  numbers, target = gold
  return {"numbers": ",".join(map(str, numbers)), "target": target}


_RECORDS: dict[str, Callable[[str, Any], dict[str, Any]]] = {
  # the published files have null for a negative gold answer: no answer is correct then
  "gsm8k": lambda question, gold: {"question": question, "answer": "" if gold is None else f"{gold:f}"},
  "math": lambda question, gold: {"problem": question, "answer": str(gold)},
  "countdown": _countdown_record,
  "sudoku": _sudoku_record,
}


def spec(name: str, choice: str = "default", prompt: str = "default") -> dict[str, Any]:
  """Return the arguments of `make_task` for one set of rewards and graders, with the task's default options."""
  config = base.get_config().task.to_dict()
  return tasks.spec(config | {"name": name, "prompt": prompt, "rewards": choice, "grader": choice})


def grade_items(task: str, items: Sequence[Item], workers: int, seconds: float) -> list[Row]:
  """Grade items by both graders, in their order.

  Args:
    workers, seconds: processes for graders that may hang, and the time limit for one generation.
  """
  rows = {}
  for prompt in dict.fromkeys(item.prompt for item in items):
    part = [item for item in items if item.prompt == prompt]
    grading = Grading(spec(task, prompt=prompt), workers=workers, seconds=seconds)
    completions, is_ended = [item.completion for item in part], [item.generation != item.completion for item in part]
    verdicts = grading.submit([item.record for item in part], completions, is_ended).result()
    grading.close()
    for item, verdict in zip(part, verdicts, strict=True):
      published = GRADERS[task](item.generation, item.question, item.gold)
      rows[item.file, item.index] = Row(item, published, verdict)
  return [rows[item.file, item.index] for item in items]


def count(grades: Sequence[Grade]) -> dict[str, float]:
  """Count correct items, or correct cells where a grader counts those, with a 95 % Wilson interval of the share."""
  pairs = [grade.cells or (int(grade.is_correct), 1) for grade in grades]
  correct, processed = sum(right for right, _ in pairs), sum(asked for _, asked in pairs)
  if not processed:
    return {"items": len(grades), "correct": 0, "processed": 0, "accuracy_percent": math.nan}
  interval = stats.binomtest(correct, processed).proportion_ci(method="wilson")
  return {
    "items": len(grades),
    "correct": correct,
    "processed": processed,
    "accuracy_percent": 100 * correct / processed,
    "low_percent": 100 * float(interval.low),
    "high_percent": 100 * float(interval.high),
  }


def setting(path: str) -> str:
  """Return the name of a file without the number of its shard and its ending."""
  name = epath.Path(path).name
  return re.sub(r"(_\d+)?_generations\.json$", "", name)


def find_disagreements(task: str, rows: Sequence[Row]) -> dict[str, list[Row]]:
  """Return the items that only one grader calls correct, by probable cause, the most frequent cause first."""
  causes = collections.defaultdict(list)
  for row in rows:
    if row.published.is_correct != row.default.is_correct:
      causes[f"{'default' if row.default.is_correct else 'published'} alone: {_cause(task, row)}"].append(row)
  return dict(sorted(causes.items(), key=lambda entry: -len(entry[1])))


def _cause(task: str, row: Row) -> str:
  """Return the first known cause that applies."""
  completion, taken = row.item.completion, str(row.default.extracted)
  num_answers = max(completion.count("\\boxed"), completion.count("<answer>"))
  if row.verdict.kind != "graded":
    return row.verdict.kind
  if task == "gsm8k" and re.search(r"\d,\d{3}", taken):
    return "thousands' commas"
  if row.default.extracted is None:
    return "no answer in tags or a box"
  if "<answer>" in completion and "</answer>" not in completion:
    return "answer block not closed"
  if num_answers > 1:
    return "several answers, of which the last counts"
  if task == "countdown":
    return "signs or an equation's sides"
  if task == "math":
    return "the same mathematics in other text" if row.default.is_correct else "equal text, other mathematics"
  if task == "sudoku":
    return "cells beside the blank ones, or other text in the answer"
  return "number among words" if not answers.is_number(taken) else "number read otherwise"


def _as_json(grade: Grade) -> dict[str, Any]:
  """Describe a grade with the keys of the published evaluation."""
  value = grade.extracted
  if isinstance(value, float) and not math.isfinite(value):
    value = str(value)
  known = {"extracted": value, "correct": grade.is_correct}
  if grade.cells:
    right, asked = grade.cells
    known |= {"correct_cells": right, "empty_cells": asked, "accuracy": right / asked if asked else 0.0}
  if grade.value is not None:
    known["evaluation_result"] = grade.value if isinstance(grade.value, int) else str(grade.value)
    if isinstance(grade.value, float) and math.isfinite(grade.value):
      known["evaluation_result"] = grade.value
  return known


def define_flags() -> None:
  """Declare the command's flags; not on import, as other commands have a --json of their own."""
  flags.DEFINE_enum("task", None, list(GRADERS), "The task of the generations.", required=True)
  flags.DEFINE_multi_string("generations", None, "A file; more may follow.", required=True)
  flags.DEFINE_enum("grader", "default", ["default", "published"], "The grader of the table.")
  flags.DEFINE_bool("json", False, "Print one JSON object with every item instead of a table.")
  flags.DEFINE_integer("examples", 3, "Number of disagreements shown for each cause.", lower_bound=0)
  flags.DEFINE_integer("workers", 2, "Processes for graders that may hang.", lower_bound=1)
  flags.DEFINE_float("seconds", 10.0, "Time limit for grading one generation.", lower_bound=0.1)


def main(*more: str) -> None:
  """Print the table, or the JSON object."""
  given = flags.FLAGS
  paths = [*given.generations, *more]
  buckets.check({f"file {path}": path for path in paths})
  items = [item for path in paths for item in read_items(path, given.task)]
  if not items:
    raise ValueError(f"no generations in {', '.join(paths)}")
  rows = grade_items(given.task, items, given.workers, given.seconds)
  grades = [getattr(row, given.grader) for row in rows]
  by_setting = collections.defaultdict(list)
  for row, grade in zip(rows, grades, strict=True):
    by_setting[setting(row.item.file)].append(grade)
  figures = {name: count(part) for name, part in by_setting.items()}
  disagreements = find_disagreements(given.task, rows)
  if given.json:
    about = {"task": given.task, "grader": given.grader, "settings": figures}
    print(files.to_json(about | _report(rows, grades, disagreements)))
  else:
    _print_table(f"{given.task}, {given.grader} grader", figures)
    rewards = ", ".join(f"{name} {value:.3f}" for name, value in _mean_rewards(rows).items())
    print(f"default rewards, mean: {rewards}")
    _print_disagreements(disagreements, len(rows), given.examples)


def _report(rows: list[Row], grades: list[Grade], disagreements: dict[str, list[Row]]) -> dict[str, Any]:
  return {
    "total": count(grades),
    "not_graded": dict(collections.Counter(row.verdict.kind for row in rows if row.verdict.kind != "graded")),
    "default_rewards": _mean_rewards(rows),
    "disagreements": {cause: len(found) for cause, found in disagreements.items()},
    "items": [
      {
        "file": epath.Path(row.item.file).name,
        "index": row.item.index,
        **_as_json(grade),
        "reward": row.verdict.reward,
        "reward_parts": row.verdict.parts or None,
      }
      for row, grade in zip(rows, grades, strict=True)
    ],
  }


def _mean_rewards(rows: Sequence[Row]) -> dict[str, float]:
  """Average the default reward and each of its parts."""
  names = dict.fromkeys(name for row in rows for name in row.verdict.parts)
  parts = {name: statistics.fmean(row.verdict.parts.get(name, 0.0) for row in rows) for name in names}
  return {"reward": statistics.fmean(row.verdict.reward for row in rows)} | parts


def _print_table(title: str, figures: dict[str, dict[str, float]]) -> None:
  table = Table(title=title)
  for column in ("setting", "accuracy", "95 % interval", "correct", "of"):
    table.add_column(column, justify="left" if column == "setting" else "right")
  for name, row in figures.items():
    interval = f"{row.get('low_percent', 0):.1f} to {row.get('high_percent', 0):.1f}"
    table.add_row(name, f"{row['accuracy_percent']:.2f} %", interval, str(row["correct"]), str(row["processed"]))
  Console().print(table)


def _print_disagreements(disagreements: dict[str, list[Row]], num_items: int, num_examples: int) -> None:
  console = Console()
  found = sum(map(len, disagreements.values()))
  console.print(f"{found} of {num_items} items are correct for one grader and wrong for the other", highlight=False)
  for cause, rows in disagreements.items():
    console.print(f"{len(rows):5}  {cause}", highlight=False)
    for row in rows[:num_examples]:
      published, default = (f"{str(grade.extracted)[:60]!r}" for grade in (row.published, row.default))
      line = f"       gold {str(row.item.gold)[:60]!r}: published extracted {published}, default {default}"
      console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
  define_flags()
  commands.start(main, takes_more=True)
