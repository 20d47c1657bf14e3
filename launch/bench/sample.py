"""The samplers against each other, and against the published ones in PyTorch."""

from types import SimpleNamespace

import jax
import numpy as np
from ml_collections import ConfigDict

from dmpo_jax import noise, phases
from dmpo_jax.structs import Rollouts
from launch.bench import costs, timing, workload
from launch.bench.report import Options, Result, compare

# name in the table -> what it changes in the configuration
CONTENDERS = {
  "llada": {"sampler.name": "llada"},
  "prefix_cache": {"sampler.name": "prefix_cache", "sampler.prefix_cache.rule": "count"},
  "dual_cache": {"sampler.name": "dual_cache", "sampler.dual_cache.rule": "count"},
  "threshold": {
    "sampler.name": "parallel",
    "sampler.parallel.rule": "threshold",
    "sampler.parallel.threshold": 0.5,  # random weights are never as sure as trained ones, for which 0.9 is published
  },
}
PUBLISHED = "prefix_cache"  # what the published rollouts are drawn by, and the peer
TOLERANCES = {"tokens": 0.1}  # share of others; a tie that rounding decides changes all that follows in its row


def run(config: ConfigDict, options: Options) -> Result:
  """Measure rollouts of a buffer by each sampler."""
  makers: dict[str, timing.Maker] = {
    name: (make_ours, (workload.changed(config, own),)) for name, own in CONTENDERS.items()
  }
  pairs = [(name, "llada") for name in CONTENDERS if name != "llada"]
  for peer, path in options.peers():
    makers[f"{peer} {PUBLISHED}"] = (make_peer, (config, path))
    pairs.append((PUBLISHED, f"{peer} {PUBLISHED}"))
  amount = config.rollout.num_prompts * config.rollout.group_size * config.sampler.completion_length
  return compare("sample", config, makers, options, amount=amount, unit="tokens", tolerances=TOLERANCES, pairs=pairs)


def make_ours(config: ConfigDict) -> timing.Contender:
  """Compile the sampler as training draws its rollouts."""
  work = workload.make(config, sharpness=workload.SHARPNESS)
  compiled = workload.trace("sample", work).lower().compile()
  key = noise.step_key(config.seed, "rollout", 0)
  per_call = flops_per_call(work)

  def turn() -> dict[str, float]:
    rollouts = jax.device_get(compiled(work.policies, work.experience.prompts, key))
    calls = count_calls(rollouts, config.sampler.block_length)
    return {"calls": calls, "flops": per_call[0] + per_call[1] * calls}

  def check() -> dict[str, np.ndarray]:
    quiet = workload.make(workload.without_noise(config), sharpness=workload.SHARPNESS)
    sample = phases.training_sample(quiet.config, SimpleNamespace(model=quiet.model, mesh=quiet.meshes[1]))
    return {"tokens": np.asarray(sample(quiet.policies, quiet.experience.prompts, key).completion).reshape(-1)}

  return timing.Contender(turn, check, {"planned_bytes": workload.planned_bytes(compiled)})


def flops_per_call(work: workload.Workload) -> tuple[float, float]:
  """Split a sampler's operations into what it takes once and what each model call takes."""
  jaxpr = workload.trace("sample", work).jaxpr
  blocks = work.config.sampler.completion_length // work.config.sampler.block_length
  none, one = (costs.count_flops(jaxpr, while_trips=trips) for trips in (0, 1))
  each = (one - none) / blocks
  first = blocks if work.config.sampler.name in ("prefix_cache", "dual_cache") else 0  # calls that `none` has
  return none - first * each, each


def count_calls(rollouts: Rollouts, block_length: int) -> int:
  """Count the model calls that the batch made: in every block as many as its slowest row; each decides something."""
  committed_at = rollouts.committed_at.reshape(-1, rollouts.committed_at.shape[-1])
  last = committed_at.reshape(len(committed_at), -1, block_length).max(-1)
  return int(np.diff(last, axis=1, prepend=-1).max(0).sum())


def make_peer(config: ConfigDict, official: str) -> timing.Contender:
  """Build the published sampler in PyTorch."""
  from launch.bench import peer_torch

  peer = peer_torch.make_peer(workload.make(config, sharpness=workload.SHARPNESS), official)
  calls = {"calls": config.sampler.steps}

  def turn() -> dict[str, float]:
    peer.decode(config.sampler.temperature)
    return calls

  return timing.Contender(turn, lambda: {"tokens": peer.decode(0.0).numpy().reshape(-1)})
