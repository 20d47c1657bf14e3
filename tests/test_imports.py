"""The house's order: modules import only what lies below them, and nothing touches a device on import."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "dmpo_jax"

# lowest first; a module may import what stands in a lower one
LEVELS = (
  {"structs", "processes", "sharding", "noise", "files", "digests", "tasks"},
  {"models", "objectives", "samplers"},
  {
    "buckets",
    "chat",
    "checks",
    "command",
    "data",
    "grading",
    "tokenizer",
    "optim",
    "checkpoints",
    "measure",
    "metrics",
    "piecewise",
    "pretrained",
    "progress",
    "relations",
    "rules",
    "shards",
    "config",
    "scoring",
    "watch",
    "workdir",
  },
  {"report", "rollout", "update"},
  {"build", "evaluate", "phases", "sample", "serve", "train"},
  {"main"},
)
# and, of its own level, only what is named here: so the three rooms of the second know nothing of each other
INSIDE = {
  "sharding": {"processes"},
  "digests": {"files", "processes"},
  "command": {"config", "rules"},
  "config": {"pretrained", "relations", "rules"},
  "checks": {"checkpoints"},
  "checkpoints": {"pretrained"},
  "data": {"tokenizer"},
  "watch": {"tokenizer"},
  "buckets": {"config"},
  "workdir": {"buckets", "config"},
  "metrics": {"config", "rules"},
  "measure": {"checkpoints", "scoring"},
  "rules": {"tokenizer"},
  "tokenizer": {"chat"},
  "grading": {"tokenizer"},
  "evaluate": {"build"},
  "phases": {"build", "evaluate"},
  "sample": {"build"},
  "serve": {"build", "sample"},
  "train": {"build", "evaluate", "phases"},
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
        rooms |= {alias.name for alias in node.names}
      elif node.module.startswith("dmpo_jax."):
        rooms.add(node.module.split(".")[1])
    elif isinstance(node, ast.Import):
      rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("dmpo_jax.")}
  return rooms - {room(path)}


def level(name):
  (found,) = [number for number, names in enumerate(LEVELS) if name in names]
  return found


def test_every_module_has_a_level():
  assert {room(path) for path in MODULES} <= set().union(*LEVELS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path):
  name = room(path)
  for other in imported_rooms(path):
    assert level(other) < level(name) or other in INSIDE.get(name, ()), f"{name} may not import {other}"


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
