"""Kill a run again and again, at moments that a seed decides, and check that it ends as if it had been left alone.

    python -m launch.soak --kills=100 [--seed=0] [--workdir=runs/soak] [-- --config=configs/smoke.py ...]

What stands after `--` is passed to dmpo_jax.main. One run is left alone first; then the same run is started over and
over, killed (SIGKILL, nothing can be caught) somewhere between its start and its end, and started again until it gets
through. Then its final state, metrics, evaluations and generations must be those of the first, bit for bit.
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

_KILLS = flags.DEFINE_integer("kills", 100, "How many times to kill.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
_WORKDIR = flags.DEFINE_string(
  "workdir", "runs/soak", "Folder of the runs; what an earlier soak left there is removed."
)

SETTLE_SECONDS = 0.2  # a kill comes at least so long after the start


def main(argv: list[str]) -> None:
  """Soak and print how many kills were survived; exit code 1 and the first difference where a run ended otherwise."""
  arguments = argv[1:] or ["--config=configs/smoke.py"]
  buckets.refuse("--workdir", _WORKDIR.value)
  folder = pathlib.Path(_WORKDIR.value).resolve()
  shutil.rmtree(folder, ignore_errors=True)
  run_until(folder / "warm_up", arguments, None)  # compiles, so that the next one takes as long as those to come
  seconds = run_until(folder / "left_alone", arguments, None)
  wanted = outcome(epath.Path(folder / "left_alone"))
  rng, kills, finished = np.random.default_rng(_SEED.value), 0, 0
  with Progress("kills", _KILLS.value) as progress:
    while kills < _KILLS.value:
      workdir = folder / "killed"
      while run_until(workdir, arguments, rng.uniform(SETTLE_SECONDS, seconds)) is None:
        kills += 1
        progress.advance()
        if kills == _KILLS.value:  # the last one gets through
          run_until(workdir, arguments, None)
          break
      finished += 1
      difference = compare(wanted, outcome(epath.Path(workdir)))
      if difference:
        sys.exit(f"after {kills} kills a run ended otherwise than the one left alone: {difference} (see {workdir})")
      shutil.rmtree(workdir)
  print(f"{kills} kills survived: {finished} runs ended bit for bit as the one left alone ({seconds:.0f} s)")


def run_until(workdir: pathlib.Path, arguments: list[str], seconds: float | None) -> float | None:
  """Run for so many seconds at most (None: to the end); return how long it took, None if it was killed.

  Raises:
    SystemExit: it ended by itself, but not well.
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
