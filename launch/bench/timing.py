"""Times contenders in turns, each in its own process, and checks that their numbers agree.

Turns expose all contenders to the same load of the machine; processes keep their memory apart.
"""

import ctypes
import dataclasses
import gc
import multiprocessing
import os
import pathlib
import platform
import re
import statistics
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

STATUS = pathlib.Path("/proc/self/status")
PEAK_SIZE = 3072  # of the square matrix product that measures the peak of the machine
PEAK_REPEATS = 5
SETTLE_SECONDS = 0.3  # the results of a program are ready a little before its memory is free


@dataclasses.dataclass(frozen=True)
class Contender:
  """The work of one process."""

  run: Callable[[], Mapping[str, float] | None]  # does one turn, and returns facts about it
  check: Callable[[], Mapping[str, np.ndarray]] = dict  # the same work without noise; numbers to compare
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # known before any turn, such as "flops"


Numbers = Mapping[str, np.ndarray]
Maker = tuple[Callable[..., Contender], tuple[Any, ...]]  # a function at the top level of a module, and its arguments


@dataclasses.dataclass(frozen=True)
class Timing:
  """The time and memory of one contender."""

  seconds: tuple[float, ...]
  peak_bytes: int | None  # above what the process held before its first turn; None: unknown on this system
  facts: Mapping[str, Any]

  @property
  def median(self) -> float:
    return statistics.median(self.seconds)


class ContenderFailed(RuntimeError):
  """The process of a contender died, raised an error, or took too long."""


class Start(NamedTuple):
  """How the processes of contenders start, and until when they may run."""

  from_one: bool = False  # as copies of one process that has imported what is set to be preloaded; else afresh
  until: float | None = None  # by `time.monotonic`; None: as long as they take


AFRESH = Start()  # what one process has imported or set must not reach another


def run_in_turns(
  makers: Mapping[str, Maker],
  repeats: int,
  *,
  say: Callable[[str], None] = print,
  checked: Collection[str] = (),
  judge: Callable[[Mapping[str, Numbers]], None] = lambda numbers: None,
  start: Start = AFRESH,
) -> dict[str, Timing]:
  """Build every contender, run it once untimed, then `repeats` times in turns.

  Args:
    say: gets a line about each step.
    checked: the contenders whose numbers are compared.
    judge: gets these numbers before anything is timed; an error that it raises ends the run.

  Raises:
    ValueError: a contender refuses its arguments.
    ContenderFailed: a contender fails otherwise, or takes too long.
  """
  processes: dict[str, _Process] = {}
  try:
    for name, (make, args) in makers.items():
      say(f"{name}: building")
      processes[name] = _Process(name, make, args, start)
    facts = {name: process.facts for name, process in processes.items()}
    numbers = {name: {} for name in processes}
    for name, process in processes.items():
      say(f"{name}: first turn, not counted")
      process.ask("run")
      if name in checked:
        say(f"{name}: numbers")
        numbers[name] = process.ask("check")
    judge(numbers)
    turns: dict[str, list[_Turn]] = {name: [] for name in processes}
    for turn in range(repeats):
      for name, process in processes.items():
        say(f"{name}: turn {turn + 1} of {repeats}")
        turns[name].append(process.ask("run"))
  finally:
    for process in processes.values():
      process.stop()
  return {
    name: Timing(
      tuple(turn.seconds for turn in rows),
      _highest([turn.peak_bytes for turn in rows]),
      facts[name] | rows[-1].facts,
    )
    for name, rows in turns.items()
  }


def measure_peak(dtype: str) -> float:
  """Measure the peak of the machine: floating-point operations per second of a large matrix product, the best turn."""
  process = _Process("matrix product", _make_product, (dtype,))
  try:
    return process.facts["flops"] / min(process.ask("run").seconds for _ in range(PEAK_REPEATS + 1))
  finally:
    process.stop()


def facts_of(make: Callable[..., Contender], args: tuple[Any, ...], start: Start = AFRESH) -> dict[str, Any]:
  """Build a contender in its own process and return its facts.

  Raises:
    ValueError, ContenderFailed: as `run_in_turns`.
  """
  process = _Process(make.__name__, make, args, start)
  process.stop()
  return process.facts


def _make_product(dtype: str) -> Contender:
  matrix = jnp.ones((PEAK_SIZE, PEAK_SIZE), dtype)
  product = jax.jit(jnp.matmul)

  def turn() -> None:
    product(matrix, matrix).block_until_ready()

  return Contender(turn, facts={"flops": 2.0 * PEAK_SIZE**3})


def relative_error(numbers: np.ndarray, wanted: np.ndarray) -> float:
  """Return the largest difference relative to the largest wanted number; of integers, the share that differs."""
  if np.issubdtype(wanted.dtype, np.integer):
    return float((numbers != wanted).mean())
  scale = np.abs(wanted).max()
  return float(np.abs(numbers - wanted).max() / (scale if scale > 0 else 1.0))


def describe_machine() -> str:
  """Name the accelerator, or the processor and the cores that this process may use."""
  device = jax.devices()[0]
  if device.platform != "cpu":
    return f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}"
  info = pathlib.Path("/proc/cpuinfo")
  found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return f"{cores} cores of {found[1] if found else platform.processor()}, jax {jax.__version__}"


class _Process:
  """The process of a contender, seen from the main process."""

  def __init__(self, name: str, make: Callable[..., Contender], args: tuple[Any, ...], start: Start = AFRESH):
    own = multiprocessing.get_context
    context = own("forkserver") if start.from_one else own("spawn")
    self._name, self._until = name, start.until
    self._pipe, other = context.Pipe()
    self._process = context.Process(target=_serve, args=(other, make, args), daemon=True)
    self._process.start()
    other.close()
    self.facts = self._receive()

  def ask(self, what: str) -> Any:
    self._pipe.send(what)
    return self._receive()

  def _receive(self) -> Any:
    if self._until is not None and not self._pipe.poll(max(self._until - time.monotonic(), 0)):
      self._process.kill()
      raise ContenderFailed(f"{self._name}: its time is over")
    try:
      answer = self._pipe.recv()
    except EOFError:
      self._process.join()
      code = self._process.exitcode
      raise ContenderFailed(f"{self._name}: its process died, exit code {code} (-9: perhaps out of memory)") from None
    if isinstance(answer, ValueError):
      raise answer
    if isinstance(answer, _Problem):
      raise ContenderFailed(f"{self._name}: {answer.text}")
    return answer

  def stop(self) -> None:
    self._pipe.close()
    self._process.join(timeout=10)
    self._process.kill()
    self._process.join()  # until then it may hold an accelerator's memory


def _highest(peaks: Sequence[int | None]) -> int | None:
  known = [peak for peak in peaks if peak is not None]
  return max(known) if len(known) == len(peaks) else None


class _Problem(NamedTuple):
  text: str


class _Turn(NamedTuple):
  seconds: float
  peak_bytes: int | None
  facts: dict[str, Any]


def _serve(pipe: Connection, make: Callable[..., Contender], args: tuple[Any, ...]) -> None:
  """Build the contender and answer requests until the pipe is closed."""
  try:
    contender = make(*args)
    pipe.send(dict(contender.facts))
    base = _resident()
    while True:
      if pipe.recv() == "run":
        pipe.send(_take_turn(contender.run, base))
        continue
      before = _resident()
      pipe.send({name: np.asarray(value) for name, value in contender.check().items()})
      after = _resident()
      if base is not None and before is not None and after is not None:
        base += after - before  # the programs of the check stay in memory
  except EOFError:
    pass
  except ValueError as error:
    pipe.send(ValueError(str(error)))
  except Exception:
    pipe.send(_Problem(traceback.format_exc()))


def _take_turn(run: Callable[[], Mapping[str, float] | None], base: int | None) -> _Turn:
  _resident()  # returns freed memory, so that every turn allocates its memory anew
  _forget_peak()
  start = time.perf_counter()
  facts = run()
  seconds = time.perf_counter() - start
  return _Turn(seconds, None if base is None else max(_read_status("VmHWM") - base, 0), dict(facts or {}))


def _resident() -> int | None:
  """Return freed memory to the system, and the bytes that the process still holds (None if not on Linux)."""
  gc.collect()
  time.sleep(SETTLE_SECONDS)
  try:
    ctypes.CDLL(None).malloc_trim(0)
  except (OSError, AttributeError):
    return None
  return _read_status("VmRSS") if STATUS.exists() else None


def _forget_peak() -> None:
  """Reset the memory peak of the process to what it holds now (Linux)."""
  clear = pathlib.Path("/proc/self/clear_refs")
  if clear.exists():
    clear.write_text("5")


def _read_status(key: str) -> int:
  found = re.search(rf"{key}:\s+(\d+) kB", STATUS.read_text())
  assert found is not None  # Linux writes every key
  return int(found[1]) * 1024
