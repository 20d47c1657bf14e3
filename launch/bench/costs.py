"""Costs of a program: floating-point operations of its jaxpr, and communication of its compiled HLO.

XLA's cost analysis counts the body of a loop once; here bodies are multiplied by their trip counts. Where the data
decides how long a loop runs, the caller gives the count. Of two branches the more expensive one counts; of more (such
as one for each block of a completion) their mean.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = "between slices"  # sent by a host to other slices for a device, over the data centre network
_ITEMSIZE = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
_SHAPE = re.compile(r"\b(pred|bf16|[fsu]\d+)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_OP = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations|async_execution_thread)=\{?%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|true_computation=%?([\w.-]+), false_computation=%?([\w.-]+)")


def count_flops(jaxpr: ClosedJaxpr | Jaxpr, while_trips: int = 1) -> float:
  """Count the floating-point operations of all matrix products on all devices, 2 for each multiply-add.

  An operation whose results nothing reads is not counted, as the compiler leaves it out.

  Args:
    while_trips: trip count of loops whose length depends on data.
  """
  total = 0.0
  for eqn in _live(jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr):
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
      total += _dot_flops(eqn)
    elif name in ("ragged_dot", "ragged_dot_general"):  # experts: each row is multiplied by one of the matrices
      total += 2.0 * math.prod(_shape_of(eqn.invars[0])) * _shape_of(eqn.outvars[0])[-1]
    elif name == "scan":
      total += params["length"] * count_flops(params["jaxpr"], while_trips)
    elif name == "while":
      total += while_trips * count_flops(params["body_jaxpr"], while_trips)
    elif name == "cond":
      branches = [count_flops(branch, while_trips) for branch in params["branches"]]
      total += sum(branches) / len(branches) if len(branches) > 2 else max(branches)
    elif name == "pallas_call":
      total += math.prod(params["grid_mapping"].grid) * count_flops(params["jaxpr"], while_trips)
    elif name == "shard_map":
      total += params["mesh"].size * count_flops(params["jaxpr"], while_trips)
    else:
      total += sum(count_flops(inner, while_trips) for inner in _inner(params))
  return total


def _live(jaxpr: Jaxpr) -> list[JaxprEqn]:
  """Return the operations on which the results or effects of a program depend."""
  read, found = set(map(id, jaxpr.outvars)), []
  for eqn in reversed(jaxpr.eqns):
    if eqn.effects or any(id(result) in read for result in eqn.outvars):
      found.append(eqn)
      read.update(map(id, eqn.invars))
  return found[::-1]


def _dot_flops(eqn: JaxprEqn) -> float:
  (contracted, _), _ = eqn.params["dimension_numbers"]
  shape = _shape_of(eqn.invars[0])
  return 2.0 * math.prod(_shape_of(eqn.outvars[0])) * math.prod(shape[axis] for axis in contracted)


def _shape_of(array: Any) -> tuple[int, ...]:
  assert isinstance(array.aval, ShapedArray)
  return array.aval.shape


def _inner(params: dict[str, Any]) -> Iterator[ClosedJaxpr | Jaxpr]:
  """Yield the programs that an operation calls once, such as a jitted or rematerialised function."""
  for name, value in params.items():
    if isinstance(value, ClosedJaxpr | Jaxpr) and name not in ("fwd_jaxpr_thunk", "bwd"):
      yield value


class Collective(NamedTuple):
  """A collective operation of a program, and how often it runs."""

  kind: str
  shapes: tuple[tuple[int, ...], ...]  # of its results on one device (reduce-scatter: of its operands)
  size: int  # bytes of these shapes
  trips: int


class _Computation(NamedTuple):
  lines: list[str]
  calls: list[tuple[str, str, int]]  # computation, condition if it is the body of a loop, number of branches


def count_collectives(hlo: str, while_trips: int = 1) -> list[Collective]:
  """List the collectives of a compiled program, with the trip counts of the loops around them.

  A collective that XLA splits to overlap it with other work counts once. An all-reduce in a computation named
  all-reduce-scatter counts as reduce-scatter: each device keeps only its part of the sum.

  Args:
    hlo: the text of the compiled program.
    while_trips: trip count of loops whose length depends on data.
  """
  computations, entry = _parse(hlo)
  trips = dict.fromkeys(computations, 0)

  def visit(name: str, times: int) -> None:
    trips[name] = max(trips[name], times)
    for called, condition, branches in computations[name].calls:
      if called in computations:
        turns = _trip_count(computations, condition, while_trips) if condition else 1
        visit(called, max(1, times * turns // branches) if branches > 2 else times * turns)

  visit(entry, 1)
  found: dict[str, Collective] = {}
  for name, computation in computations.items():
    for number, line in enumerate(computation.lines):
      collective = _collective(line, trips[name])
      if collective is not None and trips[name]:
        if name.startswith("all-reduce-scatter"):
          collective = collective._replace(kind="reduce-scatter")
        channel = re.search(r"channel_id=(\d+)", line)
        key = f"{collective.kind == BETWEEN_SLICES} {channel[1]}" if channel else f"{name}/{number}"
        found[key] = max(found.get(key, collective), collective, key=lambda c: (c.trips, c.size))
  return list(found.values())


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
  computations: dict[str, _Computation] = {}
  current, entry = None, ""
  for line in hlo.splitlines():
    header = _HEADER.match(line)
    if header:
      current = computations[header[2]] = _Computation([], [])
      entry = header[2] if header[1] else entry
    elif current is not None:
      current.lines.append(line)
      current.calls.extend(_calls(line))
  return computations, entry


def _calls(line: str) -> Iterator[tuple[str, str, int]]:
  loop = re.search(r"condition=%?([\w.-]+), body=%?([\w.-]+)", line)
  if loop:
    yield loop[2], loop[1], 1
  for called in _CALLED.findall(line):
    yield called, "", 1
  for several, yes, no in _BRANCHES.findall(line):
    names = several.replace("%", "").split(", ") if several else [yes, no]
    for called in names:
      yield called, "", len(names)


def _trip_count(computations: dict[str, _Computation], condition: str, otherwise: int) -> int:
  """Return n if the condition of a loop is `i < n`, and `otherwise` for any other condition."""
  root = _root(computations[condition])
  bounds = re.findall(r"= s32\[\]\S* constant\((\d+)\)", "\n".join(computations[condition].lines))
  called = [_root(computations[name]) for name, _, _ in _calls(root) if name in computations]
  is_counted = len(bounds) == 1 and any("direction=LT" in line for line in (root, *called))
  return int(bounds[0]) if is_counted else otherwise


def _root(computation: _Computation) -> str:
  return next((line for line in computation.lines if line.lstrip().startswith("ROOT")), "")


def _collective(line: str, trips: int) -> Collective | None:
  match = _OP.match(line)
  if match and match[2] == "send" and "xla_megascale_runtime" in line:
    dtype, dims = _SHAPE.findall(match[1])[0]  # of the sent array; a number and a token follow
    shape = tuple(map(int, filter(None, dims.split(","))))
    return Collective(BETWEEN_SLICES, (shape,), _ITEMSIZE.get(dtype, 4) * math.prod(shape), trips)
  if not match or match[2].removesuffix("-start") not in KINDS:
    return None
  result, kind = match[1], match[2].removesuffix("-start")
  shapes = [(dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims in _SHAPE.findall(result)]
  if match[2].endswith("-start") and result.startswith("("):  # (operands, results)
    shapes = shapes[len(shapes) // 2 :]
  if kind == "reduce-scatter":
    operands = line[match.end() :].split("), ")[0]
    shapes = [(d, tuple(map(int, filter(None, dims.split(","))))) for d, dims in _SHAPE.findall(operands)] or shapes
  size = sum(_ITEMSIZE.get(dtype, 4) * math.prod(dims) for dtype, dims in shapes)
  return Collective(kind, tuple(dims for _, dims in shapes), size, trips)


def link_bytes(collectives: list[Collective]) -> float:
  """Estimate the bytes that a device sends over its links: the size of every collective, twice for an all-reduce."""
  times = {"all-reduce": 2, BETWEEN_SLICES: 0}
  return float(sum(c.size * c.trips * times.get(c.kind, 1) for c in collectives))
