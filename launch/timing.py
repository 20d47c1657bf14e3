"""Seconds and memory of programs that are compared: run in turns, so that what else the machine does hits all alike."""

import ctypes
import dataclasses
import os
import pathlib
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

STATUS = pathlib.Path("/proc/self/status")


@dataclasses.dataclass(frozen=True)
class Timing:
  """What one program took."""

  seconds: tuple[float, ...]
  peak_bytes: int | None  # resident memory above what was there before the run; None: the system does not tell
  result: Any  # of the last run

  @property
  def median(self) -> float:
    return statistics.median(self.seconds)


def run_in_turns(programs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
  """Run every program once unmeasured, then `repeats` times in turns; results must be ready when a call returns."""
  for program in programs.values():
    program()
  seconds: dict[str, list[float]] = {name: [] for name in programs}
  peaks: dict[str, list[int | None]] = {name: [] for name in programs}
  results = {}
  for _ in range(repeats):
    for name, program in programs.items():
      before = _start_watching_memory()
      start = time.perf_counter()
      results[name] = program()
      seconds[name].append(time.perf_counter() - start)
      peaks[name].append(None if before is None else max(_read_status("VmHWM") - before, 0))
  return {
    name: Timing(tuple(seconds[name]), None if None in peaks[name] else max(peaks[name]), results[name])
    for name in programs
  }


def describe_machine() -> str:
  """Name the accelerator, or the processor with the cores that this process may use."""
  device = jax.devices()[0]
  if device.platform != "cpu":
    return f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}"
  info = pathlib.Path("/proc/cpuinfo")
  found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return f"{cores} cores of {found[1] if found else platform.processor()}, jax {jax.__version__}"


def _start_watching_memory() -> int | None:
  """Set the process's memory peak back to what it holds now (Linux), and return that."""
  try:
    ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, or the run would find it and seem to need none
    pathlib.Path("/proc/self/clear_refs").write_text("5")
  except (OSError, AttributeError):
    return None
  return _read_status("VmRSS")


def _read_status(key: str) -> int:
  return int(re.search(rf"{key}:\s+(\d+) kB", STATUS.read_text())[1]) * 1024
