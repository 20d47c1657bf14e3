"""DTM (arXiv 2604.18739) on the bench: tilted by one a buffer, which adds up to about the 1 / alpha of `wdce`."""

from configs import bench


def get_config(task: str = "sudoku"):
  c = bench.get_config(task)
  c.objective.name = "dtm"
  c.objective.dtm.tilt = 1.0
  c.objective.num_replicates = 2
  c.objective.min_mask_ratio = 0.0
  c.train.updates_per_buffer = 8
  c.objective.sync_reference_every = 8
  return c
