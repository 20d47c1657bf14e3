"""LLaDA-8B on a TPU slice, with the settings that DMPO published (arXiv 2510.08233) for LLaDA-8B-Instruct.

    python -m launch.convert_hf --hf=GSAI-ML/LLaDA-8B-Instruct --out=CHECKPOINT
    python -m dmpo_jax.main --config=configs/llada_8b.py --config.model.init_from=CHECKPOINT --workdir=RUN

Completions of 128 or 512 tokens: --config=configs/llada_8b.py:512. Another slice than v5e-16, on which rollouts and
evaluation come in larger or smaller parts: --config=configs/llada_8b.py:256,v6e-16. Another task:
--config.task.name=countdown. `launch/plan.py` says what fits a slice before there is one. What is not as published says
so, and why.
"""

import math

from configs import base

TERAFLOPS = {"v4": 275, "v5e": 197, "v5p": 459, "v6e": 918}  # a second, of a chip in bfloat16
ROW = {128: 95, 256: 327, 512: 1204}  # TFLOP that a rollout of so many tokens takes, as launch/plan.py counts them


def get_config(settings="256"):
  """Build it for completions of so many tokens on a slice: `256`, or `256,v5e-16`."""
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
  m.dtype = m.param_dtype = "bfloat16"  # published: a base in NF4, which is none of a TPU's formats
  m.remat = "full"  # dots would keep 2.5 MiB a token, 36 GiB on each of 16 chips at this microbatch
  m.layer_rows = 4  # 36 antithetic pairs of 512-token rows a v5e chip fit by it, and do not without (docs/pod.md)
  m.lora.rank = 128
  m.lora.alpha = 64.0
  m.lora.dropout = 0.05
  m.lora.targets = ("q_proj", "k_proj", "v_proj", "up_proj")  # those of the published names that LLaDA has

  c.tokenizer.name = "huggingface"
  c.tokenizer.path = ""  # the checkpoint's own
  c.tokenizer.is_chat = True
  c.task.name = "gsm8k"  # or math, countdown, sudoku
  c.task.max_prompt_length = 200
  c.task.overlong_prompts = "skip"  # published: cut on the left, which takes the chat template's header

  c.sampler.completion_length = length
  c.sampler.block_length = 32
  c.sampler.steps = length // 2
  c.sampler.temperature = 0.2
  c.sampler.name = "prefix_cache"
  c.sampler.prefix_cache.rule = "count"

  c.rollout.num_prompts = 32  # of a buffer; the published number is that of eight GPUs' local batches
  c.rollout.group_size = 16
  c.objective.alpha = 0.04
  c.objective.num_replicates = 4
  c.objective.num_elbo_replicates = 4
  c.objective.min_mask_ratio = 0.1  # published as [0.1, 0.9]; what the official code draws is [0.1, 1]
  c.objective.max_mask_ratio = 1.0

  c.optim.learning_rate = 1e-6
  c.optim.warmup_updates = 100
  c.optim.b1 = 0.9
  c.optim.b2 = 0.99
  c.optim.weight_decay = 0.1
  c.optim.clip_norm = 0.2
  c.train.num_buffers = 500
  c.train.updates_per_buffer = 8
  c.train.microbatch_prompts = 8

  c.sharding.data = -1
  c.sharding.fsdp = 16  # a slice of fewer chips takes as many as it has
  c.sharding.tensor = 1

  c.eval.every_buffers = 25
  c.eval.temperature = 0.0
  c.eval.lengths = (128, 256, 512)
  c.checkpoint.every_updates = 8  # once a buffer: what is lost where a notice comes in the middle of an update
  listen_often(c, where, ROW[length] if length in ROW else ROW[256] * (length / 256) ** 2)
  return c.lock()


def listen_often(c, where, row):
  """Size the parts of rollouts and evaluation on a slice so that the devices take 8 s or less for one,
  or as little as one prompt's rollouts take.

  A notice of preemption is asked for between two parts, and the machines are gone 30 s after it. Samplers have groups
  of four chips, each with all of the weights: gathered over fsdp they would take 14 s for any part on v5e-16.

  Args:
    where: the slice, such as v5e-16, v6e-16 or v5p-8 (which counts cores, two a chip); "": v5e-16.
    row: TFLOP that a rollout takes.
  """
  kind, _, number = (where or "v5e-16").partition("-")
  if kind not in TERAFLOPS or not number.isdigit() or int(number) == 0:
    raise ValueError(f"slice {where!r}: must be a kind ({', '.join(TERAFLOPS)}) and a size, such as v5e-16")
  chips = max(int(number) // 2, 1) if kind in ("v4", "v5p") else int(number)
  fitting = 8 * 0.5 * TERAFLOPS[kind] * chips / row  # rows, at half of the chips' peak
  rows = 2 ** int(math.log2(max(fitting, 1)))
  c.rollout.chunk_prompts = min(max(rows // c.rollout.group_size, 1), c.rollout.num_prompts)
  c.eval.batch_size = min(rows, 256)
  c.sharding.rollout.data = -1
  c.sharding.rollout.fsdp = 1
  c.sharding.rollout.tensor = 4
