"""Parameters saved by themselves, in an Orbax folder: a run's policies, or a converted checkpoint or adapter."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from dmpo_jax import digests
from dmpo_jax.files import Unreadable
from dmpo_jax.hub import pretrained
from dmpo_jax.processes import poll
from dmpo_jax.run.orbax import absolute, arrays_handler, first_line, host_copies

_INDEX_FILES = ("_METADATA", "manifest.ocdbt")
_REMEDY = (
  "replace it by a copy, or write it again: convert the checkpoint again, or, for a run's policy/, remove that folder "
  "and result.json and re-run training, which resumes from the newest checkpoint"
)


def save_params(path: epath.PathLike, params: PyTree, metadata: Mapping[str, object] | None = None) -> None:
  """Save parameters to a folder, whole or not at all; an existing folder is replaced.

  Args:
    metadata: what made them, as JSON can hold it; `read_metadata` returns it.

  Raises:
    Absent, Stopped: see `processes.poll`.
  """
  poll("saving parameters")
  with ocp.AsyncCheckpointer(arrays_handler()) as checkpointer:
    save_args, custom = ocp.args.StandardSave(host_copies(params)), digests.mark(metadata=metadata)
    checkpointer.save(absolute(path), args=save_args, force=True, custom_metadata=custom)


def is_saved(path: epath.PathLike) -> bool:
  """Whether `save_params` has finished writing the folder."""
  path = absolute(path)
  return path.exists() and (path / "_METADATA").exists() and ocp.utils.is_checkpoint_finalized(path)


def read_metadata(path: epath.PathLike) -> dict[str, Any]:
  """Return the metadata that `save_params` was given; {} if there was none.

  Raises:
    Unreadable: it is damaged.
  """
  return digests.read_metadata(absolute(pretrained.params_path(path)))


def load_params(path: epath.PathLike, abstract_params: PyTree) -> PyTree:
  """Load parameters onto the shapes, dtypes and shardings of `abstract_params` (`jax.ShapeDtypeStruct`).

  Every process calls this.

  Args:
    path: a folder that `save_params` wrote, or a converted checkpoint or adapter.

  Raises:
    Unreadable: there are none, they are damaged, or names or shapes differ; up to ten differences are listed.
  """
  path = check_params(path)
  check_shapes(path, abstract_params)
  with ocp.StandardCheckpointer() as checkpointer, _reading(path):
    return checkpointer.restore(path, abstract_params)


def check_shapes(path: epath.PathLike, abstract_params: PyTree) -> None:
  """Check that a folder holds parameters of these names and shapes; the arrays are not read.

  Raises:
    Unreadable: there are none, or names or shapes differ; up to ten differences are listed.
  """
  path = absolute(pretrained.params_path(path))
  if not (path / _INDEX_FILES[0]).exists():
    raise Unreadable(f"{path}: no parameters there; give a folder that a run or launch/convert_hf.py wrote")
  with ocp.StandardCheckpointer() as checkpointer, _reading(path):
    saved, wanted = _shapes(checkpointer.metadata(path).item_metadata.tree), _shapes(abstract_params)
  differing = [
    f"{name}: saved {saved.get(name, 'nothing')}, the model has {wanted.get(name, 'nothing')}"
    for name in sorted(saved.keys() | wanted.keys())
    if saved.get(name) != wanted.get(name)
  ]
  if differing:
    more = f"\n  and {len(differing) - 10} more" if len(differing) > 10 else ""
    raise Unreadable(f"{path} holds the parameters of another model:\n  " + "\n  ".join(differing[:10]) + more)


def check_params(path: epath.PathLike) -> epath.Path:
  """Compare the files of saved parameters with their digests; return the folder of the arrays.

  Every process calls this.

  Args:
    path: see `load_params`.

  Raises:
    Unreadable: there are none, or a file is missing or differs from its digest.
  """
  folder, path = absolute(path), absolute(pretrained.params_path(path))
  if not path.exists() or not any(path.iterdir()):
    raise Unreadable(f"{path}: no parameters there; give a folder that a run or launch/convert_hf.py wrote")
  try:
    digests.check(path)
  except Unreadable as error:
    raise Unreadable(f"{error}; {folder} is damaged: {_REMEDY}") from error
  if folder != path:
    try:
      digests.check(folder)
    except Unreadable as error:
      edited = f"if you have edited it yourself, remove {folder / digests.DIGESTS}"
      raise Unreadable(f"{error}: convert the checkpoint again or, {edited}") from error
  return path


def identity(path: epath.PathLike) -> str:
  """Identify saved parameters by a hash of their files' digests.

  A copied folder keeps its identity; saving the same parameters again gives another. Folders of early versions have no
  digests: there the index is hashed, which names the file and offset of every chunk of every array.
  """
  path = absolute(pretrained.params_path(path))
  if found := digests.identity(path):
    return found
  index = [file for file in sorted(path.iterdir()) if file.name in _INDEX_FILES]
  return hashlib.sha256(b"".join(file.read_bytes() for file in index)).hexdigest()[:16]


class SavedParams:
  """Saved parameters, of which one array is read to the host at a time."""

  def __init__(self, path: epath.PathLike):
    """Open a folder; see `load_params`."""
    self._folder, self._path = path, absolute(pretrained.params_path(path))

  def check(self) -> None:
    """Compare the files with their digests; see `check_params`."""
    check_params(self._folder)

  def dtypes(self) -> dict[tuple[str, ...], np.dtype]:
    """Return the dtype of every array, by its keys; the arrays are not read."""
    with ocp.PyTreeCheckpointer() as checkpointer, _reading(self._path):
      saved = checkpointer.metadata(self._path).item_metadata.tree
    leaves, _ = jax.tree.flatten_with_path(saved)
    return {tuple(key.key for key in keys): np.dtype(leaf.dtype) for keys, leaf in leaves}

  def load(self, keys: Sequence[str]) -> np.ndarray:
    """Load an array in the dtype that it was saved in.

    Raises:
      KeyError: there is no such array.
    """
    with ocp.PyTreeCheckpointer() as checkpointer:
      saved = checkpointer.metadata(self._path).item_metadata.tree
      for key in keys:
        saved = saved[key]
      item, args = jax.ShapeDtypeStruct(saved.shape, saved.dtype), ocp.RestoreArgs(restore_type=np.ndarray)
      for key in reversed(keys):
        item, args = {key: item}, {key: args}
      restored = checkpointer.restore(
        self._path, args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
      )
    for key in keys:
      restored = restored[key]
    return restored


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[None]:
  """Turn what Orbax and TensorStore raise for parameters that they cannot read into `Unreadable`."""
  try:
    yield
  except (Unreadable, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:
    raise Unreadable(f"{path} cannot be read ({first_line(error)}): {_REMEDY}") from error


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
  leaves, _ = jax.tree.flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
