"""Coupled-GRPO (DiffuCoder, arXiv 2506.20639) on the bench."""

from configs import bench


def get_config(task: str = "sudoku"):
  c = bench.get_config(task)
  as_published(c)
  return c


def as_published(c):
  """Set the objective as its paper has it."""
  c.objective.name = "coupled_grpo"
  c.objective.likelihood = "coupled"
  c.objective.num_mask_samples = 3
  c.objective.min_mask_ratio = 0.2
  c.objective.max_mask_ratio = 0.8
  c.objective.coupled_grpo.clip = 0.5
  c.objective.coupled_grpo.kl_weight = 0.01
  c.train.updates_per_buffer = 2
