"""Measure parts of the program against each other in one run, and print a table of ratios.

    python -m launch.benchmark sample                # samplers, on random weights
    python -m launch.benchmark sample --peer=torch   # with a plain PyTorch one too: needs requirements-torch.txt
    python -m launch.benchmark sample --help

A section is one module with `define_flags()` and `run()`, named in SECTIONS.
"""

import importlib
import sys
from collections.abc import Sequence

import absl.logging
from absl import app

SECTIONS = {"sample": "launch.bench_sample"}


def main(argv: Sequence[str]) -> None:
  """Run the section that the first argument named; a mistake ends in one message and exit code 2."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  try:
    section.run()
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  name = sys.argv[1] if len(sys.argv) > 1 else ""
  if name not in SECTIONS:
    sys.exit(f"{__doc__}\nsections: {', '.join(SECTIONS)}")
  section = importlib.import_module(SECTIONS[name])
  section.define_flags()
  absl.logging.set_verbosity(absl.logging.WARNING)
  app.run(main, argv=[sys.argv[0], *sys.argv[2:]])
