"""The section `compile`: compilation time of a short run of the small configurations, with an empty and a warm cache.

It counts all programs of a run: warm start, rollouts, log-probs, updates, evaluation, and the small ones.
"""

import importlib
import math
import os
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout

import jax
from etils import epath
from ml_collections import ConfigDict

from launch.bench import timing, workload
from launch.bench.results import Options, Result, Row

CONFIGS = ("smoke", "sudoku_tiny", "countdown_tiny")
SHORT = {  # no shape depends on these keys, so the programs are those of the whole run
  "warm_start.updates": 2,
  "train.num_buffers": 1,
  "eval.every_buffers": 0,
}
EVENTS = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")


def run(config: ConfigDict, options: Options) -> Result:
  """Start each configuration twice in new processes, with the same cache."""
  rows = []
  for name in CONFIGS:
    with tempfile.TemporaryDirectory() as folder:
      for start in ("cold", "warm"):
        options.say(f"{name}, {start}")
        facts = timing.facts_of(make_start, (name, folder, start))
        rows.append(Row(f"{name}, {start} cache", (facts["seconds"],), facts["programs"], "programs"))
  return Result("compile", "tracing, lowering and compiling (or reading the cache) all programs of a run", rows)


def make_start(name: str, folder: str, start: str) -> timing.Contender:
  """Run a configuration for one buffer and add up the compilation times that JAX reports."""
  from dmpo_jax import main, train

  config = workload.changed(importlib.import_module(f"configs.{name}").get_config(), SHORT)
  workdir = epath.Path(folder) / start
  main.keep_compiled_programs(workdir)
  spans: list[tuple[float, float]] = []
  num_programs = 0

  def listen(event: str, duration_secs: float, **_: object) -> None:
    nonlocal num_programs
    if event.endswith(EVENTS):
      now = time.monotonic()
      spans.append((now - duration_secs, now))
      num_programs += event.endswith(EVENTS[-1])

  jax.monitoring.register_event_duration_secs_listener(listen)
  with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
    train.main(config, workdir)  # the output of the run is not needed
  return timing.Contender(lambda: None, facts={"seconds": covered(spans), "programs": num_programs})


def covered(spans: list[tuple[float, float]]) -> float:
  """Return the length of the union of time spans: a function traced within another is reported in both."""
  total, reached = 0.0, -math.inf
  for start, end in sorted(spans):
    total += max(end - max(start, reached), 0)
    reached = max(reached, end)
  return total
