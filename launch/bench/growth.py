"""The section `growth`: time and memory over completion length, group size, mask samples, vocabulary and devices.

    python -m launch.benchmark growth [--picture=docs/growth.svg]

Memory is the compiler's estimate. One size changes at a time.
"""

import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from ml_collections import ConfigDict
from rich.table import Table

from dmpo_jax import noise
from launch.bench import costs, programs, timing, workload
from launch.bench import update as bench_update
from launch.bench.results import Options, shown, shown_bytes

NUM_DEVICES = 8


# The compiled programs of each; the first has the matrix products and the peak of memory.
PROGRAMS = {"update": programs.STEP, "sample": ("sample",)}


class Axis(NamedTuple):
  """A size, its values, the programs that depend on it, and the expected exponents of their time and memory."""

  name: str
  values: tuple[int, ...]
  programs: tuple[str, ...]
  time: str
  memory: str

  def keys(self, value: int) -> dict[str, Any]:
    """Return the keys of the configuration for a value."""
    return {
      "completion": {"sampler.completion_length": value, "sampler.steps": value // 2},
      "group": {"rollout.group_size": value},
      "mask samples": {"objective.num_mask_samples": value},
      "vocabulary": {"model.vocab_size": value, "model.embedding_size": value},
      "devices": {},
    }[self.name]


AXES = (
  Axis("completion", (64, 128, 256, 512, 1024), ("update", "sample"), "1 to 2; sampling one more", "1 to 2"),
  Axis("group", (2, 4, 8, 16), ("update", "sample"), "1", "1"),
  Axis("mask samples", (2, 4, 8, 16), ("update",), "1", "1"),
  Axis("vocabulary", (1024, 4096, 16384, 65536, 126464), ("update", "sample"), "0 to 1", "0 above 8192"),
)
DEVICES = Axis("devices", (1, 2, 4, 8), ("update",), "-1", "-1")


class Point(NamedTuple):
  """The cost of a program at one value; sizes are those of one device."""

  axis: str
  program: str
  value: int
  argument_bytes: int
  working_bytes: int  # at the peak, without the arguments
  flops: float
  seconds: float | None
  collectives: int | None = None
  collective_bytes: int | None = None


class Fit(NamedTuple):
  """How the cost of a program grows along an axis: cost ~ value^exponent, from the last two values."""

  axis: str
  program: str
  time: float | None
  flops: float
  memory: float


class Growth(NamedTuple):
  """The result of the section."""

  settings: str
  points: list[Point]
  peak_flops: float | None = None

  def fits(self) -> list[Fit]:
    """Fit the exponents of every program along every axis."""
    lines = dict.fromkeys((point.axis, point.program) for point in self.points)
    return [fit([point for point in self.points if (point.axis, point.program) == line]) for line in lines]

  def tables(self) -> list[Table]:
    """Lay out the figures, and the exponents beside the expected ones."""
    table = Table(title=f"growth: {self.settings}", title_justify="left")
    for column in ("size", "value", "program", "seconds", "GFLOP", "arguments", "working memory", "collectives"):
      table.add_column(column, justify="left" if column in ("size", "program", "collectives") else "right")
    for point in self.points:
      table.add_row(*row_of(point))
    laws = Table(title="exponent of the last step: cost ~ value^exponent", title_justify="left")
    for column in ("size", "program", "time", "operations", "expected", "memory", "expected "):
      laws.add_column(column, justify="left" if column in ("size", "program") else "right")
    for each in self.fits():
      axis = next(axis for axis in (*AXES, DEVICES) if axis.name == each.axis)
      laws.add_row(
        each.axis,
        each.program,
        shown(each.time, "{:.2f}"),
        f"{each.flops:.2f}",
        axis.time,
        f"{each.memory:.2f}",
        axis.memory,
      )
    return [table, laws]

  def as_json(self) -> dict[str, Any]:
    """Return everything in a form for a file."""
    return {
      "section": "growth",
      "settings": self.settings,
      "points": [point._asdict() for point in self.points],
      "fits": [each._asdict() for each in self.fits()],
    }


def row_of(point: Point) -> list[str]:
  """Format a point as a row of the table."""
  communication = "-"
  if point.collectives is not None and point.collective_bytes is not None:
    communication = f"{point.collectives:,} x, {point.collective_bytes / 1e6:,.1f} MB"
  return [
    point.axis,
    f"{point.value:,}",
    point.program,
    shown(point.seconds, "{:.3g}"),
    f"{point.flops / 1e9:,.1f}",
    shown_bytes(point.argument_bytes),
    shown_bytes(point.working_bytes),
    communication,
  ]


def fit(points: Sequence[Point]) -> Fit:
  """Fit the exponents to the last two points of a line."""
  before, last = points[-2:]
  step = math.log(last.value / before.value)

  def exponent(name: str) -> float:
    return math.log(getattr(last, name) / getattr(before, name)) / step

  seconds = None if last.seconds is None else exponent("seconds")
  return Fit(last.axis, last.program, seconds, exponent("flops"), exponent("working_bytes"))


def run(config: ConfigDict, options: Options) -> Growth:
  """Measure all points, and draw them if asked to."""
  points = []
  for axis in AXES:
    for value in axis.values:
      for program in axis.programs:
        options.say(f"{axis.name} {value}, {program}")
        points.append(measure(axis, program, value, workload.changed(config, axis.keys(value)), options.repeats))
  options.say(f"{NUM_DEVICES} virtual devices")
  points += timing.facts_of(make_devices, (config,))["points"]
  settings = f"{workload.settings_line(config)}; {config.objective.num_mask_samples} masks of each"
  growth = Growth(settings, points, options.peak_flops)
  if options.picture:
    draw(growth, pathlib.Path(options.picture))
  return growth


def measure(axis: Axis, program: str, value: int, config: ConfigDict, repeats: int) -> Point:
  """Compile a gradient step or a sampler, and time it."""
  work = workload.make(config, sharpness=workload.SHARPNESS)
  compiled, turn = make_turn(program, work)
  turn()
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    turn()
    seconds.append(time.perf_counter() - start)
  traced = workload.trace(PROGRAMS[program][0], work)
  flops = costs.count_flops(traced.jaxpr, while_trips=programs.loop_calls(config))
  return point_of(axis, program, value, compiled, flops, statistics.median(seconds))


def make_turn(program: str, work: workload.Workload) -> tuple[jax.stages.Compiled, Callable[[], None]]:
  """Compile; return the first of the programs, and a function without arguments that runs all of them."""
  if program == "update":
    step = workload.compile_step(work)
    assert isinstance(step.accumulate, jax.stages.Compiled)
    return step.accumulate, bench_update.make_turn(work, step)
  compiled, key = workload.compiled("sample", work), noise.step_key(work.config.seed, "rollout", 0)
  return compiled, lambda: jax.block_until_ready(compiled(work.policies, work.experience.prompts, key, 0))


def point_of(
  axis: Axis, program: str, value: int, compiled: jax.stages.Compiled, flops: float, seconds: float | None
) -> Point:
  """Return a point with the memory that the compiler estimates."""
  memory = compiled.memory_analysis()
  assert memory is not None  # CPUs, GPUs and TPUs have one
  working = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return Point(axis.name, program, value, memory.argument_size_in_bytes, working, flops, seconds)


def make_devices(config: ConfigDict) -> timing.Contender:
  """Compile for meshes of virtual devices that share rows and weights; two cores cannot show their speed."""
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={NUM_DEVICES}"
  devices, points = jax.devices(), []
  for value in DEVICES.values:
    own = workload.changed(config, {"sharding.data": 1, "sharding.fsdp": value, "rollout.num_prompts": NUM_DEVICES})
    for program in DEVICES.programs:
      traced = [workload.trace_on(name, own, devices[:value]) for name in PROGRAMS[program]]
      compiled = [each.lower().compile() for each in traced]
      calls = programs.loop_calls(own)
      found = [each for part in compiled for each in costs.count_collectives(part.as_text() or "", while_trips=calls)]
      flops = costs.count_flops(traced[0].jaxpr, while_trips=calls) / value
      point = point_of(DEVICES, program, value, compiled[0], flops, None)
      times, size = sum(each.trips for each in found), sum(each.size * each.trips for each in found)
      points.append(point._replace(collectives=times, collective_bytes=size))
  return timing.Contender(lambda: None, facts={"points": points})


def draw(growth: Growth, path: pathlib.Path) -> None:
  """Plot seconds and working memory over every size; dashed: proportional to the operations, and to the size."""
  axes = (*AXES, DEVICES)
  figure, grid = plt.subplots(2, len(axes), figsize=(3.1 * len(axes), 5.6), layout="constrained")
  for column, axis in enumerate(axes):
    for number, program in enumerate(axis.programs):
      line = [point for point in growth.points if (point.axis, point.program) == (axis.name, program)]
      values = [point.value for point in line]
      color = f"C{number}"
      if axis is not DEVICES:
        seconds = [point.seconds for point in line if point.seconds is not None]
        expected = [seconds[-1] * point.flops / line[-1].flops for point in line]
        grid[0, column].plot(values, seconds, "o-", color=color, markersize=4, label=program)
        grid[0, column].plot(values, expected, "--", color=color, linewidth=0.9)
      else:
        sizes = [point.collective_bytes / 1e6 for point in line if point.collective_bytes is not None]
        grid[0, column].plot(values, sizes, "o-", color=color, markersize=4)
      memory = [point.working_bytes / 2**20 for point in line]
      power = -1 if axis is DEVICES else 1
      start = 0 if axis is DEVICES else -1
      grid[1, column].plot(values, memory, "o-", color=color, markersize=4)
      law = [memory[start] * (value / values[start]) ** power for value in values]
      grid[1, column].plot(values, law, "--", color=color, linewidth=0.9)
    for row, label in enumerate(("seconds", "working memory, MiB")):
      own = grid[row, column]
      if axis is DEVICES:
        label = ("communication of a device, MB", "working memory of a device, MiB")[row]
        own.set_yscale("symlog" if row == 0 else "log")
      else:
        own.set_yscale("log")
      own.set_xscale("log", base=2)
      own.set_xlabel(axis.name)
      own.set_ylabel(label)
      own.grid(alpha=0.3)
  figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, metadata={"Date": None})
  plt.close(figure)
