"""GDSD (arXiv 2605.29398) on the bench: its masks are evenly spread, here over the rollouts of a group."""

from configs import bench


def get_config(task: str = "sudoku"):
  c = bench.get_config(task)
  c.objective.name = "gdsd"
  c.objective.likelihood = "unweighted"
  c.objective.masks = "stratified"
  c.objective.num_mask_samples = 2 if task == "sudoku" else 4
  c.objective.min_mask_ratio = 0.0
  c.objective.gdsd.guidance = 1.0
  c.objective.gdsd.clip = 4e-4
  c.objective.gdsd.kl_weight = 0.001 if task == "sudoku" else 0.003
  c.train.updates_per_buffer = 8
  return c
