"""Qwen3-0.6B as a diffusion model, on one GPU or one v5e chip: supervised training, then DMPO.

    python -m launch.convert_hf --hf=Qwen/Qwen3-0.6B --out=CHECKPOINT --adapt
    python -m dmpo_jax.main --config=configs/a2d_qwen3_0.6b.py:sft --config.model.init_from=CHECKPOINT --workdir=SFT
    python -m dmpo_jax.main --config=configs/a2d_qwen3_0.6b.py --config.model.init_from=SFT/policy \\
        --config.tokenizer.path=CHECKPOINT --workdir=RUN

A model that was autoregressive until now has to learn to fill in masks: `:sft` trains all of its parameters on the
task's demonstrations. DMPO starts from that policy. dllm's diffusion models of this size convert without --adapt and
have learnt it already: for them leave out the second command, and init_from=CHECKPOINT is enough. `:lora`, the default,
trains adapters, `:full` all parameters; docs/pod.md has what both need.
"""

from configs import base

KINDS = ("lora", "full", "sft")


def get_config(kind="lora"):
  """Build it for adapters, for all parameters, or for supervised training of all parameters."""
  if kind not in KINDS:
    raise ValueError(f"configs/a2d_qwen3_0.6b.py:{kind}: must be one of {', '.join(KINDS)}")
  c = base.get_config()
  m = c.model
  m.embedding_size = 151936  # ids: the checkpoint's
  m.d_model = 1024
  m.num_layers = 28
  m.num_heads = 16
  m.num_kv_heads = 8
  m.head_dim = 128
  m.mlp_hidden_size = 3072
  m.rope_theta = 1_000_000.0
  m.rms_norm_eps = 1e-6
  m.weight_tying = True
  m.qk_norm = True
  m.dtype = m.param_dtype = "bfloat16"
  m.remat = "full"
  m.layer_rows = 4
  m.lora.rank = 64 if kind == "lora" else 0
  m.lora.alpha = 64.0
  m.lora.targets = ("all",)

  c.tokenizer.name = "huggingface"
  c.tokenizer.path = ""  # the checkpoint's own
  c.tokenizer.is_chat = True
  c.tokenizer.chat_template_kwargs = '{"enable_thinking": false}'  # no thinking first, as in dllm's models
  c.task.name = "gsm8k"  # or countdown, sudoku, your own file
  c.task.max_prompt_length = 256
  c.task.overlong_prompts = "skip"

  c.sampler.completion_length = 256
  c.sampler.block_length = 32
  c.sampler.steps = 128
  c.sampler.temperature = 0.4
  c.sampler.name = "prefix_cache"
  c.sampler.prefix_cache.rule = "count"

  c.rollout.num_prompts = 8
  c.rollout.group_size = 8
  c.rollout.chunk_prompts = 4
  c.objective.alpha = 0.04
  c.objective.num_mask_samples = 4
  c.objective.num_elbo_samples = 4
  c.objective.counted = "until_eos"

  c.optim.learning_rate = 1e-5 if kind == "lora" else 1e-6
  c.optim.warmup_updates = 20
  c.optim.weight_decay = 0.1
  c.train.num_buffers = 200
  c.train.updates_per_buffer = 4
  c.train.microbatch_prompts = 1
  c.eval.every_buffers = 50  # decodes twice a buffer's rollouts: 4 % of the time of sampling
  c.eval.num_prompts = 128
  c.eval.batch_size = 32
  c.checkpoint.every_updates = 20
  if kind == "sft":
    c.objective.name = "denoise"
    c.objective.num_mask_samples = 2
    c.rollout.num_prompts = 32  # demonstrations of a buffer
    c.rollout.group_size = 1
    c.rollout.chunk_prompts = 0
    c.train.microbatch_prompts = 8
    c.optim.learning_rate = 1e-5
  return c.lock()
