"""3-number Countdown on a laptop: a small model learns to search, then to just add up, which DMPO undoes."""

from configs import sudoku_tiny


def get_config():
  c = sudoku_tiny.get_config()
  with c.unlocked():
    c.model.d_model = 64
    c.model.num_heads = 4
    c.model.num_kv_heads = 4
    c.model.mlp_hidden_size = 192
    c.task.name = "countdown"
    c.task.num_train = 6000
    c.task.max_prompt_length = 11
    c.task.countdown.max_number = 20
    c.task.countdown.demo_wrong = 0.6
    c.sampler.completion_length = 12
    c.sampler.block_length = 12
    c.sampler.steps = 12
    c.warm_start.updates = 4000
    c.train.num_buffers = 40
  return c
