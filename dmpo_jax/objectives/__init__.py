"""What is minimised: masks, likelihood estimators, importance weights, and one file a loss.

Each loss is `loss(score, experience, keys, *, num_prompts, **own) -> (scalar, metrics)`: it draws its masks from the
rollouts' `keys`, asks `score(is_masked)` for the policy's log-probabilities under them, and returns a sum over the
prompts it was given divided by `num_prompts`. Its metrics are such sums too, so that losses, gradients and metrics of
microbatches of prompts add up to those of the whole buffer. A keyword `likelihood` is filled with the estimator that
the configuration names.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from ml_collections import ConfigDict

from dmpo_jax.objectives import coupled_grpo, denoise, diffu_grpo, dtm, gdpo, spg, tracerl, wd1, wdce, wddo

Needs = Literal["demonstrations", "rewards", "weights", "ratio", "ratio_and_reference"]


class Objective(NamedTuple):
  """A loss, and what a buffer must hold for it."""

  loss: Callable
  # `demonstrations` instead of rollouts; of rollouts `rewards` alone, the importance `weights`, or the
  # log-probabilities under the update's own views by the policy that drew them (`ratio`), and by the reference too.
  needs: Needs
  has_teacher: bool = False  # its scores have the divergence from the reference policy


OBJECTIVES = {
  "denoise": Objective(denoise.loss, "demonstrations"),
  "wdce": Objective(wdce.loss, "weights"),
  "wddo": Objective(wddo.loss, "weights"),
  "diffu_grpo": Objective(diffu_grpo.loss, "ratio_and_reference"),
  "coupled_grpo": Objective(coupled_grpo.loss, "ratio_and_reference"),
  "gdpo": Objective(gdpo.loss, "ratio_and_reference"),
  "tracerl": Objective(tracerl.loss, "ratio"),
  "wd1": Objective(wd1.loss, "rewards"),
  "spg": Objective(spg.loss, "rewards"),
  "dtm": Objective(dtm.loss, "rewards", has_teacher=True),
}


def needs_of(settings: ConfigDict) -> Needs:
  """Say what a buffer must hold for the objective of a configuration's section; without a KL, no reference."""
  needs = OBJECTIVES[settings.name].needs
  return "ratio" if needs == "ratio_and_reference" and settings[settings.name].kl_weight == 0 else needs
