"""Preemption: a notice (SIGTERM or Ctrl+C) reaches all processes of a job at one step; they save and stop."""

import itertools
import os
import signal
import sys
from types import FrameType

import jax
from jax.experimental import multihost_utils

from dmpo_jax.processes import poll
from dmpo_jax.structs import PendingRollouts

_num_polls = itertools.count(1)


class Preempted(RuntimeError):
  """The machines are about to be taken away."""

  pending: PendingRollouts | None = None  # the finished chunks of the buffer whose generation was interrupted


def listen(is_enabled: bool) -> None:
  """Let JAX catch SIGTERM as a notice of preemption, or not; call this before the processes join."""
  jax.config.update("jax_enable_preemption_service", is_enabled)


def check_preemption() -> None:
  """Check whether any process of the job has received a notice of preemption (SIGTERM).

  Every process calls this at the same points of the program, so that all stop at the same one. Where JAX does not
  listen for notices (modes with nothing to save), there are none.

  Raises:
    Preempted: a process has received one.
    Absent, Stopped: see `processes.poll`.
  """
  poll("the next step")
  is_listening = jax.config.jax_enable_preemption_service  # pyright: ignore[reportAttributeAccessIssue]  # no stub
  if is_listening and multihost_utils.reached_preemption_sync_point(next(_num_polls)):
    raise Preempted("everything is saved; re-running the command resumes the run")


def save_on_interrupt() -> None:
  """Treat the first Ctrl+C as a preemption, which saves everything; a second one stops at once."""

  def interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("interrupted: saving after this microbatch; press Ctrl+C again to stop at once", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

  signal.signal(signal.SIGINT, interrupt)
