"""The mesh and the one table of axes: sizes that are left over, and mistakes in words."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dmpo_jax import sharding
from launch.bench import costs


def test_minus_one_takes_the_devices_that_are_left():
  assert dict(sharding.make_mesh(data=-1, tensor=4).shape) == {"data": 2, "fsdp": 1, "tensor": 4}


def test_sizes_that_do_not_multiply_to_the_devices_are_told_what_would():
  with pytest.raises(ValueError, match=r"need 3 devices, there are 8: sizes must multiply to 8; one of them may be -1"):
    sharding.make_mesh(data=3)
  with pytest.raises(ValueError, match=r"need 6 devices, there are 8: the sizes that are not -1 .* to a divisor of 8$"):
    sharding.make_mesh(data=-1, fsdp=3)


def test_samplers_may_have_a_mesh_of_their_own_over_the_same_devices():
  mesh, same = sharding.make_meshes(-1, 2, 1, rollout=dict(data=0, fsdp=0, tensor=0))
  assert mesh is same
  mesh, other = sharding.make_meshes(-1, 8, 1, rollout=dict(data=0, fsdp=1, tensor=2))
  assert dict(other.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
  assert mesh.devices.flatten().tolist() == other.devices.flatten().tolist()
  with pytest.raises(ValueError, match=r"sharding.rollout.data=3, sharding.rollout.fsdp=2, .* need 6 devices"):
    sharding.make_meshes(-1, 2, 1, rollout=dict(data=3, fsdp=0, tensor=0))


@pytest.mark.parametrize(
  ("num_devices", "asked", "sizes", "text"),
  [
    (8, (-1, 4, 1), (2, 4, 1), "data 2 fsdp 4 tensor 1"),
    (8, (-1, 16, 1), (1, 8, 1), "data 1 fsdp 8 (16 requested) tensor 1"),
    (4, (1, 16, 1), (1, 4, 1), "data 1 fsdp 4 (16 requested) tensor 1"),
    (8, (2, 16, 2), (1, 4, 2), "data 1 (2 requested) fsdp 4 (16 requested) tensor 2"),
    (4, (-1, 2, 8), (1, 1, 4), "data 1 fsdp 1 (2 requested) tensor 4 (8 requested)"),
    (1, (8, 2, 2), (1, 1, 1), "data 1 (8 requested) fsdp 1 (2 requested) tensor 1 (2 requested)"),
    (8, (4, -1, 16), (1, 1, 8), "data 1 (4 requested) fsdp 1 tensor 8 (16 requested)"),
  ],
)
def test_a_size_is_as_many_devices_as_there_are_at_most(num_devices, asked, sizes, text):
  mesh = sharding.make_mesh(*asked, devices=jax.devices()[:num_devices])
  assert mesh.axis_sizes == sizes
  assert sharding.describe(mesh, dict(zip(sharding.MESH_AXES, asked, strict=True))) == text


def test_both_meshes_are_described_if_they_differ():
  asked = dict(data=-1, fsdp=16, tensor=1, rollout=dict(data=0, fsdp=1, tensor=16))
  text = "mesh data 1 fsdp 8 (16 requested) tensor 1"
  meshes = sharding.make_meshes(**asked)
  assert sharding.describe_both(meshes[0], meshes[0], asked) == text
  own = "samplers' mesh data 1 fsdp 1 tensor 8 (16 requested)"
  assert sharding.describe_both(*meshes, asked) == f"{text}, {own}"


def test_arrays_move_from_mesh_to_mesh_along_the_same_axes():
  mesh, other = sharding.make_meshes(1, 8, 1, rollout=dict(data=2, fsdp=1, tensor=4))
  values = np.arange(64.0).reshape(8, 8)
  array = jax.device_put(values, NamedSharding(mesh, sharding.spec("embed", "ffn")))
  moved = sharding.move({"kernel": array}, other)["kernel"]
  np.testing.assert_array_equal(moved, values)
  assert array.addressable_shards[0].data.shape == (1, 8)
  assert moved.addressable_shards[0].data.shape == (8, 2)
  assert sharding.move(moved, other) is moved
  assert sharding.moving(moved, mesh) is sharding.moving(moved + 1, mesh)  # compiled once


@pytest.mark.parametrize(
  ("sizes", "rollout", "most"),  # most that a device receives by one collective, of the array's 8 x 16 numbers
  [
    ((1, 8, 1), (2, 1, 4), 32),  # what is split over fsdp goes over to tensor, then two groups copy it
    ((2, 4, 1), (2, 1, 4), 32),
    ((1, 4, 2), (1, 2, 4), 16),
    ((1, 8, 1), (8, 1, 1), 128),  # every device has all of it in the end
  ],
)
def test_no_array_is_gathered_whole_where_it_stays_split(sizes, rollout, most):
  mesh, other = sharding.make_meshes(*sizes, rollout=dict(zip(sharding.MESH_AXES, rollout, strict=True)))
  values = np.arange(128.0, dtype=np.float32).reshape(8, 16)
  array = jax.device_put(values, NamedSharding(mesh, sharding.spec("embed", "ffn")))
  with jax.set_mesh(mesh):
    moving = sharding.moving(array, other)
    np.testing.assert_array_equal(moving(array), values)
    text = moving.lower(array).compile().as_text()
  collectives = costs.count_collectives(text)
  assert 0 < max(each.size for each in collectives) <= 4 * most


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    (dict(data=3), "need 3 devices, there are 8"),
    (dict(data=-1, fsdp=-1), "at most one of them may be -1"),
    (dict(data=-1, tensor=3), "need 6 devices, there are 8"),
    (dict(data=1, fsdp=2), "sharding.data=1, sharding.fsdp=2, sharding.tensor=1 need 2 devices, there are 8"),
  ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(**sizes)


def slices(num_slices, num_chips):
  """Stand-ins for chips of several slices, in an order that mixes them."""
  chips = [mock.create_autospec(jax.Device, instance=True) for _ in range(num_slices * num_chips)]
  for index, chip in enumerate(chips):
    chip.id, chip.slice_index, chip.process_index = index, index % num_slices, index % num_slices
    chip.platform = chip.device_kind = "cpu"
  return chips


@pytest.mark.parametrize(
  ("num_slices", "asked", "sizes"),
  [(2, (-1, 4, 1), (2, 4, 1)), (2, (-1, 2, 2), (2, 2, 2)), (2, (4, -1, 1), (4, 2, 1)), (2, (-1, 16, 1), (2, 4, 1)),
   (4, (-1, 2, 1), (8, 2, 1)), (4, (-1, 1, 16), (4, 1, 4))],
)  # fmt: skip
def test_only_data_is_split_over_slices(num_slices, asked, sizes):
  rollout = dict(data=0, fsdp=1, tensor=2)
  mesh, rollout_mesh = sharding.make_meshes(*asked, rollout=rollout, devices=slices(num_slices, 4))
  assert mesh.axis_sizes == sizes
  for own in (mesh, rollout_mesh):
    assert sorted(chip.id for chip in own.devices.flat) == list(range(num_slices * 4))
    parts = own.devices.reshape(num_slices, -1)  # along data, which is the first axis
    assert [{chip.slice_index for chip in part} for part in parts] == [{index} for index in range(num_slices)]
  assert mesh.devices.flatten().tolist() == rollout_mesh.devices.flatten().tolist()


@pytest.mark.parametrize(
  ("asked", "rollout", "message"),
  [
    ((1, -1, 1), {}, "8 devices are in 2 slices, .*: set sharding.data to -1 or a multiple of 2"),
    ((-1, 4, 1), dict(data=1, fsdp=-1), "set sharding.rollout.data to -1 or a multiple of 2"),
    ((-1, 3, 1), {}, "need 6 devices, there are 8"),
  ],
)
def test_a_mesh_that_splits_more_than_data_over_slices_is_refused(asked, rollout, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_meshes(*asked, rollout=dict.fromkeys(sharding.MESH_AXES, 0) | rollout, devices=slices(2, 4))


def test_slices_of_different_sizes_are_refused():
  with pytest.raises(ValueError, match=r"slices of \[3, 4\] devices"):
    sharding.make_mesh(-1, devices=slices(2, 4)[:-1])


def test_a_dimension_that_the_mesh_does_not_divide_is_refused_by_its_name():
  mesh = sharding.make_mesh(fsdp=2, tensor=4)
  sharding.check_divides(mesh, "heads", "model.num_heads", 8)
  sharding.check_divides(mesh, "layers", "model.num_layers", 3)
  with pytest.raises(ValueError, match=r"model.num_heads=6 cannot be split over sharding.tensor=4"):
    sharding.check_divides(mesh, "heads", "model.num_heads", 6)


def test_two_dimensions_over_one_axis_are_refused():
  assert sharding.spec("embed", "heads") == PartitionSpec(("fsdp",), ("tensor",))
  with pytest.raises(ValueError, match="over one mesh axis"):
    sharding.spec("heads", "ffn")


def test_rows_are_filled_up_to_what_devices_share():
  array, keys = jnp.arange(10.0).reshape(5, 2), jax.random.split(jax.random.key(0), 5)
  assert sharding.fill_rows(array) is array
  with jax.set_mesh(sharding.make_mesh(data=2, fsdp=4)):
    np.testing.assert_array_equal(sharding.fill_rows(array), [*array, *[array[-1]] * 3])
    filled = jax.random.key_data(sharding.fill_rows(keys))
    np.testing.assert_array_equal(filled, jax.random.key_data(keys)[np.array([0, 1, 2, 3, 4, 4, 4, 4])])
    np.testing.assert_array_equal(sharding.pad_rows(array), [*array, *np.zeros((3, 2))])
    assert sharding.pad_rows(array > 20).tolist() == [[False] * 2] * 5 + [[True] * 2] * 3


def test_constraints_need_no_mesh():
  assert sharding.constrain(jnp.ones((2, 2)), "batch", None).shape == (2, 2)
