"""Spans of an axis: read or overwritten from one place in all rows, or from a place of each row's own."""

import jax
from jaxtyping import Array, Int, Shaped


def take_span(array: Shaped[Array, "..."], start: Int[Array, "*b"] | int, length: int) -> Shaped[Array, "..."]:
  """Cut `length` positions out of axis 1 of rows [b, c, ...].

  Args:
    start: of the span: one for all rows, or one for each.
  """

  def cut(array: Shaped[Array, "..."], start: Int[Array, ""] | int, axis: int = 0) -> Shaped[Array, "..."]:
    return jax.lax.dynamic_slice_in_dim(array, start, length, axis)

  return jax.vmap(cut)(array, start) if _is_of_rows(start) else cut(array, start, 1)


def put_span(
  array: Shaped[Array, "..."], span: Shaped[Array, "..."], start: Int[Array, "*b"] | int, axis: int = 1
) -> Shaped[Array, "..."]:
  """Overwrite a span of an axis; the axis before it is that of the rows.

  Args:
    start: of the span: one for all rows, or one for each.
  """

  def put(
    array: Shaped[Array, "..."], span: Shaped[Array, "..."], start: Int[Array, ""] | int, axis: int = axis - 1
  ) -> Shaped[Array, "..."]:
    return jax.lax.dynamic_update_slice_in_dim(array, span, start, axis)

  if not _is_of_rows(start):
    return put(array, span, start, axis)
  return jax.vmap(put, (axis - 1, axis - 1, 0), axis - 1)(array, span, start)


def _is_of_rows(start: Int[Array, "*b"] | int) -> bool:
  return isinstance(start, jax.Array) and start.ndim > 0
