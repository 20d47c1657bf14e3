"""Entry point: flags, devices, then training or evaluation.

  python -m dmpo_jax.main --config=configs/sudoku_tiny.py --workdir=runs/sudoku_tiny
  python -m dmpo_jax.main --config=configs/sudoku_tiny.py --workdir=runs/sudoku_tiny --mode=eval
  python -m dmpo_jax.main --config=configs/sudoku_tiny.py --workdir=runs/other --config.objective.baseline=mean

Running the same command again goes on where the last run stopped, or says that it had finished.
"""

import os
import sys

import absl.logging
import jax
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from dmpo_jax import config as config_lib

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Configuration file; override a key with --config.section.key=value.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder (or gs:// path) of checkpoints, logs and results.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "train, or evaluate the workdir's final policy.")
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "host:port of process 0. Not needed on TPU pods, Slurm and the like, which are recognised."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes in the job, with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process, with --coordinator.")


def main(argv: list[str]) -> None:
  """Set the process up, run the mode, and turn a user's mistakes into one message and exit code 2."""
  absl.logging.set_verbosity(absl.logging.WARNING)
  try:
    if len(argv) > 1:
      raise config_lib.ConfigError(f"unknown argument {argv[1]!r}: options start with --, see --help")
    run(epath.Path(_WORKDIR.value).expanduser())
  except config_lib.ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def run(workdir: epath.Path) -> None:
  """Check everything that can be checked before devices are touched, then dispatch on the mode."""
  config = _CONFIG.value
  config_lib.validate(config)
  config_lib.check_workdir(workdir, config)
  _keep_compiled_programs(workdir)
  _join_processes()
  config_lib.save(workdir, config)
  from dmpo_jax import evaluate, train  # after the processes have joined: these touch devices

  if _MODE.value == "eval":
    evaluate.main(config, workdir)
  else:
    train.main(config, workdir)


def _keep_compiled_programs(workdir: epath.Path) -> None:
  """Turn JAX's persistent compilation cache on, beside the workdir, unless the environment has set it."""
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", os.fspath(workdir.parent / ".jax_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _join_processes() -> None:
  """Join the job's other processes, if there are any."""
  if _COORDINATOR.value:
    jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    return
  try:
    jax.distributed.initialize()
  except ValueError as error:
    if "coordinator_address" not in str(error):  # what it says where it recognises no cluster
      raise


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
