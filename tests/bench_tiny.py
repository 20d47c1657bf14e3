"""A workload small enough for tests of the benchmark."""

from configs import throughput
from launch.bench import workload

TINY = workload.TINY | {"rollout.num_prompts": 2, "rollout.group_size": 2}
FLAGS = [f"--config.{path}={value}" for path, value in TINY.items()]


def config(**overrides):
  """Build it; overrides are dotted paths with "__" for the dots."""
  keys = TINY | {path.replace("__", "."): value for path, value in overrides.items()}
  return workload.changed(throughput.get_config(), keys)
