"""LLaDA-8B with DMPO's proximal recipe in place of the published one, on top of `llada_8b.py`.

The policy that draws a buffer is its reference, so there is no noisy log-ratio and no forward pass for it.
docs/choosing.md has the figures: tiny models on two tasks. Nobody has run it at this size. Learning rate and temperature
stay as published: `python -m launch.advise` tells whether rollouts at this temperature differ.
"""

from configs import llada_8b


def get_config(settings="256"):
  """Build it for a completion length and a slice: `256`, or `256,v5e-16`."""
  c = llada_8b.get_config(settings)
  with c.unlocked():
    c.objective.masks = "trajectory"
    c.objective.antithetic = False
    c.objective.num_mask_samples = 2
    c.train.updates_per_buffer = 2
    c.objective.sync_reference_every = 2
  return c
