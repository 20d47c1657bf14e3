"""Compile the programs of a configuration for a TPU slice that need not exist yet, and print their costs.

    python -m launch.plan --config=configs/llada_8b.py --topology=v5e:4x4 [--sweep]

The real TPU compiler compiles the gradient step (`accumulate`: the gradient of one microbatch; `apply`: the optimizer),
the sampler of the rollouts (`sample`) and their log-probs (`score`). It needs no TPU, only the package libtpu
(`make libtpu`, part of `make test`), and minutes of one core for each program. Where the samplers have a mesh of their
own, `move` is the program that copies the parameters there: its collectives are the cost of the copy, and its memory
beyond the arguments stays in use while rollouts are sampled.

--sweep finds the largest train.microbatch_prompts that fits.
"""

import dataclasses
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags
from rich.console import Console
from rich.table import Table

from dmpo_jax import files, sharding
from dmpo_jax.config import ConfigError
from dmpo_jax.hub.pretrained import filled
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.run import buckets, progress
from launch import commands
from launch.bench import costs, programs
from launch.bench.programs import PROGRAMS

GIB = 2**30

# Without it XLA cuts products into many small ones with permutes in between, which take twice as long to compile and
# are no faster.
OPTIONS: dict[str, str | bool] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
# libtpu asks the machine for these and complains where it is no TPU machine; no program depends on them. The last lets
# several processes load it, which cannot share a TPU: none is used here.
NO_MACHINE = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# The compiler refuses programs by an early estimate, and a run holds the arrays of more than one program.
MARGIN = 0.1
MXU_SHARE = 0.5  # assumed share of the peak that matrix products reach; 0.45 to 0.6 is usual on these chips
LINK_SHARE = 0.7  # assumed share of the peak of the links that collectives reach


class Chip(NamedTuple):
  """Figures of the data sheet of a chip."""

  name: str
  hbm: float  # GiB for programs
  peak: float  # bf16 floating-point operations per second
  links: float  # bytes per second of all links of a chip together


CHIPS = {
  "TPU v4": Chip("v4", 31.75, 275e12, 300e9),
  "TPU v5 lite": Chip("v5e", 15.75, 197e12, 200e9),
  "TPU v5": Chip("v5p", 95.0, 459e12, 600e9),
  "TPU v6 lite": Chip("v6e", 31.25, 918e12, 448e9),
}


@dataclasses.dataclass(frozen=True)
class Cost:
  """The cost of one program; sizes are those of one device."""

  program: str
  arguments: float  # GiB
  peak: float  # GiB, arguments included
  is_refused: bool  # the compiler could not fit it; peak is its estimate, perhaps only of temporaries
  flops: float  # floating-point operations of all devices
  collectives: dict[str, dict[str, float]]  # by kind: times and bytes
  vocabulary: list[list[int]]  # shapes of collectives of the size of logits, of which there should be none
  seconds_compute: float
  seconds_links: float
  seconds_compiling: float

  @property
  def seconds(self) -> float:
    """Return the time by the roofline, with communication beside matrix products."""
    return max(self.seconds_compute, self.seconds_links)


class Slice(NamedTuple):
  """The devices of a plan."""

  topology: str
  devices: Sequence[jax.Device]
  chip: Chip

  def fits(self, cost: Cost) -> bool:
    """Return whether a program leaves the margin of memory free."""
    return not cost.is_refused and cost.peak <= (1 - MARGIN) * self.chip.hbm


def find_slice(topology: str, num_slices: int = 1) -> Slice:
  """Describe one or several slices, such as v5e:4x4 or v5p:2x2x1, as the TPU compiler knows them.

  Raises:
    ValueError: there is no such slice, or libtpu is not installed.
  """
  for name, value in NO_MACHINE.items():
    os.environ.setdefault(name, value)
  library = pathlib.Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"  # of `make libtpu`
  if library.exists():
    os.environ.setdefault("TPU_LIBRARY_PATH", str(library))
  from jax.experimental import topologies  # after the variables are set

  several: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
  if set(topology.partition(":")[2].split("x")) == {"1"}:  # a host of one chip; by default one has four
    several["chips_per_host_bounds"] = [1, 1, 1]
  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices
  except Exception as error:  # RuntimeError, ValueError or an error of XLA
    hint = "run `make libtpu`" if "TPU support not installed" in str(error) else "give one such as v5e:4x4 or v5p:2x2x1"
    raise ValueError(f"--topology={topology}: {hint} ({str(error).splitlines()[0][:200]})") from error
  kind = devices[0].device_kind
  if kind not in CHIPS:
    raise ValueError(f"--topology={topology}: the data sheet of {kind!r} is missing; those of {', '.join(CHIPS)} exist")
  return Slice(f"{num_slices} x {topology}" if num_slices > 1 else topology, devices, CHIPS[kind])


def cost_of(name: str, config: ConfigDict, where: Slice) -> Cost:
  """Compile one program for a slice and return its cost.

  Raises:
    ValueError: the mesh of the configuration does not fit the slice.
  """
  start = time.monotonic()
  model, meshes = programs.place(config, where.devices)
  calls = config.sampler.steps * config.sampler.block_length // config.sampler.completion_length
  traced = programs.trace(name, config, model, meshes)
  flops = costs.count_flops(traced.jaxpr, while_trips=calls)
  try:
    compiled = traced.lower(lowering_platforms=("tpu",)).compile(compiler_options=OPTIONS)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return _refused(name, str(error), flops, where, time.monotonic() - start)
  memory = compiled.memory_analysis()
  assert memory is not None  # the TPU compiler has one
  collectives = costs.count_collectives(compiled.as_text() or "", while_trips=calls)
  by_kind: dict[str, dict[str, float]] = {}
  for each in collectives:
    total = by_kind.setdefault(each.kind, {"times": 0, "bytes": 0.0})
    total["times"] += each.trips
    total["bytes"] += each.size * each.trips
  return Cost(
    program=name,
    arguments=memory.argument_size_in_bytes / GIB,
    peak=memory.peak_memory_in_bytes / GIB,
    is_refused=False,
    flops=flops,
    collectives=by_kind,
    vocabulary=[list(shape) for each in collectives for shape in each.shapes if _is_of_logits(shape, model, meshes[0])],
    seconds_compute=flops / (len(where.devices) * where.chip.peak * MXU_SHARE),
    seconds_links=costs.link_bytes(collectives) / (where.chip.links * LINK_SHARE),
    seconds_compiling=time.monotonic() - start,
  )


def _is_of_logits(shape: tuple[int, ...], model: Transformer, mesh: Mesh) -> bool:
  """Return whether a shape has the vocabulary or a device's share of it as an axis, and no axis of d_model."""
  size = model.config.embedding_size
  sizes = {size, size // mesh.shape["tensor"]}
  others = [axis for axis in shape if axis not in sizes]
  return len(others) < len(shape) and model.config.d_model not in others


def _refused(name: str, message: str, flops: float, where: Slice, seconds: float) -> Cost:
  """Read the memory of a program, or of its temporaries, from the compiler's refusal."""
  used = re.search(r"(?:Used |temporaries \()([\d.]+)([GM])\b", message)
  peak = float(used[1]) / (1 if used[2] == "G" else 1024) if used else float("inf")
  return Cost(name, float("nan"), peak, True, flops, {}, [], float("nan"), float("nan"), seconds)


def _spread(config: ConfigDict, where: Slice) -> tuple[int, int]:
  """Return the rows of a prompt in a gradient step, and the number of shards of the rows."""
  mesh, _ = programs.make_meshes(config, where.devices)
  return config.rollout.group_size * config.objective.num_mask_samples, mesh.shape["data"] * mesh.shape["fsdp"]


def largest_microbatch(
  config: ConfigDict, where: Slice, log: Callable[[str], None], begin: Callable[[str], None]
) -> tuple[int, Cost]:
  """Find the largest train.microbatch_prompts whose gradient step fits (0: none), and its cost.

  Memory grows linearly with the microbatch, so two sizes show where to search; the reported one has been compiled.

  Args:
    begin: gets the name of what is compiled next.
    log: gets a line about each result.
  """
  rows, shards = _spread(config, where)
  step = max(1, shards // rows)
  tried: dict[int, Cost] = {}

  def fits(size: int) -> bool:
    if size not in tried:
      own = ConfigDict(config.to_dict())
      own.rollout.num_prompts, own.train.microbatch_prompts = (
        2 * size,
        size,
      )  # two are accumulated
      begin(f"microbatch_prompts {size}")
      tried[size] = cost_of("accumulate", own, where)
      log(f"microbatch_prompts {size:4}: {tried[size].peak:6.2f} GiB, {'fits' if where.fits(tried[size]) else 'no'}")
    return where.fits(tried[size])

  if not fits(step):
    return 0, tried[step]
  fits(2 * step)
  slope = (tried[2 * step].peak - tried[step].peak) / step
  room = (1 - MARGIN) * where.chip.hbm - tried[step].peak
  guess = step * max(1, int((step + room / max(slope, 1e-6)) / step))
  while not fits(guess):
    guess -= step
  while guess + step not in tried and fits(guess + step):
    guess += step
  return guess, tried[guess]


def table(costs_of: Sequence[Cost], where: Slice) -> Table:
  """Lay out the costs of the programs."""
  layout = Table(title=f"{where.topology}: {len(where.devices)} chips of {where.chip.hbm} GiB")
  for column in ("program", "arguments", "peak", "of HBM", "fits", "PFLOP", "collectives", "products", "links"):
    layout.add_column(column, justify="left" if column in ("program", "collectives") else "right")
  for cost in costs_of:
    kinds = [f"{kind} {row['times']:,.0f}x {row['bytes'] / 1e9:,.1f} GB" for kind, row in cost.collectives.items()]
    layout.add_row(
      cost.program,
      f"{cost.arguments:.2f} GiB",
      f"{cost.peak:.2f} GiB",
      f"{cost.peak / where.chip.hbm:.0%}",
      "refused" if cost.is_refused else "yes" if where.fits(cost) else "no",
      f"{cost.flops / 1e15:.2f}",
      "\n".join(kinds),
      f"{cost.seconds_compute:.2f} s",
      f"{cost.seconds_links:.2f} s",
    )
  return layout


def describe_iteration(found: dict[str, Cost], config: ConfigDict, where: Slice) -> str:
  """Estimate the time of a buffer by the roofline, and state the assumptions."""
  times = {name: programs.calls_of(name, config) for name in found}
  seconds = {name: times[name] * cost.seconds for name, cost in found.items()}
  listed = " + ".join(f"{times[name]} x {name} {cost.seconds:.2f} s" for name, cost in found.items())
  return (
    f"a buffer of {config.rollout.num_prompts} prompts x {config.rollout.group_size} rollouts: {listed} "
    f"= {sum(seconds.values()):.1f} s\n"
    f"assumed: {MXU_SHARE:.0%} of {where.chip.peak / 1e12:.0f} TFLOP/s, {LINK_SHARE:.0%} of "
    f"{where.chip.links / 1e9:.0f} GB/s, communication beside products; loops that may stop early run to their end"
  )


def describe_polls(found: dict[str, Cost], config: ConfigDict) -> str:
  """Estimate by the roofline how long the devices work between two polls for a notice of preemption."""
  names = {"sample": "rollouts", "score": "log-probs", "accumulate": "a microbatch"}
  seconds = {what: found[name].seconds for name, what in names.items() if name in found}
  if "sample" in found:
    rows = config.rollout.num_prompts * config.rollout.group_size / programs.calls_of("sample", config)
    seconds["evaluation"] = found["sample"].seconds * config.eval.batch_size * config.eval.num_samples / rows
  listed = ", ".join(f"{what} {value:.1f} s" for what, value in seconds.items())
  return f"a poll for preemption at least every {max(seconds.values(), default=0):.1f} s: {listed}"


def run(config: ConfigDict, where: Slice, names: Sequence[str], is_sweep: bool) -> dict[str, Any]:
  """Compile and print; return the figures."""
  console = Console(width=140)
  model, meshes = programs.place(config, where.devices)
  attention = model.config.attention
  layout = sharding.describe_both(*meshes, config.sharding.to_dict())
  console.print(f"attention: {attention}, {layout}", highlight=False)
  result: dict[str, Any] = {"topology": where.topology, "attention": attention, "mesh": dict(meshes[0].shape)}
  if is_sweep:
    result |= _sweep(config, where, console)
  found = {}
  with progress.Progress("compiling", len(names), unit="programs") as shown:
    for name in names:
      if programs.is_needed(name, config):
        shown.part(name)
        found[name] = cost_of(name, config, where)
        console.print(f"{name} compiled in {found[name].seconds_compiling:.0f} s", highlight=False)
      else:
        console.print(f"{name}: not needed")
      shown.advance()
  if found:
    console.print(table(list(found.values()), where))
    console.print(describe_iteration(found, config, where), highlight=False, soft_wrap=True)
    console.print(describe_polls(found, config), highlight=False, soft_wrap=True)
  if wide := [shape for cost in found.values() for shape in cost.vocabulary]:
    console.print(f"collectives of the size of logits, which are expensive: {wide}")
  return result | {"programs": {name: dataclasses.asdict(cost) for name, cost in found.items()}}


def _sweep(config: ConfigDict, where: Slice, console: Console) -> dict[str, Any]:
  with progress.Progress("sweeping", 1) as shown:
    size, cost = largest_microbatch(config, where, log=console.print, begin=shown.part)
    shown.advance()
  (rows, shards), whole = _spread(config, where), config.rollout.num_prompts
  on_chip = size * rows / len(where.devices)
  console.print(f"largest train.microbatch_prompts that fits: {size} ({on_chip:g} rows a chip, {cost.peak:.2f} GiB)")
  usable = [part for part in range(1, min(size, whole) + 1) if whole % part == 0 and part * rows % shards == 0]
  console.print(f"largest that divides rollout.num_prompts={whole}: {max(usable, default='none')}")
  return {"largest_microbatch_prompts": size, "sweep": dataclasses.asdict(cost)}


def define_flags() -> None:
  """Declare the command's flags; not on import, as every command has its own."""
  config_flags.DEFINE_config_file("config", None, "Configuration file; override a key with --config.section.key=value.")
  flags.adopt_module_key_flags(progress)
  flags.DEFINE_string("topology", None, "The slice, such as v5e:4x4, v5p:2x2x1 or v6e:4x4; v5e:1x1 is one chip.")
  flags.DEFINE_integer("slices", 1, "Number of such slices; data is split over them.", lower_bound=1)
  flags.DEFINE_list("programs", list(PROGRAMS), "Programs to compile.")
  flags.DEFINE_boolean("sweep", False, "Find the largest train.microbatch_prompts that fits.")
  flags.DEFINE_string("out", "", "A JSON file for the figures.")
  flags.mark_flags_as_required(["config", "topology"])


def main() -> None:
  """Plan what the flags name."""
  given = flags.FLAGS
  names = [name for name in given.programs if name]
  if unknown := sorted(set(names) - {*PROGRAMS}):
    raise ConfigError(f"--programs: {', '.join(unknown)} is none of {', '.join(PROGRAMS)}")
  buckets.check({"config.model.init_from": given.config.model.init_from}, {"--out": given.out})
  where, config = find_slice(given.topology, given.slices), filled(given.config)
  programs.check(config)
  result = run(config, where, names, given.sweep)
  if given.out:
    files.write_whole(epath.Path(given.out), files.to_json(result, indent=2) + "\n")


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")  # leaves a TPU free
  define_flags()
  commands.start(main)
