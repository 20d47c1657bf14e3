"""Our use of Orbax: how checkpoints are named, which are kept, and what its handlers and errors become."""

import datetime
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint import path as ocp_path
from orbax.checkpoint.checkpoint_managers import LatestN

from dmpo_jax import digests

# By default Orbax's processes wait for each other in a device collective, without a limit; this barrier has one.
flags.FLAGS.set_default("experimental_orbax_use_distributed_barrier", True)

STATES = 1000  # a step can be saved this often: Orbax numbers its checkpoints step * 1000, step * 1000 + 1, ...


class Manager(ocp.CheckpointManager):
  """Orbax's manager, but it never asks whether the job is being preempted.

  It would ask from its own threads and with the checkpoint's number. JAX answers one sequence of numbers only, that of
  `check_preemption`, and would miss the moment.
  """

  def reached_preemption(self, step: int) -> bool:
    return False


class _Metadata(ocp_path.step.Metadata):
  """What Orbax knows of a checkpoint: its number. Its description also has the time, but may be damaged."""

  @property
  def commit_timestamp(self) -> datetime.datetime:
    return datetime.datetime.min


class Names:
  """Names of checkpoints: the first of step 12 is `12`, later ones are `12.1`, `12.2` and so on."""

  def build_name(self, step: int) -> str:
    whole, again = divmod(step, STATES)
    return f"{whole}.{again}" if again else f"{whole}"

  def find_all(self, base_path: epath.PathLike) -> Iterator[ocp_path.step.Metadata]:
    paths = epath.Path(base_path).iterdir() if epath.Path(base_path).is_dir() else ()
    return ocp_path.step.build_step_metadatas(paths, self._metadata)

  def find_step(self, base_path: epath.PathLike, step: int) -> ocp_path.step.Metadata:
    metadata = self._metadata(epath.Path(base_path) / self.build_name(step))
    if metadata is None or not metadata.path.exists():
      raise ValueError(f"{base_path} has no checkpoint {self.build_name(step)}")
    return metadata

  def _metadata(self, path: epath.Path) -> ocp_path.step.Metadata | None:
    name = re.fullmatch(r"(0|[1-9]\d*)(?:\.([1-9]\d*))?", path.name)
    if name is None or not ocp_path.step.is_path_finalized(path):
      return None
    return _Metadata(step=int(name[1]) * STATES + int(name[2] or 0), path=path)


class Kept:
  """The checkpoints that are kept: the newest ones, and those of `steps`."""

  def __init__(self, newest: int):
    self._newest, self.steps = LatestN(newest), frozenset[int]()

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
    is_new = self._newest.should_preserve(checkpoints, context=context)
    return [new or each.step // STATES in self.steps for new, each in zip(is_new, checkpoints, strict=True)]


def arrays_handler() -> ocp.StandardCheckpointHandler:
  """Make a handler that writes a tree of arrays and the digests of its files."""
  return digests.with_digests(ocp.StandardCheckpointHandler())


def host_copies(tree: PyTree) -> PyTree:
  """With several processes, copy arrays that each process has whole to the host: Orbax refuses them on devices."""
  if jax.process_count() == 1:
    return tree
  return jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) and x.is_fully_addressable else x, tree)


def absolute(path: epath.PathLike) -> epath.Path:
  """Return an absolute path, which is what Orbax takes."""
  path = epath.Path(path)
  return path if path.is_absolute() else path.resolve()


def first_line(error: Exception) -> str:
  """Return the type and the first line of an error; those of Orbax and TensorStore are pages long."""
  return f"{type(error).__name__}: {error}".splitlines()[0][:300]
