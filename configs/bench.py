"""What every objective of the bench starts from and is given: `--config=configs/bench_wdce.py:countdown`, and so on.

The base has learned a task's form and rules, and from demonstrations of which most are wrong. Its policy has to be told
apart what is right, not only to do what it knows. One budget for all: prompts, group, updates' learning rate; what an
objective publishes as its own (replicates, updates a buffer, clipping, KL) stands in its file.
"""

from ml_collections import ConfigDict

from configs import base

TASKS = ("sudoku", "countdown")


def get_config(task: str = "sudoku") -> ConfigDict:
  if task not in TASKS:
    raise ValueError(f"configs/bench*.py:{task}: must be one of {', '.join(TASKS)}")
  c = base.get_config()
  is_sudoku = task == "sudoku"
  c.model.d_model = 48 if is_sudoku else 64
  c.model.num_heads = c.model.num_kv_heads = 3 if is_sudoku else 4
  c.model.mlp_hidden_size = 96 if is_sudoku else 192
  c.model.rope_theta = 1000.0
  c.model.remat = "full"
  c.task.name = task
  c.task.prompt = "bare"
  c.task.num_train = 6000
  c.task.max_prompt_length = 18 if is_sudoku else 11
  c.task.sudoku.min_blanks = 5
  c.task.sudoku.demo_patience = 40.0
  c.task.sudoku.demo_wrong = 0.8
  c.task.countdown.max_number = 20
  c.task.countdown.demo_wrong = 0.6
  length = 16 if is_sudoku else 12
  c.sampler.completion_length = c.sampler.block_length = c.sampler.steps = length
  c.rollout.num_prompts = 8
  c.rollout.group_size = 8
  c.warm_start.updates = 1500 if is_sudoku else 4000
  c.warm_start.batch_size = 64
  c.warm_start.learning_rate = 2e-3
  c.warm_start.min_mask_ratio = 0.2
  c.warm_start.flawless = 0.7
  c.optim.learning_rate = 1e-4
  c.train.num_buffers = 16
  c.eval.every_buffers = 4
  c.checkpoint.every_updates = 1000
  c.checkpoint.keep = 1
  return c.lock()
