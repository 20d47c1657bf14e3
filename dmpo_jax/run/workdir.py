"""A run's workdir: locked for one run at a time; it records the configuration and every start."""

import contextlib
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import metadata
from typing import Any

import filelock
import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmpo_jax import __version__, files, sharding
from dmpo_jax.config import Config, ConfigError, differences, fingerprint
from dmpo_jax.processes import meet, stop_job
from dmpo_jax.run import buckets

FILE = "config.json"  # the run's configuration
OUTCOMES = ("base", "policy", "best", "result.json", "evaluation")  # results of a run besides checkpoints
_CHECKPOINT = re.compile(r"\d+(\.\d+)?(\.damaged.*)?")  # name of a finished checkpoint
LOCK = "run.lock"
STARTS = "starts.jsonl"
LEFT_BY_A_START = ("checkpoints", "generations", "metrics.jsonl", "parameters.txt", "tensorboard", "wandb_id.txt")
LEASE_SECONDS = 30.0  # a lock of another host that was not renewed for this long belongs to a dead process
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@contextlib.contextmanager
def alone_in(workdir: epath.Path) -> Iterator[None]:
  """Lock the workdir for this run, for all of its processes.

  Process 0 holds `run.lock`, which names its host and process, and renews it while alive. The lock of a dead process is
  taken over: at once on the same host, elsewhere after `LEASE_SECONDS` without a renewal. In a bucket the lock is an
  object; a run whose lock was taken over stops (`processes.stop_job`).

  Raises:
    ConfigError: another run is using the workdir, or it cannot be written to; in every process.
  """
  lease, problem = None, ""
  if jax.process_index() == 0:
    try:
      lease = _acquire_in_bucket(workdir) if buckets.is_in_bucket(workdir) else _acquire(workdir)
    except buckets.Held as held:
      problem = f"{workdir} is in use by another run, {held}: wait for it, stop it, or give another --workdir"
    except Exception as error:  # of the disk or of Google's libraries
      problem = f"{workdir} cannot be written to ({error}): give another --workdir, or free some space"
  if notes := meet("the workdir is locked", note=problem):
    raise ConfigError(notes[0])
  try:
    yield
  finally:
    if lease is not None:
      lease.release()


def _acquire_in_bucket(workdir: epath.Path) -> buckets.Lock:
  def stop(holder: str) -> None:
    stop_job(
      f"{workdir} was taken over by {holder}: this run could not renew {LOCK} for more than {LEASE_SECONDS:.0f} s, and "
      "two runs would delete each other's files. Everything saved before is intact; follow the other run, or stop it "
      "and re-run this command"
    )

  lock = buckets.Lock(workdir / LOCK, on_lost=stop, lease_seconds=LEASE_SECONDS)
  lock.acquire()
  return lock


def _acquire(workdir: epath.Path) -> filelock.SoftFileLease:
  workdir.mkdir(parents=True, exist_ok=True)
  lease = filelock.SoftFileLease(os.fspath(workdir / LOCK), lease_duration=LEASE_SECONDS)
  try:
    lease.acquire(timeout=0)
  except filelock.Timeout as timeout:
    if _holder(lease).endswith(f" on {platform.node()}"):  # alive, as else it would have been taken over
      raise buckets.Held(_holder(lease)) from timeout
    print(f"{workdir} is locked by {_holder(lease)}: waiting for a sign of life", file=sys.stderr, flush=True)
    try:
      lease.acquire(timeout=1.5 * LEASE_SECONDS)
    except filelock.Timeout as again:
      path = pathlib.Path(lease.lock_file)
      if _read_lock(lease) or time.time() - path.stat().st_mtime < LEASE_SECONDS:
        raise buckets.Held(_holder(lease)) from again
      print(f"{path} is damaged and nobody renews it: taken over", file=sys.stderr, flush=True)
      path.unlink(missing_ok=True)
      lease.acquire(timeout=0)
  return lease


def _holder(lease: filelock.SoftFileLease) -> str:
  """Name the process that holds the lock."""
  holder = _read_lock(lease)
  if not holder:
    return f"{lease.lock_file} does not say which (remove it if there is none)"
  return f"process {holder['pid']} on {holder['host']}"


def _read_lock(lease: filelock.SoftFileLease) -> dict[str, str]:
  """Read the lock's file; {} if it is damaged."""
  try:
    lines = pathlib.Path(lease.lock_file).read_text().splitlines()
  except UnicodeDecodeError:
    return {}
  holder = dict(line.split("=", 1) for line in lines if "=" in line)
  return holder if holder.get("pid", "").isdecimal() and "host" in holder else {}


def folder_beside(workdir: epath.Path, name: str) -> epath.Path:
  """Return a folder that several runs share: beside the workdir, or in this host's cache if that is in a bucket."""
  if buckets.is_in_bucket(workdir):
    return epath.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dmpo_jax" / name
  return workdir.parent / name


def take_over(workdir: epath.Path, config: Config) -> None:
  """Remove the files of a start of another configuration that did not finish a step (process 0).

  `check_workdir` has accepted the configuration, so there is nothing worth keeping.
  """
  path = workdir / FILE
  if jax.process_index() > 0 or not path.exists() or has_finished_a_step(workdir):
    return
  try:
    is_same = not differences(files.read_object(path), config)
  except files.Unreadable:  # cut off by the crash that ended that start
    is_same = False
  if not is_same:
    print(f"{workdir}: a start of another configuration ended before its first step; its files are removed", flush=True)
    for name in LEFT_BY_A_START:
      if (workdir / name).is_dir():
        (workdir / name).rmtree()
      else:
        (workdir / name).unlink(missing_ok=True)


def announce_start(workdir: epath.Path, config: Config, mesh: Mesh, rollout_mesh: Mesh | None = None) -> dict[str, Any]:
  """Describe this start: print one line, append it to the workdir's starts.jsonl, and return it.

  Args:
    rollout_mesh: the samplers' mesh, if it is a different one.
  """
  devices = mesh.devices.flatten()
  start = {
    "time": time.time(),
    "arguments": shlex.join(sys.argv[1:]),
    "version": __version__,
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
    before = path.read_bytes() if path.exists() else b""  # kept unchanged, even if damaged
    cut = b"" if before.endswith(b"\n") or not before else b"\n"
    files.write_whole(path, before + cut + json.dumps(start).encode() + b"\n")
    memory = f" of {start['device_memory_gb']:.0f} GB" if start["device_memory_gb"] else ""
    noun = "process" if start["processes"] == 1 else "processes"
    meshes = sharding.describe_both(mesh, rollout_mesh or mesh, config["sharding"].to_dict())
    print(
      f"{start['devices']}{memory}, {start['processes']} {noun}, {meshes}; "
      f"dmpo_jax {start['version']} ({start['revision']}), jax {start['versions']['jax']}, config {start['config']}",
      flush=True,
    )
  return start


def _device_memory_gb(device: jax.Device) -> float | None:
  """Return a device's memory as its backend reports it; None if it does not (CPU)."""
  stats = device.memory_stats() if device.process_index == jax.process_index() else None
  return stats["bytes_limit"] / 1e9 if stats and "bytes_limit" in stats else None


def _git_revision() -> str:
  """Return the checkout's commit, with a + if files differ from it; "unknown" without a checkout or git."""
  command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty=+"]
  try:
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return "unknown"


# Keys that may differ from the run's when it is used. Sampling needs only the model and how its base was made.
_OF_EVALUATION = ("eval.*", "task.eval_path", "task.grader", "task.num_test")
_OF_SAMPLING = ("eval.*", "grading.*", "objective.*", "optim.*", "rollout.*", "sampler.*", "seed", "task.*", "train.*")
MAY_DIFFER = {"train": (), "eval": _OF_EVALUATION, "sample": _OF_SAMPLING, "serve": _OF_SAMPLING}  # by mode
UNREADABLE = "if the command's configuration is the run's, remove the file, and training writes it again"


def save_config(workdir: epath.PathLike, config: ConfigDict) -> None:
  """Write the configuration to the workdir's config.json (process 0)."""
  if jax.process_index() == 0:
    files.write_whole(epath.Path(workdir) / FILE, json.dumps(config.to_dict(), indent=2) + "\n")


def has_finished_a_step(workdir: epath.PathLike) -> bool:
  """Whether the workdir holds anything to resume from or to keep: a base, a checkpoint or a result."""
  folder, saved = epath.Path(workdir), epath.Path(workdir) / "checkpoints"
  phases = [phase for phase in saved.iterdir() if phase.is_dir()] if saved.exists() else []
  names = [path.name for phase in phases for path in phase.iterdir()]
  return any((folder / name).exists() for name in OUTCOMES) or any(_CHECKPOINT.fullmatch(name) for name in names)


def check_workdir(workdir: epath.PathLike, config: ConfigDict, *, mode: str = "train") -> None:
  """Refuse a workdir whose run has a configuration with other results.

  A new workdir passes. For training, so does one where a failed start did not finish a step.

  Args:
    mode: of the program; keys that it does not use may differ (MAY_DIFFER).

  Raises:
    ConfigError: naming the keys that differ.
  """
  path = epath.Path(workdir) / FILE
  if not path.exists() or (mode == "train" and not has_finished_a_step(workdir)):
    return
  differing = [
    line
    for line in differences(files.read_object(path, UNREADABLE), config)
    if not any(fnmatch(line.partition(":")[0], f"config.{key}") for key in MAY_DIFFER[mode])
  ]
  if differing:
    listed = "\n  ".join(differing)
    raise ConfigError(
      f"{workdir} holds a run of another configuration ({path}):\n  {listed}\n"
      "Give --workdir a new folder, or set these keys back to resume that run."
    )
