"""What the sections share: options, the comparison of contenders, and results as tables and JSON."""

import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ml_collections import ConfigDict
from rich.table import Table

from dmpo_jax import files
from launch.bench import timing, workload

MIB = 2**20


class Disagreement(RuntimeError):
  """Two contenders computed different numbers, so their times cannot be compared."""


class Measured(Protocol):
  """The result of any section."""

  peak_flops: float | None  # of the machine

  def tables(self) -> list[Table]:
    """Lay out the result."""
    ...

  def as_json(self) -> dict[str, Any]:
    """Return everything in a form for a file."""
    ...


@dataclasses.dataclass(frozen=True)
class Options:
  """The flags of a section besides its configuration."""

  repeats: int = 3
  peer: str = "none"  # or torch
  official: str = ""  # a checkout of the official code, which replaces our PyTorch code
  checkpointing: bool = False  # update: also PyTorch with gradient checkpointing
  remat: tuple[str, ...] = ()  # values of model.remat; (): the configuration's
  picture: str = ""  # growth: the file of its picture
  say: Callable[[str], None] = print
  peak_flops: float | None = None  # of the machine; None: no utilisation is reported

  def peers(self, make: Callable[..., timing.Contender], *args: Any) -> dict[str, timing.Maker]:
    """Return the peer that was asked for, if any, by its name; `make` is called with `args` and `official`."""
    name = "official" if self.official else "PyTorch"
    return {} if self.peer == "none" else {name: (make, (*args, self.official))}


@dataclasses.dataclass(frozen=True)
class Row:
  """One contender."""

  name: str
  seconds: tuple[float, ...]
  amount: float  # of work in a turn
  unit: str  # of the amount
  peak_bytes: int | None = None  # above what the process held before its first turn
  planned_bytes: int | None = None  # the compiler's estimate, arguments included
  flops: float | None = None  # of the work
  calls: int | None = None  # of the model

  @property
  def median(self) -> float:
    return statistics.median(self.seconds)

  @property
  def rate(self) -> float:
    return self.amount / self.median


@dataclasses.dataclass(frozen=True)
class Ratio:
  """The speed of ours relative to a peer, turn by turn, and its share of the peer's memory."""

  ours: str
  peer: str
  speeds: tuple[float, ...]
  memory: float | None

  @property
  def speed(self) -> float:
    return statistics.median(self.speeds)


@dataclasses.dataclass(frozen=True)
class Agreement:
  """A comparison of numbers of ours with those of a peer, made before anything was timed."""

  ours: str
  peer: str
  what: str
  error: float
  tolerance: float


@dataclasses.dataclass(frozen=True)
class Result:
  """The result of a section."""

  section: str
  settings: str
  rows: list[Row]
  ratios: list[Ratio] = dataclasses.field(default_factory=list)
  agreements: list[Agreement] = dataclasses.field(default_factory=list)
  peak_flops: float | None = None

  def utilisation(self, row: Row) -> float | None:
    """Return the share of the machine's peak that the median turn reached."""
    return None if row.flops is None or not self.peak_flops else row.flops / row.median / self.peak_flops

  def tables(self) -> list[Table]:
    """Lay out the contenders, and the ratios if there are any."""
    return [self._contenders(), *([self._ratios()] if self.ratios else [])]

  def _contenders(self) -> Table:
    table = Table(title=f"{self.section}: {self.settings}", title_justify="left")
    has_calls = any(row.calls is not None for row in self.rows)
    columns = ["contender", *(["calls"] if has_calls else []), "seconds", "least", "most", f"{self.rows[0].unit}/s"]
    for column in (*columns, "memory", "planned", "GFLOP", "utilisation"):
      table.add_column(column, justify="left" if column == "contender" else "right")
    for row in self.rows:
      share = self.utilisation(row)
      table.add_row(
        row.name,
        *([shown(row.calls, "{}")] if has_calls else []),
        f"{row.median:.3g}",
        f"{min(row.seconds):.3g}",
        f"{max(row.seconds):.3g}",
        f"{row.rate:,.1f}",
        shown_bytes(row.peak_bytes),
        shown_bytes(row.planned_bytes),
        shown(None if row.flops is None else row.flops / 1e9, "{:,.0f}"),
        shown(share, "{:.0%}"),
      )
    return table

  def _ratios(self) -> Table:
    table = Table(title="ratios, turn by turn", title_justify="left")
    for column in ("ours", "against", "times its speed", "least", "most", "of its memory", "agreed within"):
      table.add_column(column, justify="left" if column in ("ours", "against", "agreed within") else "right")
    for ratio in self.ratios:
      agreed = [each for each in self.agreements if (each.ours, each.peer) == (ratio.ours, ratio.peer)]
      table.add_row(
        ratio.ours,
        ratio.peer,
        f"{ratio.speed:.2f} x",
        f"{min(ratio.speeds):.2f} x",
        f"{max(ratio.speeds):.2f} x",
        shown(ratio.memory, "{:.2f}"),
        ", ".join(f"{each.what} {each.error:.0e}" for each in agreed),
      )
    return table

  def as_json(self) -> dict[str, Any]:
    """Return everything in a form for a file."""
    return {
      "section": self.section,
      "settings": self.settings,
      "peak_flops_per_second": self.peak_flops,
      "rows": [
        dataclasses.asdict(row) | {"median": row.median, "rate": row.rate, "utilisation": self.utilisation(row)}
        for row in self.rows
      ],
      "ratios": [dataclasses.asdict(ratio) | {"speed": ratio.speed} for ratio in self.ratios],
      "agreements": [dataclasses.asdict(agreement) for agreement in self.agreements],
    }


def compare(
  section: str,
  config: ConfigDict,
  options: Options,
  ours: Mapping[str, timing.Maker],
  peers: Mapping[str, timing.Maker],
  *,
  amount: float,
  tolerances: Mapping[str, float],
  pairs: Sequence[tuple[str, str]] | None = None,
) -> Result:
  """Check that our contenders and the peers compute the same numbers, and time them in turns.

  Args:
    ours, peers: the contenders by name.
    amount: tokens of a turn.
    tolerances: the largest error (`timing.relative_error`) of each number that the contenders' checks return.
    pairs: which contenders to compare; None: all of ours with all peers.

  Raises:
    Disagreement: a number of a peer differs from ours.
  """
  if pairs is None:
    pairs = [(name, peer) for name in ours for peer in peers]
  with_peers = [pair for pair in pairs if pair[1] in peers]
  agreements: list[Agreement] = []

  def judge(numbers: Mapping[str, timing.Numbers]) -> None:
    for pair in with_peers:
      agreements.extend(agree(*pair, numbers, tolerances))

  checked = {name for pair in with_peers for name in pair} if tolerances else set()
  measured = timing.run_in_turns({**ours, **peers}, options.repeats, say=options.say, checked=checked, judge=judge)
  same_work = {peer: name for name, peer in reversed(with_peers)}
  rows = [
    Row(
      name,
      timed.seconds,
      amount,
      "tokens",
      timed.peak_bytes,
      timed.facts.get("planned_bytes"),
      measured[same_work.get(name, name)].facts.get("flops"),
      timed.facts.get("calls"),
    )
    for name, timed in measured.items()
  ]
  ratios = [ratio(*pair, measured) for pair in pairs]
  return Result(section, workload.settings_line(config), rows, ratios, agreements, options.peak_flops)


def agree(
  ours: str, peer: str, numbers: Mapping[str, timing.Numbers], tolerances: Mapping[str, float]
) -> list[Agreement]:
  """Compare the numbers of two contenders.

  Raises:
    Disagreement: a number differs by more than its tolerance.
  """
  found = []
  for what, tolerance in tolerances.items():
    mine, other = (numbers[name][what] for name in (ours, peer))
    error = timing.relative_error(mine, other)
    if not error <= tolerance:
      raise Disagreement(f"{what}: {ours} and {peer} differ by {error:.1e}, more than {tolerance:.0e}")
    found.append(Agreement(ours, peer, what, error, tolerance))
  return found


def ratio(ours: str, peer: str, measured: Mapping[str, timing.Timing]) -> Ratio:
  """Compare two contenders turn by turn."""
  mine, other = measured[ours], measured[peer]
  speeds = tuple(b / a for a, b in zip(mine.seconds, other.seconds, strict=True))
  memory = mine.peak_bytes / other.peak_bytes if mine.peak_bytes is not None and other.peak_bytes else None
  return Ratio(ours, peer, speeds, memory)


def shown(value: float | None, form: str) -> str:
  """Format a value; a dash stands for None."""
  return "-" if value is None else form.format(value)


def shown_bytes(value: int | None) -> str:
  """Format bytes as MiB."""
  return shown(None if value is None else value / MIB, "{:,.0f} MiB")


def write_json(path: pathlib.Path, results: Sequence[Measured], machine: str) -> None:
  """Write the results and the machine as JSON."""
  path.parent.mkdir(parents=True, exist_ok=True)
  everything = {"machine": machine, "sections": [each.as_json() for each in results]}
  path.write_text(files.to_json(everything, indent=2) + "\n")
