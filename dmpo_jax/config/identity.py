"""Which keys decide a run's results: its fingerprint, and how two configurations differ."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

from etils import epath

from dmpo_jax import tasks
from dmpo_jax.config.renamed import current
from dmpo_jax.config.validation import CHOICES, Config, flatten
from dmpo_jax.models.config import OLDER as OLDER_MODEL
from dmpo_jax.tasks import mixture

# Keys that may differ when a run is resumed: how long, how often, where, how much at a time, in which precision, and
# the path of the base, whose identity is in every checkpoint. All others decide results.
MAY_CHANGE = (
  "checkpoint.*",
  "eval.batch_size",
  "eval.every_buffers",
  "model.attention",
  "model.dtype",
  "model.init_from",
  "model.layer_rows",
  "grading.concurrency",
  "grading.retries",
  "grading.sandbox",
  "grading.workers",
  "log.*",
  "model.param_dtype",
  "model.remat",
  "optim.max_skips_in_a_row",
  "rollout.chunk_prompts",
  "rollout.chunk_rollouts",
  "rollout.prompt_lengths",
  "sampler.slots",
  "serve.*",
  "sharding.*",
  "task.data_dir",
  "task.records_dir",
  "train.microbatch_prompts",
  "train.num_buffers",
)

# Keys that an evaluation does not depend on. The policy and its base have identities of their own.
NOT_OF_EVALUATION = (
  *("checkpoint.*", "log.*", "objective.*", "optim.*", "rollout.*", "serve.*", "sharding.*", "train.*", "warm_start.*"),
  *("eval.batch_size", "eval.every_buffers", "eval.lengths", "eval.samplers", "eval.tasks", "grading.workers"),
  *("grading.concurrency", "grading.retries", "grading.sandbox"),
  *("model.init_from", "model.layer_rows", "model.lora.dropout", "model.lora.init_from", "model.remat"),
  *("sampler.slots", "task.data_dir", "task.records_dir"),
)

# Values of keys in runs that are older than the key.
OLDER = {f"model.{field}": value for field, value in OLDER_MODEL.items()} | {
  "model.allow_other_blocks": False,
  "tokenizer.chat_template_kwargs": "",
  "task.countdown.max_numbers": 0,
  "task.curriculum": 0,
  "task.mixture": "",
  "task.sudoku.size": 4,
  "objective.part_weights": [],
  "objective.masks": "random",
  "objective.shrinkage": "none",
  "objective.wddo.scale": "proper",
  "objective.wdce.old_masks": "buffer",
  "rollout.drop_equal_groups": False,
  "rollout.until_informative": 0,
  "rollout.max_batches": 4,
  "objective.denoise.schedule": "linear",
  "objective.denoise.weight": "bound",
  "objective.denoise.normalisation": "sequence",
  "objective.denoise.level": "sequence",
}


def fingerprint(config: Config) -> str:
  """Hash the keys that decide a run's results, independently of machine and Python version."""
  leaves = {path: float(value) if type(value) is int else value for path, value in deciding(config).items()}
  return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Config, new: Config) -> list[str]:
  """List the differences that change results, as `config.path: old -> new`."""
  before, after = deciding(old), deciding(new)
  return [
    f"config.{path}: {before.get(path, 'absent')!r} -> {after.get(path, 'absent')!r}"
    for path in sorted(before.keys() | after.keys())
    if before.get(path) != after.get(path)
  ]


def deciding(config: Config, may_change: Sequence[str] = MAY_CHANGE) -> dict[str, Any]:
  """Return the leaves that decide results: without `may_change`, options of other choices and values of OLDER."""
  leaves = current(flatten(config))
  chosen = {(section, leaves.get(f"{section}.name")) for section in CHOICES}
  chosen.add(("objective", leaves.get("objective.likelihood")))
  chosen |= {("task", tasks.section(name)) for name in _task_names(leaves)}
  found = {}
  for path, value in leaves.items():
    value = list(value) if isinstance(value, tuple) else value
    section, *rest = path.split(".")
    is_of_another = section in CHOICES and len(rest) > 1 and (section, rest[0]) not in chosen
    is_as_before = (path in OLDER and value == OLDER[path]) or (path == "model.head_dim" and _is_quotient(leaves))
    if value is None or is_of_another or is_as_before or any(fnmatch(path, key) for key in may_change):
      continue
    found[path] = value
  if isinstance(found.get("tokenizer.path"), str):  # a checkout may move, with the same file in it
    found["tokenizer.path"] = epath.Path(found["tokenizer.path"]).name
  return found


def _task_names(leaves: Mapping[str, Any]) -> list[str]:
  """Return the names of the tasks of a configuration."""
  name = str(leaves.get("task.name"))
  return list(mixture.read(leaves["task.mixture"])) if name == mixture.NAME else [name]


def _is_quotient(leaves: Mapping[str, Any]) -> bool:
  """Whether model.head_dim is what it was before it was a key."""
  head_dim, num_heads, d_model = (leaves.get(f"model.{name}") for name in ("head_dim", "num_heads", "d_model"))
  return head_dim is not None and num_heads is not None and d_model is not None and head_dim * num_heads == d_model
