"""A TPU slice that need not exist yet, and what a program costs on it by the real TPU compiler and a roofline.

It needs no TPU, only the package libtpu (`make libtpu`, part of `make test`), and minutes of one core for each program.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmpo_jax import files
from dmpo_jax.models.transformer import Transformer
from launch.bench import costs, programs

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

  @property
  def room(self) -> float:
    """GiB of a device that programs may take."""
    return (1 - MARGIN) * self.chip.hbm

  def fits(self, cost: Cost) -> bool:
    """Return whether a program leaves the margin of memory free."""
    return not cost.is_refused and cost.peak <= self.room


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


def cost_of(name: str, config: ConfigDict, where: Slice, kept: epath.Path | None = None) -> Cost:
  """Compile one program for a slice and return its cost.

  Args:
    kept: a folder of costs; a program whose cost is there is not compiled again.

  Raises:
    ValueError: the mesh of the configuration does not fit the slice.
  """
  model, meshes = programs.place(config, where.devices)
  calls = programs.loop_calls(config)
  traced = programs.trace(name, config, model, meshes)
  flops = costs.count_flops(traced.jaxpr, while_trips=calls)
  lowered = traced.lower(lowering_platforms=("tpu",))
  path = None if kept is None else kept / f"{name}_{_identify(lowered, calls)}.json"
  if path is not None and path.exists():
    said = Said(**files.read_object(path))
  else:
    said = _ask(lowered, calls)
    if path is not None:
      path.parent.mkdir(parents=True, exist_ok=True)
      files.write_whole(path, files.to_json(said._asdict()) + "\n")
  collectives = [costs.Collective(*each) for each in said.collectives]
  by_kind: dict[str, dict[str, float]] = {}
  for each in collectives:
    total = by_kind.setdefault(each.kind, {"times": 0, "bytes": 0.0})
    total["times"] += each.trips
    total["bytes"] += each.size * each.trips
  return Cost(
    program=name,
    arguments=said.arguments,
    peak=said.peak,
    is_refused=said.is_refused,
    flops=flops,
    collectives=by_kind,
    vocabulary=[list(shape) for each in collectives for shape in each.shapes if _is_of_logits(shape, model, meshes[0])],
    seconds_compute=flops / (len(where.devices) * where.chip.peak * MXU_SHARE),
    seconds_links=costs.link_bytes(collectives) / (where.chip.links * LINK_SHARE),
    seconds_compiling=said.seconds,
  )


class Said(NamedTuple):
  """What the compiler says of a program, sizes in GiB of one device."""

  arguments: float
  peak: float
  is_refused: bool
  collectives: list[costs.Collective]
  seconds: float  # that it took to compile


def _identify(lowered: jax.stages.Lowered, calls: int) -> str:
  """Hash a program and the compiler that is to compile it."""
  library = epath.Path(os.environ.get("TPU_LIBRARY_PATH", ".")).parent.parent
  versions = jax.__version__, *sorted(path.name for path in library.glob("*.dist-info"))
  text = "\n".join([lowered.as_text(), str(calls), str(OPTIONS), str(versions)])
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _ask(lowered: jax.stages.Lowered, calls: int) -> Said:
  """Compile a program."""
  start = time.monotonic()
  try:
    compiled = lowered.compile(compiler_options=OPTIONS)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return Said(0.0, refused_memory(str(error)), True, [], time.monotonic() - start)
  memory = compiled.memory_analysis()
  assert memory is not None  # the TPU compiler has one
  collectives = costs.count_collectives(compiled.as_text() or "", while_trips=calls)
  sizes = memory.argument_size_in_bytes / GIB, memory.peak_memory_in_bytes / GIB
  return Said(*sizes, False, collectives, time.monotonic() - start)


def _is_of_logits(shape: tuple[int, ...], model: Transformer, mesh: Mesh) -> bool:
  """Return whether a shape has the vocabulary or a device's share of it as an axis, and no axis of d_model."""
  size = model.config.embedding_size
  sizes = {size, size // mesh.shape["tensor"]}
  others = [axis for axis in shape if axis not in sizes]
  return len(others) < len(shape) and model.config.d_model not in others


def refused_memory(message: str) -> float:
  """Read the GiB of a program, or of its temporaries, from the compiler's refusal; 1e9 where it does not say."""
  used = re.search(r"(?:Used |temporaries \()([\d.]+)([GM])\b", message)
  return float(used[1]) / (1 if used[2] == "G" else 1024) if used else 1e9
