"""The section `update`: masks, loss, gradient, clipping and AdamW, and the same step in PyTorch."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import optax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from dmpo_jax import noise, phases
from dmpo_jax.objectives.masking import draw_masks
from dmpo_jax.structs import TrainState
from dmpo_jax.update import Update
from launch.bench import peers, timing, workload
from launch.bench.results import Options, Result, compare

# relative to the largest number; float32 sums differ by their order
TOLERANCES = {"loss": 1e-4, "gradient norm": 1e-4, "gradient": 1e-3}


def run(config: ConfigDict, options: Options) -> Result:
  """Measure the gradient step with each requested value of model.remat."""
  ours: dict[str, timing.Maker] = {
    f"ours, remat {remat}": (make_ours, (workload.changed(config, {"model.remat": remat}),))
    for remat in options.remat or (config.model.remat,)
  }
  others = options.peers(make_peer, config, False)
  if options.checkpointing:
    others |= {f"{name}, checkpointing": peer for name, peer in options.peers(make_peer, config, True).items()}
  tokens = config.rollout.num_prompts * config.rollout.group_size * config.objective.num_mask_samples
  tokens *= config.task.max_prompt_length + config.sampler.completion_length
  return compare("update", config, options, ours, others, amount=tokens, tolerances=TOLERANCES)


def make_ours(config: ConfigDict) -> timing.Contender:
  """Compile the gradient step of training."""
  work = workload.make(config)
  step = workload.compile_step(work)
  assert isinstance(step.accumulate, jax.stages.Compiled)
  assert isinstance(step.apply, jax.stages.Compiled)
  facts = {
    "flops": step.num_microbatches * workload.count_flops("accumulate", config),
    "planned_bytes": max(map(workload.planned_bytes, (step.accumulate, step.apply))),
  }
  return timing.Contender(make_turn(work, step), lambda: _check(config), facts)


def make_turn(work: workload.Workload, step: Update) -> Callable[[], None]:
  """Return a function that takes one gradient step after another."""
  state = fresh_state(work)

  def turn() -> None:
    nonlocal state
    state, metrics = step(state, *work.beside_state)
    jax.block_until_ready((state, metrics))

  return turn


def fresh_state(work: workload.Workload) -> TrainState:
  """Start from a copy of the trained parameters, since a step donates its state."""
  trainable = workload.as_trained(work.policies.trainable)
  state = phases.fresh_state(trainable, phases.training_optimizer(work.config), work.mesh)
  return dataclasses.replace(state, reference=work.policies.reference)


def _check(config: ConfigDict) -> dict[str, np.ndarray]:
  """Take one step without dropout; the gradient is what the step added to AdamW's first moment."""
  work = workload.make(workload.without_noise(config))
  state, metrics = workload.compile_step(work)(fresh_state(work), *work.beside_state)
  moment = optax.tree_utils.tree_get(state.opt_state, "mu")
  gradient = jax.tree.map(lambda x: np.asarray(x) / (1 - config.optim.b1), moment)
  return {
    "loss": np.asarray(metrics["loss"]),
    "gradient norm": np.asarray(metrics["grad_norm"]),
    "gradient": flat(gradient),
  }


def flat(tree: PyTree) -> np.ndarray:
  """Concatenate the arrays of a tree in the order of their names."""
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def masks_of_step(work: workload.Workload, step: int) -> np.ndarray:
  """Draw the masks of a gradient step, [p, g, r, c]."""
  config, experience = work.config, work.experience
  key = noise.step_key(config.seed, "loss", step)
  keys = noise.row_keys(key, experience.prompts.prompt_id, config.rollout.group_size)
  masks = phases.mask_sampling(config, config.objective.num_mask_samples)
  is_masked, _ = draw_masks(keys, experience.is_counted, masks, experience.committed_at)
  return np.asarray(is_masked)


def make_peer(config: ConfigDict, is_checkpointing: bool, official: str) -> timing.Contender:
  """Build the same step in PyTorch."""
  peer = peers.make(workload.make(config), official, is_checkpointing=is_checkpointing)

  def check() -> dict[str, np.ndarray]:
    quiet = workload.make(workload.without_noise(config))
    fresh = peers.make(quiet, official, is_checkpointing=is_checkpointing)
    loss, norm, gradient = fresh.update(masks_of_step(quiet, 0))
    return {"loss": np.array(loss), "gradient norm": np.array(norm), "gradient": flat(gradient)}

  def turn() -> None:
    peer.update()

  return timing.Contender(turn, check)
