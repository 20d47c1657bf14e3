"""diffu-GRPO (d1, arXiv 2504.12216) on the bench."""

from configs import bench


def get_config(task: str = "sudoku"):
  c = bench.get_config(task)
  c.objective.name = "diffu_grpo"
  c.objective.likelihood = "one_step"
  c.objective.one_step.prompt_mask_ratio = 0.15
  c.objective.num_mask_samples = 1
  c.objective.antithetic = False
  c.objective.diffu_grpo.clip = 0.5
  c.objective.diffu_grpo.kl_weight = 0.04
  c.train.updates_per_buffer = 8  # published for both tasks
  return c
