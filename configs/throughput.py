"""What launch/bench/main.py measures by default: LLaDA's proportions at sizes for two cores.

`throughput.py:training` is one device's share of a gradient step in the published run: 4 rollouts with 4 masks each.
`throughput.py:iteration` is the same at half the width. `throughput.py:sampling` decodes 16 rows, and
`throughput.py:growth` is the base for growing sizes. `throughput.py:blocks` is a model that attends by blocks, which
decodes 256 rows in 16 slots. Weights are random.
"""

from ml_collections import ConfigDict

from configs import base

WIDTHS = {"training": 512, "iteration": 256, "sampling": 256, "growth": 64, "blocks": 256}


def get_config(workload: str = "training") -> ConfigDict:
  if workload not in WIDTHS:
    raise ValueError(f"configs/throughput.py:{workload}: must be one of {', '.join(WIDTHS)}")
  c = base.get_config()
  is_sampling = workload == "sampling"
  m = c.model
  m.vocab_size = m.embedding_size = 32_000
  m.d_model = WIDTHS[workload]
  m.num_layers = 8
  m.num_heads = m.num_kv_heads = m.d_model // 64
  m.mlp_hidden_size = 3 * m.d_model
  m.rope_theta = 500_000.0
  m.remat = "dots"
  m.lora.rank = m.d_model // 32
  m.lora.alpha = m.lora.rank / 2
  m.lora.dropout = 0.05

  length = 64 if is_sampling else 128
  c.task.max_prompt_length = length
  c.sampler.name = "prefix_cache"
  c.sampler.prefix_cache.rule = "count"
  c.sampler.completion_length = length
  c.sampler.block_length = 32
  c.sampler.steps = length // 4  # published: 128 for 256 tokens, and 8 updates per buffer
  c.sampler.temperature = 0.2
  c.train.updates_per_buffer = 2
  c.rollout.num_prompts = 4 if is_sampling else 1
  c.rollout.group_size = 4
  c.rollout.drop_equal_groups = False  # rewards of random weights are all the same

  c.objective.alpha = 0.04
  c.objective.num_mask_samples = 4
  c.objective.num_elbo_samples = 4
  c.optim.weight_decay = 0.1
  c.optim.clip_norm = 0.2
  c.optim.learning_rate = 1e-6
  if workload == "growth":
    m.vocab_size = m.embedding_size = 4096
    m.num_layers = 2
    m.num_heads = m.num_kv_heads = 2
    m.lora.rank = 8  # which eight devices divide
    c.task.max_prompt_length = 64
    c.sampler.completion_length = 64
    c.sampler.steps = 32
    c.rollout.num_prompts = 1
    c.objective.num_mask_samples = 2
  if workload == "blocks":
    m.block_length = 4
    m.vocab_size = m.embedding_size = 4096
    m.num_layers = 2
    m.remat = "none"
    m.lora.rank = 0
    c.task.max_prompt_length = 32
    c.sampler.name = "llada"
    c.sampler.block_length = 4
    c.sampler.steps = c.sampler.completion_length
    c.sampler.temperature = 1.0
    c.sampler.slots = 16
    c.rollout.num_prompts = 64
    c.rollout.early_exit = True
    c.objective.counted = "until_eos"
  return c.lock()
