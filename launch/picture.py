"""Draw a finished Sudoku run: how the base and the trained policy fill in a held-out puzzle, and the learning curve.

    python -m launch.picture --workdir=runs/sudoku_tiny --out=docs/sudoku.svg

The puzzle is the first held-out one; `--index` chooses another. The colour of a cell is the model call that decided it.
"""

import pathlib
from typing import Any

import matplotlib
from absl import flags
from etils import epath

from dmpo_jax.run import buckets
from dmpo_jax.run.report.denoising import is_animation
from dmpo_jax.run.report.runs import Row, Run, find_generation, list_generations, read_runs
from launch import commands

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

SIDE, NUM_FRAMES = 4, 5
ENDS = ("low", "high")  # of the confidence interval, which runs of older versions lack
INK, SOFT, LINE, WRONG, ACCENT = "#1d2125", "#5c656d", "#c9d0d5", "#b3200b", "#0b63b0"
COLOURS = matplotlib.colormaps["YlGnBu"]


def main() -> None:
  """Draw the run that the flags name."""
  given = flags.FLAGS
  buckets.refuse("--out", given.out)
  buckets.check({"--workdir": given.workdir})
  draw(epath.Path(given.workdir).expanduser(), pathlib.Path(given.out).expanduser(), given.index)
  print(given.out)


def draw(workdir: epath.Path, out: pathlib.Path, index: int = 0) -> None:
  """Write the picture of a run as SVG.

  Raises:
    ValueError: the folder is not a finished run of Sudoku, or has no puzzle of this index.
  """
  (run,) = read_runs([workdir])
  buffers = sorted(run.evaluations)
  if len(buffers) < 2:
    raise ValueError(f"--workdir={workdir}: a picture needs a finished run")
  first, last = (_generation(run.workdir, buffer, index) for buffer in (buffers[0], buffers[-1]))
  with matplotlib.rc_context({"svg.hashsalt": "dmpo_jax", "font.size": 9, "text.color": INK}):
    figure = plt.figure(figsize=(10.4, 3.2), facecolor="white")
    edges = dict(left=0.085, right=0.985, top=0.9, bottom=0.15, wspace=0.1, hspace=0.08)
    grid = figure.add_gridspec(2, NUM_FRAMES + 2, width_ratios=[*[1] * NUM_FRAMES, 0.3, 2.4], **edges)
    for row, (label, line) in enumerate((("base", first), (f"after {buffers[-1]}\nbuffers", last))):
      for column in range(NUM_FRAMES):
        _draw_frame(figure.add_subplot(grid[row, column]), line, column, label if column == 0 else "", is_top=row == 0)
    _draw_curve(figure.add_subplot(grid[:, NUM_FRAMES + 1 :]), run)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def _generation(workdir: epath.Path, buffer: int, index: int) -> Row:
  """Read the generation for one prompt of an evaluation."""
  name = list_generations(workdir).get(buffer)
  if name is None:
    raise ValueError(f"--workdir={workdir}: the evaluation after {buffer} buffers has no generations")
  line = find_generation(workdir / name, index)
  record, animation = line.get("record"), line.get("denoising")
  grids = [record.get(key) for key in ("puzzle", "solution")] if isinstance(record, dict) else []
  if not grids or not all(isinstance(grid, str) and len(grid) == SIDE**2 for grid in grids):
    raise ValueError(f"--workdir={workdir}: only {SIDE}x{SIDE} Sudoku can be drawn, and {name} belongs to another task")
  if not is_animation(animation) or len(animation["pieces"]) < SIDE**2 or type(line.get("num_calls")) is not int:
    raise ValueError(f"--workdir={workdir}: {name} does not record when cells were decided")
  return line


def _draw_frame(axes: Axes, line: Row, column: int, label: str, *, is_top: bool) -> None:
  """Draw the grid as it is after the share of model calls that belongs to a column."""
  animation, num_calls = line["denoising"], line["num_calls"]
  call = round(column * num_calls / (NUM_FRAMES - 1))
  solution, puzzle = line["record"]["solution"], line["record"]["puzzle"]
  for cell in range(SIDE**2):
    x, y = cell % SIDE, SIDE - 1 - cell // SIDE
    decided_at, piece = animation["committed_at"][cell], animation["pieces"][cell]
    is_decided = decided_at < call
    face = COLOURS(0.08 + 0.42 * decided_at / max(num_calls - 1, 1)) if is_decided else "white"
    axes.add_patch(Rectangle((x, y), 1, 1, facecolor=face, edgecolor=LINE, linewidth=0.6))
    is_given, is_wrong = puzzle[cell] != "0", piece != solution[cell]
    text, colour = (piece, WRONG if is_wrong else INK) if is_decided else ("·", SOFT)
    weight = "bold" if is_decided and (is_given or is_wrong) else "normal"
    axes.text(x + 0.5, y + 0.46, text, ha="center", va="center", color=colour, weight=weight, fontsize=10)
  for middle in (0, SIDE / 2, SIDE):
    axes.plot([middle, middle], [0, SIDE], color=SOFT, linewidth=1)
    axes.plot([0, SIDE], [middle, middle], color=SOFT, linewidth=1)
  axes.set(xlim=(-0.06, SIDE + 0.06), ylim=(-0.06, SIDE + 0.06), aspect="equal")
  axes.axis("off")
  if is_top:
    axes.set_title(f"call {call}", fontsize=9, color=SOFT, pad=3)
  axes.text(-0.35, SIDE / 2, label, ha="right", va="center", fontsize=10, weight="bold")


def _draw_curve(axes: Axes, run: Run) -> None:
  """Draw the solve rate of the rollouts, and that of the held-out prompts with its 95 % interval."""
  rows = [row for row in run.rows.get("train", ()) if "solve_rate" in row]
  axes.plot([row["step"] for row in rows], [row["solve_rate"] for row in rows], color=ACCENT, label="rollouts")
  rates = [row["solve_rate"] for row in run.evaluations.values()]
  ends = [[row.get(f"solve_rate_{end}", row["solve_rate"]) for row in run.evaluations.values()] for end in ENDS]
  errors = [[abs(end - rate) for end, rate in zip(side, rates, strict=True)] for side in ends]
  held_out: dict[str, Any] = dict(fmt="o", color=INK, markersize=4, capsize=3, label="held out, greedy, 95 %")
  axes.errorbar(list(run.evaluations), rates, yerr=errors, **held_out)
  axes.set(ylim=(-0.03, 1.03), xlabel="buffers of rollouts")
  axes.set_title("puzzles solved", fontsize=10, loc="left")
  axes.yaxis.set_major_formatter(PercentFormatter(1.0))
  axes.grid(alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(loc="lower right", frameon=False, fontsize=8)


def define_flags() -> None:
  """Declare the command's flags; not on import, as every command has an --out of its own."""
  flags.DEFINE_string("workdir", None, "A finished run of Sudoku.", required=True)
  flags.DEFINE_string("out", "docs/sudoku.svg", "The file to write.")
  flags.DEFINE_integer("index", 0, "Number of the held-out puzzle in the evaluation.", lower_bound=0)


if __name__ == "__main__":
  define_flags()
  commands.start(main)
