"""What is known of a run before it starts, beyond its configuration: whether its arrays fit, and are where it says.

`build.py` calls these; everything here goes by shapes alone.
"""

import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmpo_jax.run.params import check_shapes

CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")  # what a container may use; "max": all


def check_parameters(config: ConfigDict, params: Any, lora: Any, held: Sequence[Any]) -> None:
  """Refuse parameters that are more than the devices' memory, or that are not in the folders named.

  Args:
    params, lora: shapes, dtypes and shardings; lora is None where there are no adapters.
    held: all that the devices hold at one time: these, or in training the optimizer's moments too.

  Raises:
    ValueError: they do not fit, or are not there (Unreadable).
  """
  leaves = jax.tree.leaves(held)
  on_device = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
  limit, where = _device_bytes()
  if on_device > limit:
    what = "the parameters and the optimizer's moments" if len(held) > 2 else "the parameters"
    raise ValueError(
      f"{what} take {on_device / 1e9:,.1f} GB of a device's memory, {where}: choose smaller sizes in config.model, or "
      "split them over more devices with config.sharding.fsdp"
    )
  for path, abstract in ((config.model.init_from, params), (config.model.lora.init_from, lora)):
    if path and abstract is not None:
      check_shapes(path, abstract)


def check_rows(config: ConfigDict, d_model: int, mesh: Mesh) -> None:
  """Refuse batches that are more than the memory, by the least that they take.

  Raises:
    ValueError: naming the keys that they follow from.
  """
  completion, own = config.sampler.completion_length, config.rollout
  length = config.task.max_prompt_length + completion
  rows = (config.train.microbatch_prompts or own.num_prompts) * own.group_size * config.objective.num_mask_samples
  scored = (own.chunk_prompts or own.num_prompts) * own.group_size * config.objective.num_elbo_samples
  on_device = rows * length * d_model * 2 / (mesh.shape["data"] * mesh.shape["fsdp"])
  on_host = {  # an id, a call's number and a confidence for each token of a rollout; an id for one of a demonstration
    "rollout.num_prompts * rollout.group_size rollouts of sampler.completion_length tokens": (
      12 * own.num_prompts * own.group_size * completion
    ),
    "rollout.num_prompts * rollout.group_size * objective.num_elbo_samples masks": (scored * completion),
    "warm_start.batch_size demonstrations of task.max_prompt_length + sampler.completion_length tokens": (
      4 * config.warm_start.batch_size * length * bool(config.warm_start.updates)
    ),
    "task.num_train + task.num_test prompts of task.max_prompt_length tokens": (
      4 * (config.task.num_train + config.task.num_test) * config.task.max_prompt_length
    ),
    "eval.batch_size * eval.num_samples completions of sampler.completion_length tokens": (
      12 * min(config.eval.batch_size, config.eval.num_prompts or math.inf) * config.eval.num_samples * completion
    ),
  }
  host = host_bytes()
  for what, needed in on_host.items():
    if needed > host:
      raise ValueError(f"{what} take {needed / 1e9:,.1f} GB, and this host has {host / 1e9:,.1f} GB: choose less")
  limit, where = _device_bytes()
  if on_device > limit:
    raise ValueError(
      f"a gradient step's {rows:,} rows (train.microbatch_prompts * rollout.group_size * objective.num_mask_samples) "
      f"take {on_device / 1e9:,.1f} GB of a device's memory for one layer's states, {where}: choose less"
    )


def _device_bytes() -> tuple[float, str]:
  """Return what a device may hold, and say so; the CPU's devices share the memory of their host."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"], f"which has {stats['bytes_limit'] / 1e9:,.1f} GB"
  count, host = jax.local_device_count(), host_bytes()
  return host / count, f"which has {host / count / 1e9:,.1f} GB" + f" ({count} share this host's)" * (count > 1)


def host_bytes() -> int:
  """Return the memory of this host, or what its container may use of it."""
  physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  limit = CGROUP.read_text().strip() if CGROUP.exists() else "max"
  return physical if limit == "max" else min(physical, int(limit))
