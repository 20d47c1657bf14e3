"""What a workdir holds, read so that whatever is missing or damaged is named and the rest is still there."""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from dmpo_jax.config import FILE as CONFIG
from dmpo_jax.config import flatten
from dmpo_jax.metrics import RESULT
from dmpo_jax.workdir import STARTS

NUM_SAMPLES = 8  # completions of an evaluation that the page shows: those of the first prompts, not chosen ones

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
  """One workdir."""

  name: str  # unlike that of the other runs on the page
  workdir: epath.Path
  config: dict[str, Any]  # leaves by their dotted paths; empty where there is none
  rows: dict[str, list[Row]]  # figures by phase, each sorted by step
  result: Row
  evaluations: dict[int, Row]  # figures on the held-out prompts by number of finished buffers
  starts: list[Row]
  generations: dict[int, list[Row]]  # of the first, the middle and the last evaluation, by number of buffers
  grid: list[Row]  # what --mode=eval has evaluated: tasks, lengths and samplers
  missing: list[str]  # what a person should know is not there

  def about(self, path: str, otherwise: Any = "unknown") -> Any:
    """The configuration's value of a key, which a run of another version may not have."""
    return self.config.get(path, otherwise)


def read_runs(workdirs: Sequence[epath.PathLike]) -> list[Run]:
  """Read workdirs; each gets a name of its own.

  Raises:
    ValueError: a folder does not exist, or none of what a run leaves is in it.
  """
  folders = [epath.Path(workdir).expanduser() for workdir in workdirs]
  folders = list(dict.fromkeys(folders))
  for folder in folders:
    if not folder.is_dir():
      raise ValueError(f"--workdir={folder}: no such folder")
    if not any((folder / name).exists() for name in (CONFIG, "metrics.jsonl", RESULT)):
      raise ValueError(f"--workdir={folder}: nothing of a run is in it; give the folder that training wrote to")
  return [_read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[epath.Path]) -> list[str]:
  """Name runs by as many of the last parts of their paths as tell them apart."""
  for count in itertools.count(1):
    names = ["/".join(folder.parts[-count:]) for folder in folders]
    if len(set(names)) == len(names):
      return names
  raise AssertionError("folders are unlike each other")


def _read_run(workdir: epath.Path, name: str) -> Run:
  missing: list[str] = []
  config = _read_object(workdir / CONFIG, missing)
  result = _read_object(workdir / RESULT, missing, otherwise="the run has not finished")
  rows = _read_rows(workdir / "metrics.jsonl", missing)
  evaluations = _evaluations(result, rows)
  if not evaluations:
    missing.append("no evaluation on held-out prompts is recorded")
  generations = _read_generations(workdir / "generations", missing)
  starts = list(_read_lines(workdir / STARTS, missing)) if (workdir / STARTS).exists() else []
  return Run(
    name,
    workdir,
    flatten(config),
    rows,
    result,
    evaluations,
    starts,
    generations,
    _read_grid(workdir, missing),
    missing,
  )


def _read_object(path: epath.Path, missing: list[str], otherwise: str = "") -> Row:
  try:
    value = json.loads(path.read_text())
    if isinstance(value, dict):
      return value
    missing.append(f"{path.name} is not a JSON object")
  except FileNotFoundError:
    missing.append(f"there is no {path.name}" + (f": {otherwise}" if otherwise else ""))
  except (OSError, ValueError) as error:
    missing.append(f"{path.name} cannot be read ({error})")
  return {}


def _read_lines(path: epath.Path, missing: list[str]) -> Iterator[Row]:
  """Yield the JSON objects of a file's lines; what is none of them is counted."""
  damaged, is_last = 0, False
  try:
    with path.open() as file:
      for line in file:
        try:
          row = json.loads(line)
          is_last = not isinstance(row, dict)
        except ValueError:
          is_last = True
        damaged += is_last
        if not is_last:
          yield row
  except FileNotFoundError:
    missing.append(f"there is no {path.name}")
  except (OSError, ValueError) as error:
    missing.append(f"{path.name} cannot be read ({error})")
  if damaged:
    what = "the last line" if damaged == 1 and is_last else f"{damaged} line(s)"
    missing.append(f"{path.name}: {what} cannot be read and is left out")


def _read_rows(path: epath.Path, missing: list[str]) -> dict[str, list[Row]]:
  phases: dict[str, dict[int, Row]] = {}
  strange = 0
  for row in _read_lines(path, missing):
    phase, step = row.get("phase"), row.get("step")
    if isinstance(phase, str) and type(step) is int:
      phases.setdefault(phase, {})[step] = {key: value for key, value in row.items() if is_number(value)}
    else:
      strange += 1
  if strange:
    missing.append(f"{path.name}: {strange} row(s) without phase and step, as of another version, are left out")
  return {phase: [rows[step] for step in sorted(rows)] for phase, rows in phases.items()}


def _read_grid(workdir: epath.Path, missing: list[str]) -> list[Row]:
  """Read the evaluations of --mode=eval; those of another version, which were one object, are named and left out."""
  path = workdir / "evaluation" / RESULT
  try:
    rows = json.loads(path.read_text()) if path.exists() else []
  except (OSError, ValueError) as error:
    missing.append(f"evaluation/{RESULT} cannot be read ({error})")
    return []
  known = [row for row in rows if isinstance(row, dict) and is_number(row.get("solve_rate"))]
  if not isinstance(rows, list) or len(known) < len(rows):
    missing.append(f"evaluation/{RESULT} is of another version: what is not understood is left out")
  return known


def is_number(value: Any) -> bool:
  """Whether it is a number that can be drawn; JSON's NaN and Infinity, which the record does not have, are none."""
  return type(value) in (int, float) and abs(value) < float("inf")


def _evaluations(result: Mapping[str, Any], rows: Mapping[str, Sequence[Row]]) -> dict[int, Row]:
  """Collect the evaluations of the result and, for a run that has not finished, of the rows."""
  found = {}
  for row in rows.get("train", ()):
    figures = {name.removeprefix("eval_"): value for name, value in row.items() if name.startswith("eval_")}
    if "solve_rate" in figures:
      found[row["step"]] = figures
  stored = result.get("evaluations")
  for buffer, figures in stored.items() if isinstance(stored, dict) else ():
    if buffer.isdigit() and isinstance(figures, dict) and is_number(figures.get("solve_rate")):
      found[int(buffer)] = {name: value for name, value in figures.items() if is_number(value)}
  return dict(sorted(found.items()))


def _read_generations(folder: epath.Path, missing: list[str]) -> dict[int, list[Row]]:
  """Read the first completions of the first, the middle and the last evaluation."""
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  buffers = sorted(int(name[:-6]) for name in names if name.endswith(".jsonl") and name[:-6].isdigit())
  if not buffers:
    missing.append("there are no generations")
  shown = sorted({buffers[i] for i in (0, len(buffers) // 2, -1)}) if buffers else []
  generations = {}
  for buffer in shown:
    lines = _read_lines(folder / f"{buffer:06d}.jsonl", missing)
    first = (line for line in lines if isinstance(line.get("completion"), str) and line.get("sample", 0) == 0)
    generations[buffer] = list(itertools.islice(first, NUM_SAMPLES))
  return generations
