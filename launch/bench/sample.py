"""The section `sample`: our samplers compared with each other, and with the published one in PyTorch."""

import jax
import numpy as np
from ml_collections import ConfigDict

from dmpo_jax import noise, phases
from dmpo_jax.structs import Rollouts
from launch.bench import costs, peers, timing, workload
from launch.bench.results import Options, Result, compare

# name in the table -> changes of the configuration
CONTENDERS = {
  "llada": {"sampler.name": "llada"},
  "prefix_cache": {"sampler.name": "prefix_cache", "sampler.prefix_cache.rule": "count"},
  "dual_cache": {"sampler.name": "dual_cache", "sampler.dual_cache.rule": "count"},
  "threshold": {
    "sampler.name": "parallel",
    "sampler.parallel.rule": "threshold",
    "sampler.parallel.threshold": 0.5,  # published: 0.9, for trained weights, which are more confident
  },
}
PUBLISHED = "prefix_cache"  # the sampler of the published rollouts and of the peer
TOLERANCES = {"tokens": 0.1}  # share that differs; a tie decided by rounding changes the rest of its row


def run(config: ConfigDict, options: Options) -> Result:
  """Measure rollouts of a buffer by each sampler."""
  ours: dict[str, timing.Maker] = {
    name: (make_ours, (workload.changed(config, keys),)) for name, keys in CONTENDERS.items()
  }
  others = {f"{name} {PUBLISHED}": peer for name, peer in options.peers(make_peer, config).items()}
  pairs = [(name, "llada") for name in ours if name != "llada"] + [(PUBLISHED, name) for name in others]
  amount = config.rollout.num_prompts * config.rollout.group_size * config.sampler.completion_length
  return compare("sample", config, options, ours, others, amount=amount, tolerances=TOLERANCES, pairs=pairs)


def make_ours(config: ConfigDict) -> timing.Contender:
  """Compile a sampler as training runs it."""
  work = workload.make(config, sharpness=workload.SHARPNESS)
  compiled = workload.compiled("sample", work)
  key = noise.step_key(config.seed, "rollout", 0)
  per_call = flops_per_call(work)

  def turn() -> dict[str, float]:
    rollouts = jax.device_get(compiled(work.policies, work.experience.prompts, key, 0))
    calls = count_calls(rollouts, config.sampler.block_length)
    return {"calls": calls, "flops": per_call[0] + per_call[1] * calls}

  def check() -> dict[str, np.ndarray]:
    quiet = workload.make(workload.without_noise(config), sharpness=workload.SHARPNESS)
    sample = phases.training_sample(quiet.config, quiet.model, quiet.meshes[1])
    return {"tokens": np.asarray(sample(quiet.policies, quiet.experience.prompts, key).completion).reshape(-1)}

  return timing.Contender(turn, check, {"planned_bytes": workload.planned_bytes(compiled)})


def flops_per_call(work: workload.Workload) -> tuple[float, float]:
  """Split the operations of a sampler into those made once and those of each model call."""
  plain = workload.changed(work.config, {"model.attention": "xla"})  # see `workload.count_flops`
  jaxpr = workload.trace_on("sample", plain, jax.devices()).jaxpr
  blocks = work.config.sampler.completion_length // work.config.sampler.block_length
  none, one = (costs.count_flops(jaxpr, while_trips=trips) for trips in (0, 1))
  each = (one - none) / blocks
  first = blocks if work.config.sampler.name in ("prefix_cache", "dual_cache") else 0  # calls before the loops
  return none - first * each, each


def count_calls(rollouts: Rollouts, block_length: int) -> int:
  """Count the model calls of a batch: in each block those of its slowest row, as every call decides a token."""
  committed_at = rollouts.committed_at.reshape(-1, rollouts.committed_at.shape[-1])
  last = committed_at.reshape(len(committed_at), -1, block_length).max(-1)
  return int(np.diff(last, axis=1, prepend=-1).max(0).sum())


def make_peer(config: ConfigDict, official: str) -> timing.Contender:
  """Build the published sampler in PyTorch."""
  peer = peers.make(workload.make(config, sharpness=workload.SHARPNESS), official)
  calls = {"calls": config.sampler.steps}

  def turn() -> dict[str, float]:
    peer.decode(config.sampler.temperature)
    return calls

  return timing.Contender(turn, lambda: {"tokens": peer.decode(0.0).numpy().reshape(-1)})
