"""DTM (arXiv 2604.18739) on the bench. Its tilt: the best of 1, 4 and 8 on the tuning seed of launch/study."""

from configs import bench


def get_config(task: str = "sudoku"):
  c = bench.get_config(task)
  c.objective.name = "dtm"
  c.objective.dtm.tilt = 4.0
  c.objective.num_mask_samples = 2
  c.objective.min_mask_ratio = 0.0
  c.train.updates_per_buffer = 8
  c.objective.sync_reference_every = 8
  return c
