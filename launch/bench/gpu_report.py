"""The results of `launch/bench/gpu.py`: tables and JSON, beside what others measured on the same kind of GPU."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.bench.gpu_work import Check
from launch.bench.results import Row, shown, shown_bytes

DATA_SHEET = 989e12  # bfloat16 floating-point operations a second of an H100 or H200 (SXM), without sparsity
ANCHOR = {
  "what": "NeMo AutoModel: Llama-3-8B, LoRA, one H100",
  "flops_per_second": 402e12,
  "share_of_data_sheet": 0.41,
}


@dataclasses.dataclass(frozen=True)
class Section:
  """What came of a section: done, wrong (a check failed), failed, stopped (the time was over) or skipped."""

  name: str
  state: str = "done"
  note: str = ""
  seconds: float = 0.0
  checks: list[Check] = dataclasses.field(default_factory=list)
  rows: list[Row] = dataclasses.field(default_factory=list)
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def peak_of(sections: Sequence[Section]) -> float | None:
  """Return the rate of matrix products that was measured; None: it was not."""
  rates = [section.facts["flops_per_second"] for section in sections if "flops_per_second" in section.facts]
  return rates[0] if rates else None


def figures(row: Row, peak: float | None) -> dict[str, float | None]:
  """Return a program's rates and utilisation. Operations are those needed, without recomputation."""
  rate = None if row.flops is None else row.flops / row.median
  return {
    "seconds": row.median,
    "tokens_per_second": row.rate,
    "flops_per_second": rate,
    "share_of_products": None if rate is None or not peak else rate / peak,
    "share_of_data_sheet": None if rate is None else rate / DATA_SHEET,
  }


def as_json(about: Mapping[str, Any], sections: Sequence[Section], *, is_tiny: bool) -> dict[str, Any]:
  """Return everything in a form for a file."""
  peak = peak_of(sections)
  return {
    "is_tiny": is_tiny,
    "machine": about,
    "products_flops_per_second": peak,
    "data_sheet_flops_per_second": DATA_SHEET,
    "anchor": ANCHOR,
    "sections": [
      {
        "name": section.name,
        "state": section.state,
        "note": section.note,
        "seconds": section.seconds,
        "facts": section.facts,
        "checks": [check._asdict() | {"is_right": check.is_right} for check in section.checks],
        "rows": [dataclasses.asdict(row) | figures(row, peak) | {"turns": row.seconds} for row in section.rows],
      }
      for section in sections
    ],
  }


def show(about: Mapping[str, Any], sections: Sequence[Section], *, is_tiny: bool) -> None:
  """Print the tables."""
  console, peak = Console(width=140), peak_of(sections)
  machine = ", ".join(f"{name} {value}" for name, value in about.items() if value)
  rate = f"; products {peak / 1e12:,.1f} TFLOP/s, {peak / DATA_SHEET:.0%} of the data sheet's" if peak else ""
  console.print(f"{machine}{rate}", highlight=False, soft_wrap=True)
  for section in sections:
    for name, seconds in section.facts.get("seconds", {}).items():
      console.print(f"attention and its gradient, {name}: {1e3 * seconds:.2f} ms", highlight=False)
  console.print(_of_checks(sections), _of_programs(sections, peak, is_tiny), _of_sections(sections))


def _of_checks(sections: Sequence[Section]) -> Table:
  table = Table(title="against the plain definition", title_justify="left")
  for column in ("check", "error", "allowed", ""):
    table.add_column(column, justify="left" if column in ("check", "") else "right")
  for check in (check for section in sections for check in section.checks):
    table.add_row(check.what, f"{check.error:.2g}", f"{check.tolerance:.2g}", "" if check.is_right else "WRONG")
  return table


def _of_programs(sections: Sequence[Section], peak: float | None, is_tiny: bool) -> Table:
  sizes = "tiny sizes, whose figures mean nothing" if is_tiny else "random weights, LoRA of rank 128, 200 + 256 tokens"
  table = Table(title=f"LLaDA-8B, {sizes}", title_justify="left")
  for column in ("program", "seconds", "tokens/s", "memory", "planned", "TFLOP/s", "of products", "of the data sheet"):
    table.add_column(column, justify="left" if column == "program" else "right")
  for row in (row for section in sections for row in section.rows):
    own = figures(row, peak)
    rate = own["flops_per_second"]
    table.add_row(
      row.name,
      f"{row.median:.3g}",
      f"{row.rate:,.0f}",
      shown_bytes(row.peak_bytes),
      shown_bytes(row.planned_bytes),
      shown(None if rate is None else rate / 1e12, "{:,.1f}"),
      shown(own["share_of_products"], "{:.0%}"),
      shown(own["share_of_data_sheet"], "{:.0%}"),
    )
  rate, share = ANCHOR["flops_per_second"], ANCHOR["share_of_data_sheet"]
  table.add_row(ANCHOR["what"], "-", "-", "-", "-", f"{rate / 1e12:.0f}", "-", f"{share:.0%}")
  return table


def _of_sections(sections: Sequence[Section]) -> Table:
  table = Table(title="sections", title_justify="left")
  for column in ("section", "seconds", "", "note"):
    table.add_column(column, justify="right" if column == "seconds" else "left")
  for section in sections:
    note = section.note.strip().splitlines()[-1][:200] if section.note else ""  # the last line names an exception
    table.add_row(section.name, f"{section.seconds:.0f}", section.state, note)
  return table
