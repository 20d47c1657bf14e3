"""Check the documents' commands: every one names what exists, and what a laptop can run is run.

    make docs-check

Commands of `dmpo_jax.main`, and those that look at a run, are run in the documents' order, on the smoke configuration
and in a temporary folder. A server is queried by the `openai` client and stopped. The notebook is executed in the same
way. Commands that need a pod, a bucket, a download or hours are only read. Links, and keys of a configuration in
backticks, must exist.
"""

import ast
import functools
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from configs import base
from dmpo_jax.config import flatten
from dmpo_jax.config.keys import KEYS as RULED
from launch.bench.main import SECTIONS

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = (
  "README.md",
  "CONTRIBUTING.md",
  "CHANGELOG.md",
  *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
NOTEBOOK = "docs/tour.ipynb"
PLACEHOLDERS = re.compile(r"gs://|[A-Z]{3,}|\*|hf=|runs/[ab]\b")  # what is not run
RUN = ("dmpo_jax.main", "launch.report", "launch.export_hf", "launch.picture", "launch.replay")
PATH = re.compile(r"`((?:dmpo_jax|configs|launch|tests|docs)/[\w/.-]+)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")
KEYS = {*RULED, *flatten(base.get_config())}  # with the own keywords of choices, which have no rules
KEY = re.compile(
  rf"`(?:--config\.)?((?:{'|'.join(sorted({key.partition('.')[0] for key in KEYS}))})\.(?!json`)[\w.]+)[^`]*`"
)


def commands(text: str) -> list[str]:
  """List the commands of a document: indented lines that begin with python or make, continued lines joined."""
  joined = re.sub(r"\\\n\s*", "", text)
  return re.findall(r"^    ((?:\.venv/bin/)?(?:python|make) [^\n]*)", joined, re.M)


def problems(text: str, folder: pathlib.Path = ROOT) -> list[str]:
  """List what the commands, paths and links of a document in `folder` name and what does not exist."""
  found = [f"{path}: no such file" for path in PATH.findall(text) if not (ROOT / path).exists()]
  for path, anchor in LINK.findall(text):
    if path and not (folder / path).exists():
      found.append(f"{path}: a link to nothing")
    elif anchor and anchor not in _anchors((folder / path).read_text() if path else text):
      found.append(f"{path}#{anchor}: no such heading")
  found += [f"{key}: no such key" for key in KEY.findall(text) if not _is_key(key)]
  targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
  for command in commands(text):
    program, *args = shlex.split(command, comments=True)
    if program == "make":
      found += [f"{command}: no such target" for arg in args if "=" not in arg and arg not in targets]
    elif args[:1] == ["-m"] and args[1].split(".")[0] in ("dmpo_jax", "launch"):
      found += [f"{command}: {what}" for what in _wrong_arguments(args[1], args[2:])]
  return found


def _anchors(text: str) -> set[str]:
  """The anchors that GitHub gives to the headings of a page."""
  headings = re.findall(r"^#+ (.+)$", text, re.M)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _is_key(path: str) -> bool:
  """Whether it is a key, or a section of keys."""
  return path in KEYS or any(key.startswith(f"{path}.") for key in KEYS)


def _wrong_arguments(module: str, args: Sequence[str]) -> list[str]:
  if module == "launch.benchmark" and args and args[0] not in SECTIONS:
    return [f"no section {args[0]}"]
  folder = ROOT / module.replace(".", "/")
  path = folder / "__main__.py" if folder.is_dir() else folder.with_suffix(".py")
  if not path.exists():
    return [f"no module {module}"]
  known = _flags(path) | _flags(ROOT / "dmpo_jax/run/progress.py")
  found = []
  for arg in (arg.strip("[]") for arg in args):
    name, _, value = arg.removeprefix("--").partition("=")
    if not arg.startswith("--"):
      continue
    if name.startswith("config."):
      found += [] if name.removeprefix("config.") in KEYS else [f"no key {name}"]
    elif name not in known:
      found.append(f"no flag --{name}")
    elif name == "config" and not (ROOT / value.partition(":")[0]).exists():  # what follows is its argument
      found.append(f"no file {value}")
  return found


def _flags(path: pathlib.Path) -> set[str]:
  """List the flags that a command defines, in its own module or in modules of `launch` that it imports."""
  nodes = list(ast.walk(ast.parse(path.read_text())))
  calls = [node for node in nodes if isinstance(node, ast.Call)]
  defining = [call for call in calls if getattr(call.func, "attr", "").startswith(("DEFINE_", "add_argument"))]
  names = {ast.literal_eval(call.args[0]) for call in defining if isinstance(call.args[0], ast.Constant)}
  found = {name.removeprefix("--") for name in names}
  for node in nodes:
    if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "launch":
      folder = ROOT / node.module.replace(".", "/")
      files = [folder.with_suffix(".py"), *(folder / f"{alias.name}.py" for alias in node.names)]
      found = found.union(*(_flags(file) for file in files if file.exists()))
  return found


def runnable(text: str, folder: pathlib.Path) -> list[list[str]]:
  """List the commands to run, on the smoke configuration and in a folder of their own."""
  found = []
  for command in commands(text):
    args = shlex.split(command, comments=True)
    if args[1:2] != ["-m"] or args[2] not in RUN or PLACEHOLDERS.search(" ".join(args)):
      continue
    args = [_made_small(arg, folder) for arg in args]
    if [sys.executable, *args[1:]] not in found:
      found.append([sys.executable, *args[1:]])
  return found


def _made_small(text: str, folder: pathlib.Path) -> str:
  """Name the smoke configuration in place of others, and `folder` in place of those that are written to."""
  text = re.sub(r"configs/\w+\.py", "configs/smoke.py", text)
  return re.sub(r"(^|[=\"])(runs|docs)/", rf"\1{folder}/", text)


def notebook_text(path: pathlib.Path) -> str:
  """Write a notebook as a document: its text, and the commands that its cells run."""
  cells = nbformat.read(path, as_version=4).cells
  return "\n\n".join(re.sub(r"^!", "    ", cell.source, flags=re.M) for cell in cells)


def execute_notebook(path: pathlib.Path, folder: pathlib.Path) -> str:
  """Execute a notebook on the smoke configuration; return what went wrong, "" if nothing did."""
  book = nbformat.read(path, as_version=4)
  for cell in book.cells:
    is_command = cell.cell_type == "code" and cell.source.startswith("!")
    cell.source = _made_small(cell.source, folder) + "\nassert _exit_code == 0" * is_command
  search = {**os.environ, "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
  quiet = ["--log-level=ERROR"]  # it warns of its local port otherwise
  client = NotebookClient(
    book, timeout=600, kernel_name="python3", extra_arguments=quiet, resources={"metadata": {"path": str(ROOT)}}
  )
  try:
    client.execute(env=search)
  except CellExecutionError as error:
    said = [output.get("text", "") for cell in book.cells for output in cell.get("outputs", [])]
    return f"{''.join(said)[-1000:]}\n{error}"
  return ""


def execute(command: Sequence[str]) -> str:
  """Run a command to its end, or ask and stop it where it serves; return what went wrong, "" if nothing did."""
  if "--mode=serve" in command:
    return _ask([*command, "--config.serve.port=0"])
  done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
  return f"exit code {done.returncode}\n{done.stderr[-1000:]}" if done.returncode else ""


def _ask(command: Sequence[str]) -> str:
  """Start a server, ask it as docs/serving.md does, and stop it."""
  page = (ROOT / "docs" / "serving.md").read_text()
  program = textwrap.dedent(re.search(r"^(    from openai.*?)^\S", page, re.M | re.S)[1])
  with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
    said = []
    for line in server.stdout:
      said.append(line)
      if found := re.search(r"http://\S+/v1", line):
        program = program.replace("http://127.0.0.1:8000/v1", found[0])
        break
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    server.send_signal(signal.SIGINT)
    server.wait()
  return f"{done.stderr[-1000:]}\n{''.join(said)[-1000:]}" if done.returncode else ""


def main() -> None:
  """Check all documents, run their commands, and say what is wrong."""
  texts = {name: (ROOT / name).read_text() for name in DOCUMENTS} | {NOTEBOOK: notebook_text(ROOT / NOTEBOOK)}
  wrong = [f"{name}: {what}" for name, text in texts.items() for what in problems(text, (ROOT / name).parent)]
  with tempfile.TemporaryDirectory() as folder:
    commands_to_run = runnable("\n".join(texts[name] for name in DOCUMENTS), pathlib.Path(folder))
    steps = [(" ".join(command[1:]), functools.partial(execute, command)) for command in commands_to_run]
    steps.append((NOTEBOOK, lambda: execute_notebook(ROOT / NOTEBOOK, pathlib.Path(folder))))
    for name, step in steps:
      problem = step()
      print(f"{'FAILED' if problem else 'ok':8}{name}", flush=True)
      if problem:
        wrong.append(f"{name}: {problem}")
  if wrong:
    sys.exit("\n".join(["wrong in the documents:", *wrong]))


if __name__ == "__main__":
  main()
