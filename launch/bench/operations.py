"""Operations that the programs of a buffer execute, against those that the buffer needs, by what makes the difference.

They are counted in the traced programs. A cause is the difference between a program and the same one without it, taken
in the order of `CAUSES`. No program is without the last two, so they are estimates.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.table import Table

from dmpo_jax import phases
from dmpo_jax.lengths import choose
from dmpo_jax.models.transformer import Transformer
from launch.bench import costs, programs

COUNTED = {"accumulate": "update", "score": "scores", "sample": "rollouts"}
CAUSES = {
  "recomputation": "of the forward pass, for the gradient",
  "kernel": "attention's kernel: whole blocks of its own, and scores once more for the gradient",
  "filled rows": "copies of a row, so that the devices divide the rows",
  "padding": "of prompts",
  "last layer": "positions of the last layer that are not read: all but their keys and values",
  "head": "logits that are not read",
}


class Operations(NamedTuple):
  """Floating-point operations of a program's matrix products for one buffer, on all devices."""

  program: str
  executed: float
  causes: dict[str, float]  # by `CAUSES`: what is not needed

  @property
  def needed(self) -> float:
    return self.executed - sum(self.causes.values())


class _Counter(NamedTuple):
  """Counts a program of a configuration as if its model, devices or prompts were others."""

  name: str
  config: ConfigDict
  model: Transformer
  meshes: tuple[Mesh, Mesh]

  def having(self, **fields: object) -> "_Counter":
    return self._replace(model=Transformer(dataclasses.replace(self.model.config, **fields)))

  def count(self, length: int) -> float:
    """Count it for prompts of this length, in tokens."""
    config = ConfigDict(self.config.to_dict())
    config.task.max_prompt_length = length
    traced = programs.trace(self.name, config, self.model, self.meshes)
    return costs.count_flops(traced.jaxpr, while_trips=programs.loop_calls(config))

  def mean(self, sizes: Sequence[int]) -> float:
    """Average over prompts of these lengths."""
    counts = {size: self.count(size) for size in set(sizes)}
    return float(np.mean([counts[size] for size in sizes]))

  def means(self, *several: Sequence[int]) -> list[float]:
    """Do the same for several lists, by the polynomial in the length that it is without kernels: attention's square."""
    points = np.array([1, 2, 3]) * max(max(map(max, several)) // 3, 1)
    polynomial = np.polyfit(points, [self.count(int(point)) for point in points], 2)
    return [float(np.polyval(polynomial, sizes).mean()) for sizes in several]


def count(name: str, config: ConfigDict, devices: Sequence[jax.Device], lengths: Sequence[int]) -> Operations:
  """Count what a program executes and needs for a buffer whose prompts have these lengths, in tokens.

  They are padded as `rollout.prompt_lengths` says, as if no chunk or microbatch held prompts of two lengths.
  """
  model, meshes = programs.place(config, devices)
  as_run = _Counter(name, config, model, meshes)
  kept = as_run.having(remat="none")
  plain = kept.having(attention="xla")
  alone = plain._replace(meshes=programs.make_meshes(config, devices[:1]))
  sizes = choose(lengths, config.task.max_prompt_length, config.rollout.prompt_lengths)
  padded = [next(size for size in sizes if size >= length) for length in lengths]
  found = [as_run.mean(padded), kept.mean(padded), *plain.means(padded), *alone.means(padded, lengths)]
  causes = dict(zip(CAUSES, -np.diff(found), strict=False))
  mean = round(float(np.mean(lengths)))
  causes |= {"last layer": _of_last_layer(alone, mean), "head": _of_head(alone, mean)}
  times = programs.calls_of(name, config)
  return Operations(name, times * found[0], {cause: times * float(value) for cause, value in causes.items()})


def _of_last_layer(counter: _Counter, length: int) -> float:
  """Estimate what the last layer computes of positions that only attention reads, and that only by key and value."""
  own, sampler = counter.model.config, counter.config.sampler
  shorter = counter.having(num_layers=own.num_layers - 1, expert_layers=own.expert_layers[:-1])
  layer = counter.count(length) - shorter.count(length)
  whole = length + sampler.completion_length
  read, run = sampler.completion_length, float(whole)
  if counter.name == "sample":
    read, starts = sampler.block_length, np.arange(0, sampler.completion_length, sampler.block_length)
    calls = sampler.steps * sampler.block_length // sampler.completion_length
    later = {"prefix_cache": sampler.completion_length - starts, "dual_cache": sampler.block_length}
    run = (whole + (calls - 1) * float(np.mean(later.get(sampler.name, whole)))) / calls
  attention = own.d_model * own.head_dim * (2 * own.num_heads + 2 * own.num_kv_heads)
  is_dense = own.router == "none" or (own.expert_layers and not own.expert_layers[-1])
  width = own.mlp_hidden_size if is_dense else own.experts_per_token * own.expert_size + own.shared_expert_size
  keys_values = 2 * own.d_model * own.head_dim * own.num_kv_heads
  return layer * (1 - read / run) * (1 - keys_values / (attention + 3 * own.d_model * width))


def _of_head(counter: _Counter, length: int) -> float:
  """Estimate the logits that are not read: of positions that are not masked."""
  config = counter.config
  head = counter.having(embedding_size=2 * counter.model.config.embedding_size).count(length) - counter.count(length)
  if counter.name == "sample":  # a block has as many masks less after each call
    calls = config.sampler.steps * config.sampler.block_length // config.sampler.completion_length
    return head * (1 - (calls + 1) / (2 * calls))
  own, objective = config.objective, phases.make_objective(config)
  num = own.num_elbo_samples if counter.name == "score" and objective.needs_weights else own.num_mask_samples
  masks = phases.mask_sampling(config, num)
  return 0.0 if masks.pairs() else head * (1 - (own.min_mask_ratio + own.max_mask_ratio) / 2)


def table(found: Sequence[Operations], peak: float) -> Table:
  """Lay out the operations of a buffer; peak: operations that the devices are taken to reach, a second."""
  layout = Table(title="operations of a buffer, PFLOP: executed, needed and why")
  for column in ("", *(COUNTED[each.program] for each in found), "all", "seconds"):
    layout.add_column(column, justify="left" if not column else "right")

  def add(what: str, parts: Sequence[float]) -> None:
    figures = [*parts, sum(parts)]
    layout.add_row(what, *(f"{part / 1e15:.1f}" for part in figures), f"{sum(parts) / peak:.1f}")

  add("executed", [each.executed for each in found])
  for cause, what in CAUSES.items():
    add(f"{cause}: {what}", [each.causes[cause] for each in found])
  add("needed", [each.needed for each in found])
  shares = [each.executed / each.needed for each in found]
  total = sum(each.executed for each in found) / sum(each.needed for each in found)
  layout.add_row("executed / needed", *(f"{share:.2f}" for share in (*shares, total)), "")
  return layout
