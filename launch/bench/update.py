"""The gradient step: masks, loss, gradient, clipping and AdamW, against the same step in PyTorch."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from dmpo_jax import noise, phases
from dmpo_jax.objectives.masking import draw_masks
from dmpo_jax.structs import TrainState
from dmpo_jax.update import Update
from launch.bench import timing, workload
from launch.bench.report import Options, Result, compare

# largest differences, relative to the largest number: float32 sums of other orders
TOLERANCES = {"loss": 1e-4, "gradient norm": 1e-4, "gradient": 1e-3}


def run(config: ConfigDict, options: Options) -> Result:
  """Measure the step, with each way of recomputing that was asked for."""
  makers: dict[str, timing.Maker] = {
    f"ours, remat {remat}": (make_ours, (workload.changed(config, {"model.remat": remat}),))
    for remat in options.remat or (config.model.remat,)
  }
  for name, path in options.peers():
    makers[name] = (make_peer, (config, path, False))
    if options.checkpointing:
      makers[f"{name}, checkpointing"] = (make_peer, (config, path, True))
  tokens = config.rollout.num_prompts * config.rollout.group_size * config.objective.num_mask_samples
  tokens *= config.task.max_prompt_length + config.sampler.completion_length
  return compare("update", config, makers, options, amount=tokens, unit="tokens", tolerances=TOLERANCES)


def make_ours(config: ConfigDict) -> timing.Contender:
  """Compile the step that training takes."""
  work = workload.make(config)
  step = workload.compile_step(work)
  facts = {
    "flops": step.num_microbatches * workload.count_flops("accumulate", config),
    "planned_bytes": max(map(workload.planned_bytes, (step.accumulate, step.apply))),
  }
  return timing.Contender(make_turn(work, step), lambda: _check(config), facts)


def make_turn(work: workload.Workload, step: Update) -> Callable[[], None]:
  """Take one gradient step after another."""
  state = fresh_state(work)

  def turn() -> None:
    nonlocal state
    state, metrics = step(state, *work.beside_state)
    jax.block_until_ready((state, metrics))

  return turn


def fresh_state(work: workload.Workload) -> TrainState:
  """Begin with a copy of what is trained, as a step is given its state for good."""
  trainable = workload.as_trained(work.policies.trainable)
  state = phases.fresh_state(trainable, phases.training_optimizer(work.config), work.mesh)
  return state.replace(reference=work.policies.reference)


def _check(config: ConfigDict) -> dict[str, np.ndarray]:
  """Take one step without dropout; the gradient is read from AdamW's first moment, which the step has moved by it."""
  work = workload.make(workload.without_noise(config))
  state, metrics = workload.compile_step(work)(fresh_state(work), *work.beside_state)
  moment = optax.tree_utils.tree_get(state.opt_state, "mu")
  gradient = jax.tree.map(lambda x: np.asarray(x) / (1 - config.optim.b1), moment)
  return {
    "loss": np.asarray(metrics["loss"]),
    "gradient norm": np.asarray(metrics["grad_norm"]),
    "gradient": flat(gradient),
  }


def flat(tree: Any) -> np.ndarray:
  """Join a tree's arrays, in the order of their names."""
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def masks_of_step(work: workload.Workload, step: int) -> np.ndarray:
  """Draw the masks that the update draws in its step, [p, g, r, c]."""
  config, experience = work.config, work.experience
  key = noise.step_key(config.seed, "loss", step)
  own = config.objective
  is_masked, _ = draw_masks(
    noise.row_keys(key, experience.prompts.prompt_id, config.rollout.group_size),
    experience.is_counted,
    num_mask_samples=own.num_mask_samples,
    antithetic=own.antithetic,
    min_ratio=own.min_mask_ratio,
    max_ratio=own.max_mask_ratio,
  )
  return np.asarray(is_masked)


def make_peer(config: ConfigDict, official: str, is_checkpointing: bool) -> timing.Contender:
  """Build the same step in PyTorch; `official`: a checkout whose own functions take it, or ""."""
  from launch.bench import peer_torch

  work = workload.make(config)
  peer = peer_torch.make_peer(work, official, is_checkpointing=is_checkpointing)
  quiet = workload.make(workload.without_noise(config))

  def check() -> dict[str, np.ndarray]:
    twin = peer_torch.make_peer(quiet, official, is_checkpointing=is_checkpointing)
    loss, norm, gradient = twin.update(masks_of_step(quiet, 0))
    return {"loss": np.array(loss), "gradient norm": np.array(norm), "gradient": flat(gradient)}

  def turn() -> None:
    peer.update()

  return timing.Contender(turn, check)
