"""Grade saved generations, and say where the published and the default grader disagree.

    python -m launch.grade --task=gsm8k --grader=published --generations=runs/x/generations/000020.jsonl
    python -m launch.grade --task=sudoku --grader=published --generations out/sudoku_*_generations.json --json

Takes the generations of an evaluation here (JSON lines) and those of d1's and DMPO's evaluation (one JSON object with
`generations`), as published or with the run of end tokens as a count. Files that differ only in their shard's number
count as one setting. The published Sudoku accuracy is that of blank cells, so it counts cells, not puzzles.
"""

import collections
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags
from etils import epath
from rich.console import Console
from rich.table import Table
from scipy import stats

from configs import base
from dmpo_jax import files, tasks
from dmpo_jax.config import command
from dmpo_jax.grading import Grading
from dmpo_jax.run import buckets
from dmpo_jax.tasks import TASKS, Grade, answers
from dmpo_jax.tasks.judge import NO_GRADE
from dmpo_jax.tasks.published import GRADERS
from dmpo_jax.tasks.worded import END

_STOP = re.compile(r"<\|eot_id\|>|<\|endoftext\|>")


class Item(NamedTuple):
  """One saved generation."""

  file: str
  index: int
  generation: str  # as the published graders see it, end tokens included
  completion: str  # up to the first end token
  question: str
  gold: Any  # in the published form
  record: dict[str, Any]  # in ours
  prompt: str  # name of the prompt


class Row(NamedTuple):
  """An item under both graders."""

  item: Item
  published: Grade
  default: Grade
  kind: str  # of the default grader's verdict: graded, timeout, crash


def read_items(path: str, task: str) -> list[Item]:
  """Read a file of either form.

  Raises:
    ValueError: no such file, or rows that cannot be used, all of them listed.
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
  is_theirs = isinstance(whole, dict) and "generations" in whole
  if is_theirs and not isinstance(whole["generations"], list):
    raise ValueError(f"{path}: `generations` is no list")
  lines = whole["generations"] if is_theirs else [line for line in text.split("\n") if line.strip()]
  items, problems = [], []
  for index, line in enumerate(lines):
    try:
      make = _their_item if is_theirs else _our_item
      items.append(make(path, index, line if is_theirs else json.loads(line), task))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      problems.append(f"  row {index + 1}: {type(error).__name__}: {error}")
  if problems:
    raise ValueError(f"{path}: {len(problems)} of {len(lines)} rows cannot be used\n" + "\n".join(problems[:20]))
  return items


def _their_item(path: str, index: int, row: dict[str, Any], task: str) -> Item:
  text, question, gold = row["generations"], row.get("question", ""), row["ground_truth"]
  generation = text + END * row.get("endoftext_run", 0)
  record = _RECORDS[task](question, gold)
  return Item(path, index, generation, _STOP.split(text)[0], question, gold, record, "published_eval")


def _our_item(path: str, index: int, row: dict[str, Any], task: str) -> Item:
  record, text, prompt = row["record"], row["completion"], row.get("prompt_name", "default")
  question, gold = tasks.make_task(**spec(task, prompt=prompt)).published_question(record)
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
  # a negative gold answer is null there: nothing is right then
  "gsm8k": lambda question, gold: {"question": question, "answer": "" if gold is None else f"{gold:f}"},
  "math": lambda question, gold: {"problem": question, "answer": str(gold)},
  "countdown": _countdown_record,
  "sudoku": _sudoku_record,
}


def spec(name: str, choice: str = "default", prompt: str = "default") -> dict[str, Any]:
  """Return the arguments of `make_task` for one set of rewards and graders, with the task's default options."""
  config = base.get_config().task.to_dict()
  return tasks.spec(config | {"name": name, "prompt": prompt, "rewards": choice, "grader": choice})


def grade_items(task: str, items: Sequence[Item]) -> list[Row]:
  """Grade items by both graders; the default one in worker processes where it may hang."""
  rows = []
  for prompt in dict.fromkeys(item.prompt for item in items):
    part = [item for item in items if item.prompt == prompt]
    grading = Grading(spec(task, prompt=prompt), workers=flags.FLAGS.workers, seconds=flags.FLAGS.seconds)
    completions, is_ended = [item.completion for item in part], [item.generation != item.completion for item in part]
    verdicts = grading.submit([item.record for item in part], completions, is_ended).result()
    grading.close()
    for item, verdict in zip(part, verdicts, strict=True):
      published = GRADERS[task](item.generation, item.question, item.gold)
      rows.append(Row(item, published, verdict.grade or NO_GRADE, verdict.kind))
  return rows


def count(grades: Sequence[Grade]) -> dict[str, float]:
  """Return how many are right, of how many (cells of a Sudoku where they are counted), with a 95 % Wilson interval."""
  pairs = [grade.parts or (int(grade.is_correct), 1) for grade in grades]
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
  """Return a file's name without its shard's number and ending."""
  name = epath.Path(path).name
  return re.sub(r"(_\d+)?_generations\.json$", "", name)


def find_disagreements(rows: Sequence[Row]) -> dict[str, list[Row]]:
  """Return the items that one grader calls right and the other wrong, by the cause that is nearest."""
  causes = collections.defaultdict(list)
  for row in rows:
    if row.published.is_correct != row.default.is_correct:
      causes[f"{'default' if row.default.is_correct else 'published'} alone: {_cause(row)}"].append(row)
  return dict(sorted(causes.items(), key=lambda entry: -len(entry[1])))


def _cause(row: Row) -> str:
  """Name the first of the known causes that applies."""
  completion, taken = row.item.completion, str(row.default.extracted)
  num_answers = max(completion.count("\\boxed"), completion.count("<answer>"))
  if row.kind != "graded":
    return row.kind
  if flags.FLAGS.task == "gsm8k" and re.search(r"\d,\d{3}", taken):
    return "thousands' commas"
  if row.default.extracted is None:
    return "no answer in tags or a box"
  if "<answer>" in completion and "</answer>" not in completion:
    return "answer block not closed"
  if num_answers > 1:
    return "several answers, of which the last counts"
  if flags.FLAGS.task == "countdown":
    return "signs or an equation's sides"
  if flags.FLAGS.task == "math":
    return "the same mathematics in other text" if row.default.is_correct else "equal text, other mathematics"
  if flags.FLAGS.task == "sudoku":
    return "cells beside the blank ones, or other text in the answer"
  return "number among words" if not answers.is_number(taken) else "number read otherwise"


def _as_json(grade: Grade) -> dict[str, Any]:
  value = grade.extracted
  if isinstance(value, float) and not math.isfinite(value):
    value = str(value)
  known = {"extracted": value, "correct": grade.is_correct}
  if grade.parts:
    right, asked = grade.parts
    known |= {"correct_cells": right, "empty_cells": asked, "accuracy": right / asked if asked else 0.0}
  if grade.value is not None:
    known["evaluation_result"] = grade.value if isinstance(grade.value, int) else str(grade.value)
    if isinstance(grade.value, float) and math.isfinite(grade.value):
      known["evaluation_result"] = grade.value
  return known


def define_flags() -> None:
  """Declare the command's flags; not on import, as other commands have a --json of their own."""
  flags.DEFINE_enum("task", None, list(TASKS), "Whose generations they are.", required=True)
  flags.DEFINE_multi_string("generations", None, "A file; more may follow it.", required=True)
  flags.DEFINE_enum("grader", "default", ["default", "published"], "What counts as right in the table.")
  flags.DEFINE_bool("json", False, "Print one JSON object, with every item, instead of a table.")
  flags.DEFINE_integer("examples", 3, "Disagreements to show of each cause.", lower_bound=0)
  flags.DEFINE_integer("workers", 2, "Processes for grading that may hang.", lower_bound=1)
  flags.DEFINE_float("seconds", 10.0, "Time limit for grading one generation.", lower_bound=0.1)


def main(argv: Sequence[str]) -> None:
  """Print the table, or the JSON object."""
  try:
    paths = [*flags.FLAGS.generations, *argv[1:]]
    buckets.check({f"file {path}": path for path in paths})
    items = [item for path in paths for item in read_items(path, flags.FLAGS.task)]
    if not items:
      raise ValueError(f"no generations in {', '.join(paths)}")
    rows = grade_items(flags.FLAGS.task, items)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  order = {item: index for index, item in enumerate((item.file, item.index) for item in items)}
  rows.sort(key=lambda row: order[row.item.file, row.item.index])
  chosen = [getattr(row, flags.FLAGS.grader) for row in rows]
  groups = collections.defaultdict(list)
  for row, grade in zip(rows, chosen, strict=True):
    groups[setting(row.item.file)].append(grade)
  figures = {name: count(grades) for name, grades in groups.items()}
  disagreements = find_disagreements(rows)
  if flags.FLAGS.json:
    print(files.to_json(_report(rows, chosen, figures, disagreements)))
  else:
    _print_tables(figures, disagreements, rows)


def _report(rows: list[Row], chosen: list[Grade], figures: dict, disagreements: dict[str, list[Row]]) -> dict[str, Any]:
  return {
    "task": flags.FLAGS.task,
    "grader": flags.FLAGS.grader,
    "settings": figures,
    "total": count(chosen),
    "not_graded": dict(collections.Counter(row.kind for row in rows if row.kind != "graded")),
    "disagreements": {cause: len(found) for cause, found in disagreements.items()},
    "items": [
      {"file": epath.Path(row.item.file).name, "index": row.item.index, **_as_json(grade)}
      for row, grade in zip(rows, chosen, strict=True)
    ],
  }


def _print_tables(figures: dict[str, dict], disagreements: dict[str, list[Row]], rows: list[Row]) -> None:
  console = Console()
  table = Table(title=f"{flags.FLAGS.task}, {flags.FLAGS.grader} grader")
  for column in ("setting", "accuracy", "95 % interval", "correct", "of"):
    table.add_column(column, justify="left" if column == "setting" else "right")
  for name, row in figures.items():
    shares = [
      f"{row['accuracy_percent']:.2f} %",
      f"{row.get('low_percent', 0):.1f} to {row.get('high_percent', 0):.1f}",
    ]
    table.add_row(name, *shares, str(row["correct"]), str(row["processed"]))
  console.print(table)
  found = sum(map(len, disagreements.values()))
  console.print(f"{found} of {len(rows)} items are right to one grader and wrong to the other", highlight=False)
  for cause, examples in disagreements.items():
    console.print(f"{len(examples):5}  {cause}", highlight=False)
    for row in examples[: flags.FLAGS.examples]:
      texts = [f"{str(grade.extracted)[:60]!r}" for grade in (row.published, row.default)]
      gold = str(row.item.gold)[:60]
      line = f"       gold {gold!r}: published took {texts[0]}, default {texts[1]}"
      console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
  define_flags()
  command.run(main)
