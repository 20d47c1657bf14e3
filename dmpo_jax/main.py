"""Entry point: flags, devices, then training, evaluation, sampling or serving.

  python -m dmpo_jax.main --config=configs/sudoku_tiny.py --workdir=runs/sudoku_tiny
  python -m dmpo_jax.main --config=configs/sudoku_tiny.py --workdir=runs/sudoku_tiny --mode=eval
  python -m dmpo_jax.main --config=configs/sudoku_tiny.py --workdir=runs/sudoku_tiny --mode=sample --prompt="..."
  python -m dmpo_jax.main --config=configs/sudoku_tiny.py --workdir=runs/sudoku_tiny --mode=serve
  python -m dmpo_jax.main --config=configs/sudoku_tiny.py --workdir=runs/other --config.objective.baseline=mean

Running the same command again goes on where the last run stopped, or says that it had finished.

Exit codes: 0 finished; 1 stopped, the message says why; 2 a mistake in the command, nothing was started; 75 preempted
(SIGTERM, or Ctrl+C), the state is saved: run the same command again; 76 another process of the job is gone: the same;
130 interrupted at once. Where one process of a job fails, all of them end with its code. Anything else is a crash.
"""

import contextlib
import os
import re
import signal
import socket
import sys
import traceback
from typing import Any

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from dmpo_jax import evaluate, processes, sample, serve, train
from dmpo_jax.config import ConfigError, command, flatten, validate
from dmpo_jax.files import Unreadable
from dmpo_jax.hub.pretrained import filled
from dmpo_jax.measure import NotFinite
from dmpo_jax.processes import ABANDONED, Absent, Stopped
from dmpo_jax.run import buckets, progress
from dmpo_jax.run.preemption import Preempted
from dmpo_jax.run.workdir import alone_in, check_workdir

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Configuration file; override a key with --config.section.key=value.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder (or gs:// path) of checkpoints, logs and results.")
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  ["train", "eval", "sample", "serve"],
  "train, evaluate the workdir's final policy, decode prompts with it, or serve it over HTTP.",
)
_PROMPT = flags.DEFINE_string("prompt", None, "--mode=sample: a prompt. Prompts may also come by a pipe, one a line.")
_PROMPTS = flags.DEFINE_string("prompts", None, '--mode=sample: a file of lines {"prompt": ..., "prefill": ...}.')
_JSON = flags.DEFINE_bool("json", False, "--mode=sample: print one JSON object a prompt: ids, text, calls, ...")
_WATCH = flags.DEFINE_bool("watch", False, "--mode=sample: show the denoising in the terminal while it happens.")
flags.adopt_module_key_flags(progress)  # --quiet
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where in the code a message comes from.")
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "host:port of process 0. Not needed on TPU pods, Slurm and the like, which are recognised."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes in the job, with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process, with --coordinator.")
_HEARTBEAT_SECONDS = flags.DEFINE_integer(
  "heartbeat_seconds",
  30,
  "A process that was silent for so long is taken for dead, and the others stop.",
  lower_bound=1,
)

INTERRUPTED = 130  # by Ctrl+C, at once
_OF_HOSTS = ("task.data_dir", "task.records_dir")  # where each host may have a folder of its own
PREEMPTED = 75  # sysexits' "temporary failure": running the same command again goes on


def main(argv: list[str]) -> None:
  """Run the mode; what a user can mend ends in one message and an exit code of its own."""
  try:
    if len(argv) > 1:
      raise ConfigError(f"unknown argument {argv[1]!r}: options start with --, see --help")
    run(_CONFIG.value, epath.Path(_WORKDIR.value).expanduser() if _WORKDIR.value else None)
  except (Preempted, train.Diverged, Stopped) as error:  # in all processes at one point
    if _TRACEBACK.value:
      traceback.print_exc()
    is_preempted = isinstance(error, Preempted)
    print(f"{'preempted' if is_preempted else 'stopped'}{_which_process()}: {error}", file=sys.stderr)
    with contextlib.suppress(Absent, jax.errors.JaxRuntimeError):  # none may leave while another is still saving
      processes.finish()
    sys.exit(PREEMPTED if is_preempted else 1)
  except KeyboardInterrupt:
    processes.fail(INTERRUPTED, f"interrupted{_which_process()}")
  except Exception as error:
    code, said = _explain(error)
    if not said and not _which_process():
      raise
    if _TRACEBACK.value or not said:
      traceback.print_exc()
    processes.fail(
      code, f"{'error' if code == command.MISTAKE else 'stopped'}{_which_process()}: {said or repr(error)}"
    )


def _explain(error: Exception) -> tuple[int, str]:
  """Return the exit code and the message of what has ended the run; "": nobody has foreseen it."""
  first = (str(error).splitlines() or [""])[0][:300]
  match error:
    case ConfigError() | Unreadable():
      return command.MISTAKE, str(error)
    case NotFinite() | OSError():
      return 1, str(error)
    case Absent():
      return ABANDONED, f"{error}; its own log says what it was doing"
    case jax.errors.JaxRuntimeError() if "RESOURCE_EXHAUSTED" in str(error):
      return 1, (
        f"a device's memory is not enough: {first}\nLess of it is needed with a smaller rollout.chunk_prompts, "
        "eval.batch_size or train.microbatch_prompts, with model.layer_rows, or with model.remat='full'; "
        "python -m launch.plan says what a program takes"
      )
    case jax.errors.JaxRuntimeError() if _which_process():
      return ABANDONED, (
        f"{first}\nIf another process of the job died, its own log says why. Started again, all of them go on from the "
        "newest checkpoint."
      )
  return 1, ""


def run(config: ConfigDict, workdir: epath.Path | None) -> None:
  """Check everything that can be checked before devices are touched, then dispatch on the mode."""
  _check_flags()
  _check_buckets(config, workdir)  # first: whether a path exists is among what is validated
  validate(config, mode=_MODE.value)
  config = filled(config)
  if workdir is not None:
    check_workdir(workdir, config, mode=_MODE.value)
    keep_compiled_programs(workdir)
  requests = sample.read_requests(_PROMPT.value, _PROMPTS.value) if _MODE.value == "sample" else []
  _join_processes()
  _compare_commands(config, workdir)
  if _MODE.value == "sample":
    sample.main(config, workdir, requests, as_json=_JSON.value, watch=_WATCH.value)
  elif _MODE.value == "serve":
    serve.main(config, workdir)
  elif _MODE.value == "eval":
    evaluate.main(config, workdir)
    _renew_page(workdir)
  else:
    _save_when_interrupted()
    with alone_in(workdir):
      train.main(config, workdir)
  processes.finish()


def _check_flags() -> None:
  """Check what the modes need of the flags."""
  is_sample = _MODE.value == "sample"
  if not _WORKDIR.value and _MODE.value not in ("sample", "serve"):
    raise ConfigError(f"--workdir is missing: --mode={_MODE.value} reads and writes it")
  _check_cluster()
  if not is_sample:
    given = [flag.name for flag in (_PROMPT, _PROMPTS, _JSON, _WATCH) if flag.value]
    if given:
      raise ConfigError(f"--{given[0]} belongs to --mode=sample")


def _check_cluster() -> None:
  """Check that the flags that name a job's processes are all there, and what they must be."""
  cluster = (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)
  missing = [f"--{flag.name}" for flag in cluster if flag.value is None]
  if len(missing) == len(cluster):
    return
  if missing:
    raise ConfigError(f"{' and '.join(missing)} missing: --coordinator, --num_processes and --process_id go together")
  if not 0 <= _PROCESS_ID.value < _NUM_PROCESSES.value:
    raise ConfigError(
      f"--process_id={_PROCESS_ID.value}: must be 0 or more, below --num_processes={_NUM_PROCESSES.value}"
    )
  if not re.fullmatch(r".+:\d+", _COORDINATOR.value):
    raise ConfigError(f"--coordinator={_COORDINATOR.value}: must be host:port")


def _check_buckets(config: ConfigDict, workdir: epath.Path | None) -> None:
  """Ask the buckets among all paths that are given: the workdir's and those of any key of the configuration."""
  read = {
    f"config.{key}": value for key, value in flatten(config).items() if isinstance(value, str) and "gs://" in value
  }
  read |= {"--prompts": _PROMPTS.value or ""}
  written = {"--workdir": workdir} if workdir is not None and _MODE.value in ("train", "eval") else {}
  if workdir is not None and not written:
    read["--workdir"] = workdir
  buckets.check(read, written)


def _renew_page(workdir: epath.Path) -> None:
  """Write the report again, if there is one: it shows what has been evaluated."""
  if jax.process_index() == 0 and (workdir / train.PAGE).exists():
    print(f"report       {workdir / train.write_page(workdir)}")


def _which_process() -> str:
  """Name the process in a message, where there are several and the job has been joined."""
  is_one_of_several = jax.distributed.is_initialized() and jax.process_count() > 1
  return f" in process {jax.process_index()}" if is_one_of_several else ""


def keep_compiled_programs(workdir: epath.Path) -> None:
  """Turn JAX's persistent compilation cache on, beside the workdir, unless the environment has set it.

  Of several processes JAX lets the first alone write to it: in a bucket it serves all of them, on new hosts too.
  """
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    beside = workdir if os.fspath(workdir.parent) == buckets.PREFIX else workdir.parent  # of a whole bucket: in it
    jax.config.update("jax_compilation_cache_dir", os.fspath(beside / ".jax_cache"))
    if not buckets.is_in_bucket(workdir):  # where asking for a program takes as long as compiling a small one
      jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # dozens of small ones cost seconds too


def _join_processes() -> None:
  """Join the job's other processes; training on its own makes a job of one, to hear of its preemption.

  JAX catches SIGTERM then, and `train.run` saves after the current microbatch or chunk of rollouts. Other modes
  have nothing to save and end at once.
  """
  jax.config.update("jax_enable_preemption_service", _MODE.value == "train")
  seconds = _HEARTBEAT_SECONDS.value
  is_job = processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, heartbeat_seconds=seconds)
  if not is_job and _MODE.value == "train":
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      address = f"127.0.0.1:{free.getsockname()[1]}"
    processes.join(address, 1, 0, heartbeat_seconds=seconds)


def _compare_commands(config: ConfigDict, workdir: epath.Path | None) -> None:
  """Refuse a job whose processes were not given the same: they compute one program, and would wait for each other."""
  given = {f"config.{key}": value for key, value in flatten(config).items() if key not in _OF_HOSTS}
  given |= {"--mode": _MODE.value, "--workdir": workdir and os.fspath(workdir)}
  if lines := processes.differing("the commands are compared", given):
    raise ConfigError("the processes of the job were given different commands:\n  " + "\n  ".join(lines))


def _save_when_interrupted() -> None:
  """Let the first Ctrl+C end training as a preemption does, with everything saved; a second one ends it at once."""

  def interrupt(number: int, frame: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("interrupted: saving after this microbatch; Ctrl+C once more stops at once", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

  signal.signal(signal.SIGINT, interrupt)


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  command.run(main)
