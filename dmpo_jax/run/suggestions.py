"""What to try with a finished run: commands for its own configuration and workdir, printed at its end."""

import os
import pathlib
import shlex
import sys
from collections.abc import Sequence

LONGEST = 60  # characters of a prompt that is put into a command
NOT_REPEATED = ("--mode", "--quiet", "--traceback", "--noquiet")  # flags of the training command


def suggest(command: Sequence[str], prompt: str) -> list[tuple[str, str]]:
  """Return what to try after a training command, and the command of each.

  Args:
    command: the program and the arguments of the training.
    prompt: a held-out prompt; a long one, or one of several lines, is left to the reader.
  """
  program, *arguments = command
  kept = [argument for argument in arguments if argument.partition("=")[0] not in NOT_REPEATED]
  again = f"{program} {shlex.join(kept)}"
  is_short = 0 < len(prompt) <= LONGEST and prompt.isprintable()
  asked = f"--prompt={shlex.quote(prompt) if is_short else 'TEXT'}"
  return [
    ("watch it answer a held-out prompt", f"{again} --mode=sample --watch {asked}"),
    ("ask it in a browser, or by OpenAI's API", f"{again} --mode=serve"),
    ("compare samplers", f"""{again} --mode=eval --config.eval.samplers="('llada','parallel','wino')\""""),
  ]


def typed() -> list[str]:
  """Return the program of this process as one would type it here, and its arguments."""
  name, python = pathlib.Path(sys.argv[0]).name, pathlib.Path(sys.executable)
  if name == "dmpo-jax":
    return [name, *sys.argv[1:]]
  is_here = python.is_relative_to(pathlib.Path.cwd())
  return [f"{os.path.relpath(python) if is_here else 'python'} -m dmpo_jax.main", *sys.argv[1:]]
