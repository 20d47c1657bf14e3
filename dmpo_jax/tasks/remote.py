"""Tests of a model's code, which runs in another process: the tests see stand-ins for its functions and objects.

Tests and expected values never leave this process, and the verdict is formed here. What comes back over the channel is
the return value of a call, rebuilt from plain types: an object with an `__eq__` of its own arrives as a `Remote`, which
equals nothing but itself.
"""

import builtins
import dataclasses
import json
import os
import random
import secrets
import select
import time
from collections.abc import Iterator, Sequence
from typing import Any

from dmpo_jax.tasks import candidate, sandbox
from dmpo_jax.tasks.base import Limits

MOST_ANSWER_BYTES = 2**22
TESTS_SHARE = 0.8  # of the time limit of a completion, so that tests that were passed before it count
_ENDED = "the process of the model's code ended"


class Gone(BaseException):
  """The process has ended, is late, or does not follow the protocol: no test can pass any more.

  Not an Exception, as tests may catch those.
  """


@dataclasses.dataclass(frozen=True)
class Program:
  """A model's code and what it is tested with.

  Args:
    header: what stands before the code: imports, helpers and the head of the function. helpers: the same as a program
      of its own, for the tests.
    names: what the tests use of the code's names. alias: another name for the first of them.
    setup: code that the tests need. tests: pieces of code, in order, in one namespace.
  """

  header: str
  code: str
  helpers: str
  names: Sequence[str]
  setup: str
  tests: Sequence[str]
  alias: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of a program."""

  parses: bool = False
  runs: bool = False  # it defines what the tests use, and a call has returned
  num_passed: int = 0
  problem: str = ""  # the first one


def run_tests(program: Program, limits: Limits, seed: str) -> Outcome:
  """Run a program's tests.

  Args:
    seed: of the random numbers that tests draw, the same for every completion of a prompt.
  """
  process, parses, num_passed, problem = _Process(limits), False, 0, ""
  try:
    process.ask("parse", program.header + program.code)
    parses = any(line.strip() and not line.strip().startswith("#") for line in program.code.splitlines())
    namespace: dict[str, Any] = {"__name__": "tests"}
    exec(program.helpers, namespace)  # what the tests use of them is the data set's own, not the model's
    process.ask("define")
    for name in program.names:
      namespace[name] = process.ask("name", name)
    if program.alias:
      namespace[program.alias] = namespace[program.names[0]]
    random.seed(seed)
    exec(program.setup, namespace)
    for test in program.tests:
      try:
        exec(test, namespace)
        num_passed += 1
      except Exception as error:
        problem = problem or f"{type(error).__name__} in {test:.100}"
  except Exception as error:
    problem = problem or type(error).__name__
  except Gone as error:
    problem = problem or str(error)
  finally:
    process.close()
  return Outcome(parses, process.num_returned > 0, num_passed, problem)


class _Process:
  """The process of a model's code, and the channel to it."""

  def __init__(self, limits: Limits):
    seconds = TESTS_SHARE * limits.seconds
    self._deadline = time.monotonic() + seconds
    self._process = sandbox.start(limits.sandbox, int(limits.memory_gb * 2**30), int(seconds) + 1)
    assert self._process.stdin is not None
    assert self._process.stdout is not None
    self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
    os.set_blocking(self._to, False)
    self._unread = b""
    self.num_returned = 0  # calls that have returned

  def ask(self, action: str, *given: Any) -> Any:
    """Let the process do something, and return the value.

    Raises:
      Gone: it has not done so in time, or has answered something else.
      Exception: what the model's code has raised, if it is a built-in one, or RuntimeError.
    """
    token = secrets.token_hex(8)
    request = {"id": token, "do": action, "given": [candidate.encode(item, _number_of) for item in given]}
    self._write(json.dumps(request).encode() + b"\n")
    try:
      answer = json.loads(self._read_line())
      is_right = isinstance(answer, dict) and answer.pop("id", "") == token
    except (ValueError, RecursionError) as error:
      raise Gone("an answer that is none") from error
    if not is_right:
      raise Gone("an answer to no question")
    if "error" in answer:
      kind = getattr(builtins, str(answer["error"]), None)
      if isinstance(kind, type) and issubclass(kind, Exception):
        raise kind("in the model's code")
      raise RuntimeError(answer["error"])
    try:
      value = candidate.decode(answer.get("value"), lambda number: Remote(self, number))
    except (LookupError, TypeError, ValueError, RecursionError) as error:
      raise Gone("a value that is none") from error
    self.num_returned += action == "call"
    return value

  def _write(self, data: bytes) -> None:
    while data:
      self._wait(to_write=True)
      try:
        data = data[os.write(self._to, data) :]
      except OSError as error:
        raise Gone(_ENDED) from error

  def _read_line(self) -> bytes:
    while b"\n" not in self._unread:
      if len(self._unread) > MOST_ANSWER_BYTES:
        raise Gone(f"an answer of more than {MOST_ANSWER_BYTES} bytes")
      self._wait(to_write=False)
      got = os.read(self._from, 2**16)
      if not got:
        raise Gone(_ENDED)
      self._unread += got
    line, _, self._unread = self._unread.partition(b"\n")
    return line

  def _wait(self, to_write: bool) -> None:
    left = max(self._deadline - time.monotonic(), 0.0)
    reading, writing = ([], [self._to]) if to_write else ([self._from], [])
    if not any(select.select(reading, writing, [], left)):
      raise Gone("out of time")

  def close(self) -> None:
    """End it, with all that it holds."""
    self._process.kill()
    with self._process:  # closes the pipes and waits
      pass


class Remote:
  """A function, class or object in the process of the model's code. No two are equal."""

  def __init__(self, process: _Process, number: int):
    object.__setattr__(self, "_process", process)
    object.__setattr__(self, "_number", number)

  def __call__(self, *arguments: Any, **keywords: Any) -> Any:
    return self._process.ask("call", self, list(arguments), keywords)

  def __getattr__(self, name: str) -> Any:
    if name.startswith("__"):
      raise AttributeError(name)
    return self._process.ask("attribute", self, name)

  def __setattr__(self, name: str, value: Any) -> None:
    self._process.ask("set", self, name, value)

  def __iter__(self) -> Iterator[Any]:
    return iter(self._process.ask("items", self))


def _number_of(value: Any) -> int:
  if isinstance(value, Remote):
    return value._number
  raise TypeError(f"a {type(value).__name__} cannot be handed to the model's code")
