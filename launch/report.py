"""Write a run, or several overlaid, as one page that opens in any browser: curves, outcomes, completions, differences.

    python -m launch.report --workdir=runs/sudoku_tiny
    python -m launch.report --workdir=runs/a runs/b runs/c --out=compare.html

Every training run ends with a report of its own. Unfinished and damaged runs are shown as far as they can be read.
"""

import sys
from collections.abc import Sequence

from absl import flags
from etils import epath

from dmpo_jax.config import command
from dmpo_jax.run import buckets, report


def define_flags() -> None:
  """Declare the command's flags; not on import, as every command has an --out of its own."""
  flags.DEFINE_string("workdir", None, "A run's folder (or gs:// path); more may follow it, to compare.", required=True)
  flags.DEFINE_string("out", None, "The file to write; by default report.html in the first workdir.")


def main(argv: Sequence[str]) -> None:
  """Write the report and say where; a mistake ends in one message and exit code 2."""
  given = flags.FLAGS
  written = {"--workdir": given.workdir} | ({"--out": given.out} if given.out else {})
  try:
    buckets.check({f"folder {path}": path for path in argv[1:]}, written)
    path = report.write([given.workdir, *argv[1:]], epath.Path(given.out).expanduser() if given.out else None)
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  print(f"report       {path}")


if __name__ == "__main__":
  define_flags()
  command.run(main)
