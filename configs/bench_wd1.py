"""wd1 (arXiv 2507.08838) on the bench."""

from configs import bench


def get_config(task: str = "sudoku"):
  c = bench.get_config(task)
  c.objective.name = "wd1"
  c.objective.likelihood = "one_step"
  c.objective.one_step.prompt_mask_ratio = 0.15
  c.objective.num_mask_samples = 1
  c.objective.antithetic = False
  c.objective.wd1.sharpness = 1.0
  c.train.updates_per_buffer = 8 if task == "sudoku" else 12  # published
  return c
