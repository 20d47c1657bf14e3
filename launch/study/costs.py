"""What a run costs, on two axes, and its held-out figures at a budget.

A cost is in model calls for each of 64 rollouts, a backward pass as two. On the axis `calls` every call counts once. On
the axis `drawing_x8` the calls that draw rollouts count eight times: an 8B model makes 128 or more of them for a
completion, and a tiny one makes 16.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dmpo_jax import phases

DRAWING = {"calls": 1, "drawing_x8": 8}
AXES = tuple(DRAWING)
ONE = {"calls": 1024.0, "drawing_x8": 2048.0}  # 1x: DMPO as published draws 8 or 9 buffers on either axis
LEVELS = (1 / 3, 1.0, 3.0, 10.0)  # where a run is evaluated, as far as its budget reaches
ROLLOUTS = 64


@dataclasses.dataclass(frozen=True)
class Cost:
  """Model calls for each rollout of a buffer."""

  drawing: float
  scoring: float
  updating: float  # if no group is dropped

  def on(self, axis: str, informative: float = 1.0) -> float:
    """Return the cost on an axis, with the share of the groups that the updates computed."""
    return DRAWING[axis] * self.drawing + self.scoring + informative * self.updating


def of_buffer(config: ConfigDict, step: int) -> Cost:
  """Count the model calls for each rollout of the buffer that the policy of a step draws.

  A teacher is called once more. Nothing is scored where the policy is its own reference (`phases.num_scored`).
  """
  own, objective, updates = config.objective, phases.make_objective(config), config.train.updates_per_buffer
  views = 1 if own.likelihood == "trajectory" else updates
  each = own.num_elbo_samples if objective.needs_weights else own.num_mask_samples * views
  sets = 2 if own.name == "wddo" and own.wddo.sets == "independent" else 1
  updating = (3 + objective.has_teacher) * sets * own.num_mask_samples * updates
  scoring = phases.num_scored(config, step) * each + own.num_mask_samples * updates * objective.scores_updates
  share = config.rollout.num_prompts * config.rollout.group_size / ROLLOUTS
  return Cost(share * config.sampler.steps, share * scoring, share * updating)


def budget(axis: str, level: float) -> float:
  """Return a budget on an axis, as a multiple of 1x."""
  return level * ONE[axis]


def reading(row: Mapping[str, Any], axis: str, level: float) -> dict[str, float]:
  """Return a run's evaluation at a budget: that whose cost is the nearest."""
  wanted = budget(axis, level)
  return min(row["evaluations"], key=lambda evaluation: abs(evaluation[axis] - wanted))
