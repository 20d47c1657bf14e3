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

# the tests of the numeric rooms that compare with recorded numbers have one of these words in their names
RECORDED = "recorded or official"
ROOMS = ("logprobs", "models", "objectives", "samplers")
FILES = sorted(path for room in ROOMS for path in (ROOT / "tests").glob(f"test_{room}*.py"))


@pytest.mark.slow
def test_recorded_numbers_hold_with_default_flags():
  given = ("XLA_FLAGS", "JAX_DEFAULT_MATMUL_PRECISION")
  environment = {key: value for key, value in os.environ.items() if key not in given} | {DEFAULT_FLAGS: "1"}
  command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-m", "not slow and not torch", "-k", RECORDED]
  command += ["-v", "-rf", *map(str, FILES)]
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)
  assert "; matmul precision: None" in done.stdout
  assert "optimization_level" not in done.stdout
  for file in ("test_objectives_gradients", "test_samplers_goldens", "test_models_transformer", "test_logprobs_blocks"):
    assert re.search(rf"{file}\.py::\S+ PASSED", done.stdout), file
  assert done.returncode == 0, done.stdout[-4000:]
