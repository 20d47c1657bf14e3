"""The house's order: modules import only what lies below them, and nothing touches a device on import."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "dmpo_jax"

# Room by room from the bottom, what each may import besides itself. A module outside the folders is a room of its own.
FOUNDATIONS = {"digests", "files", "lengths", "messages", "noise", "processes", "ranges", "sharding"}
FOUNDATIONS |= {"spelling", "structs"}
ROOMS = {
  "structs": set(),
  "logsumexp": set(),
  "spans": set(),
  "noise": set(),
  "spelling": set(),
  "ranges": {"spelling"},
  "files": set(),
  "messages": set(),
  "processes": set(),
  "lengths": {"processes", "structs"},
  "sharding": {"processes"},
  "digests": {"files", "processes"},
  "tasks": {"messages"},
  "models": {"logsumexp", "sharding", "spans", "spelling", "structs"},
  "samplers": {"logsumexp", "sharding", "spans", "spelling", "structs"},
  "objectives": {"ranges", "spelling", "structs"},
  "hub": {"digests", "files", "messages", "models"},
  "config": {"hub", "models", "objectives", "ranges", "samplers", "sharding", "spelling", "tasks"},
  "run": FOUNDATIONS | {"config", "hub"},
  "data": FOUNDATIONS | {"hub", "tasks"},
  "grading": FOUNDATIONS | {"hub", "tasks"},
  "mixed": FOUNDATIONS | {"data", "grading", "tasks"},
  "optim": set(),
  "policy": FOUNDATIONS | {"config", "hub", "models", "run", "samplers"},
  "continuous": FOUNDATIONS | {"models", "policy", "samplers"},
  "logprobs": FOUNDATIONS | {"models", "objectives", "policy"},
  "rollout_metrics": FOUNDATIONS | {"grading", "objectives"},
  "chunks": {"lengths", "run", "structs"},
  "rollout": FOUNDATIONS | {"chunks", "grading", "hub", "objectives", "policy", "rollout_metrics", "run"},
  "update": FOUNDATIONS | {"logprobs", "models", "objectives", "run"},
  "build": FOUNDATIONS
  | {"config", "data", "grading", "hub", "mixed", "models", "objectives", "policy", "run", "tasks"},
  "generations": FOUNDATIONS | {"grading", "hub"},
  "evaluate": FOUNDATIONS
  | {"build", "config", "continuous", "generations", "grading", "hub", "policy", "run", "tasks"},
  "graded_rollouts": FOUNDATIONS | {"data", "models", "objectives", "policy", "rollout", "rollout_metrics"},
  "demonstrations": FOUNDATIONS | {"build", "data", "logprobs", "models", "objectives", "rollout", "run"},
  "phases": FOUNDATIONS
  | {"build", "chunks", "continuous", "demonstrations", "evaluate", "graded_rollouts", "logprobs", "models"}
  | {"objectives", "optim", "policy", "rollout", "run", "update"},
  "sample": FOUNDATIONS | {"build", "config", "continuous", "data", "hub", "policy", "run"},
  "serve": FOUNDATIONS | {"build", "config", "continuous", "data", "hub", "policy", "run", "sample", "samplers"},
  "train": FOUNDATIONS | {"build", "config", "evaluate", "phases", "policy", "rollout", "rollout_metrics", "run"},
  "main": FOUNDATIONS | {"config", "evaluate", "hub", "policy", "run", "sample", "serve", "train"},
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path):
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path):
  """The rooms of the package that a file imports, wherever in the file."""
  rooms = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path.name} imports relatively"
      if node.module == "dmpo_jax":
        rooms |= {alias.name for alias in node.names} - {"__version__"}
      elif node.module.startswith("dmpo_jax."):
        rooms.add(node.module.split(".")[1])
    elif isinstance(node, ast.Import):
      rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("dmpo_jax.")}
  return rooms - {room(path)}


def test_the_table_is_of_the_rooms_there_are_and_has_no_circle():
  assert {room(path) for path in MODULES} == set(ROOMS)
  above = set()
  for name, below in reversed(ROOMS.items()):
    assert not below & (above | {name}), f"{name} stands under what it may import"
    above.add(name)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path):
  assert imported_rooms(path) <= ROOMS[room(path)]


def test_the_package_imports_neither_configs_nor_launch():
  """They are not installed with it."""
  for path in MODULES:
    for node in ast.walk(ast.parse(path.read_text())):
      names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
      names += [node.module] if isinstance(node, ast.ImportFrom) else []
      assert not {name.split(".")[0] for name in names} & {"configs", "launch"}, path


LAUNCH = PACKAGE.parent / "launch"
# What the commands and rooms of launch import of its rooms; a room may import all of itself.
OF_ROOMS = {
  "benchmark": {"bench.main"},
  "plan": {"bench.operations", "bench.programs", "bench.workload"},
  "tpu": {"bench.costs", "bench.programs"},
  "tune": {"bench.costs", "bench.programs", "bench.workload"},
}


def launch_imports(path):
  """The modules of launch that a file imports, wherever in the file."""
  modules = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "launch":
      for name in [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]:
        file = PACKAGE.parent / name.replace(".", "/")
        modules |= {name.removeprefix("launch.")} if file.with_suffix(".py").exists() else set()
  return modules


def test_launch_has_no_circle_and_its_rooms_stay_apart():
  paths = {".".join(path.relative_to(LAUNCH).with_suffix("").parts): path for path in LAUNCH.rglob("*.py")}
  imports = {name: launch_imports(path) for name, path in paths.items()}
  graphlib.TopologicalSorter(imports).prepare()  # raises where there is a circle
  across = {}
  for name, found in imports.items():
    own = name.partition(".")[0]
    for other in found:
      if "." in other and other.partition(".")[0] != own:
        across.setdefault(own, set()).add(other)
  assert across == OF_ROOMS


def test_processes_wait_for_each_other_at_named_and_bounded_places_alone():
  """The devices' collectives wait for ever: `processes` alone uses them, behind a meeting."""
  for path in MODULES:
    names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    waiting = {"sync_global_devices", "process_allgather", "broadcast_one_to_all", "wait_at_barrier"} & names
    assert not waiting or path.name == "processes.py", f"{path.name}: {waiting}"


def test_tasks_know_nothing_of_jax():
  for path in (PACKAGE / "tasks").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
      names += [node.module] if isinstance(node, ast.ImportFrom) else []
      assert not any(name.split(".")[0] in ("jax", "flax", "optax", "tensorflow") for name in names), path.name


def test_importing_everything_touches_no_device():
  """Processes join (`jax.distributed.initialize`) after the imports, which works only before a device is used."""
  names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in MODULES]
  names = [name.removesuffix(".__init__") for name in names]
  program = f"""
import importlib, sys
for name in {names!r}:
  importlib.import_module(name)
assert "tensorflow.python.eager.context" not in sys.modules, "TensorFlow is imported on import"
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a device is touched on import"
"""
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr[-2000:]
