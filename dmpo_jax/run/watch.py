"""Denoising in the terminal: the tokens that each model call decides, with the model's confidence, as it happens.

A token's colour shows the call that decided it, from violet to yellow as in the report. The newest call's tokens are
highlighted and listed below the text. Each call is shown for a minimum time, as small models decide too fast to see.
"""

import colorsys
import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from rich.console import Console, Group
from rich.live import Live
from rich.style import Style
from rich.text import Text

from dmpo_jax.hub.tokenizer import Tokenizer
from dmpo_jax.run.grids import Grid

MASKED = "\N{LIGHT SHADE}"  # shown for a masked position
ENDED = "\N{MIDDLE DOT}"  # shown for an end token
SECONDS_A_CALL = 0.15  # minimum time on a terminal
SECONDS_LEFT = 6.0  # maximum time for calls that are decided but not shown yet
NUM_NAMED = 8  # new tokens listed


class Frame(NamedTuple):
  """Completions after a model call."""

  completion: np.ndarray  # [b, c]
  num_calls: np.ndarray  # [b]
  confidence: np.ndarray  # [b, c]


class Watcher:
  """Shows completions on the terminal while they are decoded; a callback after every model call (`samplers.Plan`)."""

  def __init__(self, tokenizer: Tokenizer, console: Console | None = None):
    self._tokenizer = tokenizer
    self._console = console or Console(stderr=True)  # standard output is for the completions
    self._ends = {*tokenizer.end_token_ids, tokenizer.eot_token_id, tokenizer.pad_token_id}
    self._news = threading.Condition()
    self._puzzles: Sequence[Grid | None] = ()
    self._last: np.ndarray | None = None  # the rows as last drawn
    self._since: np.ndarray | None = None  # the calls that decided their tokens

  @contextlib.contextmanager
  def watching(self, puzzles: Sequence[Grid | None]) -> Iterator[None]:
    """Show a batch, as many rows as fit; returns once all of its calls have been shown.

    Args:
      puzzles: for each row the Sudoku that its tokens fill in; None for any other text.
    """
    tallest = max((puzzle.side + puzzle.box + 1 for puzzle in puzzles if puzzle), default=8)
    self._num_rows = min(len(puzzles), max(self._console.height // tallest, 1))
    self._puzzles = puzzles[: self._num_rows]
    self._newest, self._frames, self._is_over = -1, [], False
    self._last = self._since = None
    with Live(console=self._console, auto_refresh=False) as live:
      player = threading.Thread(target=self._play, args=[live], name="watch")
      player.start()
      try:
        yield
      finally:
        with self._news:
          self._is_over = True
          self._news.notify()
        player.join()
    _end_line(self._console)

  def __call__(self, number: Any, completion: Any, num_calls: Any, confidence: Any) -> None:
    """Take the rows after model call `number`, unless later ones have arrived."""
    rows = slice(self._num_rows)
    frame = Frame(*(np.array(array)[rows] for array in (completion, num_calls, confidence)))
    with self._news:
      if int(number) > self._newest:
        self._newest = int(number)
        self._frames.append(frame)
        self._news.notify()

  def _play(self, live: Live) -> None:
    pause = threading.Event()
    while True:
      with self._news:
        self._news.wait_for(lambda: self._frames or self._is_over)
        if not self._frames:
          return
        frame, num_waiting = self._frames.pop(0), len(self._frames)
      live.update(self.draw(frame), refresh=True)
      if self._console.is_terminal:
        pause.wait(min(SECONDS_A_CALL, SECONDS_LEFT / max(num_waiting, 1)))

  def draw(self, frame: Frame) -> Group:
    """Draw the rows, each above the list of its newest tokens."""
    if self._last is None or self._since is None:
      self._last = np.full_like(frame.completion, self._tokenizer.mask_token_id)
      self._since = np.zeros_like(frame.completion)
    is_new = (frame.completion != self._last) & (frame.completion != self._tokenizer.mask_token_id)
    self._since = np.where(is_new, frame.num_calls[:, None] - 1, self._since)
    self._last = frame.completion
    puzzles = self._puzzles or [None] * len(is_new)
    rows = zip(frame.completion, self._since, is_new, frame.confidence, frame.num_calls, puzzles, strict=True)
    return Group(*(draw_row([self._piece(token) for token in ids], *rest) for ids, *rest in rows))

  def _piece(self, token: Any) -> str | None:
    if token == self._tokenizer.mask_token_id:
      return None
    return ENDED if int(token) in self._ends else self._tokenizer.piece(int(token))


def play(record: Mapping[str, Any], puzzle: Grid | None, console: Console, seconds: float) -> None:
  """Animate a finished completion.

  Args:
    record: its tokens (`pieces`), the calls that decided them (`committed_at`) and their probabilities (`confidence`).
    puzzle: the Sudoku that its tokens fill in; None for any other text.
    seconds: time that each call is shown.
  """
  pieces, since, sure = record["pieces"], np.array(record["committed_at"]), np.array(record["confidence"])
  with Live(console=console, auto_refresh=False) as live:
    for call in range(since.max() + 1):
      shown = [piece if at <= call else None for piece, at in zip(pieces, since, strict=True)]
      live.update(draw_row(shown, since, since == call, sure, call + 1, puzzle), refresh=True)
      if console.is_terminal:
        time.sleep(seconds)
  _end_line(console)


def _end_line(console: Console) -> None:
  """End the last frame's line where `Live` does not: a file gets only that frame, without a newline."""
  if not console.is_terminal:
    console.print()


def draw_row(
  pieces: Sequence[str | None],
  since: Int[np.ndarray, "c"],
  is_new: Bool[np.ndarray, "c"],
  confidence: Float[np.ndarray, "c"],
  call: int | np.integer,
  puzzle: Grid | None = None,
) -> Group:
  """Draw a completion, coloured by the calls that decided its tokens, with the new tokens listed below.

  Args:
    pieces: its tokens; None for a masked position.
    since: the call that decided each token, from 0.
    is_new: the tokens of the newest call.
    call: number of the newest call, from 1.
    puzzle: the Sudoku that the tokens fill in, if they do.
  """
  styles = [
    Style(dim=True) if piece is None else Style(color=_colour(at, len(pieces)), reverse=bool(stands_out))
    for piece, at, stands_out in zip(pieces, since, is_new, strict=True)
  ]
  if puzzle is not None and puzzle.fits([piece or MASKED for piece in pieces]):
    drawn = _draw_grid(puzzle, pieces, styles)
  else:
    drawn = Text.assemble(*zip((MASKED if piece is None else piece for piece in pieces), styles, strict=True))
  named = [f"{pieces[i]!r} {confidence[i]:.2f}" for i in np.flatnonzero(is_new).tolist()]
  if len(named) > NUM_NAMED:
    named[NUM_NAMED:] = [f"{len(named) - NUM_NAMED} more"]
  listed = f"call {call}, with confidence: {', '.join(named)}" if named else f"call {call}: nothing new"
  return Group(drawn, Text(listed, style="dim", no_wrap=True, overflow="ellipsis"))


def _colour(call: int | np.integer, num_tokens: int) -> str:
  """Return the colour of a call, from violet to yellow."""
  hue = (265 - 215 * min(call / max(num_tokens - 1, 1), 1.0)) / 360
  red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue, 0.65, 0.65))
  return f"rgb({red},{green},{blue})"


def _draw_grid(puzzle: Grid, pieces: Sequence[str | None], styles: Sequence[Style]) -> Text:
  """Draw a Sudoku: given digits are bold, and faint until the model has decided them; wrong ones are red."""
  wrong, text, side, box = set(puzzle.find_wrong(pieces)), Text(), puzzle.side, puzzle.box
  for index, (digit, piece, style) in enumerate(zip(puzzle.puzzle, pieces, styles, strict=False)):
    row, column = divmod(index, side)
    if column == 0 and row and row % box == 0:
      text.append("\u253c".join(["\u2500" * (2 * box + 1)] * box) + "\n", "dim")
    if column and column % box == 0:
      text.append(" \u2502", "dim")
    own = style + Style(bold=digit != "0") + (Style(color="red", underline=True) if index in wrong else Style())
    hidden = MASKED if digit == "0" else digit
    text.append(" ").append((ENDED if piece.startswith("<") else piece) if piece else hidden, own)
    if column == side - 1:
      text.append("\n")
  text.right_crop(1)
  return text
