"""Write the report of a run, or of several runs overlaid, as one HTML page: curves, outcomes, completions, differences.

    python -m launch.report --workdir=runs/sudoku_tiny
    python -m launch.report --workdir=runs/a runs/b runs/c --out=compare.html

Every training run writes its own report when it ends. Of unfinished and damaged runs the page shows what can be read.
"""

from absl import flags
from etils import epath

from dmpo_jax.run import buckets, report
from launch import commands


def define_flags() -> None:
  """Declare the command's flags; not on import, as every command has an --out of its own."""
  flags.DEFINE_string("workdir", None, "Folder (or gs:// path) of a run; more may follow, to compare.", required=True)
  flags.DEFINE_string("out", None, "The file to write; by default report.html in the first workdir.")


def main(*others: str) -> None:
  """Write the report and print its path."""
  given = flags.FLAGS
  written = {"--workdir": given.workdir} | ({"--out": given.out} if given.out else {})
  buckets.check({f"folder {path}": path for path in others}, written)
  path = report.write([given.workdir, *others], epath.Path(given.out).expanduser() if given.out else None)
  print(f"report       {path}")


if __name__ == "__main__":
  define_flags()
  commands.start(main, takes_more=True)
