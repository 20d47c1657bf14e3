"""One GPU in eight minutes: are its kernels right, and how fast is LLaDA-8B on it?

    python -m launch.bench.gpu                            # one H100 or H200 (80 GB), at most 8 minutes
    python -m launch.bench.gpu --minutes=20 --json=runs/gpu.json
    python -m launch.bench.gpu --tiny                     # every step at tiny sizes, on the CPU

Sections run in the order of their worth, each program in a process of its own: one that fails or is out of memory takes
no other along. When the time is over, what is left is skipped. Compiled programs are kept beside the JSON file, so a
second run gets further. The weights are random, so tokens mean nothing; speed and memory are those of the real ones.
"""

import dataclasses
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from configs import llada_8b, throughput
from dmpo_jax import files
from dmpo_jax.run import buckets
from launch import commands
from launch.bench import gpu_report, gpu_work, sample, score, timing, update, workload
from launch.bench.gpu_report import Section
from launch.bench.gpu_work import Case
from launch.bench.results import Row

# Read by JAX in the processes that run programs. cuBLAS alone computes products: XLA would compile and time dozens of
# Triton kernels for every shape, which takes minutes. The pool leaves a tenth of the memory to cuBLAS and CUDA.
ENVIRONMENT = {
  "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false",
  "XLA_CLIENT_MEM_FRACTION": "0.9",
  "CUDA_VISIBLE_DEVICES": "0",
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED")
LEAST_SECONDS = 10.0  # less is too short for any section

ONE_PROMPT = {  # a buffer of one prompt, in one chunk and one microbatch
  "rollout.num_prompts": 1,
  "rollout.chunk_prompts": 0,
  "rollout.chunk_rollouts": 0,
  "train.microbatch_prompts": 0,
  "train.updates_per_buffer": 1,
}
CASES = (  # the lengths are LLaDA's: 200 + 256 tokens, blocks of 32
  Case("rows with padding", 16, 456, 456, 32, 32),
  Case("rows without padding", 4, 456, 456, 32, 32, is_padded=False),
  Case("an odd length, shared keys", 4, 331, 331, 28, 4),
  Case("a block over a cache", 4, 32, 456, 32, 32),
)


@dataclasses.dataclass(frozen=True)
class Program:
  """A program of training, and what its sizes are: `tries[0]`, and where that is out of memory the next ones."""

  make: Callable[[ConfigDict], timing.Contender]
  tokens: Callable[[ConfigDict], int]
  tries: tuple[Mapping[str, Any], ...]
  turns: int


def sizes(rollouts: int, layer_rows: int = 0, remat: str = "full") -> dict[str, Any]:
  """Return the keys that decide a program's memory."""
  return {"rollout.group_size": rollouts, "model.layer_rows": layer_rows, "model.remat": remat}


def tokens_of_sample(config: ConfigDict) -> int:
  """Count the tokens that rollouts decide."""
  return config.rollout.group_size * config.sampler.completion_length


def tokens_of_update(config: ConfigDict) -> int:
  """Count the positions that a gradient step runs through the model."""
  rows = config.rollout.group_size * config.objective.num_mask_samples
  return rows * (config.task.max_prompt_length + config.sampler.completion_length)


def tokens_of_score(config: ConfigDict) -> int:
  """Count the positions that the log-probs of two policies run through the model."""
  rows = config.rollout.group_size * config.objective.num_elbo_samples
  return 2 * rows * (config.task.max_prompt_length + config.sampler.completion_length)


# `dots` keeps 2.7 MiB a token: 20 GiB for 4 rollouts x 4 masks of 456 tokens, beside 16 GB of weights and 3 of adapters
# with their gradient and moments. `full` keeps 0.25 MiB a token: 7 GiB for 16 rollouts x 4 masks, the published batch.
PROGRAMS = {
  "update": Program(update.make_ours, tokens_of_update, (sizes(4, remat="dots"), sizes(4, 16), sizes(2, 4)), 3),
  "rollouts": Program(sample.make_ours, tokens_of_sample, (sizes(16), sizes(8), sizes(4)), 1),
  "scores": Program(score.make_ours, tokens_of_score, (sizes(16, 16), sizes(8, 4), sizes(4, 4)), 2),
  "update, published batch": Program(update.make_ours, tokens_of_update, (sizes(16, 16), sizes(16, 4), sizes(8, 4)), 1),
}
# Name and quantization of the base; the first three answer most.
ORDER = (
  ("products", ""),
  ("attention", ""),
  ("update", "none"),
  ("rollouts", "none"),
  ("samplers", ""),
  ("scores", "none"),
  ("update", "int8"),
  ("rollouts", "int8"),
  ("scores", "int8"),
  ("update, published batch", "none"),
)
BASES = {"none": "bfloat16 base", "int8": "int8 base"}


@dataclasses.dataclass(frozen=True)
class Bench:
  """What all sections share."""

  is_tiny: bool
  until: float  # by `time.monotonic`

  @property
  def start(self) -> timing.Start:
    """Processes are copies of one that has imported everything, which saves seconds each."""
    return timing.Start(from_one=True, until=self.until)

  @property
  def seconds_left(self) -> float:
    return self.until - time.monotonic()

  def say(self, what: str) -> None:
    """Print a line of progress."""
    minutes, seconds = divmod(max(round(self.seconds_left), 0), 60)
    print(f"{minutes}:{seconds:02} left  {what}", file=sys.stderr, flush=True)


def llada(is_tiny: bool, quantization: str, keys: Mapping[str, Any]) -> ConfigDict:
  """Build LLaDA-8B's configuration for a buffer of one prompt, as published (LoRA of rank 128), or a tiny one."""
  own = ONE_PROMPT | (workload.TINY if is_tiny else {}) | {"model.quantization": quantization} | dict(keys)
  return workload.changed(llada_8b.get_config("256"), own)


def sampler_config(is_tiny: bool) -> ConfigDict:
  """Build a small model for the check of the samplers: 8 rows, and a vocabulary of several chunks."""
  own = {"rollout.num_prompts": 2, "model.num_layers": 4} | (workload.TINY if is_tiny else {})
  return workload.changed(throughput.get_config("sampling"), own)


def measure_products(bench: Bench) -> Section:
  """Measure the rate of the GPU's matrix products, which utilisation is relative to."""
  facts = timing.facts_of(gpu_work.make_products, (128, 2) if bench.is_tiny else (8192, 200), bench.start)
  return Section("products", facts=facts)


def check_attention(bench: Bench) -> Section:
  """Check and time the attention kernel."""
  cases = CASES
  if bench.is_tiny:
    few = dict(rows=2, heads=2, kv_heads=1, head_dim=8)
    cases = tuple(dataclasses.replace(case, queries=min(case.queries, 8), keys=8, **few) for case in CASES)
  facts = timing.facts_of(gpu_work.make_attention, (cases,), bench.start)
  return Section("attention", checks=facts.pop("checks"), facts=facts)


def check_samplers(bench: Bench) -> Section:
  """Check the samplers and their model calls."""
  facts = timing.facts_of(gpu_work.make_samplers, (sampler_config(bench.is_tiny),), bench.start)
  return Section("samplers", checks=facts["checks"])


def run_program(name: str, quantization: str, bench: Bench) -> Section:
  """Time a program of LLaDA-8B; where it is out of memory, say so and take the next smaller sizes."""
  program, notes = PROGRAMS[name], []
  for number, keys in enumerate(program.tries):
    config = llada(bench.is_tiny, quantization, keys)
    own = config.rollout.group_size, config.model.remat, config.model.layer_rows
    what = f"{name}, {BASES[quantization]}, {own[0]} rollouts" + (f", remat {own[1]}" if "update" in name else "")
    contender = (gpu_work.make_program, (program.make, config))
    try:
      timed = timing.run_in_turns({what: contender}, program.turns, say=bench.say, start=bench.start)[what]
    except timing.ContenderFailed as error:
      if not is_out_of_memory(error) or number + 1 == len(program.tries):
        raise
      notes.append(f"out of memory with {own[0]} rollouts, remat {own[1]}, layer_rows {own[2]}")
      bench.say(f"{what}: {notes[-1]}; trying smaller sizes")
      continue
    facts = timed.facts
    memory = facts.get("held_bytes"), facts["planned_bytes"]
    row = Row(what, timed.seconds, program.tokens(config), "tokens", *memory, facts["flops"], facts.get("calls"))
    return Section(f"{name}, {BASES[quantization]}", rows=[row], note="; ".join(notes))
  raise AssertionError("every program has sizes")


def is_out_of_memory(error: Exception) -> bool:
  """Whether a process failed for want of the GPU's memory."""
  return any(sign in str(error) for sign in OUT_OF_MEMORY)


def run_section(name: str, quantization: str, bench: Bench) -> Section:
  """Run a section; if it fails, report that instead."""
  title = f"{name}, {BASES[quantization]}" if quantization else name
  own = {"products": measure_products, "attention": check_attention, "samplers": check_samplers}
  start = time.monotonic()
  if bench.seconds_left < LEAST_SECONDS and not bench.is_tiny:
    return Section(title, state="skipped", note="the time is over")
  bench.say(f"{title} begins")
  try:
    section = own[name](bench) if name in own else run_program(name, quantization, bench)
  except (timing.ContenderFailed, ValueError) as error:
    section = Section(title, state="failed" if bench.seconds_left > 0 else "stopped", note=str(error))
    print(error, file=sys.stderr, flush=True)
  if any(not check.is_right for check in section.checks):
    section = dataclasses.replace(section, state="wrong")
  section = dataclasses.replace(section, seconds=time.monotonic() - start)
  bench.say(f"{title}: {section.state} after {section.seconds:.0f} s")
  return section


def prepare(is_tiny: bool, folder: pathlib.Path) -> None:
  """Set the environment of the processes to come, without what the user has set, and what they import at first."""
  own = {**ENVIRONMENT, "JAX_COMPILATION_CACHE_DIR": str(folder.resolve() / ".jax_cache")}
  if is_tiny:
    own.pop("XLA_FLAGS")
  if "XLA_PYTHON_CLIENT_MEM_FRACTION" in os.environ:  # the older name; JAX refuses both
    own.pop("XLA_CLIENT_MEM_FRACTION")
  for name, value in own.items():
    os.environ.setdefault(name, value)
  os.environ["JAX_PLATFORMS"] = "cpu" if is_tiny else "cuda,cpu"  # the samplers are compared with the CPU
  multiprocessing.get_context("forkserver").set_forkserver_preload(["launch.bench.gpu_work", *_modules()])


def _modules() -> list[str]:
  return [program.make.__module__ for program in PROGRAMS.values()]


def define_flags() -> None:
  """Declare the command's flags."""
  flags.DEFINE_float("minutes", 8.0, "Time for everything.", lower_bound=0.0)
  flags.DEFINE_bool("tiny", False, "Tiny sizes on the CPU: tries every step, measures nothing of worth.")
  flags.DEFINE_string("json", "runs/gpu.json", "File for the results; it is written after every section.")


def main() -> None:
  """Run all sections and print tables; exit with code 1 where something failed or was wrong.

  Raises:
    ValueError: there is no GPU.
  """
  given = flags.FLAGS
  buckets.refuse("--json", given.json)
  path = pathlib.Path(given.json)
  bench = Bench(given.tiny, time.monotonic() + 60 * given.minutes)
  prepare(bench.is_tiny, path.parent)
  bench.say("looking for a GPU" if not bench.is_tiny else "tiny sizes on the CPU: no figure means anything")
  about = timing.facts_of(gpu_work.make_description, (), bench.start)
  why = about.pop("why")
  if about["platform"] != "gpu" and not bench.is_tiny:
    raise ValueError(f"JAX finds no NVIDIA GPU ({why}); --tiny tries every step on the CPU, see docs/performance.md")
  found: list[Section] = []
  path.parent.mkdir(parents=True, exist_ok=True)
  for name, quantization in ORDER:
    found.append(run_section(name, quantization, bench))
    path.write_text(files.to_json(gpu_report.as_json(about, found, is_tiny=bench.is_tiny), indent=2) + "\n")
  gpu_report.show(about, found, is_tiny=bench.is_tiny)
  print(f"everything is in {path}", file=sys.stderr)
  sys.exit(any(section.state in ("failed", "wrong") for section in found))


if __name__ == "__main__":
  define_flags()
  commands.start(main)
