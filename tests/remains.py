"""What a run leaves in its workdir, as tests compare it."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from dmpo_jax import train
from dmpo_jax.run import checkpoints


def leave_alone(config, folder):
  """Run a configuration to its end on one device, and return its workdir."""
  devices, workdir = jax.devices(), epath.Path(folder / "run")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "devices", lambda: devices[:1])
    train.main(config, workdir)
  return workdir


def rows_of(workdir):
  """The metrics of a run, without what is measured in time."""
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{name: row[name] for name in row if name != "time" and "second" not in name} for row in rows]


def policy_of(workdir):
  """Every parameter of the final policy, on the host, whatever devices it was saved from."""
  path, checkpointer = (workdir / "policy").resolve(), ocp.StandardCheckpointer()
  saved = checkpointer.metadata(path).item_metadata.tree
  return checkpointer.restore(path, jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), saved))


def die_at_save(patch, number):
  """Let the program die when it has asked for a checkpoint for the `number`-th time, and it stands."""
  count, save = [0], checkpoints.Checkpoints.save

  def save_and_die(self, *args):
    save(self, *args)
    count[0] += 1
    if count[0] == number:
      self.wait()
      raise KeyboardInterrupt

  patch.setattr(checkpoints.Checkpoints, "save", save_and_die)
