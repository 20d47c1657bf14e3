"""A run small enough for tests: the smoke configuration, made smaller still. Also a file for --config."""

from configs import smoke


def config(**overrides):
  """Build it; overrides are dotted paths with "__" for the dots."""
  c = smoke.get_config()
  with c.unlocked():
    c.update_from_flattened_dict(
      {
        "model.d_model": 16,
        "model.mlp_hidden_size": 32,
        "task.num_train": 64,
        "task.num_test": 16,
        "task.max_prompt_length": 18,
        "sampler.steps": 4,
        "rollout.num_prompts": 4,
        "rollout.drop_equal_groups": False,  # rewards of a policy at random are often all the same
        "warm_start.updates": 3,
        "warm_start.batch_size": 8,
        "train.num_buffers": 3,
        "eval.num_prompts": 16,
        "eval.batch_size": 16,
        "checkpoint.every_updates": 1,
      }
    )
    c.update_from_flattened_dict({path.replace("__", "."): value for path, value in overrides.items()})
  return c


def get_config():
  """Build it as `--config=tests/tiny.py` does."""
  return config()
