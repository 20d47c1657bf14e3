"""Costs of programs: matrix products in loops and branches, and collectives by their loops' trip counts."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dmpo_jax.models.attention import attend
from launch.bench import costs

SQUARE = jnp.zeros((8, 8))


def flops(function, *args, **keywords):
  return costs.count_flops(jax.make_jaxpr(function)(*args), **keywords)


def test_products_are_counted_by_their_sizes():
  assert flops(lambda a, b: a @ b, jnp.zeros((2, 3)), jnp.zeros((3, 5))) == 2 * 2 * 3 * 5
  batched = jnp.zeros((4, 2, 3)), jnp.zeros((4, 3, 5))
  assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), *batched) == 4 * 2 * 2 * 3 * 5


def test_experts_multiply_each_row_once_forward_and_twice_back():
  rows, kernels, sizes = jnp.zeros((6, 3)), jnp.zeros((4, 3, 5)), jnp.array([1, 2, 0, 3])
  assert flops(jax.lax.ragged_dot, rows, kernels, sizes) == 2 * 6 * 3 * 5
  grad = jax.value_and_grad(lambda a, b: jax.lax.ragged_dot(a, b, sizes).sum(), (0, 1))
  assert flops(grad, rows, kernels) == 3 * 2 * 6 * 3 * 5


def test_loops_count_every_turn():
  one = 2 * 8**3

  def scanned(x):
    return jax.lax.scan(lambda x, _: (jax.jit(jnp.matmul)(x, x), None), x, length=7)[0]

  assert flops(scanned, SQUARE) == 7 * one
  assert flops(lambda x: jax.lax.fori_loop(0, 5, lambda _, x: scanned(x), x), SQUARE) == 35 * one

  def unknown(x):
    return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ x, x)

  assert flops(unknown, SQUARE, while_trips=4) == 4 * one

  def branched(x):
    return jax.lax.cond(x.sum() > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

  assert flops(branched, SQUARE) == 2 * one  # the dearer of two

  def switched(x):
    power = [lambda x, n=n: [x := x @ x for _ in range(n)][-1] for n in (1, 2, 3)]
    return jax.lax.fori_loop(0, 3, lambda i, x: jax.lax.switch(i, power, x), x)

  assert flops(switched, SQUARE) == 6 * one  # each of several its share


def test_a_kernel_counts_for_every_block():
  """Attention of 4 heads and 2 rows, whose 130 queries and keys are one block of 256."""
  arrays = [jnp.zeros((2, 130, 4, 8))] * 3
  kernel = flops(lambda *arrays: attend(*arrays, None, "splash"), *arrays)
  assert kernel == 2 * 4 * 2 * (2 * 256 * 256 * 8)
  plain = flops(lambda *arrays: attend(*arrays, None), *arrays)
  assert plain == 2 * 4 * 2 * (2 * 130 * 130 * 8)


def test_what_is_recomputed_is_counted_again():
  def loss(x):
    return jax.checkpoint(lambda x: jnp.sin(x @ x))(x).sum()

  forward, both = flops(loss, SQUARE), flops(jax.value_and_grad(loss), SQUARE)
  assert both == 4 * forward  # forward, forward again, and a product for each of its two factors


def test_what_nothing_reads_is_not_counted():
  """A gradient without its value needs no result of the forward pass that is computed again."""

  def loss(x):
    return jax.checkpoint(lambda x: jnp.sin(x @ x))(x).sum()

  assert flops(jax.grad(loss), SQUARE) == 3 * flops(loss, SQUARE)


def test_collectives_of_a_compiled_program():
  """A product whose inner axis is split needs a sum over devices in each of five turns."""
  mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec("x", None))

  def program(x, w):
    def turn(x, _):
      x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, "x")))
      return jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, PartitionSpec())), None

    return jax.lax.scan(turn, x, length=5)[0]

  given = jax.ShapeDtypeStruct((16, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=rows)
  found = costs.count_collectives(jax.jit(program).lower(*given).compile().as_text())
  summed = [c for c in found if c.kind == "all-reduce"]
  assert [(c.shapes, c.size, c.trips) for c in summed] == [(((16, 16),), 16 * 16 * 4, 5)]
  others = sum(c.size * c.trips for c in found if c.kind != "all-reduce")
  assert costs.link_bytes(found) == 2 * 5 * 16 * 16 * 4 + others


HLO = """HloModule jit_f

%wide.condition (p: (s32[], bf16[4])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(32)
  %p = (s32[], bf16[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}

%data.condition (p: (s32[], bf16[4])) -> pred[] {
  %p = (s32[], bf16[4]{0}) parameter(0)
  ROOT %any = pred[] get-tuple-element(%p), index=1
}

%started (a: bf16[1,4]) -> bf16[8,4] {
  %a = bf16[1,4]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[8,4]{1,0:T(8,128)} all-gather(%a), channel_id=3, dimensions={0}
}

%finished (a: bf16[1,4]) -> bf16[8,4] {
  %a = bf16[1,4]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,4]{1,0:T(8,128)} all-gather(%a), channel_id=3, dimensions={0}
}

%inner (p: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %p = (s32[], bf16[4]{0}) parameter(0)
  ROOT %reduce-scatter.1 = f32[2]{0} reduce-scatter(f32[16]{0} %x), channel_id=5, dimensions={0}
}

%body (p: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %p = (s32[], bf16[4]{0}) parameter(0)
  %f = bf16[8,4]{1,0} fusion(%a), kind=kCustom, calls=%started
  %g = bf16[8,4]{1,0} fusion(%a), kind=kCustom, calls=%finished
  ROOT %while.2 = (s32[], bf16[4]{0}) while(%p), condition=%data.condition, body=%inner
}

ENTRY %main (a: bf16[4]) -> bf16[4] {
  %ag = (bf16[4]{0}, bf16[32]{0}) all-gather-start(%a), channel_id=7, dimensions={0}
  %done = bf16[32]{0} all-gather-done(%ag)
  %c = bf16[8,2]{1,0} conditional(%i, %x, %x, %x), branch_computations={%first, %second, %third}
  ROOT %while.1 = (s32[], bf16[4]{0}) while(%t), condition=%wide.condition, body=%body
}
"""
BRANCH = """
%{0} (a: bf16[4]) -> bf16[8,2] {{
  ROOT %while.{1} = bf16[8,2] while(%a), condition=%wide.condition, body=%inside.{1}
}}

%inside.{1} (a: bf16[4]) -> bf16[8,2] {{
  ROOT %all-to-all.{1} = bf16[8,2]{{1,0}} all-to-all(%a), channel_id=1{1}, dimensions={{0}}
}}
"""


def test_each_branch_of_several_counts_its_share():
  """A conditional in a loop of 32: three branches, entered 10 times each, with a collective in a loop of its own."""
  branches = "".join(BRANCH.format(name, number) for number, name in enumerate(("first", "second", "third")))
  inside = HLO.replace(
    "ROOT %while.2",
    "%c = bf16[8,2] conditional(%i, %x, %x, %x), branch_computations={%first, %second, %third}\n  ROOT %while.2",
  ).replace("  %c = bf16[8,2]{1,0} conditional", "  %d = bf16[8,2]{1,0} negate")
  found = [c for c in costs.count_collectives(inside + branches, while_trips=3) if c.kind == "all-to-all"]
  assert [c.trips for c in found] == [10 * 32] * 3


SCATTERED = """
%all-reduce-scatter.7.clone.1 (input: bf16[16,4]) -> bf16[16,1] {
  %input = bf16[16,4]{1,0} parameter(0)
  %all-reduce.1 = bf16[16,4]{1,0} all-reduce(%input), channel_id=20, to_apply=%add
  ROOT %dynamic-slice.1 = bf16[16,1]{1,0} dynamic-slice(%all-reduce.1, %zero, %share), dynamic_slice_sizes={16,1}
}
"""


def test_a_sum_that_is_scattered_is_no_all_reduce():
  """As a TPU's program has it; the same sum, kept whole, is sent twice."""
  fused = "  %s = bf16[16,1]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.7.clone.1\n  %ag = "
  found = costs.count_collectives(SCATTERED + HLO.replace("  %ag = ", fused))
  assert [c[:4] for c in found if c.shapes == ((16, 4),)] == [("reduce-scatter", ((16, 4),), 128, 1)]
  kept = costs.count_collectives((SCATTERED + HLO.replace("  %ag = ", fused)).replace("all-reduce-scatter", "sum"))
  assert costs.link_bytes(kept) - costs.link_bytes(found) == 128


def test_collectives_in_loops_and_split_in_two():
  collectives = costs.count_collectives(HLO, while_trips=3)
  found = {c.shapes: c[:4] for c in collectives}
  assert len(found) == len(collectives) == 3
  assert found[((8, 4),)] == ("all-gather", ((8, 4),), 64, 32)
  assert found[((16,),)] == ("reduce-scatter", ((16,),), 64, 96)  # 32 times at most 3
  assert found[((32,),)] == ("all-gather", ((32,),), 64, 1)
  assert np.isclose(costs.link_bytes(collectives), 64 * 32 + 64 * 96 + 64)


def test_what_goes_between_slices_is_no_traffic_of_links():
  """As a program for two slices has it: the hosts of a device's slice send for it."""
  send = (
    "  %send.1 = (f32[1,4,128]{2,1,0:T(4,128)}, u32[], token[]) send(%x, %t), channel_id=3, is_host_transfer=true, "
    'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}\n  %ag = '
  )
  collectives = costs.count_collectives(HLO.replace("  %ag = ", send))
  assert [c[1:] for c in collectives if c.kind == "between slices"] == [(((1, 4, 128),), 2048, 1)]
  assert costs.link_bytes(collectives) == costs.link_bytes(costs.count_collectives(HLO))
