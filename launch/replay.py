"""Play a saved generation in the terminal: which token was decided at which model call, and how surely.

python -m launch.replay --workdir=runs/sudoku_tiny                                # the first of the last evaluation
python -m launch.replay --workdir=runs/sudoku_tiny --buffers=0 --index=3          # the fourth of the base's
python -m launch.replay --generations=FILE    # of --mode=eval: evaluation/result.json names it
"""

import sys
from collections.abc import Sequence

from absl import flags
from etils import epath
from rich.console import Console

from dmpo_jax.config import command
from dmpo_jax.run import buckets, watch
from dmpo_jax.run.report.page import is_animation
from dmpo_jax.run.report.runs import Row, find_generation, is_number, list_generations


def find_file(workdir: epath.Path, buffers: int | None) -> epath.Path:
  """Return the file of an evaluation; None: the last one.

  Raises:
    ValueError: there is none.
  """
  known = list_generations(workdir)
  if not known:
    raise ValueError(f"--workdir={workdir}: there are no generations in it")
  if buffers is not None and buffers not in known:
    raise ValueError(f"--buffers={buffers}: there was an evaluation after {', '.join(map(str, known))} buffers")
  return workdir / known[max(known) if buffers is None else buffers]


def read_animation(path: epath.Path, index: int, sample: int) -> Row:
  """Read one line of a file of generations.

  Raises:
    ValueError: there is no such file or line, or it does not say when tokens were decided.
  """
  found = find_generation(path, index, sample)
  if not is_animation(found.get("denoising")):
    raise ValueError(f"{path} does not say when tokens were decided")
  return found


def main(argv: Sequence[str]) -> None:
  """Play; a mistake ends in one message and exit code 2."""
  given = flags.FLAGS
  try:
    if len(argv) > 1:
      raise ValueError(f"unknown argument {argv[1]!r}")
    if bool(given.workdir) == bool(given.generations):
      raise ValueError("give either --workdir or --generations")
    buckets.check({"--workdir": given.workdir or "", "--generations": given.generations or ""})
    path = epath.Path(given.generations or find_file(epath.Path(given.workdir).expanduser(), given.buffers))
    line = read_animation(path.expanduser(), given.index, given.sample)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  console = Console()
  console.print(str(line.get("prompt", "")), style="dim", markup=False, highlight=False)
  animation = line["denoising"]
  watch.play(animation["pieces"], animation["committed_at"], animation["confidence"], console, given.seconds)
  verdict = "solved" if line.get("is_solved") else "not solved"
  reward = line.get("reward")
  console.print(f"reward {f'{reward:.3f}' if is_number(reward) else 'unknown'}, {verdict}", highlight=False)


def define_flags() -> None:
  """Declare the command's flags; not on import, as other commands have a --workdir of their own."""
  flags.DEFINE_string("workdir", None, "A run's folder (or gs:// path).")
  flags.DEFINE_integer("buffers", None, "Of which evaluation: after so many buffers; by default the last.")
  flags.DEFINE_string("generations", None, "Or: a file of generations, such as --mode=eval writes.")
  flags.DEFINE_integer("index", 0, "The prompt, by its number in the evaluation.", lower_bound=0)
  flags.DEFINE_integer("sample", 0, "Which of the prompt's completions, where there are several.", lower_bound=0)
  flags.DEFINE_float("seconds", 0.3, "Time that a model call is shown.", lower_bound=0.0)


if __name__ == "__main__":
  define_flags()
  command.run(main)
