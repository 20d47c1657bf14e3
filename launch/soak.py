"""Kill a run again and again at random moments, and check that it ends as an undisturbed run does, bit for bit.

    python -m launch.soak --kills=100 [--seed=0] [--workdir=runs/soak] [-- --config=configs/smoke.py ...]

Arguments after `--` go to dmpo_jax.main. One run is left undisturbed. A second one is killed by SIGKILL, which cannot
be caught, somewhere between its start and its end, and started again until it finishes. Its final state, metrics,
evaluations and generations must then equal those of the first run.
"""

import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
from absl import flags
from etils import epath

from dmpo_jax.config import command
from dmpo_jax.run import buckets
from dmpo_jax.run.progress import Progress
from launch.outcome import compare, outcome

_KILLS = flags.DEFINE_integer("kills", 100, "Number of kills.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the moments.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/soak", "Folder of the runs; an earlier soak there is removed.")

SETTLE_SECONDS = 0.2  # from a start to the earliest kill


def main(argv: list[str]) -> None:
  """Kill runs and compare their ends; exit with code 1 and the first difference if there is one."""
  arguments = argv[1:] or ["--config=configs/smoke.py"]
  buckets.refuse("--workdir", _WORKDIR.value)
  folder = pathlib.Path(_WORKDIR.value).resolve()
  shutil.rmtree(folder, ignore_errors=True)
  run_until(folder / "warm_up", arguments, None)  # fills the compilation cache, so that the next run is not slower
  seconds = run_until(folder / "undisturbed", arguments, None)
  assert seconds is not None  # nothing kills it
  wanted = outcome(epath.Path(folder / "undisturbed"))
  rng, kills, finished = np.random.default_rng(_SEED.value), 0, 0
  with Progress("kills", _KILLS.value) as progress:
    while kills < _KILLS.value:
      workdir = folder / "killed"
      while run_until(workdir, arguments, rng.uniform(SETTLE_SECONDS, seconds)) is None:
        kills += 1
        progress.advance()
        if kills == _KILLS.value:  # the last run may finish
          run_until(workdir, arguments, None)
          break
      finished += 1
      difference = compare(wanted, outcome(epath.Path(workdir)))
      if difference:
        sys.exit(f"after {kills} kills a run differs from the undisturbed one: {difference} (see {workdir})")
      shutil.rmtree(workdir)
  print(f"{kills} kills survived: {finished} runs equal the undisturbed one bit for bit ({seconds:.0f} s)")


def run_until(workdir: pathlib.Path, arguments: list[str], seconds: float | None) -> float | None:
  """Run for at most so many seconds (None: to the end); return the time taken, or None if the run was killed.

  Raises:
    SystemExit: the run failed by itself.
  """
  start = time.monotonic()
  command = [sys.executable, "-m", "dmpo_jax.main", f"--workdir={workdir}", *arguments]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  try:
    output, _ = process.communicate(timeout=seconds)
  except subprocess.TimeoutExpired:
    process.kill()
    process.communicate()
    return None
  if process.returncode:
    sys.exit(f"{' '.join(command)} ended with exit code {process.returncode}:\n{output[-3000:]}")
  return time.monotonic() - start


if __name__ == "__main__":
  command.run(main)
