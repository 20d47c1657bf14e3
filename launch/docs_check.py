"""Check the documents' commands: every one names what exists, and what a laptop can run is run.

    python -m launch.docs_check

Commands of `dmpo_jax.main` are run in the documents' order on the smoke configuration, in a folder that is thrown away;
those that serve are left out, as tests/test_serve.py asks them. Commands that need a pod, a bucket, a download or hours
are only read.
"""

import ast
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from launch.benchmark import SECTIONS

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
PLACEHOLDERS = re.compile(r"gs://|[A-Z]{3,}|\*|hf=|launch\.(study|plan|soak)|runs/[ab]\b|mode=serve")  # what is not run
PATH = re.compile(r"`((?:dmpo_jax|configs|launch|tests)/[\w/.-]+)`")


def commands(text: str) -> list[str]:
  """List the commands of a document: indented lines that begin with python or make, continued lines joined."""
  joined = re.sub(r"\\\n\s*", "", text)
  return re.findall(r"^    ((?:\.venv/bin/)?(?:python|make) [^\n]*)", joined, re.M)


def problems(text: str) -> list[str]:
  """List what the commands and paths of a document name and what does not exist."""
  found = [f"{path}: no such file" for path in PATH.findall(text) if not (ROOT / path).exists()]
  targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
  for command in commands(text):
    program, *args = shlex.split(command, comments=True)
    if program == "make":
      found += [f"{command}: no such target" for arg in args if "=" not in arg and arg not in targets]
    elif args[:1] == ["-m"] and args[1].split(".")[0] in ("dmpo_jax", "launch"):
      found += [f"{command}: {what}" for what in _wrong_arguments(args[1], args[2:])]
  return found


def _wrong_arguments(module: str, args: Sequence[str]) -> list[str]:
  from dmpo_jax.rules import RULES

  if module == "launch.benchmark" and args:  # a section is a module with flags of its own
    module = SECTIONS.get(args[0], module)
  path = ROOT / (module.replace(".", "/") + ".py")
  if not path.exists():
    return [f"no module {module}"]
  known = _flags(path)
  found = []
  for arg in (arg.strip("[]") for arg in args):
    name, _, value = arg.removeprefix("--").partition("=")
    if not arg.startswith("--"):
      continue
    if name.startswith("config."):
      is_own = name.count(".") == 3  # a choice's own keyword
      found += [] if is_own or name.removeprefix("config.") in RULES else [f"no key {name}"]
    elif name not in known:
      found.append(f"no flag --{name}")
    elif name == "config" and not (ROOT / value).exists():
      found.append(f"no file {value}")
  return found


def _flags(path: pathlib.Path) -> set[str]:
  """The names that a module defines flags by."""
  calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
  defining = [call for call in calls if getattr(call.func, "attr", "").startswith(("DEFINE_", "add_argument"))]
  names = {ast.literal_eval(call.args[0]) for call in defining if isinstance(call.args[0], ast.Constant)}
  return {name.removeprefix("--") for name in names}


def runnable(text: str, folder: pathlib.Path) -> list[list[str]]:
  """List the commands to run, on the smoke configuration and in a folder of their own."""
  found = []
  for command in commands(text):
    args = shlex.split(command, comments=True)
    is_ours = args[1:2] == ["-m"] and args[2] in ("dmpo_jax.main", "launch.report", "launch.export_hf")
    if not is_ours or PLACEHOLDERS.search(" ".join(args)):
      continue
    args = [re.sub(r"configs/\w+\.py", "configs/smoke.py", arg).replace("=runs/", f"={folder}/") for arg in args]
    found.append([sys.executable, *args[1:]])
  return found


def main() -> None:
  """Check all documents, run their commands, and say what is wrong."""
  texts = {name: (ROOT / name).read_text() for name in DOCUMENTS if (ROOT / name).exists()}
  wrong = [f"{name}: {what}" for name, text in texts.items() for what in problems(text)]
  with tempfile.TemporaryDirectory() as folder:
    for command in runnable("\n".join(texts.values()), pathlib.Path(folder)):
      done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
      print(f"{'ok' if done.returncode == 0 else 'FAILED':8}{' '.join(command[1:])}", flush=True)
      if done.returncode:
        wrong.append(f"{' '.join(command[1:])}: exit code {done.returncode}\n{done.stderr[-1000:]}")
  if wrong:
    sys.exit("\n".join(["wrong in the documents:", *wrong]))


if __name__ == "__main__":
  main()
