"""Measure the parts of training and print tables: seconds, tokens/s, memory, utilisation.

    python -m launch.benchmark all                    # all but growth, cache and slots, as `make bench` does
    python -m launch.benchmark update                 # one section
    python -m launch.benchmark update --peer=torch    # and the same work in PyTorch (requirements-torch.txt)
    python -m launch.benchmark update --config=configs/llada_8b.py --config.model.remat=dots

Any configuration can be measured, with random weights; the default ones fit a laptop. With --peer, both first have to
compute the same numbers within a tolerance, and then run in turns, each in its own process.
"""

import dataclasses
import importlib
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from dmpo_jax.config import command
from dmpo_jax.hub.pretrained import filled
from dmpo_jax.run import buckets, progress
from launch.bench import programs, timing
from launch.bench.results import Disagreement, Measured, Options, write_json


@dataclasses.dataclass(frozen=True)
class Section:
  """A module with `run(config, options)`, its default configuration, and roughly how long it takes."""

  module: str
  config: str
  seconds: float  # on two cores, with PyTorch, one counted turn
  has_products: bool = True  # whose rate is compared with the peak of the machine


PEERED = ("sample", "score", "update", "iteration")
SECTIONS = {
  "sample": Section("launch.bench.sample", "configs/throughput.py:sampling", 290),
  "cache": Section("launch.bench.cache", "configs/sudoku_blocks.py", 60),
  "slots": Section("launch.bench.slots", "configs/throughput.py:blocks", 120),
  "score": Section("launch.bench.score", "configs/throughput.py", 90),
  "update": Section("launch.bench.update", "configs/throughput.py", 120),
  "iteration": Section("launch.bench.iteration", "configs/throughput.py:iteration", 170),
  "convert": Section("launch.bench.convert", "configs/throughput.py", 15, has_products=False),
  "grade": Section("launch.bench.grade", "configs/throughput.py", 25, has_products=False),
  "compile": Section("launch.bench.compile", "configs/throughput.py", 150, has_products=False),
  "growth": Section("launch.bench.growth", "configs/throughput.py:growth", 400),
}
APART = ("growth", "cache", "slots")  # not part of `all`: growth takes half as long, the others compare ours with ours
# The sections that read a flag; all sections read any other flag.
READ_BY = {
  "peer": PEERED,
  "official": PEERED,
  "remat": ("update",),
  "checkpointing": ("update",),
  "picture": ("growth",),
  "repeats": tuple(name for name in SECTIONS if name != "compile"),  # compile has configurations of its own
  "config": tuple(name for name in SECTIONS if name != "compile"),
}


def unread(name: str, args: Sequence[str]) -> dict[str, tuple[str, ...]]:
  """Find the arguments (`--flag=value`, `--flag`) that a section ignores, and the sections that read them."""
  flags_of = {arg: re.match(r"--?(?:no)?(\w+)", arg) for arg in args}
  readers = {arg: READ_BY.get(flag[1], tuple(SECTIONS)) for arg, flag in flags_of.items() if flag}
  return {arg: sections for arg, sections in readers.items() if name not in sections}


def define_flags(section: Section) -> None:
  """Declare the flags of all sections."""
  config_flags.DEFINE_config_file("config", section.config, "What to measure; any of its keys can be overridden.")
  flags.DEFINE_enum("peer", "none", ["none", "torch"], "Also do the same work in PyTorch.")
  flags.DEFINE_string("official", "", "With --peer=torch: a checkout of the official code, which then is the peer.")
  flags.DEFINE_integer("repeats", 3, "Timed turns of each contender; the median counts.", lower_bound=1)
  flags.DEFINE_list("remat", [], "update: values of model.remat to compare; default: that of the configuration.")
  flags.DEFINE_bool("checkpointing", False, "update, --peer=torch: also PyTorch with gradient checkpointing.")
  flags.DEFINE_string("picture", "", "growth: the file of its picture, such as docs/growth.svg.")
  flags.adopt_module_key_flags(progress)
  flags.DEFINE_string("json", "", "A JSON file for all results.")


def main(argv: Sequence[str]) -> None:
  """Run the section that the first argument names; a mistake ends in one message and exit code 2."""
  given = flags.FLAGS
  try:
    if len(argv) > 1:
      raise ValueError(f"unexpected argument {argv[1]!r}")
    for option in ("json", "picture"):
      buckets.refuse(f"--{option}", given[option].value or "")
    results = run(argv[0], filled(given.config), given)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except (Disagreement, timing.ContenderFailed) as error:
    print(f"stopped: {error}", file=sys.stderr)
    sys.exit(1)
  machine = timing.describe_machine()
  show(results, machine)
  if given.json:
    write_json(pathlib.Path(given.json), results, machine)


def run(name: str, config: ConfigDict, given: flags.FlagValues) -> list[Measured]:
  """Measure the peak of the machine and run a section."""
  check(config, given)
  start = time.monotonic()

  def say(what: str) -> None:  # prints lines, as redrawing a progress bar would take time from the contenders
    if not progress.wants_quiet():
      print(f"{name} {time.monotonic() - start:5.0f} s  {what}", file=sys.stderr, flush=True)

  peak_flops = None
  if SECTIONS[name].has_products:
    say("a large matrix product")
    peak_flops = timing.measure_peak(config.model.dtype)
  options = Options(
    repeats=given.repeats,
    peer=given.peer,
    official=given.official,
    checkpointing=given.checkpointing,
    remat=tuple(given.remat),
    picture=given.picture,
    say=say,
    peak_flops=peak_flops,
  )
  return [importlib.import_module(SECTIONS[name].module).run(config, options)]


def check(config: ConfigDict, given: flags.FlagValues) -> None:
  """Refuse what cannot be measured before anything runs.

  Raises:
    ValueError: the message says what is wrong.
  """
  programs.check(config)
  if given.official and given.peer != "torch":
    raise ValueError("--official: only together with --peer=torch")
  if given.checkpointing and given.peer != "torch":
    raise ValueError("--checkpointing: only together with --peer=torch")
  if given.peer == "torch" and importlib.util.find_spec("torch") is None:
    raise ValueError("--peer=torch: PyTorch is not installed; pip install -r requirements-torch.txt")


def show(results: Sequence[Measured], machine: str) -> None:
  """Print the tables."""
  console = Console(width=140)
  for result in results:
    peak = f"; a large product reaches {result.peak_flops / 1e9:,.0f} GFLOP/s" if result.peak_flops else ""
    console.print(f"{machine}{peak}", highlight=False)
    for table in result.tables():
      console.print(table)


def run_all(args: Sequence[str]) -> int:
  """Run the sections, each as a command of its own with the flags that it reads.

  Returns:
    The exit code: 0, 1 if a section failed, 2 for a mistake in the flags.
  """
  json_flag = next((arg for arg in args if arg.startswith("--json=")), "")
  others = [arg for arg in args if arg != json_flag]
  if any(arg.startswith("--config") for arg in others):
    print("error: --config belongs to one section; in `all` each has its own", file=sys.stderr)
    return 2
  if any(arg.startswith("--picture") for arg in others):
    print("error: --picture belongs to growth, which is not part of `all`", file=sys.stderr)
    return 2
  if any(not arg.startswith("-") for arg in others):
    print("error: `all` takes flags in one piece, such as --json=FILE", file=sys.stderr)
    return 2
  start, found, failed = time.monotonic(), [], []
  sections = {name: section for name, section in SECTIONS.items() if name not in APART}
  expected = sum(section.seconds for section in sections.values())
  done = 0.0
  with tempfile.TemporaryDirectory() as folder:
    for number, (name, section) in enumerate(sections.items()):
      passed = time.monotonic() - start
      pace = passed / done if done else 1.0
      left = round(pace * (expected - done) / 60)
      print(f"\n[{number + 1}/{len(sections)}] {name}: about {left} min left", file=sys.stderr, flush=True)
      path = pathlib.Path(folder) / f"{name}.json"
      own = [arg for arg in others if arg not in unread(name, others)]
      command = [sys.executable, "-m", "launch.benchmark", name, *own, f"--json={path}"]
      if subprocess.run(command).returncode:
        failed.append(name)
      else:
        found.append(json.loads(path.read_text()))
      done += section.seconds
  if json_flag and found:
    measured = [each for part in found for each in part["sections"]]
    path = pathlib.Path(json_flag.partition("=")[2])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": found[0]["machine"], "sections": measured}, indent=2) + "\n")
  print(f"{(time.monotonic() - start) / 60:.1f} min{f'; failed: {failed}' if failed else ''}", file=sys.stderr)
  return 1 if failed else 0


def start(name: str = "", *args: str) -> None:
  """Run the section that the command line names, or all of them; exit with code 2 if there is no such section."""
  if name == "all":
    sys.exit(run_all(args))
  if name not in SECTIONS:
    print(f"{__doc__}\nsections: all, {', '.join(SECTIONS)}", file=sys.stderr)
    sys.exit(2)
  for arg, sections in unread(name, args).items():
    print(f"error: {arg} has no effect on {name}: it belongs to {', '.join(sections)}", file=sys.stderr)
  if unread(name, args):
    sys.exit(2)
  define_flags(SECTIONS[name])
  command.run(main, argv=[name, *args])
