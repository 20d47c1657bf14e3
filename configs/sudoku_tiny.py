"""4x4 Sudoku on a laptop: a small model learns the rules from half-finished solutions; DMPO teaches it to finish."""

from configs import base


def get_config():
  c = base.get_config()
  c.model.d_model = 48
  c.model.num_heads = 3
  c.model.num_kv_heads = 3
  c.model.mlp_hidden_size = 96
  c.model.rope_theta = 1000.0
  c.model.remat = "full"  # on a CPU recomputing the layers is faster than storing them
  c.task.prompt = "bare"
  c.task.max_prompt_length = 18
  c.task.sudoku.min_blanks = 5
  c.warm_start.updates = 1500
  c.warm_start.batch_size = 64
  c.warm_start.learning_rate = 2e-3
  c.warm_start.min_mask_ratio = 0.2  # below, the weights 1 / ratio would dominate the noise of the gradient
  c.warm_start.correct_share = 0.7
  c.objective.alpha = 0.05
  c.objective.num_elbo_samples = 8
  return c.lock()
