"""Checks before a run starts, by shapes alone: its arrays fit into memory, and saved parameters match the model."""

import math
import os
import pathlib
from collections.abc import Sequence

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from dmpo_jax.run.params import check_shapes

CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")  # memory limit of a container; "max": none


def check_parameters(config: ConfigDict, params: PyTree, lora: PyTree | None, held: Sequence[PyTree]) -> None:
  """Refuse parameters that exceed the devices' memory, or that the folders in the configuration do not hold.

  Args:
    params, lora: shapes, dtypes and shardings; lora is None without adapters.
    held: everything on the devices at one time: these, and in training the optimizer's moments too.

  Raises:
    ValueError: they do not fit into memory, or are missing or of another model (Unreadable).
  """
  leaves = jax.tree.leaves(held)
  on_device = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
  limit, where = _device_bytes()
  if on_device > limit:
    what = "the parameters and the optimizer's moments" if len(held) > 2 else "the parameters"
    raise ValueError(
      f"{what} take {on_device / 1e9:,.1f} GB of a device's memory, {where}: reduce the sizes in config.model, or "
      "shard them over more devices with config.sharding.fsdp"
    )
  for path, abstract in ((config.model.init_from, params), (config.model.lora.init_from, lora)):
    if path and abstract is not None:
      check_shapes(path, abstract)


def check_rows(config: ConfigDict, d_model: int, mesh: Mesh) -> None:
  """Refuse batches that exceed the memory, by a lower bound of what they need.

  Raises:
    ValueError: naming the keys that determine their size.
  """
  completion, own = config.sampler.completion_length, config.rollout
  length = config.task.max_prompt_length + completion
  rows = (config.train.microbatch_prompts or own.num_prompts) * own.group_size * config.objective.num_mask_samples
  chunk = (own.chunk_prompts or own.num_prompts) * (own.chunk_rollouts or own.group_size)
  scored = chunk * config.objective.num_elbo_samples
  on_device = rows * length * d_model * 2 / (mesh.shape["data"] * mesh.shape["fsdp"])
  on_host = {  # bytes a token: id, call and confidence for rollouts; id for demonstrations
    "rollout.num_prompts * rollout.group_size rollouts of sampler.completion_length tokens": (
      12 * own.num_prompts * own.group_size * completion
    ),
    "a chunk's rollouts (rollout.chunk_prompts) * objective.num_elbo_samples masks": scored * completion,
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
  """Return a device's memory, as a number and in words; CPU devices share the memory of their host."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"], f"which has {stats['bytes_limit'] / 1e9:,.1f} GB"
  count, host = jax.local_device_count(), host_bytes()
  return host / count, f"which has {host / count / 1e9:,.1f} GB" + f" ({count} share this host's)" * (count > 1)


def host_bytes() -> int:
  """Return the memory of this host, or its container's limit."""
  physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  limit = CGROUP.read_text().strip() if CGROUP.exists() else "max"
  return physical if limit == "max" else min(physical, int(limit))
