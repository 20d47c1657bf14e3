"""Every part of a run, in about a minute on a laptop: for trying out a change, and for the tests."""

from configs import sudoku_tiny


def get_config():
  c = sudoku_tiny.get_config()
  with c.unlocked():
    c.model.d_model = 32
    c.model.num_layers = 2
    c.model.num_heads = 2
    c.model.num_kv_heads = 2
    c.model.mlp_hidden_size = 64
    c.task.num_train = 512
    c.task.num_test = 32
    c.rollout.num_prompts = 8
    c.rollout.group_size = 4
    c.warm_start.updates = 20
    c.warm_start.batch_size = 64
    c.train.num_buffers = 3
    c.eval.num_prompts = 32
    c.eval.batch_size = 32
    c.checkpoint.every_updates = 3
  return c
