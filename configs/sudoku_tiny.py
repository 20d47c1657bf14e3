"""4x4 Sudoku on a laptop: a small model learns the rules from half-finished solutions, then to finish them by DMPO."""

from configs import base


def get_config():
  c = base.get_config()
  c.model.num_layers = 2
  c.model.num_heads = 8
  c.model.num_kv_heads = 8
  c.model.rope_theta = 1000.0
  c.task.max_prompt_length = 18
  c.warm_start.updates = 2500
  c.warm_start.batch_size = 32
  c.warm_start.learning_rate = 2e-3
  c.warm_start.min_mask_ratio = 0.2  # the 1 / ratio weights of smaller masks would be most of the gradient's noise
  c.optim.learning_rate = 2e-4
  c.train.num_buffers = 20
  return c.lock()
