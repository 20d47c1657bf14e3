"""Objectives with the settings of the tests."""

from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.objectives.masking import MaskSampling

MASKS = MaskSampling(num=2, antithetic=True, min_ratio=0.1, max_ratio=1.0)
OWN = {
  "wdce": dict(baseline="negative", baseline_strength=1.0),
  "wddo": dict(sets="shared", alpha_ddo=1.0, beta=0.1),
  "wd1": dict(sharpness=1.0),
  "dtm": dict(tilt=2.0, control_variate=1.0),
  **{name: dict(clip=0.2, kl_weight=0.1) for name in ("diffu_grpo", "coupled_grpo", "gdpo", "espo", "tracerl")},
  "gdsd": dict(clip=0.2, kl_weight=0.1, guidance=0.5),
  "ebpo": dict(clip=0.2, clip_high=0.2, kl_weight=0.1),
  "bgpo": dict(clip=0.2, most=3.0, kl_weight=0.1),
}


def make(name, masks=MASKS, likelihood=None, **own):
  """An objective of this name; `own` are its own settings where they are others."""
  return OBJECTIVES[name](masks, likelihood, **OWN.get(name, {}) | own)
