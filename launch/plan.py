"""Compile the programs of a configuration for a TPU slice that need not exist yet, and print their costs.

    python -m launch.plan --config=configs/llada_8b.py --topology=v5e:4x4 [--tune] [--operations]

The real TPU compiler compiles the gradient step (`accumulate`: the gradient of one microbatch; `apply`: the optimizer),
the sampler of the rollouts (`sample`) and their log-probs (`score`). It needs no TPU, only the package libtpu
(`make libtpu`, part of `make test`), and minutes of one core for each program. Where the samplers have a mesh of their
own, `move` is the program that copies the parameters there: its collectives are the cost of the copy, and its memory
beyond the arguments stays in use while rollouts are sampled.

--tune searches the settings that are fastest and fit (`launch/tune.py`); --write makes a configuration of them. --kept
names a folder of what the compiler has said, so that a search that was stopped goes on. --operations compiles nothing:
it counts the operations that a buffer's programs execute against those that it needs, for prompts of --prompt_tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags
from rich.console import Console
from rich.table import Table

from dmpo_jax import files, sharding
from dmpo_jax.config import ConfigError
from dmpo_jax.hub.pretrained import filled
from dmpo_jax.run import buckets, progress
from launch import commands, tpu, tune
from launch.bench import operations, programs
from launch.bench.programs import PROGRAMS
from launch.bench.workload import changed


def table(costs_of: Sequence[tpu.Cost], where: tpu.Slice) -> Table:
  """Lay out the costs of the programs."""
  layout = Table(title=f"{where.topology}: {len(where.devices)} chips of {where.chip.hbm} GiB")
  for column in ("program", "arguments", "peak", "of HBM", "fits", "PFLOP", "collectives", "products", "links"):
    layout.add_column(column, justify="left" if column in ("program", "collectives") else "right")
  for cost in costs_of:
    kinds = [f"{kind} {row['times']:,.0f}x {row['bytes'] / 1e9:,.1f} GB" for kind, row in cost.collectives.items()]
    layout.add_row(
      cost.program,
      f"{cost.arguments:.2f} GiB",
      f"{cost.peak:.2f} GiB",
      f"{cost.peak / where.chip.hbm:.0%}",
      "refused" if cost.is_refused else "yes" if where.fits(cost) else "no",
      f"{cost.flops / 1e15:.2f}",
      "\n".join(kinds),
      f"{cost.seconds_compute:.2f} s",
      f"{cost.seconds_links:.2f} s",
    )
  return layout


def describe_iteration(found: dict[str, tpu.Cost], config: ConfigDict, where: tpu.Slice) -> str:
  """Estimate the time of a buffer by the roofline, and state the assumptions."""
  times = {name: programs.calls_of(name, config) for name in found}
  seconds = {name: times[name] * cost.seconds for name, cost in found.items()}
  listed = " + ".join(f"{times[name]} x {name} {cost.seconds:.2f} s" for name, cost in found.items())
  return (
    f"a buffer of {config.rollout.num_prompts} prompts x {config.rollout.group_size} rollouts: {listed} "
    f"= {sum(seconds.values()):.1f} s\n"
    f"assumed: {tpu.MXU_SHARE:.0%} of {where.chip.peak / 1e12:.0f} TFLOP/s, {tpu.LINK_SHARE:.0%} of "
    f"{where.chip.links / 1e9:.0f} GB/s, communication beside products; loops that may stop early run to their end"
  )


def describe_polls(found: dict[str, tpu.Cost], config: ConfigDict) -> str:
  """Estimate by the roofline how long the devices work between two polls for a notice of preemption."""
  names = {"sample": "rollouts", "score": "log-probs", "accumulate": "a microbatch"}
  seconds = {what: found[name].seconds for name, what in names.items() if name in found}
  if "sample" in found:
    rows = config.rollout.num_prompts * config.rollout.group_size / programs.calls_of("sample", config)
    seconds["evaluation"] = found["sample"].seconds * config.eval.batch_size * config.eval.num_samples / rows
  listed = ", ".join(f"{what} {value:.1f} s" for what, value in seconds.items())
  return f"a poll for preemption at least every {max(seconds.values(), default=0):.1f} s: {listed}"


def run(config: ConfigDict, where: tpu.Slice, names: Sequence[str], kept: epath.Path | None = None) -> dict[str, Any]:
  """Compile and print; return the figures.

  Args:
    kept: see `tpu.cost_of`.
  """
  console = Console(width=140)
  model, meshes = programs.place(config, where.devices)
  attention = model.config.attention
  layout = sharding.describe_both(*meshes, config.sharding.to_dict())
  console.print(f"attention: {attention}, {layout}", highlight=False)
  result: dict[str, Any] = {"topology": where.topology, "attention": attention, "mesh": dict(meshes[0].shape)}
  found = {}
  with progress.Progress("compiling", len(names), unit="programs") as shown:
    for name in names:
      if programs.is_needed(name, config):
        shown.part(name)
        found[name] = tpu.cost_of(name, config, where, kept)
        console.print(f"{name} compiled in {found[name].seconds_compiling:.0f} s", highlight=False)
      else:
        console.print(f"{name}: not needed")
      shown.advance()
  if found:
    console.print(table(list(found.values()), where))
    console.print(describe_iteration(found, config, where), highlight=False, soft_wrap=True)
    console.print(describe_polls(found, config), highlight=False, soft_wrap=True)
  if wide := [shape for cost in found.values() for shape in cost.vocabulary]:
    console.print(f"collectives of the size of logits, which are expensive: {wide}")
  return result | {"programs": {name: dataclasses.asdict(cost) for name, cost in found.items()}}


def count_operations(config: ConfigDict, where: tpu.Slice, lengths: Sequence[int]) -> dict[str, Any]:
  """Print the operations of a buffer whose prompts have these lengths, executed against needed; return the figures."""
  names = [name for name in operations.COUNTED if programs.is_needed(name, config)]
  found = []
  with progress.Progress("counting", len(names), unit="programs") as shown:
    for name in names:
      shown.part(name)
      found.append(operations.count(name, config, where.devices, lengths))
      shown.advance()
  Console(width=140).print(operations.table(found, len(where.devices) * where.chip.peak * tpu.MXU_SHARE))
  return {each.program: {"executed": each.executed, "needed": each.needed, "causes": each.causes} for each in found}


def define_flags() -> None:
  """Declare the command's flags; not on import, as every command has its own."""
  config_flags.DEFINE_config_file("config", None, "Configuration file; override a key with --config.section.key=value.")
  flags.adopt_module_key_flags(progress)
  flags.DEFINE_string("topology", None, "The slice, such as v5e:4x4, v5p:2x2x1 or v6e:4x4; v5e:1x1 is one chip.")
  flags.DEFINE_integer("slices", 1, "Number of such slices; data is split over them.", lower_bound=1)
  flags.DEFINE_list("programs", list(PROGRAMS), "Programs to compile.")
  flags.DEFINE_boolean("tune", False, "Search the fastest settings that fit.")
  flags.DEFINE_string("write", "", "--tune: a file in configs/ for a configuration with the settings that were found.")
  flags.DEFINE_boolean("operations", False, "Count operations, executed against needed, and compile nothing.")
  flags.DEFINE_list("prompt_tokens", [], "--operations: lengths of prompts; by default they need no padding.")
  flags.DEFINE_string("kept", "", "A folder for what the compiler says of programs, which is not asked for twice.")
  flags.DEFINE_string("out", "", "A JSON file for the figures.")
  flags.mark_flags_as_required(["config", "topology"])


def main() -> None:
  """Plan what the flags name."""
  given = flags.FLAGS
  names = [name for name in given.programs if name]
  if unknown := sorted(set(names) - {*PROGRAMS}):
    raise ConfigError(f"--programs: {', '.join(unknown)} is none of {', '.join(PROGRAMS)}")
  buckets.check({"config.model.init_from": given.config.model.init_from}, {"--out": given.out})
  where, config = tpu.find_slice(given.topology, given.slices), filled(given.config)
  programs.check(config)
  kept = epath.Path(given.kept) if given.kept else None
  if given.operations:
    lengths = list(map(int, given.prompt_tokens)) or [config.task.max_prompt_length]
    result = count_operations(config, where, lengths)
  else:
    found = tune.tune(config, where, kept, Console(width=140).print) if given.tune else {}
    if given.write:
      file, own = config_flags.get_config_filename(given["config"]), config_flags.get_override_values(given["config"])
      about = f"What launch/plan.py --tune found for {where.topology}, from {file}."
      files.write_whole(given.write, tune.as_file(file, own | found, about))
    result = run(changed(config, found), where, names, kept)
  if given.out:
    files.write_whole(epath.Path(given.out), files.to_json(result, indent=2) + "\n")


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")  # leaves a TPU free
  define_flags()
  commands.start(main)
