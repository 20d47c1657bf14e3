"""Where arrays live: the mesh, and one table from logical axes to mesh axes.

Weights and activations have logical axes; this table alone maps them to mesh axes. Rows (prompts x rollouts x mask
samples) are sharded over `data` and `fsdp`, weights over `fsdp` and `tensor`. A laptop is a mesh of one device, so
nothing else in the package asks how many devices there are.
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
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import PyTreeDef
from jaxtyping import PyTree

from dmpo_jax.processes import HostShare as HostShare  # re-exported: how hosts share rows, beside how devices do

MESH_AXES = ("data", "fsdp", "tensor")

# logical axis -> mesh axes that it is sharded over
LOGICAL_AXES: dict[str, tuple[str, ...]] = {
  "batch": ("data", "fsdp"),  # activations: rows of a batch
  "gathered_batch": ("data",),  # activations: rows gathered over fsdp, for look-ups in weights sharded along d
  "embed": ("fsdp",),  # weights: the model width
  "heads": ("tensor",),  # weights and activations: query heads
  "kv_heads": ("tensor",),  # weights and activations: key/value heads
  "ffn": ("tensor",),  # weights and activations: feed-forward width
  "expert": ("fsdp",),  # weights: experts; a layer gathers all of them, a part of their width on each tensor shard
  "vocab": ("tensor",),  # weights and activations: vocabulary
  "act_embed": ("tensor",),  # activations: the model width of the residual stream
  "layers": (),  # weights: the scanned layer axis
  "rank": ("fsdp",),  # weights: the LoRA rank, if the adapter's other axis is not the model width
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Build the (data, fsdp, tensor) mesh over `devices` (default: all of them).

  Sizes are upper bounds: tensor takes at most the devices of a slice, fsdp those that tensor leaves, data the rest. One
  size may be -1: it takes the devices that the others leave. Only data spans several slices (by the devices'
  `slice_index`), as the network between slices is slow.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or another axis than data spans slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  num_slices = count_slices(devices)
  sizes = _fit((data, fsdp, tensor), len(devices), num_slices, "sharding")
  if num_slices == 1:  # a mesh axis may take part of a torus axis, such as 16 of 8 x 8 chips
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  else:
    within_slice, across_slices = (sizes[0] // num_slices, *sizes[1:]), (num_slices, 1, 1)
    grid = mesh_utils.create_hybrid_device_mesh(within_slice, across_slices, devices, allow_split_physical_axes=True)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def count_slices(devices: Sequence[jax.Device]) -> int:
  """Count the slices that devices belong to (TPU slices; for GPUs, nodes with fast links).

  Raises:
    ValueError: the slices have different sizes.
  """
  sizes = collections.Counter(getattr(device, "slice_index", None) or 0 for device in devices)
  if len(set(sizes.values())) > 1:
    raise ValueError(f"slices of {sorted(sizes.values())} devices make no mesh: they must have one size")
  return len(sizes)


def platform(mesh: Mesh) -> str:
  """Return the kind of the mesh's devices: cpu, tpu, cuda or rocm."""
  device = mesh.devices.flat[0]
  if device.platform != "gpu":
    return device.platform
  return "cuda" if "cuda" in device.client.platform_version else "rocm"


def make_meshes(
  data: int, fsdp: int, tensor: int, rollout: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> tuple[Mesh, Mesh]:
  """Build the mesh of the updates, and that of the samplers over the same devices in the same order.

  In that order a slice's devices are neighbours, so only data spans slices in the samplers' mesh, too.

  Args:
    data, fsdp, tensor, devices: see `make_mesh`.
    rollout: sizes of the samplers' mesh by axis; 0 means the updates' size.

  Raises:
    ValueError: the sizes of either mesh do not multiply to the number of devices.
  """
  mesh = make_mesh(data, fsdp, tensor, devices)
  requested = list(rollout_sizes(data, fsdp, tensor, rollout).values())
  sizes = _fit(requested, mesh.size, count_slices(mesh.devices.flatten().tolist()), "sharding.rollout")
  if sizes == mesh.axis_sizes:
    return mesh, mesh
  return mesh, Mesh(mesh.devices.reshape(sizes), MESH_AXES, axis_types=mesh.axis_types)


def rollout_sizes(data: int, fsdp: int, tensor: int, rollout: Mapping[str, int]) -> dict[str, int]:
  """Return the requested sizes of the samplers' mesh; see `make_meshes`."""
  return {axis: rollout[axis] or size for axis, size in zip(MESH_AXES, (data, fsdp, tensor), strict=True)}


def describe(mesh: Mesh, requested: Mapping[str, int]) -> str:
  """Describe a mesh in words, with the requested size of an axis if it is smaller."""
  sizes = []
  for axis, size in mesh.shape.items():
    sizes.append(f"{axis} {size}" + (f" ({requested[axis]} requested)" if requested[axis] > size else ""))
  return " ".join(sizes)


def describe_both(mesh: Mesh, rollout_mesh: Mesh, requested: Mapping[str, Any]) -> str:
  """Describe the meshes that `make_meshes(**requested)` built."""
  text = f"mesh {describe(mesh, requested)}"
  if rollout_mesh == mesh:
    return text
  return f"{text}, samplers' mesh {describe(rollout_mesh, rollout_sizes(**requested))}"


def _fit(sizes: Sequence[int], num_devices: int, num_slices: int, section: str) -> tuple[int, ...]:
  """Lower sizes to the devices available, replace -1 by what the others leave, and check that all devices are used.

  Args:
    section: the sizes' config section, for the message.
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
    remedy = f"sizes must multiply to {num_devices}; one of them may be -1, for the devices that the others leave"
    if -1 in sizes:
      remedy = f"the sizes that are not -1 must multiply to a divisor of {num_devices}"
    raise ValueError(f"{given} need {math.prod(fitted.values())} devices, there are {num_devices}: {remedy}")
  if fitted["data"] % num_slices:
    raise ValueError(
      f"{given}: {num_devices} devices are in {num_slices} slices, and only data may span slices: "
      f"set {section}.data to -1 or a multiple of {num_slices}"
    )
  return tuple(fitted.values())


def check_divides(mesh: Mesh, logical: str, path: str, size: int, section: str = "sharding") -> None:
  """Check that a size is divisible by the mesh axes of its logical axis, as JAX requires.

  Args:
    path: the size's config path, for the message.
    section: config section of the mesh's sizes.

  Raises:
    ValueError: it is not.
  """
  axes = LOGICAL_AXES[logical]
  num_shards = int(np.prod([mesh.shape[axis] for axis in axes]))
  if size % num_shards:
    names = " * ".join(f"{section}.{axis}" for axis in axes)
    raise ValueError(f"{path}={size} cannot be split over {names}={num_shards}: choose a divisor of {size}")


def spec(*logical: str | None) -> PartitionSpec:
  """Translate logical axis names (None: not sharded) to a PartitionSpec.

  Raises:
    ValueError: two dimensions would be sharded over the same mesh axis.
  """
  entries = [LOGICAL_AXES[name] if name else () for name in logical]
  used = [axis for entry in entries for axis in entry]
  if len(used) != len(set(used)):
    raise ValueError(f"logical axes {logical} would shard two dimensions over one mesh axis")
  return PartitionSpec(*(entry or None for entry in entries))


def replicated(mesh: Mesh) -> NamedSharding:
  """Return the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def everywhere(tree: PyTree) -> PyTree:
  """Copy arrays of the host to every device of the current mesh; do nothing if no mesh is set."""
  mesh = jax.sharding.get_mesh()
  return tree if mesh.empty else jax.device_put(tree, replicated(mesh))


def constrain(array: jax.Array, *logical: str | None) -> jax.Array:
  """Constrain an activation's sharding inside jit; do nothing if no mesh is set (`jax.set_mesh`)."""
  if jax.sharding.get_abstract_mesh().empty:
    return array
  return jax.lax.with_sharding_constraint(array, spec(*logical))


def split_rows(array: jax.Array, num_chunks: int, *axes: str | None) -> jax.Array:
  """Split rows [b, ...] into chunks [num_chunks, b / num_chunks, ...], each with equally many rows of every device.

  Args:
    axes: the logical axes of a row's first dimensions; the others are not sharded.
  """
  chunks = array.reshape(num_shares("batch"), num_chunks, -1, *array.shape[1:]).swapaxes(0, 1)
  return constrain(chunks.reshape(num_chunks, -1, *array.shape[1:]), None, "batch", *axes)


def join_rows(chunks: jax.Array, *axes: str | None) -> jax.Array:
  """Undo `split_rows`."""
  num_chunks, rows, *rest = chunks.shape
  by_device = chunks.reshape(num_chunks, num_shares("batch"), -1, *rest).swapaxes(0, 1)
  return constrain(by_device.reshape(num_chunks * rows, *rest), "batch", *axes)


def fill_rows(array: jax.Array) -> jax.Array:
  """Append copies of the last row until the devices of the current mesh divide the rows.

  At the start of a program this keeps rows evenly sharded throughout; the caller drops the copies' results. Copies
  rather than empty rows, so that a loop that runs until all rows are done takes no longer.
  """
  missing = -array.shape[0] % num_shares("batch")
  return jnp.concatenate([array, jnp.repeat(array[-1:], missing, axis=0)]) if missing else array


def pad_rows(array: jax.Array) -> jax.Array:
  """Append rows of zeros (for a mask: of True) until the devices of the current mesh divide the rows.

  They lie where the partitioner would pad by itself, so no other row moves to another device.
  """
  missing = -array.shape[0] % num_shares("batch")
  return jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1), constant_values=array.dtype == bool)


def num_shares(logical: str) -> int:
  """Count the shards of a logical axis on the current mesh; 1 if no mesh is set."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else int(np.prod([mesh.shape[axis] for axis in LOGICAL_AXES[logical]]))


def layout(boxed: PyTree, mesh: Mesh) -> PyTree:
  """Return the NamedSharding of each array in a tree of Flax partitioned boxes (or of their shapes)."""
  rules = [(name, axes or None) for name, axes in LOGICAL_AXES.items()]
  # documented, but not in the list that flax.linen exports
  return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)  # pyright: ignore[reportPrivateImportUsage]


def abstract(tree: PyTree) -> PyTree:
  """Describe arrays by shape, dtype and sharding, as needed to restore a checkpoint."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def move(tree: PyTree, mesh: Mesh) -> PyTree:
  """Reshard arrays to another mesh of the same devices, along the same logical axes, in one program.

  A tree that is already on that mesh, or on the host, is returned as it is.
  """
  arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
  is_there = all(isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh for x in arrays)
  return tree if is_there else moving(tree, mesh)(tree)


def moving(tree: PyTree, mesh: Mesh) -> jax.stages.Wrapped:
  """Jit the program of `move` for arrays, or their descriptions.

  By itself the compiler gathers an array whole on every device before it shards it along another dimension. So the
  program takes two steps: devices first exchange what will be sharded differently, then gather what will be copied.
  """
  leaves, structure = jax.tree.flatten(abstract(tree))
  return _moving(structure, tuple(leaves), mesh)


@functools.cache
def _moving(structure: PyTreeDef, leaves: tuple[jax.ShapeDtypeStruct, ...], mesh: Mesh) -> jax.stages.Wrapped:
  """Jit once for each structure: a new function for every call would be compiled for every call."""
  tree = structure.unflatten(leaves)
  halfway = jax.tree.map(lambda x: _halfway(x, mesh), tree)

  def program(tree: PyTree) -> PyTree:
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, halfway)

  return jax.jit(program, out_shardings=jax.tree.map(lambda x: NamedSharding(mesh, x.sharding.spec), tree))


def _halfway(array: Any, mesh: Mesh) -> NamedSharding:
  """Return the intermediate sharding: over the devices of the old one, along the dimensions of the new one."""
  before, after = array.sharding, NamedSharding(mesh, array.sharding.spec)
  cuts = sorted({*_strides(before.mesh), *_strides(mesh)})
  if any(high % low for low, high in itertools.pairwise(cuts)):
    return before
  # Both meshes coarsen one finer mesh: each of their axes is a product of neighbouring fine axes (named by strides).
  sizes = {str(low): high // low for low, high in itertools.pairwise(cuts)}
  fine = Mesh(mesh.devices.reshape([*sizes.values()][::-1]), [*sizes][::-1], axis_types=(AxisType.Auto,) * len(sizes))

  def parts(sharding: NamedSharding) -> list[list[str]]:
    bounds: dict[Any, tuple[int, int]] = dict(zip(MESH_AXES, itertools.pairwise(_strides(sharding.mesh)), strict=True))
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


def _strides(mesh: Mesh | AbstractMesh) -> list[int]:
  """Return the number of devices, then the distance of neighbours along each axis in the devices' order."""
  return [math.prod(mesh.axis_sizes[index:]) for index in range(len(MESH_AXES) + 1)]


def within(mesh: Mesh, program: Callable) -> Callable:
  """Wrap a jitted program so that it runs with `mesh` set and its arguments moved there."""

  def call(*args: Any) -> PyTree:
    moved = [move(arg, mesh) for arg in args]
    with jax.set_mesh(mesh):
      return program(*moved)

  return call
