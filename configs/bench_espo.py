"""ESPO (arXiv 2512.03759) on the bench: its masks are evenly spread, here over the rollouts of a group."""

from configs import bench


def get_config(task: str = "sudoku"):
  c = bench.get_config(task)
  c.objective.name = "espo"
  c.objective.likelihood = "elbo"
  c.objective.masks = "stratified"
  c.objective.num_mask_samples = 4
  c.objective.min_mask_ratio = 0.0
  c.objective.espo.clip = 0.2  # published for Countdown: 0
  c.objective.espo.kl_weight = 0.01 if task == "sudoku" else 0.003
  c.train.updates_per_buffer = 8
  return c
