"""4x4 Sudoku on a laptop: a small model learns the rules from half-finished solutions, then to finish by DMPO."""

from configs import base


def get_config():
  c = base.get_config()
  c.model.d_model = 48
  c.model.num_heads = 3
  c.model.num_kv_heads = 3
  c.model.mlp_hidden_size = 96
  c.model.rope_theta = 1000.0
  c.model.remat = "full"  # on a CPU computing the layers again is faster than keeping them
  c.task.prompt = "bare"
  c.task.max_prompt_length = 18
  c.task.sudoku.min_blanks = 5
  c.warm_start.updates = 1500
  c.warm_start.batch_size = 64
  c.warm_start.learning_rate = 2e-3
  c.warm_start.min_mask_ratio = 0.2  # the 1 / ratio weights of smaller masks would be most of the gradient's noise
  c.warm_start.flawless = 0.7
  c.objective.alpha = 0.05
  c.objective.num_elbo_replicates = 8
  return c.lock()
