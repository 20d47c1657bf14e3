"""Old names of keys, and keys that are gone: an error in a command or a file, accepted in an old run's workdir."""

from collections.abc import Mapping
from typing import Any

_CLIPPED = ("diffu_grpo", "coupled_grpo", "gdpo", "tracerl")
RENAMED = {  # old key: its names now; none: the key is gone
  "model.name": (),
  "objective.num_replicates": ("objective.num_mask_samples",),
  "objective.num_elbo_replicates": ("objective.num_elbo_samples",),
  "objective.replicates": ("objective.elbo_rounds",),
  **{f"objective.{key}": tuple(f"objective.{name}.{key}" for name in _CLIPPED) for key in ("clip", "kl_weight")},
  "objective.sharpness": ("objective.wd1.sharpness",),
  **{
    f"objective.{key}": (f"objective.wdce.{key}",)
    for key in ("baseline", "baseline_strength", "unlearning", "min_log_ratio")
  },
  "warm_start.flawless": ("warm_start.correct_share",),
}


def current(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Rename the keys of an old run's configuration to what they are called now."""
  return {new: value for path, value in leaves.items() for new in RENAMED.get(path, (path,))}


def new_name(path: str) -> str:
  """Say what a renamed key is called now, as part of an error message."""
  names = " or ".join(f"config.{new}" for new in RENAMED[path])
  return f"is now {names}" if names else "is gone: leave it out"
