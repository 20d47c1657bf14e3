"""The processes of a job as threads of the test: JAX tells each its own index, and gathers what all of them give.

Where they meet, all of them must say the same.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.experimental import multihost_utils

from dmpo_jax import processes


def run_hosts(monkeypatch, count, program):
  """Call `program(index)` in every process of a job; return what each gave, in their order.

  A process that waits for the others alone, because they have failed or gather something else, is an error.
  """
  here, given, meeting = threading.local(), [None] * count, threading.Barrier(count, timeout=30)

  def process_allgather(array):
    given[here.index] = np.asarray(array)
    meeting.wait()
    gathered = np.stack(given)
    meeting.wait()
    return gathered

  def meet(name, seconds=0.0, note=""):
    given[here.index] = (name, seconds)
    meeting.wait()
    assert given == given[:1] * count
    meeting.wait()
    return {}

  def run(index):
    here.index = index
    try:
      return program(index)
    except BaseException:
      meeting.abort()
      raise

  with monkeypatch.context() as patch, ThreadPoolExecutor(count) as threads:
    patch.setattr(jax, "process_count", lambda: count)
    patch.setattr(jax, "process_index", lambda: here.index)
    patch.setattr(multihost_utils, "process_allgather", process_allgather)
    patch.setattr(processes, "meet", meet)
    results = [threads.submit(run, index) for index in range(count)]
    return [result.result() for result in results]
