"""What a run needs to go on: its state, its live rollout buffer and its place, saved by Orbax while training continues.

Parameters that never move (the reference policy) and those that leave a run are saved apart, by `save_params`.
"""

import contextlib
import datetime
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from etils import epath
from orbax.checkpoint import path as ocp_path
from orbax.checkpoint.checkpoint_managers import LatestN

from dmpo_jax import digests, files
from dmpo_jax.files import Unreadable
from dmpo_jax.hub import pretrained
from dmpo_jax.processes import Absent, Stopped, agree, meet, poll
from dmpo_jax.structs import Drawn, Experience, LogProbs, Prompts, Rollouts, TrainState

logger = logging.getLogger(__name__)

# Without this Orbax's processes wait for each other by a collective of the devices, for ever; with it for five minutes.
flags.FLAGS.set_default("experimental_orbax_use_distributed_barrier", True)

_INDEX_FILES = ("_METADATA", "manifest.ocdbt")
_STATES = 1000  # saved at one step, at most: Orbax numbers them step * 1000, step * 1000 + 1, ...
_REPLACE = (
  "put a copy in its place, or write it again: convert it; of a run's policy/, remove it and result.json and repeat "
  "the training's command, which goes on from the newest checkpoint"
)


class Restored(NamedTuple):
  """A checkpoint as it comes back."""

  step: int
  state: TrainState  # on the shardings asked for
  experience: Experience | None  # the live rollout buffer, a copy on every device
  progress: dict[str, Any]
  drawn: Drawn | None  # the buffer after the live one, likewise, if it had been drawn


class _Manager(ocp.CheckpointManager):
  """Orbax's manager, but deaf to preemption, of which it asks from its own threads and by the checkpoint's number.

  JAX answers only one sequence of numbers, that of `check_preemption`: the others made it miss its moment.
  """

  def reached_preemption(self, step: int) -> bool:
    return False


class _Saved(ocp_path.step.Metadata):
  """A checkpoint as Orbax lists it: by its number alone, as its description, which has the time, may be damaged."""

  @property
  def commit_timestamp(self) -> datetime.datetime:
    return datetime.datetime.min


class _Names:
  """How checkpoints are called, for Orbax: the first of step 12 is `12`, further ones `12.1`, `12.2` and so on."""

  def build_name(self, number: int) -> str:
    step, again = divmod(number, _STATES)
    return f"{step}.{again}" if again else f"{step}"

  def find_all(self, folder: epath.PathLike) -> Iterator[ocp_path.step.Metadata]:
    paths = epath.Path(folder).iterdir() if epath.Path(folder).is_dir() else ()
    return ocp_path.step.build_step_metadatas(paths, self._describe)

  def find_step(self, folder: epath.PathLike, number: int) -> ocp_path.step.Metadata:
    found = self._describe(epath.Path(folder) / self.build_name(number))
    if found is None or not found.path.exists():
      raise ValueError(f"{folder} has no checkpoint {self.build_name(number)}")
    return found

  def _describe(self, path: epath.Path) -> ocp_path.step.Metadata | None:
    name = re.fullmatch(r"(0|[1-9]\d*)(?:\.([1-9]\d*))?", path.name)
    if name is None or not ocp_path.step.is_path_finalized(path):
      return None
    return _Saved(step=int(name[1]) * _STATES + int(name[2] or 0), path=path)


class _Kept:
  """Which checkpoints stay, for Orbax: the newest ones, and those of some steps."""

  def __init__(self, newest: int):
    self._newest, self.steps = LatestN(newest), frozenset[int]()

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
    is_new = self._newest.should_preserve(checkpoints, context=context)
    return [new or each.step // _STATES in self.steps for new, each in zip(is_new, checkpoints, strict=True)]


class Checkpoints:
  """The newest checkpoints of a run, each of them whole or absent. Every process calls every method.

  Args:
    directory: local or gs://; what a killed run left half-written there is removed.
    keep: checkpoints kept, at least 1.
  """

  def __init__(self, directory: epath.PathLike, keep: int):
    self.directory = _absolute(directory)
    self._kept = _Kept(keep)
    self._said: dict[int, str] = {}  # what the newest checkpoint of a step has, of steps seen by this start
    self._manager = _Manager(
      self.directory,
      item_handlers=_item_handlers(),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._kept, cleanup_tmp_directories=True, step_name_format=_Names()
      ),
    )

  def keep_steps(self, steps: frozenset[int]) -> None:
    """Keep the checkpoints of these steps too, however old they become."""
    self._kept.steps = steps

  def save(
    self,
    step: int,
    state: TrainState,
    experience: Experience | None,
    progress: dict[str, Any],
    drawn: Drawn | None = None,
  ) -> None:
    """Save in the background; when this returns the arrays may be donated.

    A step may be saved again when there is more to keep, such as chunks of the next buffer; the same is saved once.

    Args:
      experience: the live rollout buffer, if updates on it are still to come.
      progress: where the run is, as JSON can hold it.
      drawn: the buffer to come after it, or as much of it as has been drawn.

    Raises:
      OSError: this or an earlier save failed.
      Absent, Stopped: see `processes.poll`.
    """
    poll("saving a checkpoint")
    items, about = {"state": ocp.args.StandardSave(_global(state))}, {"progress": progress}
    for name, buffer in (("experience", experience), ("drawn", drawn)):
      about[f"has_{name}"] = buffer is not None
      if buffer is not None:
        items[name] = ocp.args.StandardSave(_global(buffer))
    items["progress"] = ocp.args.JsonSave(about)
    marked, said = digests.mark(list(items)), _say(about, drawn)
    if self._said.get(step) == said:
      return
    taken = [number for number in self._manager.all_steps() if number // _STATES == step]
    number = max(taken) + 1 if taken else step * _STATES
    self._storing(lambda: self._manager.save(number, args=ocp.args.Composite(**items), custom_metadata=marked))
    self._said[step] = said

  def restore_latest(self, abstract_state: TrainState) -> Restored | None:
    """Return the newest checkpoint that can be read; None if there is none.

    A damaged checkpoint is reported and renamed to `<step>.damaged`, and the one before it is taken.

    Args:
      abstract_state: shapes, dtypes and shardings (`sharding.abstract`); the mesh may be another than at the save.

    Raises:
      Unreadable: there are checkpoints and none can be read; they are left as they are.
    """
    problems: dict[int, str] = {}
    for number in sorted(self._manager.all_steps(), reverse=True):
      restored, problem = None, "another process could not read it"
      try:
        restored = self._restore(number, abstract_state)
      except (Absent, Stopped):
        raise
      except Exception as error:  # Orbax and TensorStore raise what they like
        problem = _first_line(error)
      if agree(restored is not None, "a checkpoint is read"):
        self._set_aside(problems, number)
        return restored
      problems[number] = problem
    if problems:
      listed = "\n  ".join(f"{self._path(number).name}: {problem:.300}" for number, problem in problems.items())
      raise Unreadable(
        f"no checkpoint in {self.directory} can be read:\n  {listed}\n"
        "They are damaged or of another configuration. Start over with a new --workdir, or remove them."
      )
    return None

  def restore_state(self, step: int, abstract_state: TrainState) -> TrainState | None:
    """Return the state of a step, whatever has been saved since; None if it is not there or cannot be read."""
    numbers = [number for number in self._manager.all_steps() if number // _STATES == step]
    for number in sorted(numbers, reverse=True):
      state = None
      try:
        state = self._restore(number, abstract_state).state
      except (Absent, Stopped):
        raise
      except Exception as error:  # as above
        logger.error("checkpoint %s cannot be read: %s", self._path(number).name, _first_line(error))
      if agree(state is not None, "a checkpoint's state is read"):
        return state
    return None

  def _restore(self, number: int, abstract_state: TrainState) -> Restored:
    """Compare a checkpoint with its digests and read it, every process for itself: none waits for one that cannot."""
    path, own = self._path(number), jax.process_index()
    digests.check(path)
    alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**_item_handlers()), multiprocessing_options=alone)
    about = reader.restore(path, args=ocp.args.Composite(progress=ocp.args.JsonRestore())).progress
    items, everywhere = {"state": ocp.args.StandardRestore(abstract_state)}, abstract_state.step.sharding
    for name, gather in (("experience", _experience), ("drawn", _drawn)):
      if about.get(f"has_{name}"):
        saved = self._manager.item_metadata(number)[name].tree
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), saved)
        items[name] = ocp.args.StandardRestore(gather(abstract))
    found = reader.restore(path, args=ocp.args.Composite(**items))
    step, drawn = number // _STATES, found.get("drawn")
    self._said.setdefault(step, _say(about, drawn))
    return Restored(step, found.state, found.get("experience"), about["progress"], drawn)

  def _path(self, number: int) -> epath.Path:
    return self.directory / _Names().build_name(number)

  def _set_aside(self, problems: dict[int, str], taken: int) -> None:
    if not problems:
      return
    for number, problem in problems.items():
      path, stands = self._path(number), self._path(taken).name
      name = files.name_aside(path)
      logger.error("checkpoint %s is damaged, set aside as %s, going on from %s: %s", path.name, name, stands, problem)
      if jax.process_index() == 0:
        path.rename(name)
    meet("damaged checkpoints are set aside")
    self._manager.reload()

  def wait(self) -> None:
    """Wait until what was saved stands on disk; an OSError if a save failed."""
    self._storing(self._manager.wait_until_finished)

  def close(self) -> None:
    """Wait for the last save and let the manager's threads go; an OSError if a save failed."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def _storing(self, action: Callable[[], Any]) -> None:
    """Do something that writes; what Orbax and TensorStore raise when they cannot becomes one kind of error."""
    try:
      action()
    except jax.errors.JaxRuntimeError:  # the devices' trouble, such as another process that died
      raise
    except Exception as error:
      whole = max(self._manager.all_steps(read=True), default=None)
      stands = "none was saved before" if whole is None else f"that of step {self._path(whole).name} stands"
      raise OSError(
        f"a checkpoint could not be written to {self.directory} ({_first_line(error)}); {stands}. "
        "Make room or mend the disk, then run the same command again"
      ) from error

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
    if kind is not Absent:  # without the absent process no save ends
      self.close()


def save_params(path: epath.PathLike, params: Any, about: dict[str, Any] | None = None) -> None:
  """Save parameters to a folder of their own, whole or not at all; a folder of that name is replaced.

  Args:
    about: what made them, as JSON can hold it; `read_about` returns it.

  Raises:
    Absent, Stopped: see `processes.poll`.
  """
  poll("saving parameters")
  with ocp.AsyncCheckpointer(_arrays_handler()) as checkpointer:
    save_args, marked = ocp.args.StandardSave(_global(params)), digests.mark(about=about)
    checkpointer.save(_absolute(path), args=save_args, force=True, custom_metadata=marked)


def is_saved(path: epath.PathLike) -> bool:
  """Whether `save_params` has written the folder to its end."""
  path = _absolute(path)
  return path.exists() and (path / "_METADATA").exists() and ocp.utils.is_checkpoint_finalized(path)


def read_about(path: epath.PathLike) -> dict[str, Any]:
  """Return what `save_params` was told of the parameters in a folder; {} if it was told nothing.

  Raises:
    Unreadable: it is not what was written.
  """
  return digests.read_about(_absolute(pretrained.params_path(path)))


def load_params(path: epath.PathLike, abstract_params: Any) -> Any:
  """Load parameters onto the shapes, dtypes and shardings of `abstract_params` (`jax.ShapeDtypeStruct`).

  Every process calls this.

  Args:
    path: what `save_params` wrote, or a converted checkpoint or adapter.

  Raises:
    Unreadable: there are none, they are not as they were written, or their names or shapes are others; up to ten
      differences are listed.
  """
  path = check_params(path)
  check_shapes(path, abstract_params)
  with ocp.StandardCheckpointer() as checkpointer, _reading(path):
    return checkpointer.restore(path, abstract_params)


def check_shapes(path: epath.PathLike, abstract_params: Any) -> None:
  """Check that a folder holds parameters of these names and shapes; the arrays are not read.

  Raises:
    Unreadable: there are none, or their names or shapes are others; up to ten differences are listed.
  """
  path = _absolute(pretrained.params_path(path))
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
  """Return the folder of saved parameters, once it is certain that they are as they were written.

  Args:
    path: see `load_params`.

  Raises:
    Unreadable: there are none, or a file is lost or differs from its digest.
  """
  folder, path = _absolute(path), _absolute(pretrained.params_path(path))
  if not path.exists() or not any(path.iterdir()):
    raise Unreadable(f"{path}: no parameters there; give a folder that a run or launch/convert_hf.py wrote")
  try:
    digests.check(path)
  except Unreadable as error:
    raise Unreadable(f"{error}; {folder} is damaged: {_REPLACE}") from error
  if folder != path:
    try:
      digests.check(folder)
    except Unreadable as error:
      own = f"if you have changed it yourself, remove {folder / digests.DIGESTS}"
      raise Unreadable(f"{error}: convert the checkpoint again or, {own}") from error
  return path


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[None]:
  """Make one kind of error of what Orbax and TensorStore raise for parameters that they cannot read."""
  try:
    yield
  except (Unreadable, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:
    raise Unreadable(f"{path} cannot be read ({_first_line(error)}): {_REPLACE}") from error


def identity(path: epath.PathLike) -> str:
  """Identify saved parameters by a hash of their files' digests.

  A folder that was copied keeps its identity; parameters that were saved another time have another. Where there are no
  digests, as earlier versions left it, the index is hashed: it names the file and place of every chunk of every array.
  """
  path = _absolute(pretrained.params_path(path))
  if found := digests.identity(path):
    return found
  index = [file for file in sorted(path.iterdir()) if file.name in _INDEX_FILES]
  return hashlib.sha256(b"".join(file.read_bytes() for file in index)).hexdigest()[:16]


def _item_handlers() -> dict[str, ocp.CheckpointHandler]:
  """Say how each part of a checkpoint is written and read."""
  progress = digests.with_digests(ocp.JsonCheckpointHandler())
  return {**{name: _arrays_handler() for name in ("state", "experience", "drawn")}, "progress": progress}


def _arrays_handler() -> ocp.StandardCheckpointHandler:
  return digests.with_digests(ocp.StandardCheckpointHandler())


def _say(about: dict[str, Any], drawn: Drawn | None) -> str:
  """What a checkpoint has besides its state, to tell whether there is more to save."""
  return json.dumps([about, [np.shape(leaf) for leaf in jax.tree.leaves(drawn)]], sort_keys=True)


def _first_line(error: Exception) -> str:
  return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def load_leaf(path: epath.PathLike, keys: Sequence[str]) -> np.ndarray:
  """Load one array of saved parameters to the host, in the dtype that it was saved in.

  Raises:
    KeyError: there is no such array.
  """
  path = _absolute(pretrained.params_path(path))
  with ocp.PyTreeCheckpointer() as checkpointer:
    saved = checkpointer.metadata(path).item_metadata.tree
    for key in keys:
      saved = saved[key]
    item, args = jax.ShapeDtypeStruct(saved.shape, saved.dtype), ocp.RestoreArgs(restore_type=np.ndarray)
    for key in reversed(keys):
      item, args = {key: item}, {key: args}
    restored = checkpointer.restore(
      path, args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
    )
  for key in keys:
    restored = restored[key]
  return restored


def saved_dtypes(path: epath.PathLike) -> dict[tuple[str, ...], np.dtype]:
  """Read the dtype of every array of saved parameters by its keys; the arrays stay on disk."""
  path = _absolute(pretrained.params_path(path))
  with ocp.PyTreeCheckpointer() as checkpointer, _reading(path):
    saved = checkpointer.metadata(path).item_metadata.tree
  leaves, _ = jax.tree.flatten_with_path(saved)
  return {tuple(key.key for key in keys): np.dtype(leaf.dtype) for keys, leaf in leaves}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  leaves, _ = jax.tree.flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def _experience(fields: dict[str, Any]) -> Experience:
  """Make a buffer of the names that a checkpoint has for its arrays."""
  return Experience(**fields | {"prompts": Prompts(**fields["prompts"])})


def _drawn(fields: dict[str, Any]) -> Drawn:
  measures = fields["measures"] and LogProbs(**fields["measures"])
  return Drawn(**fields | {"rollouts": Rollouts(**fields["rollouts"]), "measures": measures})


def _absolute(path: epath.PathLike) -> epath.Path:
  path = epath.Path(path)
  return path if path.is_absolute() else path.resolve()


def _global(tree: Any) -> Any:
  """With several processes, make host arrays of those that a process has whole on its own: Orbax refuses them."""
  if jax.process_count() == 1:
    return tree
  return jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) and x.is_fully_addressable else x, tree)
