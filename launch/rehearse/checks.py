"""Checks of the runs of a rehearsal. Each returns a description of what it found, or raises `Failed`."""

import collections
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from launch.outcome import compare, outcome
from launch.rehearse.jobs import Failed


def rows_of(workdir: epath.Path, phase: str = "train") -> list[dict[str, Any]]:
  """Return the rows of the metrics so far."""
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  return [row for row in map(json.loads, lines) if row["phase"] == phase]


def last_row(workdir: epath.Path) -> int:
  """Return the step of the latest row, or -1."""
  return max((row["step"] for row in rows_of(workdir)), default=-1)


def rows_in_order(workdir: epath.Path, num_buffers: int) -> str:
  """Check that there is one row for the start and one for each buffer, in order."""
  steps = [row["step"] for row in rows_of(workdir)]
  if steps != list(range(num_buffers + 1)):
    raise Failed(f"rows in order: {workdir}/metrics.jsonl has rows {steps}, not each of 0 to {num_buffers} once")
  return f"rows 0 to {num_buffers} once, in order"


def rewards(workdir: epath.Path, *, must_vary: bool) -> str:
  """Check that rewards vary: without, equal parameters would prove little."""
  found = [(row["reward_mean"], row["reward_std"]) for row in rows_of(workdir) if "reward_mean" in row]
  lowest, highest = min(mean for mean, _ in found), max(mean for mean, _ in found)
  do_vary = lowest < highest and all(std > 0 for _, std in found)
  if not do_vary and must_vary:
    raise Failed(f"rewards vary: those of {workdir} have (mean, standard deviation) {found}")
  return f"mean rewards {lowest:.3f} to {highest:.3f}" + ("" if do_vary else ": equal, so nothing is learned")


def generations(workdir: epath.Path, num_prompts: int) -> str:
  """Check that every evaluation has every held-out prompt once."""
  result = json.loads((workdir / "result.json").read_text())
  wanted = sorted(f"{int(buffers):06d}.jsonl" for buffers in result["evaluations"])
  found = sorted(path.name for path in (workdir / "generations").iterdir())
  if found != wanted:
    raise Failed(f"generations complete: {workdir}/generations has {found}, not {wanted}")
  for name in wanted:
    _every_prompt_once(workdir / "generations" / name, num_prompts)
  return f"{len(wanted)} evaluations of {num_prompts} prompts each"


def _every_prompt_once(path: epath.Path, num_prompts: int) -> None:
  counts = collections.Counter(json.loads(line)["index"] for line in path.read_text().splitlines())
  if counts != collections.Counter(range(num_prompts)):
    wrong = {index: counts[index] for index in {*range(num_prompts), *counts} if counts[index] != 1}
    raise Failed(f"every prompt once: {path} has these counts by index: {wrong}; each of {num_prompts} must come once")


def evaluations(workdir: epath.Path, num_prompts: Mapping[str, int], num_settings: int) -> str:
  """Check that --mode=eval evaluated the last and the best policy on every task with every setting."""
  rows = json.loads((workdir / "evaluation" / "result.json").read_text())
  found = collections.Counter((row["task"], row["policy"], row["num_prompts"]) for row in rows)
  policies = ["last", *(["best"] if (workdir / "best").exists() else [])]
  wanted = {(task, policy, num): num_settings for task, num in num_prompts.items() for policy in policies}
  if found != wanted:
    path = workdir / "evaluation" / "result.json"
    raise Failed(f"evaluation complete: {path} has, by task, policy and prompts, {dict(found)}, not {wanted}")
  return f"{len(rows)} settings on {', '.join(f'{num} prompts of {task}' for task, num in num_prompts.items())}"


def ends_alike(undisturbed: epath.Path, disturbed: epath.Path) -> str:
  """Check that the interrupted run equals the undisturbed one bit for bit."""
  wanted, got = outcome(undisturbed), outcome(disturbed)
  difference = compare(wanted, got)
  if difference:
    raise Failed(f"equal to the undisturbed run: {difference}, in {disturbed} and {undisturbed}")
  arrays = sum(not isinstance(value, dict | str) for value in wanted.values())
  return f"{arrays} arrays, all rows and generations equal the undisturbed run bit for bit"


def exists(path: epath.Path, what: str) -> str:
  """Check that a file or folder exists."""
  if not path.exists():
    raise Failed(f"{what}: there is no {path}")
  return what
