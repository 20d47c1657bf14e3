"""Several processes as one: which rows are a process's own, texts of all of them, and what they agree on.

Every host of a slice runs this program. What one of them decides or fails at alone leaves the others waiting, so what
they have to do together stands here.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils


class HostShare:
  """The part of `num` rows that this process works on: each row belongs to one process, whatever their number."""

  def __init__(self, num: int):
    self._num = num
    self._size = math.ceil(num / jax.process_count())
    self.mine = slice(self._size * jax.process_index(), min(self._size * (jax.process_index() + 1), num))

  def gather(self, rows: np.ndarray) -> np.ndarray:
    """Join the rows of all processes, each of which calls this with those of its share."""
    if jax.process_count() == 1:
      return rows
    filled = np.zeros((self._size, *rows.shape[1:]), rows.dtype)
    filled[: len(rows)] = rows
    return multihost_utils.process_allgather(filled, tiled=True)[: self._num]


def gather_texts(texts: Sequence[str]) -> list[str]:
  """Join the texts of all processes, in the order of the processes; every process has to call this."""
  if jax.process_count() == 1:
    return list(texts)
  content = "\0".join([*texts, ""]).encode()
  sizes = multihost_utils.process_allgather(np.array([len(content)]))
  filled = np.zeros(int(sizes.max()), np.uint8)
  filled[: len(content)] = np.frombuffer(content, np.uint8)
  parts = multihost_utils.process_allgather(filled).reshape(jax.process_count(), -1)
  return [
    text
    for part, size in zip(parts, sizes.reshape(-1), strict=True)
    for text in part[:size].tobytes().decode().split("\0")[:-1]
  ]


def agree(is_true: bool) -> bool:
  """Return whether something is true in all processes; every process has to call this."""
  return bool(multihost_utils.process_allgather(np.array([is_true])).all())
