"""BGPO (arXiv 2510.11683) on the bench."""

from configs import bench


def get_config(task: str = "sudoku"):
  c = bench.get_config(task)
  c.objective.name = "bgpo"
  c.objective.likelihood = "elbo"
  c.objective.antithetic = False
  c.objective.num_mask_samples = 16
  c.objective.min_mask_ratio = 0.0
  c.objective.bgpo.clip = 0.2
  c.objective.bgpo.most = 3.0
  c.objective.bgpo.kl_weight = 0.0
  c.train.updates_per_buffer = 1
  return c
