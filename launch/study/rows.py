"""The raw rows of the study: one line of JSON for each run, in a file for each stage. Everything is drawn from them."""

import fcntl
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from dmpo_jax import files

Row = dict[str, Any]
STAGES = ("bases", "tune", "test", "questions")
SELECTION = "selection.json"


def digest(content: Mapping[str, Any]) -> str:
  """Hash what a run is."""
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def read(folder: pathlib.Path, stage: str) -> list[Row]:
  """Read the rows of a stage, the last one of each run, in the order of the first ones."""
  path = folder / f"{stage}.jsonl"
  if not path.exists():
    return []
  found = files.read_lines(path)
  if found.problem:
    raise ValueError(f"{path}: {found.problem}")
  return list({row["run"]: row for row in found.rows}.values())


def read_selection(folder: pathlib.Path) -> dict[str, Any]:
  """Read which settings were selected, {} if none were."""
  path = folder / SELECTION
  return files.read_object(path) if path.exists() else {}


def append(folder: pathlib.Path, stage: str, row: Row) -> None:
  """Add a row; several processes may do so at the same time."""
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / f"{stage}.jsonl").open("a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(files.to_json(rounded(row)) + "\n")


def rounded(value: Any) -> Any:
  """Round every float to five digits, so that a row stays short."""
  match value:
    case float():
      return float(f"{value:.5g}")
    case dict():
      return {key: rounded(each) for key, each in value.items()}
    case list() | tuple():
      return [rounded(each) for each in value]
    case _:
      return value
