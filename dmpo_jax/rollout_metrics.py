"""What the log says of a buffer of rollouts: rewards, tokens, speed, and whether there is anything to learn."""

import math
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Num

from dmpo_jax.grading import Grades
from dmpo_jax.objectives import weights
from dmpo_jax.structs import Rollouts

COUNTS = ("rewards_failed", "grading_timeouts", "grading_crashes", "scores_failed", "groups_dropped", "batches")


class Stopwatch:
  """Seconds of the phases of a buffer."""

  def __init__(self) -> None:
    self.seconds: dict[str, float] = {}
    self._start = time.monotonic()

  def lap(self, name: str) -> None:
    """Credit the time since the last lap to `name`."""
    now = time.monotonic()
    self.add(name, now - self._start)
    self._start = now

  def add(self, name: str, seconds: float) -> None:
    """Credit seconds that were measured elsewhere."""
    self.seconds[name] = self.seconds.get(name, 0.0) + seconds

  def rates(self, tokens: int) -> dict[str, float]:
    """Return the seconds of each phase, and its completion tokens a second."""
    seconds = {f"seconds_{name}": value for name, value in self.seconds.items()}
    return seconds | {f"tokens_per_second_{name}": tokens / value for name, value in self.seconds.items()}


def lack_of_signal(reward: Float[np.ndarray, "p g *parts"], is_kept: Bool[np.ndarray, "p g"], *, compares: bool) -> str:
  """Return why the rewards of a buffer teach nothing; "" where they teach something.

  Args:
    reward: or its parts, where the objective takes them apart.
    compares: the objective learns from differences inside a group; else from the rewards themselves.
  """
  num = len(reward)
  if not is_kept.any():
    return "no signal: no reward could be computed"
  if not reward[is_kept].any():
    return f"no signal: all rewards equal in {num} of {num} groups, all are 0"
  if not compares or weights.has_variance(jnp.asarray(reward), jnp.asarray(is_kept)).any():
    return ""
  alone = ", as rollout.group_size=1 leaves nothing to compare" if reward.shape[1] == 1 else ""
  return f"no signal: all rewards equal in {num} of {num} groups{alone}"


def describe(
  grades: Grades,
  rollouts: Rollouts,
  is_until_eos: Bool[np.ndarray | jax.Array, "p g c"],
  end_token_ids: Sequence[int],
) -> dict[str, float]:
  """Compute a buffer's metrics of completions and rewards. Dropped rollouts count in no reward."""
  kept = grades.is_kept
  reward = grades.reward[kept]
  parts = {}
  if grades.parts is not None:
    parts = {f"reward_{name}": _mean(grades.parts[kept][:, index]) for index, name in enumerate(grades.part_names)}
  for index, name in enumerate(grades.task_names):
    assert grades.task is not None  # as there are names
    mine = kept & np.equal(grades.task, index)
    parts |= {f"reward_{name}": _mean(grades.reward[mine]), f"solve_rate_{name}": _mean(grades.is_solved[mine])}
  completion = rollouts.completion
  is_end = np.isin(completion, end_token_ids)
  drawn = log_confidence(rollouts)[rollouts.is_drawn]
  unique = weights.unique_rollouts(*map(jnp.asarray, (completion, is_until_eos, kept)))
  return {
    "reward_mean": _mean(reward),
    **parts,
    "reward_std": float(reward.std()) if reward.size else math.nan,
    "solve_rate": _mean(grades.is_solved[kept]),
    "rewards_failed": float((~kept).sum()),
    "grading_timeouts": float(grades.num_timeouts),
    "grading_crashes": float(grades.num_crashes),
    "graded_per_second": grades.per_second,
    "groups_without_variance": float(weights.fraction_without_variance(*map(jnp.asarray, (grades.reward, kept)))),
    "unique_rollouts": float(unique.mean()),
    "tokens_per_call": _mean(rollouts.num_tokens) / _mean(rollouts.num_calls),
    "calls_saved": _mean(rollouts.num_saved),
    "confidence": float(rollouts.confidence.sum() / rollouts.num_tokens.sum()),
    "sampled_nll": -_mean(drawn),  # nats a token; unlike `entropy` it is the same measure for every objective
    "completion_length": _mean((is_until_eos & ~is_end).sum(-1)),
    "eos_rate": _mean(np.asarray(is_end.any(-1))),
  }


def pool_figures(so_far: dict[str, float], batch: dict[str, float], number: int) -> dict[str, float]:
  """Add the figures of a buffer's `number`-th batch to those of the ones before: seconds and counts, or the mean.

  A figure that one batch lacks (NaN) is that of the others.
  """
  if number == 1:
    return batch
  pooled = {}
  for name, value in batch.items():
    is_sum = name.startswith("seconds_") or name in COUNTS
    pooled[name] = so_far[name] + (value if is_sum else (value - so_far[name]) / number)
    if math.isnan(pooled[name]):
      pooled[name] = so_far[name] if math.isnan(value) else value
  return pooled


def log_confidence(rollouts: Rollouts) -> Float[np.ndarray, "p g c"]:
  """Return the logarithm of each token's probability when it was drawn, nats; 0 where early exit filled a position.

  A probability that float32 takes for 0 counts as the smallest normal one, -87 nats.
  """
  least = np.finfo(np.float32).tiny
  return np.where(rollouts.is_drawn, np.log(np.maximum(rollouts.confidence, least)), 0)


def _mean(values: Num[np.ndarray | jax.Array, "..."] | Bool[np.ndarray, "..."]) -> float:
  return float(np.mean(values)) if values.size else math.nan
