"""Notices that the machines are about to be taken away, heard by all processes of a job at the same step."""

import itertools

import jax
from jax.experimental import multihost_utils

from dmpo_jax.processes import poll
from dmpo_jax.structs import Drawn

_num_polls = itertools.count(1)


class Preempted(RuntimeError):
  """The machines are about to be taken away."""

  drawn: Drawn | None = None  # of a buffer that was being drawn, the chunks that are finished


def check_preemption() -> None:
  """Meet before the next step, and ask whether a notice of preemption (SIGTERM) has reached any process of the job.

  Every process calls this at the same points of the program, so that all of them stop at the same one. Where JAX does
  not listen for notices (modes that have nothing to save), there is none.

  Raises:
    Preempted: it has.
    Absent, Stopped: see `processes.poll`.
  """
  poll("the next step")
  is_listening = jax.config.jax_enable_preemption_service
  if is_listening and multihost_utils.reached_preemption_sync_point(next(_num_polls)):
    raise Preempted("everything is saved; run the same command again to go on")
