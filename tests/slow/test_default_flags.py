"""The numeric tests once more, compiled as a user's programs are: XLA's default flags and matmul precision.

The other tests compile at optimisation level 0, where elementwise functions give the same numbers and sums and products
add up in another order. A loss may show that: it is a difference of cross-entropies of up to 17 nats, each of which is
right to about 2e-5 at either level. Of a loss of 0.008 three digits are then good.
"""

import os
import re
import subprocess
import sys

import pytest
from conftest import DEFAULT_FLAGS, ROOT

# what compares with recorded numbers through jax; the others that do are of strings, or need PyTorch
COMPARES = re.compile(r'"goldens"|\brecorded_models\b')
OTHERS = ("test_launch_", "test_tasks_", "test_torch_")
FILES = sorted(
  path
  for path in (ROOT / "tests").glob("test_*.py")
  if COMPARES.search(path.read_text()) and not path.name.startswith(OTHERS)
)


@pytest.mark.slow
def test_recorded_numbers_hold_with_default_flags():
  assert {"test_objectives_gradients.py", "test_samplers_goldens.py", "test_models_transformer.py"} <= {
    f.name for f in FILES
  }
  given = ("XLA_FLAGS", "JAX_DEFAULT_MATMUL_PRECISION")
  environment = {key: value for key, value in os.environ.items() if key not in given} | {DEFAULT_FLAGS: "1"}
  command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-m", "not slow and not torch", "-rf", *map(str, FILES)]
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)
  assert "; matmul precision: None" in done.stdout
  assert "optimization_level" not in done.stdout
  assert done.returncode == 0, done.stdout[-4000:]
