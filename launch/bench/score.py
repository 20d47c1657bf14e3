"""The section `score`: bounds on log p of all rollouts of a buffer under the old policy and the reference."""

import jax
import numpy as np
from ml_collections import ConfigDict

from dmpo_jax import noise, phases
from dmpo_jax.objectives.masking import Completions
from launch.bench import peers, timing, workload
from launch.bench.results import Options, Result, compare

TOLERANCES = {"log p_old": 1e-4, "log p_ref": 1e-4}


def run(config: ConfigDict, options: Options) -> Result:
  """Measure the log-probs of a buffer under both policies."""
  positions = config.task.max_prompt_length + config.sampler.completion_length
  rows = config.rollout.num_prompts * config.rollout.group_size * config.objective.num_elbo_samples
  ours: dict[str, timing.Maker] = {"ours": (make_ours, (config,))}
  others = options.peers(make_peer, config)
  amount = 2 * rows * positions  # two policies
  return compare("score", config, options, ours, others, amount=amount, tolerances=TOLERANCES)


def make_ours(config: ConfigDict) -> timing.Contender:
  """Compile the log-probs of training."""
  work = workload.make(config)
  compiled = workload.compiled("score", work)
  own = work.experience

  def scores() -> dict[str, np.ndarray]:
    rows = own.prompts, own.completion, own.is_counted, own.committed_at
    measures = compiled(work.policies, *rows, key(config), None, 0)
    log_p_old, log_p_ref = jax.device_get((measures.log_p_old, measures.log_p_ref))
    return {"log p_old": log_p_old.mean(-1).ravel(), "log p_ref": log_p_ref.mean(-1).ravel()}

  facts = {"flops": workload.count_flops("score", config), "planned_bytes": workload.planned_bytes(compiled)}

  def turn() -> None:
    scores()

  return timing.Contender(turn, scores, facts)


def key(config: ConfigDict) -> jax.Array:
  """Return the key of the masks for the first buffer."""
  return noise.step_key(config.seed, "measure", 0)


def masks(work: workload.Workload) -> np.ndarray:
  """Draw the masks of the log-probs, [p, g, r, c]."""
  estimator = phases.make_likelihood(work.config, work.config.objective.num_elbo_samples)
  keys = noise.row_keys(key(work.config), work.experience.prompts.prompt_id, work.config.rollout.group_size)
  known = Completions(work.experience.is_counted, work.experience.committed_at, work.experience.prompts.is_valid)
  return np.asarray(estimator.views(keys, known).is_masked)


def make_peer(config: ConfigDict, official: str) -> timing.Contender:
  """Build the same log-probs in PyTorch."""
  work = workload.make(config)
  peer, is_masked = peers.make(work, official), masks(work)

  def check() -> dict[str, np.ndarray]:
    log_p_old, log_p_ref = peer.elbo(is_masked)
    return {"log p_old": log_p_old, "log p_ref": log_p_ref}

  def turn() -> None:
    peer.elbo()

  return timing.Contender(turn, check)
