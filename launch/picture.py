"""Film a finished Sudoku run: base and trained policy fill in the same held-out puzzle, beside the learning curve.

    python -m launch.picture --workdir=runs/sudoku_tiny --out=docs/sudoku.svg

The puzzle is the first held-out one that only the trained policy solves; `--index` chooses another. The colour of a
cell is the model call that decided it. The film is an SVG that CSS animates, and repeats. Where nothing moves, as on
paper, it is the last frame.
"""

import colorsys
import pathlib
from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape, quoteattr

from absl import flags
from etils import epath

from dmpo_jax import files
from dmpo_jax.run import buckets
from dmpo_jax.run.report.denoising import grid_of
from dmpo_jax.run.report.runs import Row, Run, find_generation, list_generations, read_runs
from launch import commands

WIDTH, HEIGHT, GRID, TOP = 880, 290, 176, 56  # pixels; of the film, a grid's side, and its distance from the top
BEFORE, CALL, AFTER = 1.0, 0.4, 4.0  # seconds before the first call, of one call, and after the last
INK, SOFT, LINE, WRONG, RIGHT, ACCENT = "#1d2125", "#5c656d", "#c9d0d5", "#b3200b", "#157347", "#0b63b0"


def main() -> None:
  """Film the run that the flags name."""
  given = flags.FLAGS
  buckets.refuse("--out", given.out)
  buckets.check({"--workdir": given.workdir})
  draw(epath.Path(given.workdir).expanduser(), pathlib.Path(given.out).expanduser(), given.index)
  print(given.out)


def draw(workdir: epath.Path, out: pathlib.Path, index: int | None = None) -> None:
  """Write the film of a run as SVG.

  Args:
    index: number of the held-out puzzle; None: the first that only the trained policy solves, or the first.

  Raises:
    ValueError: the folder is not a finished run of Sudoku, or has no puzzle of this index.
  """
  (run,) = read_runs([workdir])
  buffers = sorted(run.evaluations)
  if len(buffers) < 2:
    raise ValueError(f"--workdir={workdir}: a film needs a finished run")
  ends = buffers[0], buffers[-1]
  number = _choose(workdir, *ends) if index is None else index
  lines = [_generation(workdir, buffer, number) for buffer in ends]
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(film(run, lines, ["base", f"after {buffers[-1]} buffers"]))


def _choose(workdir: epath.Path, first: int, last: int) -> int:
  """Return the number of the first puzzle that the base fails and the trained policy solves; 0 if there is none."""
  names = list_generations(workdir)
  rows = {buffer: files.read_lines(workdir / names[buffer]).rows for buffer in (first, last) if buffer in names}
  solved = {
    buffer: {row.get("index") for row in found if row.get("is_solved") is True} for buffer, found in rows.items()
  }
  gained = solved.get(last, set()) - solved.get(first, set())
  return min((number for number in gained if isinstance(number, int)), default=0)


def _generation(workdir: epath.Path, buffer: int, index: int) -> Row:
  """Read the generation for one prompt of an evaluation."""
  name = list_generations(workdir).get(buffer)
  if name is None:
    raise ValueError(f"--workdir={workdir}: the evaluation after {buffer} buffers has no generations")
  line = find_generation(workdir / name, index)
  if grid_of(line) is None:
    raise ValueError(
      f"--workdir={workdir}: only a Sudoku whose cells are tokens can be filmed, with the calls that decided them; "
      f"prompt {index} of {name} is none"
    )
  return line


def film(run: Run, lines: Sequence[Row], labels: Sequence[str]) -> str:
  """Film how completions of one puzzle are decided, side by side.

  Args:
    labels: what the completions are of.
  """
  num_calls = max(max(line["denoising"]["committed_at"]) + 1 for line in lines)
  parts = [_tag("rect", x=0.5, y=0.5, width=WIDTH - 1, height=HEIGHT - 1, rx=10, fill="#ffffff", stroke=LINE)]
  for column, (line, label) in enumerate(zip(lines, labels, strict=True)):
    parts += _draw_completion(line, label, x=28 + column * (GRID + 60))
  for call in range(num_calls + 1):
    text = "the puzzle" if call == 0 else f"model call {call} of {num_calls}"
    parts.append(_text(28, HEIGHT - 14, text, fill=SOFT, class_=f"n{call}"))
  parts += _draw_curve(run, x=560, y=TOP, width=WIDTH - 560 - 28, height=GRID)
  summary = "Two 4x4 Sudokus fill in, call by call: the base leaves cells blank, the trained policy solves it."
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" '
    f'font-size="13" role="img" aria-label={quoteattr(summary)}>\n<style>\n{_style(num_calls)}</style>\n'
    + "\n".join(parts)
    + "\n</svg>\n"
  )


def _style(num_calls: int) -> str:
  """Write when what appears: .c<n> what call n decides, .n<n> the count of calls, .end what is known at the end."""
  whole = BEFORE + num_calls * CALL + AFTER
  moments = [0.0] + [BEFORE + call * CALL for call in range(num_calls)] + [whole]
  rules = ["@media (prefers-reduced-motion: no-preference) {"]
  for call in range(num_calls):
    rules += _appearing(f"c{call}", moments[call + 1], whole, whole)
  rules += _appearing("end", moments[num_calls], whole, whole)
  for call in range(num_calls + 1):
    rules += _appearing(f"n{call}", moments[call], moments[call + 1], whole)
  hidden = ", ".join(f".n{call}" for call in range(num_calls))
  return "\n".join([f"{hidden} {{ opacity: 0; }}", *rules, "}"]) + "\n"


def _appearing(name: str, begin: float, end: float, whole: float) -> list[str]:
  """Write the rules by which what has this class is seen from `begin` to `end`, of `whole` seconds."""
  on, off = 100 * begin / whole, 100 * end / whole
  before = [f"0%, {on:.2f}% {{ opacity: 0; }}"] if begin > 0 else []
  after = [f"{off:.2f}%, 100% {{ opacity: 0; }}"] if end < whole else []
  seen = f"{on + 0.01:.2f}%, {off - 0.01:.2f}% {{ opacity: 1; }}"
  return [
    f"@keyframes {name} {{ {' '.join([*before, seen, *after])} }}",
    f".{name} {{ animation: {name} {whole:.1f}s infinite; }}",
  ]


def _draw_completion(line: Row, label: str, x: float) -> list[str]:
  """Draw a grid with what is hidden until its call, its label above it, and the verdict below."""
  grid, record = grid_of(line), line["denoising"]
  assert grid is not None  # `_generation` asks for it
  pieces, calls, size = record["pieces"], record["committed_at"], GRID / grid.side
  wrong, last = grid.find_wrong(pieces), max(max(record["committed_at"]), 1)
  parts = [_text(x, TOP - 16, label, font_size=15, font_weight=600)]
  for index, digit in enumerate(grid.puzzle):
    left, top = x + index % grid.side * size, TOP + index // grid.side * size
    middle = {"text_anchor": "middle", "font_size": round(size * 0.42)}
    at = left + size / 2, top + size * 0.65
    parts.append(_tag("rect", x=left, y=top, width=size, height=size, fill="#ffffff", stroke=LINE))
    parts.append(_text(*at, "·" if digit == "0" else digit, fill=SOFT, **middle))
    colour, is_bold = WRONG if index in wrong else INK, digit != "0" or index in wrong
    face = _tag("rect", x=left, y=top, width=size, height=size, fill=_colour(calls[index] / last), stroke=LINE)
    number = _text(*at, pieces[index][:1], fill=colour, font_weight=700 if is_bold else 400, **middle)
    parts.append(f'<g class="c{calls[index]}">{face}{number}</g>')
  for step in range(0, grid.side + 1, grid.box):
    at = step * size
    parts += [
      _tag("path", d=f"M{x + at:g} {TOP}v{GRID}", stroke=SOFT, stroke_width=1.5),
      _tag("path", d=f"M{x:g} {TOP + at:g}h{GRID}", stroke=SOFT, stroke_width=1.5),
    ]
  num_blank = sum(pieces[index] == "0" for index in wrong)
  what = "left blank" if num_blank == len(wrong) else "wrong"
  verdict = f"\u2717 {len(wrong)} cells {what}" if wrong else "\u2713 solved"
  below = TOP + GRID + 22
  return [*parts, _text(x, below, verdict, fill=WRONG if wrong else RIGHT, font_weight=600, class_="end")]


def _colour(share: float) -> str:
  """Return the colour of a call, from violet for the first to yellow for the last."""
  return "#" + "".join(
    f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb((265 - 215 * share) / 360, 0.84, 0.65)
  )


def _draw_curve(run: Run, x: float, y: float, width: float, height: float) -> list[str]:
  """Draw the solve rate of the rollouts, and that of the held-out prompts with its 95 % interval if there is one."""
  rows = [row for row in run.rows.get("train", ()) if "solve_rate" in row]
  last = max([*run.evaluations, *(row["step"] for row in rows)])

  def place(step: float, rate: float) -> tuple[float, float]:
    return x + width * step / last, y + height * (1 - rate)

  parts = [_text(x, y - 16, "puzzles solved", font_size=15, font_weight=600)]
  for rate in (0.0, 0.5, 1.0):
    parts.append(_tag("path", d=f"M{x:g} {place(0, rate)[1]:g}h{width:g}", stroke=LINE))
    parts.append(_text(x - 6, place(0, rate)[1] + 4, f"{rate:.0%}", fill=SOFT, font_size=12, text_anchor="end"))
  for step in dict.fromkeys((0, last // 2, last)):
    parts.append(_text(place(step, 0)[0], y + height + 18, f"{step}", fill=SOFT, font_size=12, text_anchor="middle"))
  line = " ".join(f"{left:.1f},{top:.1f}" for left, top in (place(row["step"], row["solve_rate"]) for row in rows))
  parts.append(_tag("polyline", points=line, fill="none", stroke=ACCENT, stroke_width=2))
  for step, row in run.evaluations.items():
    left, top = place(step, row["solve_rate"])
    ends = [place(step, row.get(f"solve_rate_{end}", row["solve_rate"]))[1] for end in ("low", "high")]
    parts.append(_tag("path", d=f"M{left:.1f} {ends[0]:.1f}V{ends[1]:.1f}", stroke=INK, stroke_width=1.5))
    parts.append(_tag("circle", cx=round(left, 1), cy=round(top, 1), r=3.5, fill=INK))
  legend = y + height - 14
  parts.append(_text(x + width, legend - 18, "line: rollouts", fill=ACCENT, text_anchor="end"))
  parts.append(_text(x + width, legend, "dots: held out, greedy, 95 %", text_anchor="end"))
  return [*parts, _text(x, HEIGHT - 14, "buffers of rollouts", fill=SOFT)]


def _text(x: float, y: float, text: str, **attributes: object) -> str:
  return _tag("text", text, x=round(x, 1), y=round(y, 1), **({"fill": INK} | attributes))


def _tag(name: str, text: str = "", **attributes: object) -> str:
  """Write an element; an underscore in an attribute's name is a dash, and one at its end is dropped."""
  given: Iterable[tuple[str, object]] = (
    (key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items()
  )
  head = " ".join([name, *(f"{key}={quoteattr(str(value))}" for key, value in given)])
  return f"<{head}>{escape(text)}</{name}>" if text else f"<{head}/>"


def define_flags() -> None:
  """Declare the command's flags; not on import, as every command has an --out of its own."""
  flags.DEFINE_string("workdir", None, "A finished run of Sudoku.", required=True)
  flags.DEFINE_string("out", "docs/sudoku.svg", "The file to write.")
  flags.DEFINE_integer(
    "index",
    None,
    "Number of the held-out puzzle; by default the first that only the trained policy solves.",
    lower_bound=0,
  )


if __name__ == "__main__":
  define_flags()
  commands.start(main)
