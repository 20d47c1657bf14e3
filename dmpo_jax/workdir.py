"""A run's folder: used by one run at a time, and told of every start."""

import contextlib
import hashlib
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import filelock
import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dmpo_jax import files
from dmpo_jax.config import Config, ConfigError, fingerprint

LOCK = "run.lock"
STARTS = "starts.jsonl"
LEASE_SECONDS = 30.0  # a lock on another host that was not renewed for so long has lost its process
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@contextlib.contextmanager
def alone_in(workdir: epath.Path) -> Iterator[None]:
  """Hold the workdir for this run, all of its processes together.

  Process 0 keeps `run.lock`, which names its host and process and is renewed while it lives. A lock whose process died
  is taken over: at once on its own host, elsewhere after `LEASE_SECONDS` without a sign of life. Buckets have no such
  files: there the lock is in this host's temporary folder, and runs on other hosts are not seen.

  Raises:
    ConfigError: another run is using the workdir, or it cannot be written to.
  """
  lease, problem = None, ""
  if jax.process_index() == 0:
    try:
      lease = filelock.SoftFileLease(_lock_path(workdir), lease_duration=LEASE_SECONDS)
      _acquire(lease, workdir)
    except filelock.Timeout:
      problem = f"{workdir} is in use by another run, {_holder(lease)}: wait for it, stop it, or give another --workdir"
    except OSError as error:
      problem = f"{workdir} cannot be written to ({error}): give another --workdir, or make room"
  if jax.process_count() > 1:
    is_refused = multihost_utils.broadcast_one_to_all(np.array(bool(problem)))
    problem = problem or ("process 0 could not take the workdir" if is_refused else "")
  if problem:
    raise ConfigError(problem)
  try:
    yield
  finally:
    if lease is not None:
      lease.release()


def _lock_path(workdir: epath.Path) -> str:
  if "://" in os.fspath(workdir):
    digest = hashlib.sha256(os.fspath(workdir).encode()).hexdigest()[:16]
    return os.path.join(tempfile.gettempdir(), f"dmpo_jax-{digest}.lock")
  workdir.mkdir(parents=True, exist_ok=True)
  return os.fspath(workdir / LOCK)


def _acquire(lease: filelock.SoftFileLease, workdir: epath.Path) -> None:
  try:
    lease.acquire(timeout=0)
  except filelock.Timeout:
    if _holder(lease).endswith(f" on {platform.node()}"):  # alive, or it would have been taken over
      raise
    print(f"{workdir} is locked by {_holder(lease)}: looking for a sign of life", file=sys.stderr, flush=True)
    lease.acquire(timeout=1.5 * LEASE_SECONDS)


def _holder(lease: filelock.SoftFileLease) -> str:
  """Say who holds the lock, as its file has it."""
  lines = pathlib.Path(lease.lock_file).read_text().splitlines()
  said = dict(line.split("=", 1) for line in lines if "=" in line)
  return f"process {said.get('pid', '?')} on {said.get('host', '?')}"


def announce_start(workdir: epath.Path, config: Config, mesh: Mesh) -> dict[str, Any]:
  """Print one line on where and with what this start runs, add it to the workdir's starts.jsonl, and return it."""
  devices = mesh.devices.flatten()
  start = {
    "time": time.time(),
    "devices": f"{devices.size} x {devices[0].device_kind}",
    "processes": jax.process_count(),
    "mesh": dict(mesh.shape),
    "device_memory_gb": _device_memory_gb(devices[0]),
    "python": platform.python_version(),
    "versions": {name: metadata.version(name) for name in _LIBRARIES},
    "revision": _git_revision(),
    "config": fingerprint(config),
    "host": platform.node(),
  }
  if jax.process_index() == 0:
    path = workdir / STARTS
    before = path.read_text() if path.exists() else ""
    files.write_whole(path, before + json.dumps(start) + "\n")
    memory = f" of {start['device_memory_gb']:.0f} GB" if start["device_memory_gb"] else ""
    shape = " ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    print(
      f"{start['devices']}{memory}, {start['processes']} process(es), mesh {shape}; "
      f"jax {start['versions']['jax']}, revision {start['revision']}, config {start['config']}",
      flush=True,
    )
  return start


def _device_memory_gb(device: jax.Device) -> float | None:
  """Memory of a device as its backend reports it; None where it does not (CPU)."""
  stats = device.memory_stats() if device.process_index == jax.process_index() else None
  return stats["bytes_limit"] / 1e9 if stats and "bytes_limit" in stats else None


def _git_revision() -> str:
  """The checkout's commit, with a + where files differ from it; "unknown" outside a checkout or without git."""
  command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty=+"]
  try:
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return "unknown"
