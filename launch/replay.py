"""Play a saved generation in the terminal: which model call decided each token, and how confident it was.

python -m launch.replay --workdir=runs/sudoku_tiny                          # first prompt, last evaluation
python -m launch.replay --workdir=runs/sudoku_tiny --buffers=0 --index=3    # fourth prompt, evaluation of the base
python -m launch.replay --generations=FILE                                  # named in evaluation/result.json
"""

from absl import flags
from etils import epath
from rich.console import Console

from dmpo_jax import messages
from dmpo_jax.run import buckets, watch
from dmpo_jax.run.report.denoising import grid_of, is_animation
from dmpo_jax.run.report.runs import Row, find_generation, is_number, list_generations
from launch import commands


def find_file(workdir: epath.Path, buffers: int | None) -> epath.Path:
  """Return the generations of the evaluation after so many buffers; None: of the last one.

  Raises:
    ValueError: there was no such evaluation.
  """
  known = list_generations(workdir)
  if not known:
    raise ValueError(f"--workdir={workdir}: it holds no generations")
  if buffers is not None and buffers not in known:
    raise ValueError(f"--buffers={buffers}: there were evaluations after {', '.join(map(str, known))} buffers")
  return workdir / known[max(known) if buffers is None else buffers]


def read_generation(path: epath.Path, index: int, sample: int) -> Row:
  """Read one row of a file of generations.

  Raises:
    ValueError: there is no such file or row, or it does not record when tokens were decided.
  """
  found = find_generation(path, index, sample)
  if not is_animation(found.get("denoising")):
    raise ValueError(f"{path} does not record when tokens were decided")
  return found


def main() -> None:
  """Play the generation that the flags name."""
  given = flags.FLAGS
  if bool(given.workdir) == bool(given.generations):
    raise ValueError("give either --workdir or --generations")
  buckets.check({"--workdir": given.workdir or "", "--generations": given.generations or ""})
  path = epath.Path(given.generations or find_file(epath.Path(given.workdir).expanduser(), given.buffers))
  row = read_generation(path.expanduser(), given.index, given.sample)
  console = Console()
  console.print(messages.show(row.get("prompt", "")), style="dim", markup=False, highlight=False)
  watch.play(row["denoising"], grid_of(row), console, given.seconds)
  verdict = "solved" if row.get("is_solved") else "not solved"
  rewards = {"reward": row.get("reward")} | (row.get("reward_parts") or {})
  shown = ", ".join(f"{name} {_three_decimals(value)}" for name, value in rewards.items())
  console.print(f"{shown}, {verdict}", highlight=False)


def _three_decimals(value: object) -> str:
  return f"{value:.3f}" if is_number(value) else "unknown"


def define_flags() -> None:
  """Declare the command's flags; not on import, as other commands have a --workdir of their own."""
  flags.DEFINE_string("workdir", None, "A run's folder (or gs:// path).")
  flags.DEFINE_integer("buffers", None, "The evaluation after so many buffers; by default the last one.")
  flags.DEFINE_string("generations", None, "Or: a file of generations, such as those of --mode=eval.")
  flags.DEFINE_integer("index", 0, "Number of the prompt in the evaluation.", lower_bound=0)
  flags.DEFINE_integer("sample", 0, "Number of the completion, where a prompt has several.", lower_bound=0)
  flags.DEFINE_float("seconds", 0.3, "Seconds for which each model call is shown.", lower_bound=0.0)


if __name__ == "__main__":
  define_flags()
  commands.start(main)
