"""Entry point: flags, devices, then training, evaluation, sampling or serving.

  python -m dmpo_jax.main --config=configs/sudoku_tiny.py --workdir=runs/sudoku_tiny
  python -m dmpo_jax.main --config=configs/sudoku_tiny.py --workdir=runs/sudoku_tiny --mode=eval
  python -m dmpo_jax.main --config=configs/sudoku_tiny.py --workdir=runs/sudoku_tiny --mode=sample --prompt="..."
  python -m dmpo_jax.main --config=configs/sudoku_tiny.py --workdir=runs/sudoku_tiny --mode=serve
  python -m dmpo_jax.main --config=configs/sudoku_tiny.py --workdir=runs/other --config.objective.wdce.baseline=mean

Re-running the command resumes the run.

Exit codes: 0 finished; 1 stopped, the message says why; 2 a mistake in the command, nothing was started; 75 preempted
(SIGTERM or Ctrl+C) with its state saved, 76 another process of the job is gone: re-running the command resumes both;
130 interrupted at once. If one process of a job fails, all end with its code. Anything else is a crash.
"""

import contextlib
import os
import re
import socket
import sys
import traceback

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from dmpo_jax import evaluate, processes, sample, serve, train
from dmpo_jax.config import ConfigError, command, flatten, validate
from dmpo_jax.files import Unreadable
from dmpo_jax.hub.pretrained import filled
from dmpo_jax.policy import NotFinite
from dmpo_jax.processes import ABANDONED, Absent, Stopped
from dmpo_jax.run import buckets, preemption, progress
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
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show the traceback of an error.")
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "host:port of process 0. Not needed where JAX finds it: TPU pods, Slurm and the like."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes in the job, with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process, with --coordinator.")
_HEARTBEAT_SECONDS = flags.DEFINE_integer(
  "heartbeat_seconds",
  30,
  "After this many seconds without a heartbeat a process counts as dead, and the others stop.",
  lower_bound=1,
)

INTERRUPTED = 130  # by Ctrl+C, at once
_OF_HOSTS = ("task.data_dir", "task.records_dir")  # keys that may differ between hosts
PREEMPTED = 75  # sysexits' "temporary failure": re-running the command resumes the run


def main(argv: list[str]) -> None:
  """Run the mode; an error that the user can fix ends in one message and its own exit code."""
  try:
    if len(argv) > 1:
      raise ConfigError(f"unknown argument {argv[1]!r}: options start with --, see --help")
    run(_CONFIG.value, epath.Path(_WORKDIR.value).expanduser() if _WORKDIR.value else None)
  except (Preempted, train.Diverged, Stopped) as error:  # raised in all processes at the same point
    if _TRACEBACK.value:
      traceback.print_exc()
    is_preempted = isinstance(error, Preempted)
    print(f"{'preempted' if is_preempted else 'stopped'}{_which_process()}: {error}", file=sys.stderr)
    with contextlib.suppress(Absent, jax.errors.JaxRuntimeError):  # no process may leave while another is still saving
      processes.finish()
    sys.exit(PREEMPTED if is_preempted else 1)
  except KeyboardInterrupt:
    processes.fail(INTERRUPTED, f"interrupted{_which_process()}")
  except Exception as error:
    code, message = _explain(error)
    if not message and not _which_process():
      raise
    if _TRACEBACK.value or not message:
      traceback.print_exc()
    processes.fail(
      code, f"{'error' if code == command.MISTAKE else 'stopped'}{_which_process()}: {message or repr(error)}"
    )


def _explain(error: Exception) -> tuple[int, str]:
  """Return the exit code and the message for an error; "": it is unexpected."""
  first = (str(error).splitlines() or [""])[0][:300]
  match error:
    case ConfigError() | Unreadable():
      return command.MISTAKE, str(error)
    case NotFinite() | OSError():
      return 1, str(error)
    case Absent():
      return ABANDONED, f"{error}; its log says what it was doing"
    case jax.errors.JaxRuntimeError() if "RESOURCE_EXHAUSTED" in str(error):
      return 1, (
        f"out of device memory: {first}\nReduce rollout.chunk_prompts (below 1: rollout.chunk_rollouts), "
        "eval.batch_size or train.microbatch_prompts, set model.layer_rows, or set model.remat='full'; "
        "python -m launch.plan shows what a program needs"
      )
    case jax.errors.JaxRuntimeError() if _which_process():
      return ABANDONED, (
        f"{first}\nIf another process of the job died, its log says why. Re-running the command on all hosts resumes "
        "from the newest checkpoint."
      )
  return 1, ""


def run(config: ConfigDict, workdir: epath.Path | None) -> None:
  """Check all that can be checked without devices, then run the mode."""
  _check_flags()
  _check_buckets(config, workdir)  # first, as validation looks whether paths exist
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
  else:
    assert workdir is not None  # `_check_flags` asks for it
    if _MODE.value == "eval":
      evaluate.main(config, workdir)
      _renew_page(workdir)
    else:
      preemption.save_on_interrupt()
      with alone_in(workdir):
        train.main(config, workdir)
  processes.finish()


def _check_flags() -> None:
  """Check that the flags suit the mode."""
  is_sample = _MODE.value == "sample"
  if not _WORKDIR.value and _MODE.value not in ("sample", "serve"):
    raise ConfigError(f"--workdir is missing: --mode={_MODE.value} reads and writes it")
  _check_cluster()
  if not is_sample:
    given = [flag.name for flag in (_PROMPT, _PROMPTS, _JSON, _WATCH) if flag.value]
    if given:
      raise ConfigError(f"--{given[0]} belongs to --mode=sample")


def _check_cluster() -> None:
  """Check the flags that describe a job of several processes: all or none, and in range."""
  cluster = (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)
  coordinator, num, index = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  missing = [f"--{flag.name}" for flag in cluster if flag.value is None]
  if len(missing) == len(cluster):
    return
  if coordinator is None or num is None or index is None:
    raise ConfigError(f"{' and '.join(missing)} missing: --coordinator, --num_processes and --process_id go together")
  if not 0 <= index < num:
    raise ConfigError(f"--process_id={index}: must be 0 or more, below --num_processes={num}")
  if not re.fullmatch(r".+:\d+", coordinator):
    raise ConfigError(f"--coordinator={coordinator}: must be host:port")


def _check_buckets(config: ConfigDict, workdir: epath.Path | None) -> None:
  """Check access to every bucket that the workdir or a key of the configuration names."""
  read: dict[str, epath.PathLike] = {
    f"config.{key}": value for key, value in flatten(config).items() if isinstance(value, str) and "gs://" in value
  }
  read |= {"--prompts": _PROMPTS.value or ""}
  written = {"--workdir": workdir} if workdir is not None and _MODE.value in ("train", "eval") else {}
  if workdir is not None and not written:
    read["--workdir"] = workdir
  buckets.check(read, written)


def _renew_page(workdir: epath.Path) -> None:
  """Rewrite the report, if there is one, with the new evaluations."""
  if jax.process_index() == 0 and (workdir / train.PAGE).exists():
    print(f"report       {workdir / train.write_page(workdir)}")


def _which_process() -> str:
  """Name this process for a message; "" if it is the only one or has not joined the job yet."""
  is_one_of_several = jax.distributed.is_initialized() and jax.process_count() > 1
  return f" in process {jax.process_index()}" if is_one_of_several else ""


def keep_compiled_programs(workdir: epath.Path) -> None:
  """Keep JAX's compilation cache beside the workdir, unless the environment sets one.

  Only process 0 writes to it; in a bucket all processes read it, on new hosts too.
  """
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    beside = workdir if os.fspath(workdir.parent) == buckets.PREFIX else workdir.parent  # a bucket's root has no parent
    jax.config.update("jax_compilation_cache_dir", os.fspath(beside / ".jax_cache"))
    if not buckets.is_in_bucket(workdir):  # there a lookup takes as long as compiling a small program
      jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # dozens of small ones cost seconds too


def _join_processes() -> None:
  """Join the job's other processes; training alone becomes a job of one, as JAX's preemption service needs a job.

  In training JAX catches SIGTERM, and `train.run` saves after the current microbatch or chunk of rollouts. Other modes
  have nothing to save and end at once.
  """
  preemption.listen(_MODE.value == "train")
  seconds = _HEARTBEAT_SECONDS.value
  is_job = processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, heartbeat_seconds=seconds)
  if not is_job and _MODE.value == "train":
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      address = f"127.0.0.1:{free.getsockname()[1]}"
    processes.join(address, 1, 0, heartbeat_seconds=seconds)


def _compare_commands(config: ConfigDict, workdir: epath.Path | None) -> None:
  """Refuse a job whose processes got different commands: they run one program and would wait for each other."""
  given = {f"config.{key}": value for key, value in flatten(config).items() if key not in _OF_HOSTS}
  given |= {"--mode": _MODE.value, "--workdir": workdir and os.fspath(workdir)}
  if lines := processes.differing("the commands are compared", given):
    raise ConfigError("the processes of the job were given different commands:\n  " + "\n  ".join(lines))


def start() -> None:
  """Run the command line: `python -m dmpo_jax.main`, or `dmpo-jax` where the package is installed."""
  flags.mark_flag_as_required("config")
  command.run(main)


if __name__ == "__main__":
  start()
