"""GSM8K with its prompts and grading, and a model that is far too small to solve it: it shows that the path works.

    python -m launch.train_tokenizer --output=runs/gsm8k.model --text=DIR/gsm8k_train.jsonl --vocab_size=2048
    python -m dmpo_jax.main --config=configs/gsm8k_small.py --workdir=runs/gsm8k_small --config.task.data_dir=DIR \\
      --config.tokenizer.path=runs/gsm8k.model

The data set is read from DIR, or downloaded if `task.data_dir` is "". The warm start trains on its solutions and can
teach the form of an answer. DMPO is rewarded for that form and for every correct number.
"""

from configs import base


def get_config():
  c = base.get_config()
  c.model.d_model = 64
  c.model.num_layers = 2
  c.model.mlp_hidden_size = 192
  c.model.rope_theta = 1000.0
  c.model.remat = "full"
  c.task.name = "gsm8k"
  c.task.num_train = 0
  c.task.num_test = 0
  c.task.max_prompt_length = 192
  c.task.overlong_prompts = "skip"
  c.sampler.completion_length = 96
  c.sampler.block_length = 32
  c.sampler.steps = 24
  c.rollout.num_prompts = 8
  c.rollout.group_size = 4
  c.warm_start.updates = 150
  c.warm_start.batch_size = 16
  c.warm_start.min_mask_ratio = 0.2
  c.objective.alpha = 0.5
  c.train.num_buffers = 6
  c.eval.every_buffers = 3
  c.eval.num_prompts = 64
  c.eval.batch_size = 64
  c.checkpoint.every_updates = 5
  return c.lock()
