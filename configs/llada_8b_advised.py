"""LLaDA-8B with coupled-GRPO, as `bench_coupled_grpo.py` has it, in place of DMPO, on top of `llada_8b.py`.

In the study it is ahead of DMPO as published where drawing is dear, as it is here (docs/choosing.md). Those models are
tiny, and nobody has run it at this size. Learning rate and temperature stay as in `llada_8b.py`: `python -m
launch.advise` tells whether rollouts at this temperature differ.
"""

from configs import llada_8b


def get_config(settings="256"):
  """Build it for a completion length and a slice: `256`, or `256,v5e-16`."""
  c = llada_8b.get_config(settings)
  with c.unlocked():
    c.objective.name = "coupled_grpo"
    c.objective.likelihood = "coupled"
    c.objective.num_mask_samples = 3
    c.objective.min_mask_ratio = 0.2
    c.objective.max_mask_ratio = 0.8
    c.objective.coupled_grpo.clip = 0.5
    c.objective.coupled_grpo.kl_weight = 0.01
    c.train.updates_per_buffer = c.checkpoint.every_updates = 2
  return c
