"""LLaDA-8B with coupled-GRPO, as `bench_coupled_grpo.py` has it, in place of DMPO, on top of `llada_8b.py`.

In the study it is ahead of DMPO as published where drawing is dear, as it is here (docs/choosing.md). Those models are
tiny, and nobody has run it at this size. Learning rate and temperature stay as in `llada_8b.py`: `python -m
launch.advise` tells whether rollouts at this temperature differ.
"""

from configs import bench_coupled_grpo, llada_8b


def get_config(settings="256"):
  """Build it for a completion length and a slice: `256`, or `256,v5e-16`."""
  c = llada_8b.get_config(settings)
  with c.unlocked():
    bench_coupled_grpo.as_published(c)
    c.checkpoint.every_updates = c.train.updates_per_buffer
  return c
