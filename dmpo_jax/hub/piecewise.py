"""Write Orbax checkpoints piece by piece, for arrays that do not fit into memory.

The result is an ordinary checkpoint, which `params.load_params` reads. Its chunks are the pieces, so a host of a pod
that needs a part of a stacked array reads only that part.
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
from jaxtyping import PyTree
from orbax.checkpoint import type_handlers

from dmpo_jax import digests

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class PiecewiseArray:
  """An array that is read in pieces.

  Args:
    shape, dtype: of the whole array.
    chunk: shape of a piece; the last ones along an axis may be shorter.
    pieces: yields each piece's index, aligned to the chunks, and its values.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  chunk: tuple[int, ...]
  pieces: Callable[[], Iterator[tuple[Index, np.ndarray]]]

  @property
  def size(self) -> int:
    """The number of elements."""
    return math.prod(self.shape)


class _Handler(type_handlers.NumpyHandler):
  """Lets Orbax save `PiecewiseArray`s like numpy arrays, with one piece in memory at a time."""

  def __init__(self) -> None:
    super().__init__(deepcopy_host_arrays=False)  # there is nothing to copy
    self._turn = asyncio.Lock()
    self._is_unfinished = False

  async def _open_and_write(self, value: PiecewiseArray, tspec: dict[str, Any], ts_context: ts.Context) -> None:
    tspec["metadata"]["chunks"] = list(value.chunk)  # Orbax writes a numpy array as one chunk
    async with self._turn:
      if self._is_unfinished:  # after a failure, start no further array while the folder is removed
        return
      self._is_unfinished = True
      array = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
      for index, piece in value.pieces():
        await array[index].write(piece)
      self._is_unfinished = False


def save_piecewise(path: epath.PathLike, arrays: PyTree) -> None:
  """Save a tree of `PiecewiseArray`s to a folder, whole or not at all."""
  unused = type_handlers.ArrayHandler(array_metadata_store=None)  # without it Orbax logs a warning
  registry = type_handlers.create_type_handler_registry((PiecewiseArray, _Handler()), (jax.Array, unused))
  handler = digests.with_digests(ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_zarr3=False))
  path = epath.Path(path)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(path if path.is_absolute() else path.resolve(), arrays, custom_metadata=digests.mark())
