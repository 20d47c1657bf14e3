"""The program that runs a model's code: it defines functions, calls them on request, and answers with plain values.

It is all that runs in a process of its own (`sandbox.py`), so it imports the standard library alone. Tests, expected
values and verdicts stay with the process that asks (`remote.py`): what the model's code can change or forge here is
nothing but its own return values. Requests and answers are lines of JSON; a value other than None, a bool, a number or
a text is a list that begins with its kind.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

MOST_FILE_BYTES = 2**24
MOST_ITEMS = 100_000  # of something that a test iterates over
TYPES: dict[str, type] = {own.__name__: own for own in (bool, int, float, complex, str, bytes, list, tuple, set, dict)}
SEQUENCES: dict[str, type] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}

# system calls that no solution needs: new processes and threads, programs, signals, sockets, other processes' memory,
# namespaces, and large parts of the kernel. They fail with EPERM
_CALLS = {
  "x86_64": (
    0xC000003E,
    (41, 56, 57, 58, 59, 62, 101, 129, 165, 200, 234, 248, 250, 272, 297, 298, 308, 310, 311, 321, 322, 323),
  ),
  "aarch64": (
    0xC00000B7,
    (40, 97, 117, 129, 130, 131, 138, 198, 217, 219, 220, 221, 240, 241, 268, 270, 271, 280, 281, 282),
  ),
}
_NEWER_CALLS = (424, 425, 434, 435)  # pidfd_send_signal, io_uring_setup, pidfd_open, clone3: the same everywhere
_KILL, _FAIL, _ALLOW = 0x80000000, 0x00050001, 0x7FFF0000  # what a filter returns
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2  # of prctl


def encode(value: Any, keep: Callable[[Any], int]) -> Any:
  """Write a value as JSON can hold it; `keep` numbers an object that is not plain."""
  if value is None or type(value) in (bool, int, float, str):
    return value
  for kind in (int, float, str):  # subclasses are sent as what they extend
    if isinstance(value, kind):
      return kind(value)
  if any(value is own for own in TYPES.values()):
    return ["type", value.__name__]
  if isinstance(value, complex):
    return ["complex", value.real, value.imag]
  if isinstance(value, bytes | bytearray):
    return ["bytes", bytes(value).hex()]
  if isinstance(value, dict):
    return ["dict", *(encode(item, keep) for pair in value.items() for item in pair)]
  for name, kind in SEQUENCES.items():
    if isinstance(value, kind):
      return [name, *(encode(item, keep) for item in value)]
  return ["object", keep(value)]


def decode(data: Any, find: Callable[[int], Any]) -> Any:
  """Read what `encode` wrote; `find` returns an object by its number.

  Raises:
    ValueError, TypeError: it did not write this.
  """
  if data is None or isinstance(data, bool | int | float | str):
    return data
  if not isinstance(data, list):
    raise ValueError(f"{data!r:.60} is no value")
  kind, *items = data
  if kind == "object":
    return find(*items)
  if kind == "type":
    return TYPES[items[0]]
  if kind == "bytes":
    return bytes.fromhex(*items)
  items = [decode(item, find) for item in items]
  if kind == "complex":
    return complex(*items)
  if kind == "dict":
    return dict(zip(items[::2], items[1::2], strict=True))
  return SEQUENCES[kind](items)


def main() -> None:
  """Answer requests on standard input until it closes, with limits; arguments: bytes of memory, seconds of CPU."""
  requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
  null = os.open("/dev/null", os.O_RDWR)
  for stream in (0, 1, 2):
    os.dup2(null, stream)
  restrict(int(sys.argv[1]), int(sys.argv[2]))
  del sys.argv[1:]
  objects: list[Any] = []

  def keep(value: Any) -> int:
    objects.append(value)
    return len(objects) - 1

  namespace: dict[str, Any] = {"__name__": "solution"}
  for line in requests:
    request = json.loads(line)
    answer = {"id": request["id"]}
    try:
      given = [decode(item, objects.__getitem__) for item in request["given"]]
      answer["value"] = encode(_do(request["do"], given, namespace), keep)
      text = json.dumps(answer)
    except BaseException as error:  # of the model's code, SystemExit included
      text = json.dumps({"id": request["id"], "error": type(error).__name__})
    answers.write(text.encode() + b"\n")
    answers.flush()


def _do(action: str, given: list[Any], namespace: dict[str, Any]) -> Any:
  """Do what is asked."""
  match action, given:
    case "parse", [code]:
      namespace["__code__"] = compile(code, "<completion>", "exec")
      return None
    case "define", []:
      exec(namespace.pop("__code__"), namespace)
      return None
    case "name", [name]:
      return _Kept(namespace[name]) if callable(namespace[name]) else namespace[name]
    case "call", [function, arguments, keywords]:
      return _plain(function)(*arguments, **keywords)
    case "attribute", [value, name]:
      return getattr(_plain(value), name)
    case "set", [value, name, new]:
      return setattr(_plain(value), name, new)
    case "items", [value]:
      return list(_first(iter(_plain(value))))
    case _:
      raise ValueError(action)


class _Kept:
  """A function or class that is named by the tests: it stays here, whatever it is."""

  def __init__(self, value: Any):
    self.value = value


def _plain(value: Any) -> Any:
  return value.value if isinstance(value, _Kept) else value


def _first(items: Iterator[Any]) -> Iterator[Any]:
  for _, item in zip(range(MOST_ITEMS), items, strict=False):
    yield item


def restrict(memory: int, seconds: int) -> None:
  """Limit this process: its memory, CPU time and files, and that it starts nothing and signals nobody."""
  limits = {
    "RLIMIT_AS": memory,
    "RLIMIT_CPU": seconds,
    "RLIMIT_FSIZE": MOST_FILE_BYTES,
    "RLIMIT_NOFILE": 64,
    "RLIMIT_CORE": 0,
    "RLIMIT_NPROC": 1,
  }
  for name, value in limits.items():
    with contextlib.suppress(AttributeError, ValueError, OSError):  # what this system does not know
      hard = resource.getrlimit(getattr(resource, name))[1]
      value = value if hard == resource.RLIM_INFINITY else min(value, hard)
      resource.setrlimit(getattr(resource, name), (value, value))
  if sys.platform == "linux" and platform.machine() in _CALLS:
    _forbid(*_CALLS[platform.machine()])


def _forbid(architecture: int, calls: tuple[int, ...]) -> None:
  """Let system calls fail, by a seccomp filter: four fields an instruction, as in linux/filter.h.

  Raises:
    OSError: the kernel refuses the filter.
  """
  program = [(0x20, 0, 0, 4), (0x15, 1, 0, architecture), (0x06, 0, 0, _KILL), (0x20, 0, 0, 0)]
  program += [(0x35, 0, 1, 0x40000000), (0x06, 0, 0, _KILL)]  # calls of the x32 interface
  for call in (*calls, *_NEWER_CALLS):
    program += [(0x15, 0, 1, call), (0x06, 0, 0, _FAIL + 37 * (call == 435))]  # clone3: ENOSYS, so that clone is tried
  program.append((0x06, 0, 0, _ALLOW))
  packed = b"".join(
    code.to_bytes(2, sys.byteorder) + bytes((yes, no)) + value.to_bytes(4, sys.byteorder)
    for code, yes, no, value in program
  )
  text = ctypes.create_string_buffer(packed, len(packed))

  class Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("program", ctypes.c_void_p))

  libc = ctypes.CDLL(None, use_errno=True)
  own = Filter(len(program), ctypes.addressof(text))
  if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(_SECCOMP, _FILTER, ctypes.byref(own)):
    raise OSError(ctypes.get_errno(), "no seccomp filter")


if __name__ == "__main__":
  main()
