"""Several processes as one: how they find and wait for each other, which rows are a process's own, what they agree on.

Every host of a slice runs this program. What one of them decides or fails at alone leaves the others waiting, so what
they have to do together stands here. The devices' own collectives wait for ever and cannot say for whom: before each
of them the processes `meet`, which asks JAX's coordination service on process 0 and touches no device.
"""

import collections
import contextlib
import json
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # the service has barriers with names and time limits, and no public interface
from jax.experimental import multihost_utils

# Between two meetings all hosts do the same work. A host falls behind by what it alone has to compile: five minutes is
# the longest that a program of the 8B model took. Three times that is a host that hangs.
PATIENCE = 900.0
JOIN_SECONDS = 300  # that the processes may start apart; a slice's hosts are ready within a minute or two
STALL_SECONDS = 2 * PATIENCE  # without a meeting: the devices wait for a host that hangs, or one of them does
ABANDONED = 76  # exit code: another process of the job does not answer; started again, the job goes on
_LISTEN_SECONDS = 1.0  # between two looks at whether another process has failed
_LAST_WORDS_SECONDS = 5.0  # that process 0, which serves the others, stays after a failure, so that they hear of it
_AT, _FAILED, _HOSTS, _NOTES = (
  f"dmpo_jax/{folder}/" for folder in ("at", "failed", "hosts", "notes")
)  # of the service
_MAX_NAMED = 8
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # that gRPC looks for; in small letters alone

_num_meetings: collections.Counter[str] = collections.Counter()  # by name
# The last meeting; its time is inf while it goes on. Seconds of host's work after it that are allowed for besides.
_since: dict[str, Any] = {"name": "the start", "time": math.inf, "allowed": 0.0}
_is_ending = threading.Event()  # this process ends, and listens to nobody any more
_reason: list[str] = []  # why this process wants the job to stop


class Absent(RuntimeError):
  """Another process of the job did not come to where all of them meet."""


class Stopped(RuntimeError):
  """A process of the job has found that the run must not go on; all of them raise this at the same point."""


def meet(name: str, seconds: float = PATIENCE, note: str = "") -> dict[int, str]:
  """Wait until every process of the job is here; return the notes that processes have left, by process.

  Args:
    name: what has been done or is to be done next. The same in every process, so never a path or a number of a host.
    seconds: the longest wait. It has to cover what a process may be doing that the others are not.
    note: what the others are to know.

  Raises:
    Absent: a process did not come in time; it is named, with its host and where it was last.
  """
  client, own, num = distributed.global_state.client, jax.process_index(), jax.process_count()
  if client is None or num == 1:
    return {own: note} if note else {}
  _num_meetings[name] += 1
  place = f"{name} #{_num_meetings[name]}"
  _since.update(name=name, time=math.inf)
  client.key_value_set(f"{_AT}{own}", place, allow_overwrite=True)
  if note:
    client.key_value_set(f"{_NOTES}{place}/{own}", note)
  try:
    client.wait_at_barrier(f"dmpo_jax/{name}", round(seconds * 1000))
  except jax.errors.JaxRuntimeError as error:
    if "DEADLINE_EXCEEDED" not in str(error):  # a process died, which the service says better
      raise
    raise Absent(_describe_absent(client, own, num, place, seconds)) from error
  _since["time"] = time.monotonic()
  return _read_folder(client, f"{_NOTES}{place}/")


def _describe_absent(client: Any, own: int, num: int, place: str, seconds: float) -> str:
  name, last, hosts = _name_of(place), _read_folder(client, _AT), _read_folder(client, _HOSTS)
  missing = [index for index in range(num) if last.get(index) != place]
  if not missing:  # this is the one that came too late
    return f"the {num} processes came to {name!r} more than {seconds:.0f} s apart; the first of them have given up"
  named = [
    f"process {index} on {hosts.get(index, '?')} (last at {_name_of(last.get(index, 'the start'))!r})"
    for index in missing[:_MAX_NAMED]
  ]
  more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
  return f"of {num} processes, {', '.join(named)}{more} did not come to {name!r} within {seconds:.0f} s"


def _name_of(place: str) -> str:
  return place.partition(" #")[0]


def _read_folder(client: Any, folder: str) -> dict[int, str]:
  return {int(key.rpartition("/")[2]): text for key, text in client.key_value_dir_get(folder)}


def join(coordinator: str | None, num: int | None, index: int | None, *, heartbeat_seconds: int) -> bool:
  """Join the job's other processes; return whether there is a job, which JAX recognises where it is not given.

  Ends the process with `ABANDONED` where the others have not come within `JOIN_SECONDS`.

  Args:
    coordinator: host:port of process 0. num, index: processes in the job, and which of them this one is.
    heartbeat_seconds: a process that was silent for so long is taken for dead.
  """
  timeouts: dict[str, Any] = dict(
    heartbeat_timeout_seconds=heartbeat_seconds, shutdown_timeout_seconds=heartbeat_seconds
  )
  # JAX aborts when its own time is up; this says first, in plain words, what is the matter.
  timer = threading.Timer(JOIN_SECONDS, _give_up_joining)
  timer.daemon = True
  timer.start()
  try:
    with _without_proxies():
      jax.distributed.initialize(coordinator, num, index, initialization_timeout=2 * JOIN_SECONDS, **timeouts)
  except ValueError as error:
    if coordinator is not None or "coordinator_address" not in str(error):  # what it says where it sees no cluster
      raise
    return False
  finally:
    timer.cancel()
  state = distributed.global_state
  assert state.client is not None  # this process has just joined
  state.client.key_value_set(f"{_HOSTS}{state.process_id}", platform.node())
  if state.num_processes > 1:
    threading.Thread(target=_listen, args=(state.client, state.process_id), daemon=True).start()
  return True


def _give_up_joining() -> None:
  state = distributed.global_state
  print(
    f"stopped in process {state.process_id}: the {state.num_processes} processes of the job have not found each other "
    f"within {JOIN_SECONDS} s. They look for process 0 at {state.coordinator_address}: see that it runs, that its port "
    "can be reached from here, and that so many processes were started",
    file=sys.stderr,
    flush=True,
  )
  os._exit(ABANDONED)


def _listen(client: Any, own: int) -> None:
  """End this process where another has failed or where it has met nobody for long, whatever else it is doing."""
  while not _is_ending.wait(_LISTEN_SECONDS):
    try:
      failed = _read_folder(client, _FAILED)
    except jax.errors.JaxRuntimeError:  # the service is gone, of which JAX speaks itself
      return
    if failed and not _is_ending.wait(_LISTEN_SECONDS):  # what all have noticed, each says itself
      fail(*_last_words(own, failed))
    if time.monotonic() - _since["time"] > STALL_SECONDS + _since["allowed"]:
      fail(
        ABANDONED,
        f"stopped in process {own}: nothing has gone on for {STALL_SECONDS:.0f} s since {_since['name']!r}: its "
        "devices hang, or wait for those of another process; the logs of the others say where they are",
      )


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
  """Hide proxies from gRPC, which would ask them for process 0: it is inside, and they look outside."""
  hidden = {name: os.environ.pop(name) for name in _PROXIES if name in os.environ}
  jax.config.update("jax_check_proxy_envs", False)  # JAX warns of any variable whose name has "proxy" in it
  try:
    yield
  finally:
    os.environ.update(hidden)


@contextlib.contextmanager
def working(seconds: float) -> Iterator[None]:
  """Allow for work of this host, between two meetings, that may take so long and is no stall."""
  _since["allowed"] += seconds
  try:
    yield
  finally:
    _since["allowed"] -= seconds


def differing(name: str, own: Mapping[str, Any]) -> list[str]:
  """Compare what has to be the same in every process; every process has to call this, and gets the same answer.

  Args:
    name: see `meet`. own: what this process has, by names; as JSON can hold it.

  Returns:
    One line for each name, as `x is 1 in process 0 and 2 in process 3`; of several such processes the first.
  """
  notes = meet(name, note=json.dumps(own, sort_keys=True, default=str))
  everything = {index: json.loads(note) for index, note in sorted(notes.items())}
  first, lines = everything[min(everything)], []
  for key in sorted({key for has in everything.values() for key in has}):
    values = {index: has.get(key, "absent") for index, has in everything.items()}
    other = next((index for index, value in values.items() if value != first.get(key, "absent")), None)
    if other is not None:
      lines.append(f"{key} is {values[min(values)]!r} in process 0 and {values[other]!r} in process {other}")
  return lines


def stop_job(reason: str) -> None:
  """Have every process of the job raise `Stopped` at its next `poll`; may be called from any thread."""
  _reason.append(reason)


def poll(name: str) -> None:
  """Meet before work that all processes do together, and stop where one of them has asked for it.

  Raises:
    Absent: see `meet`.
    Stopped: a process has called `stop_job`; none of them goes on.
  """
  if notes := meet(name, note=_reason.pop() if _reason else ""):
    raise Stopped(next(iter(notes.values())))


def fail(code: int, said: str) -> NoReturn:
  """Say why this process ends, and end all processes of the job with its exit code.

  The usual exit of a process waits for the others, which wait for it, and JAX ends them all as crashed.
  """
  _is_ending.set()
  state = distributed.global_state
  print(said, file=sys.stderr, flush=True)
  if state.client is None or state.num_processes == 1:
    sys.exit(code)
  if code == ABANDONED and (heard := _hear_of_failure(state.client, state.process_id)):
    code, words = heard  # why the other does not answer; its code says whether to start again
    print(words, file=sys.stderr, flush=True)
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody is there to hear it
    state.client.key_value_set(f"{_FAILED}{state.process_id}", f"{code} {said}", allow_overwrite=True)
  if state.process_id == 0:
    time.sleep(_LAST_WORDS_SECONDS)
  sys.stdout.flush()
  os._exit(code)


def _hear_of_failure(client: Any, own: int) -> tuple[int, str] | None:
  """Wait a moment for what another process has said as it failed: its connections close before its words are here."""
  deadline = time.monotonic() + _LAST_WORDS_SECONDS
  while time.monotonic() < deadline:
    try:
      if failed := _read_folder(client, _FAILED):
        return _last_words(own, failed)
    except jax.errors.JaxRuntimeError:  # the service has gone with process 0
      return None
    time.sleep(0.1)
  return None


def _last_words(own: int, failed: Mapping[int, str]) -> tuple[int, str]:
  index, note = min(failed.items())
  code, _, said = note.partition(" ")
  return int(code), f"stopped in process {own} by process {index}, which has said: {said}"


def finish() -> None:
  """Wait for the others at the end of all work, as process 0 has still to report: JAX waits a few seconds alone.

  Raises:
    Absent: see `meet`.
  """
  meet("the end")
  _is_ending.set()


class HostShare:
  """The part of `num` rows that this process works on.

  Each row belongs to one process, and no process has two rows more than another. Where there are fewer rows than
  processes, some have none; process 0, which writes the log, has the first.

  Args:
    index, count: which process of how many; by default what JAX says now.
  """

  def __init__(self, num: int, index: int | None = None, count: int | None = None):
    self._num = num
    self._count = jax.process_count() if count is None else count
    self.mine = self._rows_of(jax.process_index() if index is None else index)

  def _rows_of(self, index: int) -> slice:
    return slice(-(-self._num * index // self._count), -(-self._num * (index + 1) // self._count))

  def gather(self, rows: np.ndarray) -> np.ndarray:
    """Join the rows of all processes, each of which calls this with those of its share, after they have met."""
    if self._count == 1 or self._num == 0:
      return rows
    filled = np.zeros((math.ceil(self._num / self._count), *rows.shape[1:]), rows.dtype)
    filled[: len(rows)] = rows
    parts = multihost_utils.process_allgather(filled)
    shares = [self._rows_of(index) for index in range(self._count)]
    return np.concatenate([part[: share.stop - share.start] for part, share in zip(parts, shares, strict=True)])


def gather_texts(texts: Sequence[str], name: str, seconds: float = PATIENCE) -> list[str]:
  """Join the texts of all processes, in the order of the processes; every process has to call this.

  Args:
    name, seconds: see `meet`.
  """
  if jax.process_count() == 1:
    return list(texts)
  meet(name, seconds)
  content = np.frombuffer(json.dumps(list(texts)).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([len(content)])).reshape(-1)
  filled = np.zeros(int(sizes.max()), np.uint8)
  filled[: len(content)] = content
  parts = multihost_utils.process_allgather(filled)
  return [text for part, size in zip(parts, sizes, strict=True) for text in json.loads(part[:size].tobytes())]


def agree(is_true: bool, name: str, seconds: float = PATIENCE) -> bool:
  """Return whether something is true in all processes; every process has to call this.

  Args:
    name, seconds: see `meet`.
  """
  meet(name, seconds)
  return bool(multihost_utils.process_allgather(np.array([is_true])).all())
