"""Rehearse a run on a pod on this machine, before renting one.

    python -m launch.rehearse --config=configs/llada_8b.py --processes=4 --devices=4
    python -m launch.rehearse --config=configs/llada_8b.py --workdir=gs://BUCKET/rehearsal    # a real bucket

The configuration keeps its structure but gets small widths and a tiny checkpoint. The rehearsal runs the user's own
commands: convert, train, preemption, resume, death of a host, resume on other hosts, evaluation, sampling, export. The
interrupted run must equal an undisturbed one bit for bit. Hosts are processes with virtual CPU devices and their own
folders; the bucket is in memory and speaks the protocol of Google Cloud Storage. If a check fails, the exit code is 1
and the message names the check and its log.
"""

import contextlib
import copy
import functools
import operator
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Sequence

import absl.logging
import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dmpo_jax.config import ConfigError, command, validate
from dmpo_jax.run import buckets, progress
from launch.rehearse import bucket, steps
from launch.rehearse.jobs import ROOT, Failed, Hosts
from launch.rehearse.shrink import shrink

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Configuration file; override a key with --config.section.key=value.", lock_config=True
)
_PROCESSES = flags.DEFINE_integer("processes", 4, "Number of hosts, which are processes; must be even.", lower_bound=2)
_DEVICES = flags.DEFINE_integer("devices", 4, "Virtual devices of each host.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", "", 'A new or empty gs:// path; "": a bucket in memory.')
_OUT = flags.DEFINE_string("out", "runs/rehearsal", "Folder of the logs; an earlier rehearsal there is removed.")
flags.adopt_module_key_flags(progress)  # --quiet

TASK = "launch/rehearse/task.py"
WIDTH = 120  # of the table where the output is no terminal
MARK = "rehearsal"  # a file that marks the folder of a rehearsal


def main(argv: Sequence[str]) -> None:
  """Rehearse and print the table; exit with code 1 if a check failed, 2 for a mistake in the command."""
  jax.config.update("jax_platforms", "cpu")
  absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax warns about its older versions
  try:
    if len(argv) > 1:
      raise ConfigError(f"unknown argument {argv[1]!r}: options start with --, see --help")
    folder = _check_flags()
    config, given = _small(_CONFIG.value, sys.argv[1:])
    _make_anew(folder)
  except ConfigError as error:
    command.complain(error)
  with _bucket(folder) as (root, environment):
    threads = 2 * _DEVICES.value
    hosts = Hosts(_PROCESSES.value, _DEVICES.value, threads, folder / "hosts", environment)
    others = Hosts(_PROCESSES.value // 2, _DEVICES.value * 2, threads, folder / "other_hosts", environment)
    is_own_task = config.task.name == TASK
    plan = steps.Plan(config, given, root, folder, hosts, others, is_own_task)
    is_passed = rehearse(plan, Console(width=None if sys.stdout.isatty() else WIDTH))
  sys.exit(0 if is_passed else 1)


def rehearse(plan: steps.Plan, console: Console) -> bool:
  """Run the steps until one fails; print what was checked and how long each took."""
  table = Table("step", "what", "checked", "seconds", title="Rehearsal", title_justify="left")
  failure: Failed | None = None
  with progress.Progress("rehearsal", len(steps.STEPS), unit="steps") as shown:
    for step in steps.STEPS:
      if failure is not None:
        table.add_row(step.name, step.what, "[yellow]not run[/]", "")
        continue
      shown.part(f"{step.name}: {step.what}")
      begun = time.monotonic()
      try:
        checked = "\n".join(map(escape, step.act(plan)))
      except (Failed, OSError, ValueError, KeyError) as error:  # a check, or a file that is missing or damaged
        failure = error if isinstance(error, Failed) else Failed(f"{step.name}: {type(error).__name__}: {error}")
        checked = f"[red]failed:[/] {escape(str(failure))}"
      table.add_row(step.name, step.what, checked, f"{time.monotonic() - begun:.0f}")
      shown.advance()
  console.print(table)
  if failure is None:
    console.print(f"passed; logs are in {plan.folder}, the runs in {plan.bucket}", highlight=False, soft_wrap=True)
    return True
  place = f"; see {failure.log}" if failure.log else f"; logs in {plan.folder / 'logs'}"
  print(f"failed: {failure}{place}", file=sys.stderr)
  return False


def _check_flags() -> pathlib.Path:
  """Check the flags; return the local folder."""
  if _PROCESSES.value % 2:
    raise ConfigError(f"--processes={_PROCESSES.value}: must be even, as half of them resume the run")
  if _WORKDIR.value and not buckets.is_in_bucket(_WORKDIR.value):
    raise ConfigError(f"--workdir={_WORKDIR.value}: must be a gs:// path; leave it out for a bucket in memory")
  buckets.check({}, {"--workdir": _WORKDIR.value})
  if _WORKDIR.value and (root := epath.Path(_WORKDIR.value)).exists() and any(root.iterdir()):
    raise ConfigError(f"--workdir={_WORKDIR.value} is not empty: give a new path, or remove it")
  buckets.refuse("--out", _OUT.value)
  folder = pathlib.Path(_OUT.value).expanduser().resolve()
  if folder.exists() and not (folder / MARK).exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ConfigError(f"--out={_OUT.value} exists and is not the folder of a rehearsal: give a new one, or remove it")
  return folder


def _make_anew(folder: pathlib.Path) -> None:
  if folder.exists():
    shutil.rmtree(folder)
  folder.mkdir(parents=True)
  (folder / MARK).write_text("python -m launch.rehearse removes this folder when it is run again\n")


def _small(config: ConfigDict, given: Sequence[str]) -> tuple[ConfigDict, list[str]]:
  """Shrink the configuration; return it, and the arguments of dmpo_jax.main that result in it.

  Raises:
    ConfigError: it does not start from a checkpoint, or is not valid.
  """
  _check_start(config)
  small = copy.deepcopy(config)
  with small.unlocked():
    small.model.init_from = str(ROOT)  # any existing folder, as the checkpoint does not exist yet
  validate(small)
  arguments = [arg for arg in given if arg.startswith(("--config=", "--config."))]
  changes = shrink(config)
  if not any(arg.startswith("--config.task.name=") for arg in arguments):
    changes["task.name"] = (config.task.name, TASK)
  for path, (old, new) in changes.items():
    print(f"config.{path}: {old!r} -> {new!r}")
    arguments.append(f"--config.{path}={new}")
  with small.unlocked():
    small.update_from_flattened_dict({path: new for path, (_, new) in changes.items()})
    validate(small)
    small.model.init_from = ""
  return small, arguments


def _check_start(config: ConfigDict) -> None:
  """Refuse a configuration that does not start from a converted checkpoint with its tokenizer."""
  wanted = {"tokenizer.name": "huggingface", "tokenizer.path": "", "model.init_from": "", "model.lora.init_from": ""}
  for path, value in wanted.items():
    section, _, key = path.rpartition(".")
    found = functools.reduce(operator.getitem, section.split("."), config)[key]
    if found != value:
      raise ConfigError(
        f"config.{path} = {found!r}: must be {value!r}, as the rehearsal makes the checkpoint and its tokenizer; "
        "give a configuration that starts from one, such as configs/llada_8b.py"
      )


@contextlib.contextmanager
def _bucket(folder: pathlib.Path) -> Iterator[tuple[epath.Path, dict[str, str]]]:
  """Yield the folder of a bucket, and the environment variables that lead processes to it."""
  if _WORKDIR.value:
    yield epath.Path(_WORKDIR.value), {}
    return
  with bucket.running(("bucket",), folder / "bucket") as emulator:
    os.environ.update(emulator.environment)  # this process reads the runs too
    yield epath.Path("gs://bucket"), emulator.environment


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  command.run(main)
