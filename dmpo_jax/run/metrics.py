"""A run's figures: one row a buffer in metrics.jsonl, TensorBoard and optionally Weights & Biases; and its result.json.

metrics.jsonl is the record; a resumed run rewrites TensorBoard's files from it. Only process 0 writes.
"""

import logging
import math
import os
import re
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from clu import parameter_overview
from etils import epath
from jaxtyping import PyTree

from dmpo_jax import files
from dmpo_jax.config import ConfigError
from dmpo_jax.config.rules import NO_WANDB

logger = logging.getLogger(__name__)

RESULT = "result.json"


class Metrics:
  """Writes the figures of a run, one row for each phase and step.

  Args:
    workdir: for metrics.jsonl, one JSON object a line: phase, step, time (seconds since 1970) and the figures, null if
      not finite; and for `tensorboard/`, with tags `<phase>/<figure>`.
    wandb_project: a project of Weights & Biases for the same rows; "": none.
    config: the run's configuration, for that project.

  Raises:
    ConfigError: Weights & Biases is not installed or refuses the run.
  """

  def __init__(self, workdir: epath.PathLike, *, wandb_project: str = "", config: Mapping[str, object] | None = None):
    self._workdir = epath.Path(workdir)
    self._path = self._workdir / "metrics.jsonl"
    self._is_writing = jax.process_index() == 0
    self._rows = _read_rows(self._path) if self._is_writing else []
    self._writer = None  # made at the first row, as it imports TensorFlow
    self._wandb = None
    if wandb_project and self._is_writing:
      self._wandb = _begin_wandb(wandb_project, self._workdir, config or {})

  def forget(self, phase: str, after: int) -> None:
    """Drop the rows of a phase after step `after`, which a resumed run will write again.

    Earlier steps without a row are logged, as every step above 0 writes one.
    """
    if not self._is_writing:
      return
    steps = {row["step"] for row in self._rows if row["phase"] == phase}
    if lost := [step for step in range(1, after + 1) if step not in steps]:
      logger.warning(
        "%s: the rows of phase %s, steps %s, are missing; the run continues", self._path, phase, _ranges(lost)
      )
    rows = [row for row in self._rows if row["phase"] != phase or row["step"] <= after]
    if len(rows) < len(self._rows) and self._writer is not None:
      self._writer.close()
      self._writer = None
    self._rows = rows
    if self._path.exists():  # always rewritten, as a killed run may have left half a line
      files.write_whole(self._path, "".join(map(_line, rows)))

  def write(self, phase: str, step: int, scalars: Mapping[str, Any]) -> None:
    """Append a row of Python, numpy or JAX scalars.

    Raises:
      ValueError: the phase has a row of this step or a later one.
    """
    if not self._is_writing:
      return
    last = max((row["step"] for row in self._rows if row["phase"] == phase), default=-1)
    if step <= last:
      raise ValueError(f"metrics of phase {phase}, step {step}: there are rows up to step {last}; see Metrics.forget")
    row = {"phase": phase, "step": step, "time": time.time()} | {name: float(x) for name, x in scalars.items()}
    if self._writer is None:
      self._writer = _fresh_writer(self._workdir / "tensorboard", self._rows)
    self._rows.append(row)
    if "://" in os.fspath(self._path):  # a bucket's objects cannot be appended to
      files.write_whole(self._path, "".join(map(_line, self._rows)))
    else:
      with self._path.open("a") as file:
        file.write(_line(row))
    _write_row(self._writer, row)
    if self._wandb is not None:  # it ignores steps that an earlier start has logged
      figures = {name: x for name, x in row.items() if name not in ("phase", "time")}
      self._wandb.log({f"{phase}/{name}": x for name, x in figures.items()}, step=len(self._rows) - 1)

  def close(self, *, is_failed: bool = False) -> None:
    """Wait until everything is on disk and sent; `is_failed`: the run did not finish."""
    if self._writer is not None:
      self._writer.close()
      self._writer = None
    if self._wandb is not None:
      self._wandb.finish(exit_code=int(is_failed))
      self._wandb = None

  def __enter__(self) -> "Metrics":
    return self

  def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
    self.close(is_failed=kind is not None)


def _begin_wandb(project: str, workdir: epath.Path, config: Mapping[str, object]) -> Any:
  """Start a run of Weights & Biases, or resume the workdir's."""
  try:
    import wandb  # pyright: ignore[reportMissingImports]  # here, as it is optional
  except ImportError as error:
    raise ConfigError(f"config.log.wandb_project = {project!r}: {NO_WANDB}") from error
  path = workdir / "wandb_id.txt"
  own = path.read_bytes().decode(errors="replace").strip() if path.exists() else ""
  if not re.fullmatch(r"[\w-]+", own, re.ASCII):
    if path.exists():
      logger.warning("%s does not hold a run's id: starting a new run of Weights & Biases", path)
    own = uuid.uuid4().hex[:12]
    files.write_whole(path, own + "\n")
  folder = tempfile.gettempdir() if "://" in os.fspath(workdir) else os.fspath(workdir)
  settings = dict(project=project, id=own, resume="allow", name=workdir.name, dir=folder)
  try:
    run = wandb.init(**settings, config=dict(config))
  except wandb.Error as error:
    raise ConfigError(
      f"config.log.wandb_project = {project!r}: Weights & Biases refuses it ({error}); set WANDB_MODE=offline to "
      'write to the workdir only, or leave it ""'
    ) from error
  for phase in ("warm_start", "train"):
    run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
  return run


def _line(row: Mapping[str, object]) -> str:
  return files.to_json(row) + "\n"


def _read_rows(path: epath.Path) -> list[dict[str, Any]]:
  """Read the rows of earlier starts, without the half line that a killed run may have left at the end.

  If other lines are damaged, a copy of the file is kept, and the file is rewritten with the good rows.
  """
  if not path.exists():
    return []
  lines = files.read_lines(path)
  rows = [row for row in lines.rows if isinstance(row.get("phase"), str) and type(row.get("step")) is int]
  num_damaged = len(lines.damaged) - lines.is_cut + len(lines.rows) - len(rows)
  if num_damaged:
    aside = files.name_aside(path)
    files.write_whole(aside, path.read_bytes())
    files.write_whole(path, "".join(map(_line, rows)))
    logger.warning(
      "%s: %d line(s) cannot be read: the file is copied to %s, the other rows are kept", path, num_damaged, aside.name
    )
  return rows


def _ranges(numbers: Sequence[int]) -> str:
  """Write sorted numbers as `1-3, 7`."""
  starts = [number for number in numbers if number - 1 not in numbers]
  ends = [number for number in numbers if number + 1 not in numbers]
  return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _fresh_writer(directory: epath.Path, rows: list[dict[str, Any]]) -> Any:
  """Make clu's writer to log and TensorBoard, and write the existing rows first."""
  import tensorflow as tf  # here, as it takes seconds

  for kind in ("GPU", "TPU"):  # they belong to JAX
    tf.config.set_visible_devices([], kind)
  from clu import metric_writers

  if directory.exists():
    directory.rmtree()
  directory.mkdir(parents=True)
  writer = metric_writers.create_default_writer(directory)
  for row in rows:
    _write_row(writer, row)
  return writer


def _write_row(writer: Any, row: Mapping[str, Any]) -> None:
  scalars = {name: math.nan if x is None else x for name, x in row.items() if name not in ("phase", "step", "time")}
  writer.write_scalars(row["step"], {f"{row['phase']}/{name}": x for name, x in scalars.items()})


def write_parameter_overview(workdir: epath.PathLike, params: PyTree) -> str:
  """Write the table of parameters (name, shape, dtype, size) to the workdir's parameters.txt; return it."""
  table = parameter_overview.get_parameter_overview(params, include_stats=False)
  if jax.process_index() == 0:
    files.write_whole(epath.Path(workdir) / "parameters.txt", table + "\n")
  return table


def write_result(workdir: epath.PathLike, result: Mapping[str, object]) -> None:
  """Write a finished run's result to the workdir's result.json; null for numbers that are not finite."""
  if jax.process_index() == 0:
    files.write_whole(epath.Path(workdir) / RESULT, files.to_json(result, indent=2) + "\n")


def read_result(workdir: epath.PathLike) -> dict[str, Any] | None:
  """Read a run's result; None if it has not finished.

  Raises:
    Unreadable: it is damaged.
  """
  path = epath.Path(workdir) / RESULT
  if not path.exists():
    return None
  remedy = "remove it and re-run training, which writes it again from the newest checkpoint"
  result = files.read_object(path, remedy)
  kinds = {"buffers": int, "base": dict, "last": dict, "best": dict, "evaluations": dict}
  if lacking := sorted(name for name, kind in kinds.items() if not isinstance(result.get(name), kind)):
    raise files.Unreadable(f"{path} lacks {', '.join(lacking)}: {remedy}")
  return result
