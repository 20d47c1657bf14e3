"""What a person sees while a phase runs: one line with the phase, the step, some figures and the time left."""

import time
from collections import deque
from typing import Any

import jax
from rich import progress as rich_progress
from rich.console import Console

# figures of a buffer that the line shows, and how
SHOWN = (
  ("reward_mean", "reward", "{:.3f}"),
  ("solve_rate", "solved", "{:.1%}"),
  ("loss", "loss", "{:.3f}"),
  ("tokens_per_second_sample", "tokens/s", "{:,.0f}"),
)
PLAIN_SECONDS = 10.0  # between two lines where the output is no terminal


class Progress:
  """A line that is redrawn on a terminal, and printed now and then elsewhere; nothing on processes other than 0.

  Args:
    phase: what runs, such as `warm_start`.
    total: its steps, of which `done` were finished at an earlier start.
  """

  def __init__(self, phase: str, total: int, *, done: int = 0, console: Console | None = None):
    self._phase = phase.replace("_", " ")
    self._total, self._done = total, done
    self._console = console or Console(quiet=jax.process_index() != 0)
    self._finished_at: deque[float] = deque(maxlen=21)  # the last 20 steps tell the pace, not the first: it compiles
    self._printed_at = -PLAIN_SECONDS
    self._bar = None

  def advance(self, **scalars: float) -> None:
    """Count a finished step; `scalars` are its figures, of which the line shows some."""
    self._done += 1
    self._finished_at.append(time.monotonic())
    shown = [f"{label} {form.format(scalars[name])}" for name, label, form in SHOWN if name in scalars]
    figures = "  ".join([*shown, *self._time_left()])
    if self._bar is not None:
      self._bar.update(self._task, completed=self._done, figures=figures)
    elif self._done == self._total or time.monotonic() - self._printed_at >= PLAIN_SECONDS:
      self._printed_at = time.monotonic()
      self._console.print(f"{self._phase} {self._done}/{self._total}  {figures}", highlight=False, soft_wrap=True)

  def _time_left(self) -> list[str]:
    if len(self._finished_at) < 2:
      return []
    pace = (self._finished_at[-1] - self._finished_at[0]) / (len(self._finished_at) - 1)
    minutes, seconds = divmod(round(pace * (self._total - self._done)), 60)
    hours, minutes = divmod(minutes, 60)
    return [f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"]

  def __enter__(self) -> "Progress":
    if self._console.is_terminal and not self._console.quiet:
      self._bar = rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(bar_width=24),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[figures]}"),
        rich_progress.TimeElapsedColumn(),
        console=self._console,
      )
      self._task = self._bar.add_task(self._phase, total=self._total, completed=self._done, figures="")
      self._bar.start()
    return self

  def __exit__(self, *error: Any) -> None:
    if self._bar is not None:
      self._bar.stop()
