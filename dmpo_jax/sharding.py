"""Where arrays live: the mesh, and one table from logical axes to mesh axes.

Weights and activations name their axes logically; this table alone says which mesh axis each is split over.
Rows (prompts x rollouts x mask samples) are split over `data` and `fsdp`; weights over `fsdp` and `tensor`. A laptop
is a mesh of one device, so nothing else in the package asks how many devices there are.
"""

import collections
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dmpo_jax.processes import HostShare as HostShare  # found here too: rows of hosts beside rows of chips

MESH_AXES = ("data", "fsdp", "tensor")

# logical axis -> mesh axes it is split over
LOGICAL_AXES: dict[str, tuple[str, ...]] = {
  "batch": ("data", "fsdp"),  # activations: rows of a batch
  "gathered_batch": ("data",),  # activations: rows while the shards of a weight's width look at all of them
  "embed": ("fsdp",),  # weights: the model width
  "heads": ("tensor",),  # weights and activations: query heads
  "kv_heads": ("tensor",),  # weights and activations: key/value heads
  "ffn": ("tensor",),  # weights and activations: feed-forward width
  "vocab": ("tensor",),  # weights and activations: vocabulary
  "act_embed": ("tensor",),  # activations: the model width between layers
  "layers": (),  # weights: the scanned layer axis
  "rank": ("fsdp",),  # weights: the LoRA rank, where the adapter's other axis is not the model width
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Build the (data, fsdp, tensor) mesh over `devices` (default: all of them).

  A size is as many as there are, at most: tensor takes at most all devices of a slice, fsdp those that tensor leaves,
  data what both leave. One of the sizes may be -1: it takes the devices that the others leave. Several slices, whose
  devices know their `slice_index`, are neighbours along data, as the network between them is slow.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or split something else than data over slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  num_slices = count_slices(devices)
  sizes = _fit((data, fsdp, tensor), len(devices), num_slices, "sharding")
  if num_slices == 1:  # an axis may be a part of one of the torus's, such as 16 of 8 x 8 chips
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  else:
    of_slice, across = (sizes[0] // num_slices, *sizes[1:]), (num_slices, 1, 1)
    grid = mesh_utils.create_hybrid_device_mesh(of_slice, across, devices, allow_split_physical_axes=True)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def count_slices(devices: Sequence[jax.Device]) -> int:
  """Count the slices (of TPUs; of GPUs: groups with fast links) that devices are of.

  Raises:
    ValueError: they are of different sizes.
  """
  sizes = collections.Counter(getattr(device, "slice_index", None) or 0 for device in devices)
  if len(set(sizes.values())) > 1:
    raise ValueError(f"slices of {sorted(sizes.values())} devices are no mesh: they have to be of one size")
  return len(sizes)


def platform(mesh: Mesh) -> str:
  """Name what the mesh's devices are: cpu, tpu, cuda or rocm."""
  device = mesh.devices.flat[0]
  if device.platform != "gpu":
    return device.platform
  return "cuda" if "cuda" in device.client.platform_version else "rocm"


def make_meshes(
  data: int, fsdp: int, tensor: int, rollout: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> tuple[Mesh, Mesh]:
  """Build the mesh of the updates, and that of the samplers over the same devices in the same order.

  In that order a slice's devices are neighbours, so the samplers' mesh has slices along data, too.

  Args:
    data, fsdp, tensor, devices: see `make_mesh`.
    rollout: sizes of the samplers' mesh by axis, of which 0 stands for what is given for the updates'.

  Raises:
    ValueError: the sizes of either do not multiply to the number of devices.
  """
  mesh, asked = make_mesh(data, fsdp, tensor, devices), rollout_sizes(data, fsdp, tensor, rollout)
  own = _fit(list(asked.values()), mesh.size, count_slices(mesh.devices.flatten().tolist()), "sharding.rollout")
  if own == mesh.axis_sizes:
    return mesh, mesh
  return mesh, Mesh(mesh.devices.reshape(own), MESH_AXES, axis_types=mesh.axis_types)


def rollout_sizes(data: int, fsdp: int, tensor: int, rollout: Mapping[str, int]) -> dict[str, int]:
  """Give the sizes that are asked for the samplers' mesh; see `make_meshes`."""
  return {axis: rollout[axis] or size for axis, size in zip(MESH_AXES, (data, fsdp, tensor), strict=True)}


def describe(mesh: Mesh, asked: Mapping[str, int]) -> str:
  """Describe a mesh in words, and where it has fewer devices along an axis than were asked for, say so."""
  sizes = []
  for axis, size in mesh.shape.items():
    sizes.append(f"{axis} {size}" + (f" ({asked[axis]} asked for)" if asked[axis] > size else ""))
  return " ".join(sizes)


def describe_both(mesh: Mesh, rollout_mesh: Mesh, asked: Mapping[str, Any]) -> str:
  """Describe the meshes that `make_meshes` has made of `asked`."""
  text = f"mesh {describe(mesh, asked)}"
  if rollout_mesh == mesh:
    return text
  return f"{text}, samplers' mesh {describe(rollout_mesh, rollout_sizes(**asked))}"


def _fit(sizes: Sequence[int], num_devices: int, num_slices: int, section: str) -> tuple[int, ...]:
  """Lower sizes to the devices that there are, replace -1 by those that the others leave, and check that all are used.

  Args:
    section: of the configuration, for the message.
  """
  given = ", ".join(f"{section}.{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
  if list(sizes).count(-1) > 1:
    raise ValueError(f"{given}: at most one of them may be -1 (the devices that the others leave)")
  fitted, left = dict(zip(MESH_AXES, sizes, strict=True)), num_devices // num_slices
  for axis in reversed(MESH_AXES):
    left *= num_slices if axis == "data" else 1
    fitted[axis] = min(fitted[axis], left)
    left //= max(fitted[axis], 1)
  rest = num_devices // math.prod(size for size in fitted.values() if size != -1)
  fitted = {axis: max(rest, 1) if size == -1 else size for axis, size in fitted.items()}
  if math.prod(fitted.values()) != num_devices:
    mend = f"sizes have to multiply to {num_devices}; one of them may be -1, for the devices that the others leave"
    if -1 in sizes:
      mend = f"the sizes that are not -1 have to multiply to a divisor of {num_devices}"
    raise ValueError(f"{given} need {math.prod(fitted.values())} devices, {num_devices} are there: {mend}")
  if fitted["data"] % num_slices:
    raise ValueError(
      f"{given}: {num_devices} devices are in {num_slices} slices, and data alone is split over slices: "
      f"set {section}.data to -1 or a multiple of {num_slices}"
    )
  return tuple(fitted.values())


def check_divides(mesh: Mesh, logical: str, path: str, size: int, section: str = "sharding") -> None:
  """Check that the mesh axes of a logical axis divide it evenly, as JAX asks of every array's dimension.

  Args:
    path: the configuration's name for the size, for the message; section: of the mesh's sizes.

  Raises:
    ValueError: they do not.
  """
  axes = LOGICAL_AXES[logical]
  parts = int(np.prod([mesh.shape[axis] for axis in axes]))
  if size % parts:
    names = " * ".join(f"{section}.{axis}" for axis in axes)
    raise ValueError(f"{path}={size} cannot be split over {names}={parts}: choose a divisor of {size}")


def spec(*logical: str | None) -> PartitionSpec:
  """Translate logical axis names (None: not split) to a PartitionSpec."""
  entries = [LOGICAL_AXES[name] if name else () for name in logical]
  used = [axis for entry in entries for axis in entry]
  if len(used) != len(set(used)):
    raise ValueError(f"logical axes {logical} would split two dimensions over one mesh axis")
  return PartitionSpec(*(entry or None for entry in entries))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def everywhere(tree: Any) -> Any:
  """Put arrays of the host on every device of the mesh that is set, as replicated results lie; none set: do nothing."""
  mesh = jax.sharding.get_mesh()
  return tree if mesh.empty else jax.device_put(tree, replicated(mesh))


def constrain(array: jax.Array, *logical: str | None) -> jax.Array:
  """Pin an activation's layout inside jit; does nothing where no mesh is set (`jax.set_mesh`)."""
  if jax.sharding.get_abstract_mesh().empty:
    return array
  return jax.lax.with_sharding_constraint(array, spec(*logical))


def split_rows(array: jax.Array, num_chunks: int, *axes: str | None) -> jax.Array:
  """Split rows [b, ...] into groups [groups, b / groups, ...], each with as many rows of every device.

  Args:
    axes: the logical axes of a row's first dimensions; the others are whole on a device.
  """
  parts = array.reshape(num_shares("batch"), num_chunks, -1, *array.shape[1:]).swapaxes(0, 1)
  return constrain(parts.reshape(num_chunks, -1, *array.shape[1:]), None, "batch", *axes)


def join_rows(chunks: jax.Array, *axes: str | None) -> jax.Array:
  """Undo `split_rows`."""
  num_chunks, rows, *rest = chunks.shape
  parts = chunks.reshape(num_chunks, num_shares("batch"), -1, *rest).swapaxes(0, 1)
  return constrain(parts.reshape(num_chunks * rows, *rest), "batch", *axes)


def fill_rows(array: jax.Array) -> jax.Array:
  """Add copies of the last row until every device of the mesh that is set has as many.

  A program that begins so spreads its rows evenly all the way; results of the copies are to be cut off. A copy rather
  than an empty row, as a loop over rows then ends when it would.
  """
  missing = -array.shape[0] % num_shares("batch")
  return jnp.concatenate([array, jnp.repeat(array[-1:], missing, axis=0)]) if missing else array


def pad_rows(array: jax.Array) -> jax.Array:
  """Add rows of zeros (of True to a mask) until every device has as many.

  They lie where the partitioner leaves room by itself, so no other row moves to another device.
  """
  missing = -array.shape[0] % num_shares("batch")
  return jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1), constant_values=array.dtype == bool)


def num_shares(logical: str) -> int:
  """Count the parts that a logical axis is split into on the mesh that is set; 1 where none is."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else int(np.prod([mesh.shape[axis] for axis in LOGICAL_AXES[logical]]))


def layout(boxed: Any, mesh: Mesh) -> Any:
  """Give the NamedSharding of each array of a tree of Flax partitioned boxes (or their abstract shapes)."""
  rules = [(name, axes or None) for name, axes in LOGICAL_AXES.items()]
  return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)


def abstract(tree: Any) -> Any:
  """Describe arrays by shape, dtype and sharding alone: what a checkpoint is restored onto."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def move(tree: Any, mesh: Mesh) -> Any:
  """Lay arrays out over another mesh of the same devices, along the same axes, by one program that gathers and cuts.

  A tree that lies there already, or on the host, is returned as it is.
  """
  is_there = all(not isinstance(x, jax.Array) or x.sharding.mesh == mesh for x in jax.tree.leaves(tree))
  return tree if is_there else moving(tree, mesh)(tree)


def moving(tree: Any, mesh: Mesh) -> jax.stages.Wrapped:
  """Jit the program of `move` for arrays, or their descriptions.

  Left to itself the compiler gathers an array whole on every device before it cuts it along another dimension. So it is
  told to go halfway first: devices exchange what is to be cut otherwise, and then gather what is to be copied.
  """
  leaves, structure = jax.tree.flatten(abstract(tree))
  return _moving(structure, tuple(leaves), mesh)


@functools.cache
def _moving(structure: Any, leaves: tuple[jax.ShapeDtypeStruct, ...], mesh: Mesh) -> jax.stages.Wrapped:
  """Jit it once: a function of its own for every call would be compiled for every call."""
  tree = structure.unflatten(leaves)
  halfway = jax.tree.map(lambda x: _halfway(x, mesh), tree)

  def program(tree: Any) -> Any:
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, halfway)

  return jax.jit(program, out_shardings=jax.tree.map(lambda x: NamedSharding(mesh, x.sharding.spec), tree))


def _halfway(array: Any, mesh: Mesh) -> NamedSharding:
  """Split an array over the devices that it is split over now, along the dimensions that it is to be split along."""
  before, after = array.sharding, NamedSharding(mesh, array.sharding.spec)
  cuts = sorted({*_strides(before.mesh), *_strides(mesh)})
  if any(high % low for low, high in itertools.pairwise(cuts)):
    return before
  # Both meshes are one finer mesh, of whose neighbouring axes, named by their strides, each of their axes is a product.
  sizes = {str(low): high // low for low, high in itertools.pairwise(cuts)}
  fine = Mesh(mesh.devices.reshape([*sizes.values()][::-1]), [*sizes][::-1], axis_types=(AxisType.Auto,) * len(sizes))

  def parts(sharding: NamedSharding) -> list[list[str]]:
    bounds = dict(zip(MESH_AXES, itertools.pairwise(_strides(sharding.mesh)), strict=True))
    return [
      [str(cut) for axis in axes for cut in cuts[::-1] if bounds[axis][1] <= cut < bounds[axis][0]]
      for axes in ((entry,) if isinstance(entry, str) else entry or () for entry in sharding.spec)
    ]

  old, new = parts(before), parts(after)
  of_old, of_new = ({part for entry in entries for part in entry} for entries in (old, new))
  entries = [
    [part for part in was if part in becomes or part not in of_new]
    + [part for part in becomes if part in of_old and part not in was]
    for was, becomes in zip(old, new, strict=True)
  ]
  is_even = all(
    size % math.prod(sizes[part] for part in entry) == 0 for size, entry in zip(array.shape, entries, strict=False)
  )
  return NamedSharding(fine, PartitionSpec(*(tuple(entry) or None for entry in entries))) if is_even else before


def _strides(mesh: Mesh) -> list[int]:
  """Give the number of devices, then how far apart neighbours along each axis lie in their order."""
  return [math.prod(mesh.axis_sizes[index:]) for index in range(len(MESH_AXES) + 1)]


def within(mesh: Mesh, program: Callable) -> Callable:
  """Wrap a jitted program to run with `mesh` set, and its arguments there, whichever mesh is set around it."""

  def call(*args: Any) -> Any:
    args = [move(arg, mesh) for arg in args]
    with jax.set_mesh(mesh):
      return program(*args)

  return call
