"""Makes a configuration small: widths shrink, while structure, precision, mesh and choices stay."""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dmpo_jax.config import flatten
from dmpo_jax.hub import pretrained

HEAD_DIM = 16
RANK = 16
BUFFERS = 3  # a preemption in the second, a kill in the third
VOCABULARY = 512
MOST = {  # upper limits of keys
  "model.num_layers": 2,
  "model.num_experts": 64,
  "task.num_train": 64,
  "task.num_test": 16,
  "grading.workers": 1,
  "sampler.completion_length": 16,
  "rollout.num_prompts": 8,
  "rollout.group_size": 4,
  "warm_start.updates": 2,
  "warm_start.batch_size": 16,
  "optim.warmup_updates": 2,
  "train.updates_per_buffer": 2,
  "eval.every_buffers": 2,
  "eval.num_prompts": 16,
  "checkpoint.every_updates": 3,
}
PARTS = {
  "rollout.chunk_prompts": "rollout.num_prompts",
  "rollout.chunk_rollouts": "rollout.group_size",
  "train.microbatch_prompts": "rollout.num_prompts",
  "eval.batch_size": "eval.num_prompts",
}


def shrink(config: ConfigDict) -> dict[str, tuple[Any, Any]]:
  """Return the keys that change, by path: (old, new).

  Ratios stay: query heads per key head, feed-forward to model width, model calls per token, adapters' alpha to their
  rank. A chunk, microbatch or batch that was part of a whole becomes half of it.
  """
  old = flatten(pretrained.filled(config))  # keys left open come from the checkpoint, which is made small
  new: dict[str, Any] = {path: min(old[path], most) for path, most in MOST.items()}
  new |= _model(old) | _lengths(old, new) | {"train.num_buffers": BUFFERS}
  new["eval.num_prompts"] = new["eval.num_prompts"] or MOST["eval.num_prompts"]  # 0 is all
  for path, whole in PARTS.items():
    is_part = 0 < old[path] < old[whole]
    new[path] = max(new[whole] // 2, 1) if is_part else min(old[path], new[whole])
  if new["rollout.chunk_rollouts"]:  # of one prompt
    new["rollout.chunk_prompts"] = old["rollout.chunk_prompts"]
  every, updates = "objective.sync_reference_every", "train.updates_per_buffer"
  new[every] = new[updates] if old[every] == old[updates] else min(old[every], new[updates])
  has_warm_start = old["warm_start.updates"] > 0
  used = {path: value for path, value in new.items() if has_warm_start or not path.startswith("warm_start.")}
  return {path: (old[path], value) for path, value in used.items() if value != old[path]}


def _model(old: Mapping[str, Any]) -> dict[str, Any]:
  queries_a_key = old["model.num_heads"] // old["model.num_kv_heads"]
  kv_heads = math.lcm(max(4 // queries_a_key, 1), old["sharding.tensor"], max(old["sharding.rollout.tensor"], 1))
  heads = kv_heads * queries_a_key
  width = heads * HEAD_DIM
  old_rank = old["model.lora.rank"]
  rank = min(old_rank, max(RANK, old["sharding.fsdp"]))  # which fsdp splits, too
  has_spare_rows = old["model.embedding_size"] > old["model.vocab_size"]
  return {
    "model.num_heads": heads,
    "model.num_kv_heads": kv_heads,
    "model.d_model": width,
    "model.head_dim": HEAD_DIM if old["model.head_dim"] else None,
    **{
      f"model.{name}": round(old[f"model.{name}"] / old["model.d_model"] * heads) * HEAD_DIM
      for name in ("mlp_hidden_size", "expert_size", "shared_expert_size")
    },
    "model.expert_layers": old["model.expert_layers"][: MOST["model.num_layers"]],
    "model.embedding_size": VOCABULARY if old["model.embedding_size"] else 0,
    "model.vocab_size": (VOCABULARY - 8 if has_spare_rows else VOCABULARY) if old["model.vocab_size"] else 0,
    "model.lora.rank": rank,
    "model.lora.alpha": old["model.lora.alpha"] * rank / old_rank if rank else old["model.lora.alpha"],
  }


def _lengths(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
  """Shrink the lengths; completions of several blocks keep at least two."""
  before, length = old["sampler.completion_length"], new["sampler.completion_length"]
  block = length if old["sampler.block_length"] == before else min(old["sampler.block_length"], length // 2)
  blocks = length // block
  steps = max(round(old["sampler.steps"] * length / before / blocks), 1) * blocks
  shortened = (max(round(other * length / before / block), 1) * block for other in old["eval.lengths"])
  return {
    "sampler.block_length": block,
    "model.block_length": block if old["model.block_length"] else 0,
    "sampler.steps": steps,
    "eval.lengths": tuple(dict.fromkeys(shortened)),
    "objective.mask_block_length": min(old["objective.mask_block_length"], block),
  }
