"""What all objectives of the bench share: tasks, models and budget. Used as `--config=configs/bench_wdce.py:countdown`.

The base knows the form and the rules of its task, but most of the demonstrations that it has seen since are wrong. So
the policy has to learn what is correct, not only to do what it knows. Prompts, group size and learning rate are the
same for all; what an objective's paper prescribes (masks, updates per buffer, clipping, KL) is in the objective's file.
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
  c.warm_start.correct_share = 0.7
  c.optim.learning_rate = 1e-4
  c.train.num_buffers = 16
  c.eval.every_buffers = 4
  c.checkpoint.every_updates = 1000
  c.checkpoint.keep = 1
  return c.lock()
