"""Several tasks in one run: one stream of prompts from those of the tasks, and one grading that asks each task's own.

Which task has which place of the stream is a function of the shares alone, and so is the position that each task's own
stream has reached: a resumed run needs nothing but its position.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, UInt32

from dmpo_jax.data import PromptStream, prompt_id
from dmpo_jax.grading import Grading, Pending
from dmpo_jax.structs import Prompts
from dmpo_jax.tasks import Record, Task
from dmpo_jax.tasks.judge import Verdict
from dmpo_jax.tasks.mixture import OF_TASK, Mixture, label


def schedule(shares: Sequence[float], num: int) -> Int[np.ndarray, " num"]:
  """Return the task of each of the first `num` places: after any of them, each task has its share, give or take one.

  The place of a task's n-th prompt is that of (n - 1/2) / share among those of all tasks.
  """
  times, tasks = [], []
  for task, share in enumerate(shares):
    count = int(num * share) + len(shares) + 1
    times.append((np.arange(count) + 0.5) / share)
    tasks.append(np.full(count, task))
  order = np.argsort(np.concatenate(times), kind="stable")[:num]
  return np.concatenate(tasks)[order]


class MixedStream(PromptStream):
  """The streams of several tasks as one; see `PromptStream`.

  Args:
    streams: by task. shares: of the prompts, in the same order; None: one stream after the other, once.
  """

  def __init__(self, streams: Mapping[str, PromptStream], shares: Sequence[float] | None):
    self._streams, self._shares = streams, shares
    self.num_skipped = sum(stream.num_skipped for stream in streams.values())
    self.num_cut = sum(stream.num_cut for stream in streams.values())

  def __len__(self) -> int:
    """Return the number of different prompts."""
    return sum(map(len, self._streams.values()))

  @property
  def lengths(self) -> list[int]:
    """The tokens of each prompt of an epoch of every task."""
    return [length for stream in self._streams.values() for length in stream.lengths]

  def digest(self) -> str:
    """Hash the tokens of all prompts."""
    digests = [stream.digest() for stream in self._streams.values()]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]

  def check_demonstrations(self, completion_length: int) -> None:
    """Make the demonstrations of an epoch of each task; see `PromptStream`."""
    for stream in self._streams.values():
      stream.check_demonstrations(completion_length)

  def batch(self, position: int, n: int) -> tuple[Prompts, list[Record]]:
    """Return the `n` prompts from `position` on, and their records, which name their tasks."""
    place, turns = self._turns(position, n)
    found = [stream.batch(*turn) for stream, turn in zip(self._streams.values(), turns, strict=True)]
    return self._merge(place, found)

  def demonstrations(
    self, position: int, n: int, completion_length: int
  ) -> tuple[Prompts, Int[np.ndarray, "n c"], list[Record]]:
    """Return prompts as `batch` does, and a demonstration for each."""
    place, turns = self._turns(position, n)
    pairs = zip(self._streams.values(), turns, strict=True)
    found = [stream.demonstrations(*turn, completion_length) for stream, turn in pairs]
    prompts, records = self._merge(place, [(own[0], own[2]) for own in found])
    return prompts, np.concatenate([own[1] for own in found])[place], records

  def _turns(self, position: int, n: int) -> tuple[Int[np.ndarray, " n"], list[tuple[int, int]]]:
    """Return each task's position and count, and where each place is found if they stand one after the other."""
    if self._shares is None:
      order = np.repeat(np.arange(len(self._streams)), list(map(len, self._streams.values())))
    else:
      order = schedule(self._shares, position + n)
    before, here = order[:position], order[position : position + n]
    turns = [(int((before == task).sum()), int((here == task).sum())) for task in range(len(self._streams))]
    return np.argsort(np.argsort(here, kind="stable"), kind="stable"), turns

  def _merge(
    self, place: Int[np.ndarray, " n"], found: Sequence[tuple[Prompts, list[Record]]]
  ) -> tuple[Prompts, list[Record]]:
    records = [{**record, OF_TASK: name} for name, (_, own) in zip(self._streams, found, strict=True) for record in own]
    tokens, is_valid, ids = (
      np.concatenate([getattr(prompts, field) for prompts, _ in found])[place]
      for field in ("tokens", "is_valid", "prompt_id")
    )
    return Prompts(tokens=tokens, is_valid=is_valid, prompt_id=_told_apart(ids)), [records[index] for index in place]


def _told_apart(ids: UInt32[np.ndarray, " n"]) -> UInt32[np.ndarray, " n"]:
  """Give a prompt that two tasks share another identity the second time, which none of them has either."""
  found, taken = ids.copy(), set[int]()
  for row, own in enumerate(ids.tolist()):
    repeats = itertools.count(1)
    while int(found[row]) in taken:  # `data.prompt_ids` has named the repeats within a task in the same way
      found[row] = prompt_id(f"{own} {next(repeats)}")
    taken.add(int(found[row]))
  return found


class MixedGrading(Grading):
  """The gradings of several tasks as one; see `Grading`."""

  def __init__(self, gradings: Mapping[str, Grading]):
    self.task = Mixture({name: grading.task for name, grading in gradings.items()})
    self._gradings = gradings

  def submit(self, records: Sequence[Record], completions: Sequence[str], is_ended: Sequence[bool]) -> "MixedPending":
    """Start grading completions, each by the task of its record; return at once."""
    pending = []
    for name, grading in self._gradings.items():
      rows = [row for row, record in enumerate(records) if record[OF_TASK] == name]
      texts = [completions[row] for row in rows]
      pending.append((rows, grading.submit([records[row] for row in rows], texts, [is_ended[row] for row in rows])))
    return MixedPending(pending)

  def tasks_of(self, records: Sequence[Record]) -> tuple[tuple[str, ...], list[int] | None]:
    """Return the names of the tasks, without folders, and which of them each record is of."""
    names = list(self._gradings)
    return tuple(map(label, names)), [names.index(record[OF_TASK]) for record in records]

  def task_of(self, record: Record) -> Task:
    """Return the task that a record names."""
    return self._gradings[record[OF_TASK]].task

  def patience(self, num: int) -> float:
    """Return how many seconds a process may take longer than the others: at most that of all tasks together."""
    return sum(grading.patience(num) for grading in self._gradings.values())

  def close(self) -> None:
    """End the workers of all tasks."""
    for grading in self._gradings.values():
      grading.close()


@dataclasses.dataclass
class MixedPending(Pending):
  """Grading in progress: rows and the pending verdicts on them, task by task."""

  pending: Sequence[tuple[list[int], Pending]]

  def result(self) -> list[Verdict]:
    """Wait for the verdicts and return them in the order of the completions."""
    found = {row: verdict for rows, own in self.pending for row, verdict in zip(rows, own.result(), strict=True)}
    return [dataclasses.replace(found[row], parts={}) for row in range(len(found))]

  @property
  def per_second(self) -> float:
    """Completions graded per second, NaN if there were none."""
    seconds = [len(rows) / own.per_second for rows, own in self.pending if rows]
    return sum(len(rows) for rows, _ in self.pending) / max(seconds) if seconds else float("nan")
