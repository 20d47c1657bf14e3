"""Several processes as one: which rows are a process's own, texts of all of them, and what they agree on.

Every host of a slice runs this program. What one of them decides or fails at alone leaves the others waiting, so what
they have to do together stands here.
"""

import json
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils


class HostShare:
  """The part of `num` rows that this process works on.

  Each row belongs to one process, and no process has two rows more than another. Where there are fewer rows than
  processes, some have none; process 0, which writes the log, has the first.

  Args:
    index, count: which process of how many; by default what JAX says now.
  """

  def __init__(self, num: int, index: int | None = None, count: int | None = None):
    self._num = num
    self._count = jax.process_count() if count is None else count
    self.mine = self._rows_of(jax.process_index() if index is None else index)

  def _rows_of(self, index: int) -> slice:
    return slice(-(-self._num * index // self._count), -(-self._num * (index + 1) // self._count))

  def gather(self, rows: np.ndarray) -> np.ndarray:
    """Join the rows of all processes, each of which calls this with those of its share."""
    if self._count == 1 or self._num == 0:
      return rows
    filled = np.zeros((math.ceil(self._num / self._count), *rows.shape[1:]), rows.dtype)
    filled[: len(rows)] = rows
    parts = multihost_utils.process_allgather(filled)
    shares = [self._rows_of(index) for index in range(self._count)]
    return np.concatenate([part[: share.stop - share.start] for part, share in zip(parts, shares, strict=True)])


def gather_texts(texts: Sequence[str]) -> list[str]:
  """Join the texts of all processes, in the order of the processes; every process has to call this."""
  if jax.process_count() == 1:
    return list(texts)
  content = np.frombuffer(json.dumps(list(texts)).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([len(content)])).reshape(-1)
  filled = np.zeros(int(sizes.max()), np.uint8)
  filled[: len(content)] = content
  parts = multihost_utils.process_allgather(filled)
  return [text for part, size in zip(parts, sizes, strict=True) for text in json.loads(part[:size].tobytes())]


def agree(is_true: bool) -> bool:
  """Return whether something is true in all processes; every process has to call this."""
  return bool(multihost_utils.process_allgather(np.array([is_true])).all())
