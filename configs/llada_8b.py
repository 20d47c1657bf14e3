"""LLaDA-8B on a TPU slice, with the settings of the DMPO paper (arXiv 2510.08233) for LLaDA-8B-Instruct.

    python -m launch.convert_hf --hf=GSAI-ML/LLaDA-8B-Instruct --out=CHECKPOINT
    python -m dmpo_jax.main --config=configs/llada_8b.py --config.model.init_from=CHECKPOINT --workdir=RUN

Completions of 128 or 512 tokens: --config=configs/llada_8b.py:512. Another slice than v5e-16, which changes the chunks
of rollouts and evaluation and the microbatches: --config=configs/llada_8b.py:256,v6e-16. Another task:
--config.task.name=countdown. `launch/plan.py` tells what fits a slice before you have one. Comments say where and why a
value is not as published.
"""

import math

from configs import base

DEFAULT = "v5e-16"  # the slice where none is named
TERAFLOPS = {"v4": 275, "v5e": 197, "v5p": 459, "v6e": 918}  # per second, of a chip in bfloat16
# TFLOP of a rollout of so many tokens, and of its part of an update, counted by launch/plan.py
ROW = {128: (91, 54), 256: (310, 77), 512: (1139, 123)}
# What `launch/plan.py --tune` has found, by completion length and slice. Elsewhere layers are recomputed whole.
TUNED = {
  (256, "v5e-16"): {"train.microbatch_prompts": 2, "model.remat": "products", "model.layer_rows": 0},
}


def get_config(settings="256"):
  """Build it for a completion length and a slice: `256`, or `256,v5e-16`."""
  length, _, where = settings.partition(",")
  length = int(length)
  c = base.get_config()
  m = c.model
  m.vocab_size = m.embedding_size = 126464
  m.d_model = 4096
  m.num_layers = 32
  m.num_heads = m.num_kv_heads = 32
  m.mlp_hidden_size = 12288
  m.rope_theta = 500_000.0
  m.dtype = m.param_dtype = "bfloat16"  # published: a base in NF4, which TPUs do not have
  m.lora.rank = 128
  m.lora.alpha = 64.0
  m.lora.dropout = 0.05
  m.lora.targets = ("q_proj", "k_proj", "v_proj", "up_proj")  # the published names that LLaDA has

  c.tokenizer.name = "huggingface"
  c.tokenizer.path = ""  # the checkpoint's own
  c.tokenizer.is_chat = True
  c.task.name = "gsm8k"  # or math, countdown, sudoku
  c.task.max_prompt_length = 200
  c.task.overlong_prompts = "skip"  # published: cut on the left, which removes the header of the chat template

  c.sampler.completion_length = length
  c.sampler.block_length = 32
  c.sampler.steps = length // 2
  c.sampler.temperature = 0.2
  c.sampler.name = "prefix_cache"
  c.sampler.prefix_cache.rule = "count"

  c.rollout.num_prompts = 32  # per buffer; published are the local batches of eight GPUs
  c.rollout.group_size = 16
  c.objective.alpha = 0.04
  c.objective.num_mask_samples = 4
  c.objective.num_elbo_samples = 4
  c.objective.min_mask_ratio = 0.1  # published as [0.1, 0.9]; the official code draws from [0.1, 1]
  c.objective.max_mask_ratio = 1.0

  c.optim.learning_rate = 1e-6
  c.optim.warmup_updates = 100
  c.optim.b1 = 0.9
  c.optim.b2 = 0.99
  c.optim.weight_decay = 0.1
  c.optim.clip_norm = 0.2
  c.train.num_buffers = 500
  c.train.updates_per_buffer = 8

  c.sharding.data = -1
  c.sharding.fsdp = 16  # capped at the number of chips
  c.sharding.tensor = 1

  c.eval.every_buffers = 25  # decodes half a buffer's rollouts: 2 % of the time of sampling
  c.eval.temperature = 0.0
  c.eval.lengths = (128, 256, 512)
  c.checkpoint.every_updates = 8  # once per buffer: a crash loses no more than that
  listen_often(c, where, ROW)
  c.update_from_flattened_dict(TUNED.get((length, where or DEFAULT), {}))
  return c.lock()


def listen_often(c, where, row):
  """Size chunks of rollouts and evaluation, and microbatches, to take 8 s or less, a microbatch at least a prompt.

  Hosts check for a notice of preemption between two of them, and lose machines 30 s after it. Samplers use groups
  of four chips, each with all of the weights. Gathered over fsdp, the weights would take 14 s for any chunk on v5e-16.

  Args:
    where: the slice, such as v5e-16, v6e-16 or v5p-8 (which counts cores, two a chip); "": v5e-16.
    row: TFLOP by completion length, as `ROW` has them.
  """
  kind, _, number = (where or DEFAULT).partition("-")
  if kind not in TERAFLOPS or not number.isdigit() or int(number) == 0:
    raise ValueError(f"slice {where!r}: must be a kind ({', '.join(TERAFLOPS)}) and a size, such as v5e-16")
  chips = max(int(number) // 2, 1) if kind in ("v4", "v5p") else int(number)
  budget = 8 * 0.5 * TERAFLOPS[kind] * chips  # TFLOP in 8 s, at half of the peak
  length = c.sampler.completion_length
  teraflop = row[length] if length in row else [each * (length / 256) ** 2 for each in row[256]]
  rows, microbatch = (2 ** int(math.log2(max(budget / each, 1))) for each in teraflop)
  c.rollout.chunk_prompts = min(max(rows // c.rollout.group_size, 1), c.rollout.num_prompts)
  c.rollout.chunk_rollouts = rows if rows < c.rollout.group_size else 0
  c.train.microbatch_prompts = min(max(microbatch // c.rollout.group_size, 1), 8)
  c.model.remat, c.model.layer_rows = "full", 4  # the most that fits: what layers keep for the gradient decides
  c.eval.batch_size = min(rows, 256)
  c.sharding.rollout.data = -1
  c.sharding.rollout.fsdp = 1
  c.sharding.rollout.tensor = 4
