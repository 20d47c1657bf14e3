"""The mesh and the one table of axes: sizes that are left over, and mistakes in words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dmpo_jax import sharding
from launch import costs


def test_minus_one_takes_the_devices_that_are_left():
  assert dict(sharding.make_mesh(data=-1, tensor=4).shape) == {"data": 2, "fsdp": 1, "tensor": 4}


def test_samplers_may_have_a_mesh_of_their_own_over_the_same_devices():
  mesh, same = sharding.make_meshes(-1, 2, 1, rollout=dict(data=0, fsdp=0, tensor=0))
  assert mesh is same
  mesh, other = sharding.make_meshes(-1, 8, 1, rollout=dict(data=0, fsdp=1, tensor=2))
  assert dict(other.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
  assert mesh.devices.flatten().tolist() == other.devices.flatten().tolist()
  with pytest.raises(ValueError, match=r"sharding.rollout.data=3, sharding.rollout.fsdp=2, .* need 6 devices"):
    sharding.make_meshes(-1, 2, 1, rollout=dict(data=3, fsdp=0, tensor=0))


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
    (dict(data=3), "need 3 devices, 8 are there"),
    (dict(data=-1, fsdp=-1), "at most one of them may be -1"),
    (dict(data=-1, tensor=3), "need 6 devices, 8 are there"),
  ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(**sizes)


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
  assert sharding.constrain(jnp.ones((2, 2)), "rows", None).shape == (2, 2)
