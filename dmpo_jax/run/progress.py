"""What a person sees while long work goes on: its steps, some figures, the time left, and which part is running.

On a terminal two lines are redrawn. Where there is none lines are printed now and then; with --quiet one, when the work
is done. All of it goes to standard error, as results go to standard output.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import jax
from absl import flags
from rich import progress as rich_progress
from rich.console import Console, RenderableType
from rich.text import Text

flags.DEFINE_bool("quiet", False, "Show no progress but a line where a piece of work is done.")

# figures of a buffer that are shown, and how
SHOWN = (
  ("reward_mean", "reward", "{:.3f}"),
  ("solve_rate", "solved", "{:.1%}"),
  ("loss", "loss", "{:.3f}"),
  ("tokens_per_second_sample", "tokens/s", "{:,.0f}"),
)
PLAIN_SECONDS = 10.0  # between two lines where the output is no terminal
COMPILING = "/jax/core/compile/backend_compile_duration"  # what jax says as it begins, and again as it has compiled

_open: list["Progress"] = []  # the newest last: parts belong to it


class Progress:
  """The progress of one piece of work; nothing on processes other than 0. Inside another one's it is a part of that.

  Args:
    work: what is done, such as `warm_start`.
    total: its steps, of which `done` were finished at an earlier start.
    unit: what a step is, where the line should say so; `bytes` are shown as MB or GB, with their speed.
    is_quiet: None: as --quiet says.
  """

  def __init__(
    self,
    work: str,
    total: int,
    *,
    done: int = 0,
    unit: str = "",
    console: Console | None = None,
    is_quiet: bool | None = None,
  ):
    self._work, self._total, self._done, self._unit = work.replace("_", " "), total, done, unit
    self._console = console or Console(stderr=True, quiet=not _is_first())
    self._is_quiet = wants_quiet() if is_quiet is None else is_quiet
    self._begun = time.monotonic()
    self._finished: deque[tuple[float, int]] = deque(maxlen=21)  # the last 20 steps tell the pace: the first compiles
    self._printed_at: float | None = None
    self._figures, self._part, self._compiling = "", "", ""
    self._bar: _Bar | None = None
    self._around: Progress | None = None

  def advance(self, by: int = 1, **scalars: float) -> None:
    """Count finished steps; `scalars` are their figures, of which some are shown."""
    self._done += by
    self._finished.append((time.monotonic(), self._done))
    shown = [f"{label} {form.format(scalars[name])}" for name, label, form in SHOWN if name in scalars]
    self._figures, self._part = "  ".join(shown), ""
    self._show(is_step=True)

  def part(self, what: str, done: int = 0, total: int = 0) -> None:
    """Say what the next step is at: a part of it, of which `done` of `total` are finished."""
    self._part = f"{what} {done}/{total}" if total else what
    self._show()

  def compiling(self, name: str) -> None:
    """Say that a program is being compiled; "": no longer."""
    self._compiling = name
    if self._around is not None:
      self._around.compiling(name)
    elif self._bar is not None:
      self._redraw()
    elif name:
      timer = threading.Timer(PLAIN_SECONDS, self._print_compiling, [name])
      timer.daemon = True
      timer.start()

  def _print_compiling(self, name: str) -> None:
    if self._compiling == name:
      self._show()

  def _show(self, is_step: bool = False) -> None:
    if self._around is not None:
      self._around.part("  ".join([f"{self._work} {self._count()}", *self._said()]))
      return
    if self._bar is not None:
      self._redraw()
      return
    is_last, now = self._done >= self._total, time.monotonic()
    is_due = now - (self._begun if self._printed_at is None else self._printed_at) >= PLAIN_SECONDS
    is_first = is_step and self._printed_at is None
    if (is_step and is_last) or ((is_due or is_first) and not self._is_quiet):
      self._printed_at = now
      time_text = f"in {_clock(now - self._begun)}" if is_last else self._time_left()
      text = "  ".join(filter(None, [f"{self._work} {self._count()}", *self._said(), time_text]))
      self._console.print(text, highlight=False, soft_wrap=True)

  def _redraw(self) -> None:
    assert self._bar is not None
    self._bar.said = "  ".join(self._said())
    time_left = self._time_left() if self._done < self._total else ""
    self._bar.update(self._task, completed=self._done, count=self._count(), time=time_left)

  def _said(self) -> list[str]:
    compiling = f"compiling {self._compiling}" if self._compiling else ""
    return [text for text in (self._part, compiling, self._figures) if text]

  def _count(self) -> str:
    if self._unit != "bytes":
      return f"{self._done}/{self._total}" + (f" {self._unit}" if self._unit else "")
    scale, name = (1e9, "GB") if self._total >= 1e9 else (1e6, "MB")
    return f"{self._done / scale:.1f}/{self._total / scale:.1f} {name}"

  def _time_left(self) -> str:
    if len(self._finished) < 2:
      return ""
    (first, before), (last, now) = self._finished[0], self._finished[-1]
    pace = (last - first) / max(now - before, 1)
    left = f"{_clock(pace * (self._total - self._done))} left"
    if self._unit != "bytes" or not pace:
      return left
    speed = 1e-6 / pace  # of bytes: megabytes a second
    return f"{speed:,.{0 if speed >= 10 else 1}f} MB/s, {left}"

  def __enter__(self) -> "Progress":
    _listen_to_the_compiler()
    self._around = _open[-1] if _open else None
    is_drawn = self._console.is_terminal and not self._console.quiet and not self._is_quiet
    if is_drawn and self._around is None:
      self._bar = _Bar(console=self._console)
      self._task = self._bar.add_task(self._work, total=self._total, completed=self._done, count=self._count(), time="")
      self._bar.start()
    _open.append(self)
    return self

  def __exit__(self, *error: Any) -> None:
    _open.remove(self)
    if self._bar is not None:
      self._part = self._compiling = ""
      self._redraw()
      self._bar.stop()


class _Bar(rich_progress.Progress):
  """The bar, and under it what is said besides."""

  def __init__(self, console: Console):
    self.said = ""
    super().__init__(
      rich_progress.TextColumn("{task.description}"),
      rich_progress.BarColumn(bar_width=24),
      rich_progress.TextColumn("{task.fields[count]}"),
      rich_progress.TimeElapsedColumn(),
      rich_progress.TextColumn("{task.fields[time]}"),
      console=console,
      refresh_per_second=5,
      redirect_stdout=sys.stdout.isatty(),  # what is printed stands above the bar; to a file or a pipe it goes as it is
    )

  def get_renderables(self) -> Iterable[RenderableType]:
    yield self.make_tasks_table(self.tasks)
    if self.said:
      yield Text(self.said, style="dim", no_wrap=True, overflow="ellipsis")


def part(what: str, done: int = 0, total: int = 0) -> None:
  """Say what the work that is going on is at, see `Progress.part`; where none is, nobody looks."""
  if _open:
    _open[-1].part(what, done, total)


def wants_quiet() -> bool:
  """Whether --quiet was given; a program without flags was not asked."""
  return flags.FLAGS.is_parsed() and flags.FLAGS.quiet


def _is_first() -> bool:
  """Whether this is process 0; a program that has not joined a job is, and touches no device to know it."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


_is_listening = False


def _listen_to_the_compiler() -> None:
  """Hear of every program that JAX compiles, once in this process."""
  global _is_listening
  if not _is_listening:
    jax.monitoring.register_scalar_listener(_begins_to_compile)
    jax.monitoring.register_event_duration_secs_listener(_has_compiled)
    _is_listening = True


def _begins_to_compile(event: str, value: float, **about: Any) -> None:
  if event == COMPILING and _open:
    name = str(about.get("fun_name", "a program"))  # as jit(update) or jit_update
    _open[-1].compiling(name.removeprefix("jit").strip("_()"))


def _has_compiled(event: str, seconds: float, **about: Any) -> None:
  if event == COMPILING and _open:
    _open[-1].compiling("")
