"""SPG with the mixture (arXiv 2510.09541) on the bench: one block, like the bench's sampler."""

from configs import bench


def get_config(task: str = "sudoku"):
  c = bench.get_config(task)
  c.objective.name = "spg"
  c.objective.likelihood = "eubo"
  c.objective.eubo.beta = 1.0 if task == "sudoku" else 1.5
  c.objective.eubo.mixture = 0.5
  c.objective.num_mask_samples = 2
  c.objective.antithetic = False
  c.objective.min_mask_ratio = 0.0
  c.train.updates_per_buffer = 4
  return c
