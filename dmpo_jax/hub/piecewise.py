"""Orbax checkpoints written piece by piece, for arrays that are never in memory as a whole.

What comes out is an ordinary checkpoint: `params.load_params` reads it. Its chunks are the pieces, so hosts of a
pod that need a part of a stacked array read that part's pieces and not all layers.
"""

import asyncio
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint import type_handlers

from dmpo_jax import digests

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class PiecewiseArray:
  """An array by the pieces that it is read in.

  Args:
    shape, dtype: of the whole.
    chunk: shape of a piece; those at an axis's end may be shorter.
    pieces: yields each piece's place, aligned to the chunks, and its values.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  chunk: tuple[int, ...]
  pieces: Callable[[], Iterator[tuple[Index, np.ndarray]]]

  @property
  def size(self) -> int:
    """The number of its elements."""
    return math.prod(self.shape)


class _Handler(type_handlers.NumpyHandler):
  """Lets Orbax save `PiecewiseArray`s as it saves arrays of numpy; one piece is in memory at one time."""

  def __init__(self) -> None:
    super().__init__(deepcopy_host_arrays=False)  # there is nothing to copy
    self._turn = asyncio.Lock()
    self._is_unfinished = False

  async def _open_and_write(self, value: PiecewiseArray, tspec: dict[str, Any], ts_context: ts.Context) -> None:
    tspec["metadata"]["chunks"] = list(value.chunk)  # Orbax makes one chunk of an array of numpy
    async with self._turn:
      if self._is_unfinished:  # whoever removes what was written must not meet an array that is only now begun
        return
      self._is_unfinished = True
      array = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
      for index, piece in value.pieces():
        await array[index].write(piece)
      self._is_unfinished = False


def save_piecewise(path: epath.PathLike, arrays: Any) -> None:
  """Save a tree of `PiecewiseArray`s to a folder of its own, whole or not at all."""
  unused = type_handlers.ArrayHandler(array_metadata_store=None)  # without one Orbax warns that it stores less
  registry = type_handlers.create_type_handler_registry((PiecewiseArray, _Handler()), (jax.Array, unused))
  handler = digests.with_digests(ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_zarr3=False))
  path = epath.Path(path)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(path if path.is_absolute() else path.resolve(), arrays, custom_metadata=digests.mark())
