"""EBPO on the bench, whose models have full attention: one block holds the whole completion."""

from configs import bench


def get_config(task: str = "sudoku"):
  c = bench.get_config(task)
  c.objective.name = "ebpo"
  c.objective.likelihood = "elbo"
  c.objective.masks = "stratified"
  c.objective.antithetic = False
  c.objective.num_mask_samples = 16
  c.objective.min_mask_ratio = 0.0
  c.objective.ebpo.clip = c.objective.ebpo.clip_high = 0.2
  c.objective.ebpo.kl_weight = 0.0
  c.train.updates_per_buffer = 1
  return c
