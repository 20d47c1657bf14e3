"""How the process that runs a model's code is started: in bubblewrap, or without a sandbox where the user says so.

In the sandbox the process sees Python and the system's libraries, read-only, and an empty /tmp of its own; no network,
no other process, no environment. In both cases `candidate.py` limits memory, time and files, and forbids the process
to start others, to send signals and to open sockets (on Linux).
"""

import functools
import os
import pathlib
import shutil
import subprocess
import sys

from dmpo_jax.tasks import candidate

SANDBOXES = ("bubblewrap", "none")
TMP_BYTES = 2**26  # of the sandbox's /tmp, which is in memory
START_SECONDS = 20.0  # for the trial

_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}
_LIBRARIES = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")


def start(sandbox: str, memory: int, seconds: int) -> "subprocess.Popen[bytes]":
  """Start `candidate.py`; its standard input and output are the channel.

  Args:
    sandbox: one of SANDBOXES. memory: bytes. seconds: of CPU time.
  """
  python = os.path.realpath(sys.executable)
  program = pathlib.Path(candidate.__file__).read_text()
  command = [python, "-sSBP", "-c", program, str(memory), str(seconds)]
  if sandbox == "bubblewrap":
    command = [*_bubblewrap(), *command]
  return subprocess.Popen(
    command,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    cwd="/",
    env=_ENVIRONMENT,
    start_new_session=True,
  )


def _bubblewrap() -> list[str]:
  """Return the command up to the program."""
  words = "--unshare-user --unshare-pid --unshare-net --unshare-ipc --unshare-uts --unshare-cgroup-try"
  words += " --uid 65534 --gid 65534 --cap-drop ALL --die-with-parent --new-session --hostname sandbox --clearenv"
  command = ["bwrap", *words.split()]
  for name, value in _ENVIRONMENT.items():
    command += ["--setenv", name, value]
  for folder in _LIBRARIES:
    command += ["--ro-bind-try", folder, folder]
  if not sys.base_prefix.startswith("/usr/"):
    command += ["--ro-bind", sys.base_prefix, sys.base_prefix]
  for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
    command += ["--dev-bind", device, device]
  return [*command, "--size", str(TMP_BYTES), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]


@functools.cache
def check(sandbox: str) -> None:
  """Check that model code can run as configured.

  Raises:
    ValueError: it cannot; the message says why and what would do.
  """
  why = _problem(sandbox)
  if why:
    raise ValueError(
      f"grading.sandbox={sandbox!r}: {why}. The task's rewards run what the model writes, so install bubblewrap "
      "(Debian and Ubuntu: apt install bubblewrap) on every host, or set grading.sandbox='none': then the model's "
      "code reads and writes what you can"
    )


def _problem(sandbox: str) -> str:
  if sandbox == "none":
    return ""
  if shutil.which("bwrap") is None:
    return "there is no bwrap on this machine's PATH"
  trial = [*_bubblewrap(), os.path.realpath(sys.executable), "-sSBP", "-c", "pass"]
  try:
    done = subprocess.run(trial, capture_output=True, timeout=START_SECONDS, check=False)
  except subprocess.TimeoutExpired:
    return f"bwrap did not start within {START_SECONDS:g} seconds"
  said = done.stderr.decode(errors="replace").strip().splitlines()
  return f"bwrap cannot start here ({said[-1] if said else f'exit {done.returncode}'})" if done.returncode else ""
