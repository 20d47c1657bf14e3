"""Progress of long work: steps, some figures, the time left, and the part that is running.

A terminal shows two lines that are redrawn. Otherwise a line is printed every few seconds, or with --quiet one line at
the end. Progress goes to standard error; results go to standard output.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Iterable

import jax
from absl import flags
from rich import progress as rich_progress
from rich.console import Console, RenderableType
from rich.text import Text

flags.DEFINE_bool("quiet", False, "Print one line when a piece of work is done, and no other progress.")

# figures of a buffer that are shown: name, label, format
SHOWN = (
  ("reward_mean", "reward", "{:.3f}"),
  ("solve_rate", "solved", "{:.1%}"),
  ("loss", "loss", "{:.3f}"),
  ("tokens_per_second_sample", "tokens/s", "{:,.0f}"),
)
PLAIN_SECONDS = 10.0  # between two lines if the output is not a terminal
COMPILING_SECONDS = 3.0  # after which a line says there that a program is being compiled
COMPILING = "/jax/core/compile/backend_compile_duration"  # jax's event at the beginning and end of compiling

_open: list["Progress"] = []  # the newest is last; parts belong to it


class Progress:
  """Shows the progress of one piece of work, on process 0. Inside another `Progress` it is shown as a part of that.

  Args:
    work: name of the work, such as `warm_start`.
    total: number of steps, of which `done` were finished by an earlier start.
    unit: what a step is, if it should be shown; `bytes` are shown as MB or GB, with their speed.
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
    self._finished: deque[tuple[float, int]] = deque(maxlen=21)  # the last 20 steps set the pace
    self._printed_at: float | None = None
    self._figures, self._part, self._compiling = "", "", ""
    self._num_events = 0  # programs that began to be compiled, or were
    self._bar: _Bar | None = None
    self._around: Progress | None = None

  def advance(self, by: int = 1, **scalars: float) -> None:
    """Count finished steps; some of their figures, `scalars`, are shown."""
    self._done += by
    self._finished.append((time.monotonic(), self._done))
    shown = [f"{label} {form.format(scalars[name])}" for name, label, form in SHOWN if name in scalars]
    self._figures, self._part = "  ".join(shown), ""
    self._show(is_step=True)

  def part(self, what: str, done: int = 0, total: int = 0) -> None:
    """Show the current part of the next step, of which `done` of `total` are finished."""
    self._part = f"{what} {done}/{total}" if total else what
    self._show()

  def compiling(self, name: str) -> None:
    """Show that a program is being compiled; "": it is compiled."""
    self._compiling, self._num_events = name, self._num_events + 1
    if self._around is not None:
      self._around.compiling(name)
    elif self._bar is not None:
      self._redraw()
    elif name:
      timer = threading.Timer(COMPILING_SECONDS, self._print_compiling, [self._num_events])
      timer.daemon = True
      timer.start()

  def _print_compiling(self, number: int) -> None:
    """Print that a program is being compiled, unless it is done or another one has begun since event `number`."""
    if self._num_events == number and not self._is_quiet:
      self._print(time.monotonic(), self._time_left())

  def _show(self, is_step: bool = False) -> None:
    if self._around is not None:
      self._around.part("  ".join([f"{self._work} {self._count()}", *self._details()]))
      return
    if self._bar is not None:
      self._redraw()
      return
    is_last, now = self._done >= self._total, time.monotonic()
    is_due = now - (self._begun if self._printed_at is None else self._printed_at) >= PLAIN_SECONDS
    is_first = is_step and self._printed_at is None
    if (is_step and is_last) or ((is_due or is_first) and not self._is_quiet):
      self._print(now, f"in {_clock(now - self._begun)}" if is_last else self._time_left())

  def _print(self, now: float, time_text: str) -> None:
    self._printed_at = now
    text = "  ".join(filter(None, [f"{self._work} {self._count()}", *self._details(), time_text]))
    self._console.print(text, highlight=False, soft_wrap=True)

  def _redraw(self) -> None:
    assert self._bar is not None
    self._bar.details = "  ".join(self._details())
    time_left = self._time_left() if self._done < self._total else ""
    self._bar.update(self._task, completed=self._done, count=self._count(), time=time_left)

  def _details(self) -> list[str]:
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

  def __exit__(self, *error: object) -> None:
    _open.remove(self)
    if self._bar is not None:
      self._part = self._compiling = ""
      self._redraw()
      self._bar.stop()


class _Bar(rich_progress.Progress):
  """The bar, and a line of details under it."""

  def __init__(self, console: Console):
    self.details = ""
    super().__init__(
      rich_progress.TextColumn("{task.description}"),
      rich_progress.BarColumn(bar_width=24),
      rich_progress.TextColumn("{task.fields[count]}"),
      rich_progress.TimeElapsedColumn(),
      rich_progress.TextColumn("{task.fields[time]}"),
      console=console,
      refresh_per_second=5,
      redirect_stdout=sys.stdout.isatty(),  # printed text appears above the bar; files and pipes get it unchanged
    )

  def get_renderables(self) -> Iterable[RenderableType]:
    yield self.make_tasks_table(self.tasks)
    if self.details:
      yield Text(self.details, style="dim", no_wrap=True, overflow="ellipsis")


def part(what: str, done: int = 0, total: int = 0) -> None:
  """Show the part that the current work is at, see `Progress.part`; does nothing without a `Progress`."""
  if _open:
    _open[-1].part(what, done, total)


def wants_quiet() -> bool:
  """Whether --quiet was given; False in programs that parse no flags."""
  return flags.FLAGS.is_parsed() and flags.FLAGS.quiet


def _is_first() -> bool:
  """Whether this is process 0, or has not joined a job; no device is touched to find out."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


_is_listening = False


def _listen_to_the_compiler() -> None:
  """Register for JAX's compilation events, once a process."""
  global _is_listening
  if not _is_listening:
    jax.monitoring.register_scalar_listener(_begins_to_compile)
    jax.monitoring.register_event_duration_secs_listener(_has_compiled)
    _is_listening = True


def _begins_to_compile(event: str, value: float, **details: object) -> None:
  if event == COMPILING and _open:
    name = str(details.get("fun_name", "a program"))  # jit(update) or jit_update
    _open[-1].compiling(name.removeprefix("jit").strip("_()"))


def _has_compiled(event: str, duration_secs: float, **details: object) -> None:
  if event == COMPILING and _open:
    _open[-1].compiling("")
