"""GDPO (arXiv 2510.08554) on the bench."""

from configs import bench


def get_config(task: str = "sudoku"):
  c = bench.get_config(task)
  c.objective.name = "gdpo"
  c.objective.likelihood = "elbo_quadrature"
  c.objective.elbo_quadrature.num_points = 2
  c.objective.num_mask_samples = 2
  c.objective.gdpo.clip = 0.5
  c.objective.gdpo.kl_weight = 0.0
  c.train.updates_per_buffer = 12
  return c
