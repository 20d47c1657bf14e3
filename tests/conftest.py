"""Before any test: eight virtual CPU devices, exact float32 matmuls, run-time checks of the jaxtyping signatures."""

import gc
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Read when jax is first imported, and inherited by the processes that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
# With this variable programs are compiled as a user's are (tests/slow/test_default_flags.py runs the numeric tests so).
DEFAULT_FLAGS = "TESTS_WITH_DEFAULT_FLAGS"
HAS_DEFAULT_FLAGS = DEFAULT_FLAGS in os.environ
# Programs are compiled more often than run here, so the compiler's optimiser and its slow fusion emitters are off.
QUICK_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
COMPILE_QUICKLY = "" if HAS_DEFAULT_FLAGS else QUICK_FLAGS
os.environ["XLA_FLAGS"] = " ".join(
  [os.environ.get("XLA_FLAGS", ""), COMPILE_QUICKLY, "--xla_force_host_platform_device_count=8"]
).strip()
if not HAS_DEFAULT_FLAGS:
  os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Imported before the hook, and so not checked: its fields also hold shardings and abstract arrays under jax.tree.map.
import dmpo_jax.structs  # noqa: E402, F401

# an int passes where a float is asked for, as everywhere in Python
install_import_hook("dmpo_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


def pytest_report_header():
  """Say how programs are compiled."""
  return f"XLA_FLAGS: {os.environ['XLA_FLAGS']}; matmul precision: {jax.config.jax_default_matmul_precision}"


@pytest.fixture
def use_devices(monkeypatch):
  """Let the test say how many of the eight devices there are."""
  devices = jax.devices()
  return lambda count: monkeypatch.setattr(jax, "devices", lambda: devices[:count])


MEMORY_MAPS = pathlib.Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def programs_do_not_pile_up():
  """Drop the compiled programs before they use up the process's memory maps.

  Each program that the CPU compiles takes several maps. Linux allows 65,530 a process, and past them the compiler
  crashes with a segmentation fault.
  """
  yield
  if MEMORY_MAPS.exists() and MEMORY_MAPS.read_bytes().count(b"\n") > 20_000:
    jax.clear_caches()
    gc.collect()
