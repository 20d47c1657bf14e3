"""A buffer in chunks: what of it is sampled and scored at one time, and how the results of chunks are joined again.

The processes look for a notice of preemption before each chunk, so its size decides how often they do.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from dmpo_jax import lengths
from dmpo_jax.run.preemption import Preempted, check_preemption
from dmpo_jax.structs import Prompts


class Chunk(NamedTuple):
  """Some prompts of a buffer, and of each of them some rollouts."""

  prompts: slice
  rollouts: slice

  def of_rollouts(self, arrays: PyTree) -> PyTree:
    """Take the chunk's rollouts of arrays [p, g, ...]."""
    return jax.tree.map(lambda array: array[self.prompts, self.rollouts], arrays)


@dataclasses.dataclass(frozen=True)
class Chunking:
  """How a buffer is cut into chunks.

  Args:
    group_size: rollouts of a prompt.
    prompts: of a chunk; 0: all of the buffer.
    rollouts: of each of its prompts; 0: all. Fewer only if `prompts` is 1: then chunks hold the buffer's rows in order.
    lengths: to the first of them that holds a chunk's prompts, these are padded; (): as they come.
  """

  group_size: int
  prompts: int = 0
  rollouts: int = 0
  lengths: tuple[int, ...] = ()

  def cut(self, num_prompts: int) -> list[Chunk]:
    """Cut a buffer of so many prompts."""
    prompts, rollouts = self.prompts or num_prompts, self.rollouts or self.group_size
    return [
      Chunk(slice(prompt, prompt + prompts), slice(rollout, rollout + rollouts))
      for prompt in range(0, num_prompts, prompts)
      for rollout in range(0, self.group_size, rollouts)
    ]

  def prompts_of(self, chunk: Chunk, prompts: Prompts) -> Prompts:
    """Take a chunk's prompts of a buffer's, without padding that they do not need."""
    return lengths.cut(jax.tree.map(lambda array: array[chunk.prompts], prompts), self.lengths)

  def finished(self, rows: PyTree, chunks: Sequence[Chunk]) -> list[PyTree]:
    """Cut the first rows of a buffer, [b, ...] (None: there are none), into those chunks [p, g, ...] that are whole."""
    num = len(jax.tree.leaves(rows)[0]) if rows is not None else 0
    found, start = [], 0
    for chunk in chunks:
      shape = chunk.prompts.stop - chunk.prompts.start, chunk.rollouts.stop - chunk.rollouts.start
      stop = start + shape[0] * shape[1]
      if stop > num:
        break
      part = slice(start, stop)
      found.append(jax.tree.map(lambda x, part=part, shape=shape: x[part].reshape(*shape, *x.shape[1:]), rows))
      start = stop
    return found

  def groups(self, rows: PyTree) -> PyTree:
    """Arrange a whole buffer's rows [b, ...] in groups [p, g, ...]."""
    return jax.tree.map(lambda array: array.reshape(-1, self.group_size, *array.shape[1:]), rows)


class Arriving:
  """A buffer's rows, which arrive one by one in any order, as chunks, which are whole one after the other.

  Args:
    rows: the first ones, [b, ...], which an earlier start had; None: there are none.
  """

  def __init__(self, chunks: Sequence[Chunk], rows: PyTree = None):
    self._sizes = [
      (chunk.prompts.stop - chunk.prompts.start, chunk.rollouts.stop - chunk.rollouts.start) for chunk in chunks
    ]
    self.num_begun = len(jax.tree.leaves(rows)[0]) if rows is not None else 0
    self._rows = {number: jax.tree.map(lambda x, n=number: x[n], rows) for number in range(self.num_begun)}
    self._given = 0  # rows in the chunks that were given out

  def __len__(self) -> int:
    return len(self._rows)

  def add(self, number: int, row: PyTree) -> None:
    """Take the row with this number in the buffer."""
    self._rows[number] = row

  def whole(self) -> Iterator[PyTree]:
    """Give the chunks [p, g, ...] that have become whole since, in order."""
    while self._sizes and self._first_missing() - self._given >= self._sizes[0][0] * self._sizes[0][1]:
      yield self._take(*self._sizes.pop(0))

  def tail(self) -> list[PyTree]:
    """Give the rows behind these chunks and before the first that is missing, as a chunk, if there are any."""
    num = self._first_missing() - self._given
    return [self._take(1, num)] if num else []

  def _first_missing(self) -> int:
    number = self._given
    while number in self._rows:
      number += 1
    return number

  def _take(self, p: int, g: int) -> PyTree:
    rows = [self._rows[number] for number in range(self._given, self._given + p * g)]
    self._given += p * g
    return jax.tree.map(lambda *arrays: np.stack(arrays).reshape(p, g, *np.shape(arrays[0])), *rows)


def join_rows(chunks: Sequence[PyTree]) -> PyTree:
  """Join the arrays [p, g, ...] of successive chunks, rollout by rollout: [b, ...]."""
  return jax.tree.map(lambda *parts: np.concatenate([part.reshape(-1, *part.shape[2:]) for part in parts]), *chunks)


def fetch_ahead(calls: Iterable[Callable[[], Any]]) -> Iterator[Any]:
  """Yield what each call computes as numpy arrays; the next call is dispatched before one's result is awaited.

  So the devices have work while the host looks at results.

  Raises:
    Preempted: between two calls, once all that was dispatched has been yielded.
  """
  dispatched = collections.deque()
  for call in calls:
    try:
      check_preemption()
    except Preempted:
      yield from map(jax.device_get, dispatched)
      raise
    dispatched.append(call())
    if len(dispatched) > 1:
      yield jax.device_get(dispatched.popleft())
  yield from map(jax.device_get, dispatched)
