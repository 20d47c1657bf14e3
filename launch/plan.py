"""Compile a configuration's programs for a TPU slice that need not exist yet, and say what they take.

    python -m launch.plan --config=configs/llada_8b.py --topology=v5e:4x4 [--sweep]

The gradient step (`accumulate`: the gradient of one microbatch; `apply`: the optimizer), the sampler of the rollouts
and the scores that weigh them are compiled by the real TPU compiler, which needs no TPU but the package libtpu
(`make libtpu`, part of `make test`). A program takes minutes of one core.
Where samplers have a mesh of their own, so is the program that lays the parameters out for it: its collectives are what
that costs, its memory beyond the arguments what stays taken while rollouts are sampled.

--sweep finds the largest train.microbatch_prompts whose gradient step fits.
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
from absl import app, flags
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags
from rich.console import Console
from rich.table import Table

from dmpo_jax import files, sharding
from dmpo_jax.config import ConfigError, command, validate
from dmpo_jax.hub.pretrained import filled
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.run import buckets, progress
from launch.bench import costs, programs
from launch.bench.programs import PROGRAMS

GIB = 2**30

# Without it XLA cuts products into many small ones with permutes between: twice the time to compile, and no faster.
OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
# What libtpu would ask a TPU machine about, and complain of where it gets no answer; no program depends on it. And it
# would refuse to be loaded twice on a machine, as two processes cannot share a TPU: none is touched here.
NO_MACHINE = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# The compiler refuses by an early estimate of what a program takes, and a run holds more than one program's arrays.
MARGIN = 0.1
MXU_SHARE = 0.5  # of the peak that matrix products reach: assumed; 0.45 to 0.6 is usual on these chips
LINK_SHARE = 0.7  # of the links' peak that collectives reach: assumed


class Chip(NamedTuple):
  """What its data sheet says of a chip."""

  name: str
  hbm: float  # GiB that programs may use
  peak: float  # bf16 floating-point operations a second
  links: float  # bytes a second, all links of a chip together


CHIPS = {
  "TPU v4": Chip("v4", 31.75, 275e12, 300e9),
  "TPU v5 lite": Chip("v5e", 15.75, 197e12, 200e9),
  "TPU v5": Chip("v5p", 95.0, 459e12, 600e9),
  "TPU v6 lite": Chip("v6e", 31.25, 918e12, 448e9),
}


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one program takes. Sizes are of one device."""

  program: str
  arguments: float  # GiB
  peak: float  # GiB, arguments included
  is_refused: bool  # the compiler found no way to fit it; peak is its estimate, which may be of temporaries alone
  flops: float  # floating-point operations of all devices
  collectives: dict[str, dict[str, float]]  # by kind: how often, and bytes
  vocabulary: list[list[int]]  # shapes of collectives of logits' size: there should be none
  seconds_compute: float
  seconds_links: float
  seconds_compiling: float

  @property
  def seconds(self) -> float:
    """Of the roofline: communication runs beside the products."""
    return max(self.seconds_compute, self.seconds_links)


class Slice(NamedTuple):
  """The devices that are planned for."""

  topology: str
  devices: Sequence[jax.Device]
  chip: Chip

  def fits(self, cost: Cost) -> bool:
    """Whether a program leaves the margin free."""
    return not cost.is_refused and cost.peak <= (1 - MARGIN) * self.chip.hbm


def find_slice(topology: str, num_slices: int = 1) -> Slice:
  """Describe a slice such as v5e:4x4 or v5p:2x2x1, or several of them, by what the TPU compiler knows of it.

  Raises:
    ValueError: there is no such slice, or no libtpu.
  """
  for name, value in NO_MACHINE.items():
    os.environ.setdefault(name, value)
  library = pathlib.Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"  # where `make libtpu` puts it
  if library.exists():
    os.environ.setdefault("TPU_LIBRARY_PATH", str(library))
  from jax.experimental import topologies  # after the variables are set

  several = {"num_slices": num_slices} if num_slices > 1 else {}
  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices
  except Exception as error:  # as RuntimeError, ValueError or XLA's own, by what is wrong
    hint = "run `make libtpu`" if "TPU support not installed" in str(error) else "give one such as v5e:4x4 or v5p:2x2x1"
    raise ValueError(f"--topology={topology}: {hint} ({str(error).splitlines()[0][:200]})") from error
  kind = devices[0].device_kind
  if kind not in CHIPS:
    raise ValueError(f"--topology={topology}: no data sheet of {kind!r}; there are {', '.join(CHIPS)}")
  return Slice(f"{num_slices} x {topology}" if num_slices > 1 else topology, devices, CHIPS[kind])


def cost_of(name: str, config: ConfigDict, where: Slice) -> Cost:
  """Compile one program for a slice and count what it takes.

  Raises:
    ValueError: the configuration does not fit the slice's mesh.
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
  collectives = costs.count_collectives(compiled.as_text(), while_trips=calls)
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
  """Whether a shape has the vocabulary, or a device's share of it, beside other axes than the model's width."""
  size = model.config.embedding_size
  sizes = {size, size // mesh.shape["tensor"]}
  others = [axis for axis in shape if axis not in sizes]
  return len(others) < len(shape) and model.config.d_model not in others


def _refused(name: str, message: str, flops: float, where: Slice, seconds: float) -> Cost:
  """Read from the compiler's refusal how much the program would take, or its temporaries alone."""
  used = re.search(r"(?:Used |temporaries \()([\d.]+)([GM])\b", message)
  peak = float(used[1]) / (1 if used[2] == "G" else 1024) if used else float("inf")
  return Cost(name, float("nan"), peak, True, flops, {}, [], float("nan"), float("nan"), seconds)


def _spread(config: ConfigDict, where: Slice) -> tuple[int, int]:
  """Count the rows of a prompt in a gradient step, and the shares that rows are spread over."""
  mesh, _ = programs.make_meshes(config, where.devices)
  return config.rollout.group_size * config.objective.num_mask_samples, mesh.shape["data"] * mesh.shape["fsdp"]


def largest_microbatch(
  config: ConfigDict, where: Slice, log: Callable[[str], None], begin: Callable[[str], None]
) -> tuple[int, Cost]:
  """Find the largest train.microbatch_prompts whose gradient step leaves the margin; 0 if none does.

  Memory grows evenly with the microbatch, so two sizes tell where to look; what is reported has been compiled. `begin`
  is told what is compiled next, `log` what came out.
  """
  rows, shards = _spread(config, where)
  step = max(1, shards // rows)
  tried: dict[int, Cost] = {}

  def fits(size: int) -> bool:
    if size not in tried:
      own = ConfigDict(config.to_dict())
      own.rollout.num_prompts, own.train.microbatch_prompts = 2 * size, size  # two, so that gradients are accumulated
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
  """Lay out the programs' costs."""
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
  """Say how long a buffer takes by the roofline, and under which assumptions."""
  times = {name: programs.calls_of(name, config) for name in found}
  seconds = {name: times[name] * cost.seconds for name, cost in found.items()}
  listed = " + ".join(f"{times[name]} x {name} {cost.seconds:.2f} s" for name, cost in found.items())
  return (
    f"a buffer of {config.rollout.num_prompts} prompts x {config.rollout.group_size} rollouts: {listed} "
    f"= {sum(seconds.values()):.1f} s\n"
    f"assumed: {MXU_SHARE:.0%} of {where.chip.peak / 1e12:.0f} TFLOP/s, {LINK_SHARE:.0%} of "
    f"{where.chip.links / 1e9:.0f} GB/s, communication beside products; loops that end by their data at their longest"
  )


def describe_polls(found: dict[str, Cost], config: ConfigDict) -> str:
  """Say how long the devices work between two looks for a notice of preemption, by the roofline."""
  names = {"sample": "rollouts", "score": "scores", "accumulate": "a microbatch"}
  seconds = {what: found[name].seconds for name, what in names.items() if name in found}
  if "sample" in found:
    rows = (config.rollout.chunk_prompts or config.rollout.num_prompts) * config.rollout.group_size
    own = config.eval.batch_size * config.eval.num_samples
    seconds["evaluation"] = found["sample"].seconds * own / rows
  listed = ", ".join(f"{what} {value:.1f} s" for what, value in seconds.items())
  return f"a poll for preemption at least every {max(seconds.values(), default=0):.1f} s: {listed}"


def run(config: ConfigDict, topology: str, names: Sequence[str], is_sweep: bool, out: str, num_slices: int = 1) -> None:
  """Compile and print; a mistake is a ValueError."""
  where, console, config = find_slice(topology, num_slices), Console(width=140), filled(config)
  if not config.tokenizer.path and not config.model.init_from:
    checked = ConfigDict(config.to_dict())
    checked.tokenizer.path = "."  # a checkpoint is asked for before training, not here
    validate(checked)
  else:
    validate(config)
  model, meshes = programs.place(config, where.devices)
  attention = model.config.attention
  console.print(
    f"attention: {attention}, {sharding.describe_both(*meshes, config.sharding.to_dict())}", highlight=False
  )
  result: dict[str, Any] = {"topology": where.topology, "attention": attention, "mesh": dict(meshes[0].shape)}
  if is_sweep:
    with progress.Progress("sweeping", 1) as shown:
      size, cost = largest_microbatch(config, where, log=console.print, begin=shown.part)
      shown.advance()
    result["largest_microbatch_prompts"] = size
    result["sweep"] = dataclasses.asdict(cost)
    (rows, shards), whole = _spread(config, where), config.rollout.num_prompts
    on_chip = size * rows / len(where.devices)
    console.print(f"largest train.microbatch_prompts that fits: {size} ({on_chip:g} rows a chip, {cost.peak:.2f} GiB)")
    usable = [part for part in range(1, min(size, whole) + 1) if whole % part == 0 and part * rows % shards == 0]
    console.print(f"of those that divide rollout.num_prompts={whole}: {max(usable, default='none')}")
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
    wide = [shape for cost in found.values() for shape in cost.vocabulary]
    if wide:
      console.print(f"collectives of the size of logits, which cost dearly: {wide}")
  result["programs"] = {name: dataclasses.asdict(cost) for name, cost in found.items()}
  if out:
    files.write_whole(epath.Path(out), files.to_json(result, indent=2) + "\n")


def define_flags() -> None:
  """Declare the command's flags; not on import, as every command has its own."""
  config_flags.DEFINE_config_file("config", None, "Configuration file; override a key with --config.section.key=value.")
  flags.adopt_module_key_flags(progress)
  flags.DEFINE_string("topology", None, "The slice, such as v5e:4x4, v5p:2x2x1 or v6e:4x4.")
  flags.DEFINE_integer("slices", 1, "How many such slices, which data is split over.", lower_bound=1)
  flags.DEFINE_list("programs", list(PROGRAMS), "Which programs to compile.")
  flags.DEFINE_boolean("sweep", False, "Find the largest train.microbatch_prompts that fits.")
  flags.DEFINE_string("out", "", "A JSON file for the figures.")
  flags.mark_flags_as_required(["config", "topology"])


def main(argv: Sequence[str]) -> None:
  """Plan what the flags name; a mistake ends in one message and exit code 2."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  given = flags.FLAGS
  unknown = sorted(set(given.programs) - {*PROGRAMS, ""})
  try:
    if unknown:
      raise ConfigError(f"--programs: {', '.join(unknown)} is none of {', '.join(PROGRAMS)}")
    buckets.check({"config.model.init_from": given.config.model.init_from}, {"--out": given.out})
    names = [name for name in given.programs if name]
    run(given.config, given.topology, names, given.sweep, given.out, given.slices)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")  # a TPU that is there is not needed, and stays free
  define_flags()
  command.run(main)
