"""Checkpoints of a run: state, live rollout buffer and progress, saved by Orbax while training continues."""

import json
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dmpo_jax import digests, files
from dmpo_jax.files import Unreadable
from dmpo_jax.processes import Absent, Stopped, agree, meet, poll
from dmpo_jax.run.orbax import STATES, Kept, Manager, Names, absolute, arrays_handler, first_line, host_copies
from dmpo_jax.structs import Experience, LogProbs, PendingRollouts, Prompts, Rollouts, TrainState

logger = logging.getLogger(__name__)

_PENDING = "drawn"  # the item of pending rollouts in a checkpoint


class Restored(NamedTuple):
  """What a checkpoint holds."""

  step: int
  state: TrainState  # with the shardings of the abstract state
  experience: Experience | None  # the live rollout buffer, replicated
  progress: dict[str, Any]
  pending: PendingRollouts | None  # the next buffer, replicated, if its generation had begun


class Checkpoints:
  """The newest checkpoints of a run, each whole or absent. Every process calls every method.

  Args:
    directory: local or gs://; checkpoints that a killed run left half-written are removed.
    keep: checkpoints kept, at least 1.
  """

  def __init__(self, directory: epath.PathLike, keep: int):
    self.directory = absolute(directory)
    self._kept = Kept(keep)
    self._contents: dict[int, str] = {}  # of the newest checkpoint of each step that this start has saved or read
    self._manager = Manager(
      self.directory,
      item_handlers=_item_handlers(),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._kept, cleanup_tmp_directories=True, step_name_format=Names()
      ),
    )

  def keep_steps(self, steps: frozenset[int]) -> None:
    """Keep the checkpoints of these steps, however old."""
    self._kept.steps = steps

  def save(
    self,
    step: int,
    state: TrainState,
    experience: Experience | None,
    progress: dict[str, Any],
    pending: PendingRollouts | None = None,
  ) -> None:
    """Save in the background; once this returns, the arrays may be donated.

    A step is saved again only if there is more to keep, such as chunks of the next buffer.

    Args:
      experience: the live rollout buffer, if it has updates left.
      progress: how far the run is, as JSON can hold it.
      pending: the next buffer, or the chunks of it that are finished.

    Raises:
      OSError: this or an earlier save failed.
      Absent, Stopped: see `processes.poll`.
    """
    poll("saving a checkpoint")
    items: dict[str, ocp.args.CheckpointArgs] = {"state": ocp.args.StandardSave(host_copies(state))}
    metadata: dict[str, Any] = {"progress": progress}
    for name, buffer in (("experience", experience), (_PENDING, pending)):
      metadata[f"has_{name}"] = buffer is not None
      if buffer is not None:
        items[name] = ocp.args.StandardSave(host_copies(buffer))
    items["progress"] = ocp.args.JsonSave(metadata)
    custom, contents = digests.mark(list(items)), _contents(metadata, pending)
    if self._contents.get(step) == contents:
      return
    taken = [number for number in self._manager.all_steps() if number // STATES == step]
    number = max(taken) + 1 if taken else step * STATES
    self._storing(lambda: self._manager.save(number, args=ocp.args.Composite(**items), custom_metadata=custom))
    self._contents[step] = contents

  def restore_latest(self, abstract_state: TrainState) -> Restored | None:
    """Return the newest readable checkpoint; None if there are no checkpoints.

    A damaged checkpoint is logged, renamed to `<step>.damaged`, and the one before it is used.

    Args:
      abstract_state: shapes, dtypes and shardings (`sharding.abstract`); the mesh may differ from the one at saving.

    Raises:
      Unreadable: there are checkpoints but none can be read; they are left in place.
    """
    problems: dict[int, str] = {}
    for number in sorted(self._manager.all_steps(), reverse=True):
      restored, problem = None, "another process could not read it"
      try:
        restored = self._restore(number, abstract_state)
      except (Absent, Stopped):
        raise
      except Exception as error:  # Orbax and TensorStore raise many types
        problem = first_line(error)
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
    """Return the state of an earlier step; None if it is missing or cannot be read."""
    numbers = [number for number in self._manager.all_steps() if number // STATES == step]
    for number in sorted(numbers, reverse=True):
      state = None
      try:
        state = self._restore(number, abstract_state).state
      except (Absent, Stopped):
        raise
      except Exception as error:  # as above
        logger.error("checkpoint %s cannot be read: %s", self._path(number).name, first_line(error))
      if agree(state is not None, "a checkpoint's state is read"):
        return state
    return None

  def _restore(self, number: int, abstract_state: TrainState) -> Restored:
    """Check a checkpoint's digests and read it. Each process reads alone, so that none waits for one that fails."""
    path, own = self._path(number), jax.process_index()
    digests.check(path)
    alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    handlers: dict[str, Any] = _item_handlers()  # the first arguments of the class that takes them are options
    reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers), multiprocessing_options=alone)
    metadata = reader.restore(path, args=ocp.args.Composite(progress=ocp.args.JsonRestore())).progress
    items, everywhere = {"state": ocp.args.StandardRestore(abstract_state)}, abstract_state.step.sharding
    for name in ("experience", _PENDING):
      if metadata.get(f"has_{name}"):
        saved = self._manager.item_metadata(number)[name].tree
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), saved)
        items[name] = ocp.args.StandardRestore(abstract)
    found = reader.restore(path, args=ocp.args.Composite(**items))
    step, pending = number // STATES, _pending(found.get(_PENDING))
    self._contents.setdefault(step, _contents(metadata, pending))
    return Restored(step, found.state, _experience(found.get("experience")), metadata["progress"], pending)

  def _path(self, number: int) -> epath.Path:
    return self.directory / Names().build_name(number)

  def _set_aside(self, problems: dict[int, str], taken: int) -> None:
    if not problems:
      return
    for number, problem in problems.items():
      path, used = self._path(number), self._path(taken).name
      name = files.name_aside(path)
      logger.error("checkpoint %s is damaged, renamed to %s, resuming from %s: %s", path.name, name, used, problem)
      if jax.process_index() == 0:
        path.rename(name)
    meet("damaged checkpoints are set aside")
    self._manager.reload()

  def wait(self) -> None:
    """Wait until everything saved is on disk; OSError if a save failed."""
    self._storing(self._manager.wait_until_finished)

  def close(self) -> None:
    """Wait for the last save and stop the manager's threads; OSError if a save failed."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def _storing(self, action: Callable[[], object]) -> None:
    """Run an action that writes; turn what Orbax and TensorStore raise into OSError."""
    try:
      action()
    except jax.errors.JaxRuntimeError:  # of the devices, such as after the death of another process
      raise
    except Exception as error:
      whole = max(self._manager.all_steps(read=True), default=None)
      before = "there is none before it" if whole is None else f"the one of step {self._path(whole).name} is intact"
      raise OSError(
        f"a checkpoint could not be written to {self.directory} ({first_line(error)}); {before}. "
        "Free some space or fix the disk; re-running the command resumes the run"
      ) from error

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
    if kind is not Absent:  # without that process no save finishes
      self.close()


def _item_handlers() -> dict[str, ocp.CheckpointHandler]:
  """Return the handlers that write and read each part of a checkpoint."""
  progress = digests.with_digests(ocp.JsonCheckpointHandler())
  return {**{name: arrays_handler() for name in ("state", "experience", _PENDING)}, "progress": progress}


def _contents(metadata: dict[str, Any], pending: PendingRollouts | None) -> str:
  """Describe what a checkpoint has besides its state, to tell whether there is more to save."""
  return json.dumps([metadata, [np.shape(leaf) for leaf in jax.tree.leaves(pending)]], sort_keys=True)


def _experience(fields: dict[str, Any] | None) -> Experience | None:
  """Build a buffer from the arrays of a checkpoint by name."""
  return None if fields is None else Experience(**fields | {"prompts": Prompts(**fields["prompts"])})


def _pending(fields: dict[str, Any] | None) -> PendingRollouts | None:
  """Build pending rollouts likewise; earlier versions saved [p, g, ...], their log-probabilities as measures."""
  if fields is None:
    return None
  fields = dict(fields)
  log_probs = fields.pop("measures", None) or fields.get("log_probs")
  buffer = Rollouts(**fields["rollouts"]), log_probs and LogProbs(**log_probs)
  if buffer[0].completion.ndim == 3:
    buffer = jax.tree.map(lambda array: np.asarray(array).reshape(-1, *array.shape[2:]), buffer)
  return PendingRollouts(**fields | {"rollouts": buffer[0], "log_probs": buffer[1]})
