"""What all objectives of the bench share: tasks, models, rollouts. Used as `--config=configs/bench_wdce.py:countdown`.

The base knows the form and the rules of its task, but most of the demonstrations that it has seen since are wrong. So
the policy has to learn what is correct, not only to do what it knows. Rollouts are decoded in random order, so that
those of a group differ and some of them are right. What an objective's paper prescribes (masks, updates per buffer,
clipping, KL) is in the objective's file.
"""

import os

from ml_collections import ConfigDict

from configs import base

OWN = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "launch", "study", "tasks")
NAMES = {  # task.name of each task
  "sudoku": "sudoku",
  "countdown": "countdown",
  "sorting": os.path.join(OWN, "sorting.py"),  # the reward is 0 or 1
}
TASKS = tuple(NAMES)
SIZES = {  # tokens of a prompt and of a completion, model calls, updates on demonstrations
  "sudoku": (18, 16, 16, 2000),
  "countdown": (11, 12, 12, 3500),
  "sorting": (10, 8, 8, 2000),
}


def get_config(task: str = "sudoku") -> ConfigDict:
  if task not in TASKS:
    raise ValueError(f"configs/bench*.py:{task}: must be one of {', '.join(TASKS)}")
  prompt, completion, calls, updates = SIZES[task]
  c = base.get_config()
  c.model.d_model = 32
  c.model.num_layers = 3
  c.model.num_heads = c.model.num_kv_heads = 2
  c.model.mlp_hidden_size = 64
  c.model.rope_theta = 1000.0
  c.model.remat = "full"
  c.task.name = NAMES[task]
  c.task.prompt = "bare"
  c.task.num_train = 6000
  c.task.max_prompt_length = prompt
  c.task.sudoku.min_blanks = 5
  c.task.sudoku.demo_patience = 40.0
  c.task.sudoku.demo_wrong = 0.6
  c.task.countdown.max_number = 20
  c.task.countdown.demo_wrong = 0.7
  c.sampler.name = "random_order"
  c.sampler.completion_length = c.sampler.block_length = completion
  c.sampler.steps = calls
  c.rollout.num_prompts = 8
  c.rollout.group_size = 8
  c.rollout.drop_equal_groups = False  # as published
  c.warm_start.updates = updates
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
