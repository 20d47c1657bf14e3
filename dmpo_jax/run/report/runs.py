"""Read workdirs for the report. Missing and damaged files are listed, the rest is read."""

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from etils import epath

from dmpo_jax import files
from dmpo_jax.config import current, flatten
from dmpo_jax.run.metrics import RESULT
from dmpo_jax.run.workdir import FILE as CONFIG
from dmpo_jax.run.workdir import STARTS

METRICS, GENERATIONS = "metrics.jsonl", "generations"
NUM_SAMPLES = 8  # completions of an evaluation that the page shows: of the first prompts, not a selection

Row = dict[str, Any]
STEPS = {"train": "buffers", "warm_start": "updates"}  # what a phase counts


@dataclasses.dataclass(frozen=True)
class Run:
  """One workdir."""

  name: str  # unique on the page
  workdir: epath.Path
  config: dict[str, Any]  # leaves by their dotted paths; empty if there is none
  rows: dict[str, list[Row]]  # figures by phase, each sorted by step
  result: Row
  evaluations: dict[int, Row]  # figures on the held-out prompts by number of finished buffers
  starts: list[Row]
  generations: dict[int, list[Row]]  # of the first, the middle and the last evaluation, by number of buffers
  grid: list[Row]  # rows of --mode=eval: tasks, lengths and samplers
  missing: list[str]  # what is missing or damaged, for the reader

  def setting(self, path: str) -> Any:
    """Return the configuration's value of a key; "unknown" if the run's version did not have it."""
    return self.config.get(path, "unknown")

  def count(self, path: str) -> int | None:
    """Return the configuration's value of a key that is a count; None if it is not an integer."""
    value = self.config.get(path)
    return value if type(value) is int else None


def read_runs(workdirs: Sequence[epath.PathLike]) -> list[Run]:
  """Read workdirs; each run gets a unique name.

  Raises:
    ValueError: a folder does not exist, or holds no files of a run.
  """
  folders = [epath.Path(workdir).expanduser() for workdir in workdirs]
  folders = list(dict.fromkeys(folders))
  for folder in folders:
    if not folder.is_dir():
      raise ValueError(f"--workdir={folder}: no such folder")
    if not any((folder / name).exists() for name in (CONFIG, METRICS, RESULT)):
      raise ValueError(f"--workdir={folder}: it holds no files of a run; give a training run's workdir")
  return [_read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[epath.Path]) -> list[str]:
  """Name runs by the shortest ends of their paths that tell them apart."""
  for count in itertools.count(1):
    names = ["/".join(folder.parts[-count:]) for folder in folders]
    if len(set(names)) == len(names):
      return names
  raise AssertionError("folders are unique")


def _read_run(workdir: epath.Path, name: str) -> Run:
  missing: list[str] = []
  config = _read_object(workdir / CONFIG, missing)
  result = _read_result(workdir / RESULT, missing)
  rows = _read_rows(workdir, missing)
  evaluations = _evaluations(result, rows)
  if not evaluations:
    missing.append("no evaluation on held-out prompts is recorded")
  generations = _read_generations(workdir, missing)
  starts = _rows_of(workdir, STARTS, missing) if (workdir / STARTS).exists() else []
  return Run(
    name,
    workdir,
    current(flatten(config)),
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
    return files.read_object(path)
  except FileNotFoundError:
    missing.append(f"there is no {path.name}" + (f": {otherwise}" if otherwise else ""))
  except files.Unreadable as error:
    missing.append(str(error))
  except OSError as error:
    missing.append(f"{path.name} cannot be read ({error})")
  return {}


def _read_result(path: epath.Path, missing: list[str]) -> Row:
  result = _read_object(path, missing, otherwise="the run has not finished")
  if not is_number(result.get("seconds", 0.0)):
    missing.append(f"{path.name}: seconds = {result.pop('seconds')!r} is no number")
  return result


def _rows_of(workdir: epath.Path, name: str, missing: list[str]) -> list[Row]:
  try:
    lines = files.read_lines(workdir / name)
  except FileNotFoundError:
    missing.append(f"there is no {name}")
    return []
  except OSError as error:
    missing.append(f"{name} cannot be read ({error})")
    return []
  if lines.problem:
    missing.append(f"{name}: {lines.problem}; the rest is shown")
  return lines.rows


def _read_rows(workdir: epath.Path, missing: list[str]) -> dict[str, list[Row]]:
  phases: dict[str, dict[int, Row]] = {}
  strange = 0
  for row in _rows_of(workdir, METRICS, missing):
    phase, step = row.get("phase"), row.get("step")
    if isinstance(phase, str) and type(step) is int:
      phases.setdefault(phase, {})[step] = {key: value for key, value in row.items() if is_number(value)}
    else:
      strange += 1
  if strange:
    missing.append(f"{METRICS}: {strange} row(s) without phase and step, of another version, are left out")
  return {phase: [rows[step] for step in sorted(rows)] for phase, rows in phases.items()}


def _read_grid(workdir: epath.Path, missing: list[str]) -> list[Row]:
  """Read the evaluations of --mode=eval. Those of other versions, one object, are reported as missing."""
  path = workdir / "evaluation" / RESULT
  try:
    rows = files.read_json(path) if path.exists() else []
  except (OSError, files.Unreadable) as error:
    missing.append(f"evaluation/{RESULT}: {error}")
    return []
  listed = rows if isinstance(rows, list) else []
  known = [row for row in listed if isinstance(row, dict) and is_number(row.get("solve_rate"))]
  if not isinstance(rows, list) or len(known) < len(rows):
    missing.append(f"evaluation/{RESULT} is of another version: unknown rows are left out")
  return known


def is_number(value: Any) -> TypeGuard[float]:
  """Whether a value is a finite number, which can be drawn."""
  return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _evaluations(result: Row, rows: Mapping[str, Sequence[Row]]) -> dict[int, Row]:
  """Collect the evaluations of the result and, for an unfinished run, of the rows."""
  found = {}
  for row in rows.get("train", ()):
    figures = {name.removeprefix("eval_"): value for name, value in row.items() if name.startswith("eval_")}
    if "solve_rate" in figures:
      found[row["step"]] = _figures(figures)
  stored = result.get("evaluations")
  for buffer, figures in stored.items() if isinstance(stored, dict) else ():
    if buffer.isdecimal() and isinstance(figures, dict) and is_number(figures.get("solve_rate")):
      found[int(buffer)] = _figures(figures)
  return dict(sorted(found.items()))


def _figures(row: Row) -> Row:
  """Return the numbers of a row; an interval with one end is dropped."""
  figures = {name: value for name, value in row.items() if is_number(value)}
  for name in [name for name in figures if name.endswith(("_low", "_high"))]:
    interval = name.rpartition("_")[0]
    if f"{interval}_low" not in figures or f"{interval}_high" not in figures:
      del figures[name]
  return figures


def list_generations(workdir: epath.Path) -> dict[int, str]:
  """Return the files of a run's evaluations, as paths in the workdir, by number of finished buffers."""
  folder = workdir / GENERATIONS
  names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
  numbers = {name: name.removesuffix(".jsonl") for name in names if name.endswith(".jsonl")}
  return {int(number): f"{GENERATIONS}/{name}" for name, number in numbers.items() if number.isdecimal()}


def read_prompts(workdir: epath.Path, num: int) -> list[str]:
  """Return the first held-out prompts of a run's last evaluation, of those that are plain texts."""
  names = list_generations(workdir)
  rows = files.read_lines(workdir / names[max(names)]).rows if names else []
  return list(dict.fromkeys(row["prompt"] for row in rows if isinstance(row.get("prompt"), str)))[:num]


def find_generation(path: epath.Path, index: int, sample: int = 0) -> Row:
  """Find one completion of a prompt in a file of generations.

  Raises:
    ValueError: it is not there; unreadable lines are reported.
  """
  try:
    lines = files.read_lines(path)
  except OSError as error:
    raise ValueError(f"{path}: no such file, or it cannot be read ({error})") from error
  problem = lines.problem and f" ({lines.problem})"
  for line in lines.rows:
    if (line.get("index"), line.get("sample", 0)) == (index, sample):
      return line
  raise ValueError(f"--index={index}, --sample={sample}: {path} has no such generation{problem}")


def _read_generations(workdir: epath.Path, missing: list[str]) -> dict[int, list[Row]]:
  """Read the first completions of the first, the middle and the last evaluation."""
  names = dict(sorted(list_generations(workdir).items()))
  buffers = list(names)
  if not buffers:
    missing.append("there are no generations")
  shown = sorted({buffers[i] for i in (0, len(buffers) // 2, -1)}) if buffers else []
  generations = {}
  for buffer in shown:
    lines = _rows_of(workdir, names[buffer], missing)
    first = [line for line in lines if isinstance(line.get("completion"), str) and line.get("sample", 0) == 0]
    generations[buffer] = first[:NUM_SAMPLES]
  return generations
