"""Runs commands as a pod does: one process per host, with its own folders, joined by a coordinator."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from dmpo_jax.run import progress

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
POLL_SECONDS = 0.1
SHOWN = 80  # characters of a process's last line
HEARTBEAT_SECONDS = 10  # after which a silent process counts as dead


class Failed(Exception):
  """A check failed, or a command ended with an unexpected exit code; `log` is the file to read."""

  def __init__(self, check: str, log: pathlib.Path | None = None):
    super().__init__(check)
    self.log = log


@dataclasses.dataclass(frozen=True)
class Hosts:
  """The machines of a slice: `processes` of them, each with `devices` virtual CPU devices.

  Attributes:
    threads: XLA's threads on each, at least as many as devices. Long sums are split over them, which changes their last
      bits, so hosts with comparable results have the same number.
    folder: holds a folder for each host, with its home and temporary files.
    environment: environment variables of all hosts.
  """

  processes: int
  devices: int
  threads: int
  folder: pathlib.Path
  environment: dict[str, str]

  def of(self, index: int) -> dict[str, str]:
    """Return the environment of one host."""
    own = self.folder / f"host{index}"
    own.mkdir(parents=True, exist_ok=True)
    quick = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"  # compiling is most of the work
    flags = f"{quick} --xla_force_host_platform_device_count={self.devices}"
    folders = dict(HOME=str(own), TMPDIR=str(own), XDG_CACHE_HOME=str(own / "cache"))
    login = os.environ.get("CLOUDSDK_CONFIG", str(pathlib.Path.home() / ".config" / "gcloud"))  # for a real bucket
    folders["CLOUDSDK_CONFIG"] = login
    cpu = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NPROC": str(self.threads)}
    return os.environ | self.environment | folders | cpu | {"TF_CPP_MIN_LOG_LEVEL": "3", "COLUMNS": "160"}


class Job:
  """The processes of one command; `logs` are the files of their output."""

  def __init__(self, processes: Sequence[subprocess.Popen], logs: Sequence[pathlib.Path]):
    self.processes, self.logs = processes, logs

  def wait_for(self, what: str, happened: Callable[[], bool], seconds: float) -> None:
    """Wait until something has happened while all processes run.

    Raises:
      Failed: a process ended first, or the time is over.
    """
    deadline = time.monotonic() + seconds
    while not happened():
      ended = [index for index, process in enumerate(self.processes) if process.poll() is not None]
      if ended:
        code = self.processes[ended[0]].returncode
        raise Failed(f"waiting for {what}: process {ended[0]} ended with {code}", self.logs[ended[0]])
      if time.monotonic() > deadline:
        raise Failed(f"waiting for {what}: not in {seconds:.0f} s", self.logs[0])
      self._pause()

  def codes(self, seconds: float) -> list[int]:
    """Wait until all processes have ended; return the exit codes as a shell does (128 + n for signal n).

    Raises:
      Failed: a process is still running when the time is over.
    """
    deadline = time.monotonic() + seconds
    while left := [index for index, process in enumerate(self.processes) if process.poll() is None]:
      if time.monotonic() > deadline:
        raise Failed(f"process {left[0]} did not end within {seconds:.0f} s", self.logs[left[0]])
      self._pause()
    return [128 - process.returncode if process.returncode < 0 else process.returncode for process in self.processes]

  def expect(self, wanted: Sequence[int], seconds: float) -> None:
    """Wait until all processes have ended, and check their exit codes.

    Raises:
      Failed: an exit code is another one, or the time is over.
    """
    codes = self.codes(seconds)
    wrong = [index for index, (code, right) in enumerate(zip(codes, wanted, strict=True)) if code != right]
    if wrong:
      raise Failed(f"exit codes {codes} where {list(wanted)} were expected", self.logs[wrong[0]])

  def signal(self, index: int, number: signal.Signals) -> None:
    """Send a signal to one process."""
    self.processes[index].send_signal(number)

  def output(self) -> str:
    """Return the output of process 0."""
    return self.logs[0].read_text(errors="replace")  # a line may be half written

  def _pause(self) -> None:
    """Wait for a moment, and show the last line of process 0."""
    lines = [line for line in self.output().splitlines() if line.strip() and not line.startswith("[Gloo]")]
    newest = lines[-1][:SHOWN].translate(str.maketrans("[]", "()")) if lines else ""  # brackets are markup of rich
    progress.part(f"{self.logs[0].parent.name}: {newest}")
    time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def running(module: str, arguments: Sequence[str], hosts: Hosts, logs: pathlib.Path) -> Iterator[Job]:
  """Start a module of the project on every host, and kill the processes that are left afterwards."""
  logs.mkdir(parents=True, exist_ok=True)
  processes, paths = [], []
  joined = _joining(hosts) if hosts.processes > 1 else []
  try:
    for index in range(hosts.processes):
      own = [*arguments, *joined, *([f"--process_id={index}"] if joined else [])]
      paths.append(logs / f"process{index}.log")
      with paths[-1].open("w") as log:
        command = [sys.executable, "-m", module, *own]
        processes.append(
          subprocess.Popen(
            command, cwd=ROOT, env=hosts.of(index), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
          )
        )
    yield Job(processes, paths)
  finally:
    for process in processes:
      process.kill()
      process.wait()


def _joining(hosts: Hosts) -> list[str]:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  heartbeat = f"--heartbeat_seconds={HEARTBEAT_SECONDS}"
  return [f"--coordinator={address}", f"--num_processes={hosts.processes}", heartbeat]
