"""A workload small enough for tests of the benchmark."""

from configs import throughput
from launch.bench import workload

TINY = {
  "model.d_model": 16,
  "model.num_heads": 2,
  "model.num_kv_heads": 2,
  "model.num_layers": 2,
  "model.mlp_hidden_size": 24,
  "model.vocab_size": 320,
  "model.embedding_size": 320,
  "model.lora.rank": 2,
  "task.max_prompt_length": 6,
  "sampler.completion_length": 8,
  "sampler.block_length": 4,
  "sampler.steps": 4,
  "rollout.num_prompts": 2,
  "rollout.group_size": 2,
}
FLAGS = [f"--config.{path}={value}" for path, value in TINY.items()]


def config(**overrides):
  """Build it; overrides are dotted paths with "__" for the dots."""
  keys = TINY | {path.replace("__", "."): value for path, value in overrides.items()}
  return workload.changed(throughput.get_config(), keys)
