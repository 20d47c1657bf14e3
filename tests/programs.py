"""The program in processes of its own, as a user, a pod or a preemption meets it."""

import os
import pathlib
import socket
import subprocess
import sys
import time

from conftest import COMPILE_QUICKLY

ROOT = pathlib.Path(__file__).resolve().parent.parent


def begin(*args, devices=1, module="dmpo_jax.main", program=None, **keywords):
  """Start a module of the project, or a program, and return the process; it may also see several virtual devices."""
  flags = f"{COMPILE_QUICKLY} --xla_force_host_platform_device_count={devices}"
  return subprocess.Popen(
    [*(program or (sys.executable, "-m", module)), *args],
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": flags, "PYTHON": sys.executable, "COLUMNS": "200"},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **keywords,
  )


def finish(process, timeout=600):
  """Wait for a process's end; return its exit code and what it printed."""
  try:
    stdout, stderr = process.communicate(timeout=timeout)
  finally:
    process.kill()
  return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def start(*args, **keywords):
  """Run a module to its end."""
  return finish(begin(*args, **keywords))


def wait_for(condition, process, timeout=120):
  """Wait until something is so, while a process runs."""
  deadline = time.monotonic() + timeout
  while not condition():
    assert process.poll() is None, finish(process).stderr[-2000:]
    assert time.monotonic() < deadline
    time.sleep(0.02)


def free_address():
  """Find a port that is free now, as the address of a job's process 0."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{free.getsockname()[1]}"
