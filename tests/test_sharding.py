"""The mesh and the one table of axes: sizes that are left over, and mistakes in words."""

import jax
import pytest
from jax.sharding import PartitionSpec

from dmpo_jax import sharding


def test_minus_one_takes_the_devices_that_are_left():
  assert dict(sharding.make_mesh(data=-1, tensor=4).shape) == {"data": 2, "fsdp": 1, "tensor": 4}


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


def test_constraints_need_no_mesh():
  assert sharding.constrain(jax.numpy.ones((2, 2)), "rows", None).shape == (2, 2)
