"""DMPO as published, with the negative baseline, on the bench (arXiv 2510.08233).

`bench_wdce_proximal.py` has the recipe that reuses rollouts less.
"""

from configs import bench


def get_config(task: str = "sudoku"):
  c = bench.get_config(task)
  c.objective.name = "wdce"
  c.objective.alpha = 0.05  # published: 0.04, for rewards of another range
  c.objective.num_mask_samples = 4
  c.objective.num_elbo_samples = 8
  c.train.updates_per_buffer = 8
  return c
