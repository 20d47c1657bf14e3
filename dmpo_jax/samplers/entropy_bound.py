"""Entropy-bounded decoding: a model call decides the most certain tokens as long as their entropy stays small."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from dmpo_jax.samplers.loop import Decision, Denoiser, Plan, View, decode, take_block
from dmpo_jax.samplers.prediction import comes_before, predict
from dmpo_jax.samplers.selection import check_number
from dmpo_jax.structs import Rollouts


def sample(denoiser: Denoiser, keys: Key[Array, "b"], plan: Plan, *, bound: float = 0.1) -> Rollouts:
  """Decode b completions with the entropy-bounded rule (EB-Sampler, Ben-Hamu et al., arXiv 2505.24857).

  Args:
    bound: nats; see `select_certain`. 0: one token a call, the most certain first.

  Raises:
    ValueError: the bound is negative or not finite.
  """
  check_number("sampler.entropy_bound.bound", bound)

  def look(view: View, state: tuple[()], kv_cache: None) -> Float[Array, "b s d"]:
    return take_block(denoiser.hidden(view.completion), view.start, plan.block_length)

  def accept(view: View, seen: Float[Array, "b s d"], state: tuple[()]) -> tuple[Decision, tuple[()]]:
    chosen = predict(denoiser, seen, view.keys, view.positions, plan.temperature)
    is_kept = select_certain(chosen.entropy, view.is_masked, bound)
    return Decision(jnp.where(is_kept, chosen.tokens, view.tokens), chosen.confidence), state

  rollouts, _ = decode(look, accept, (), keys, plan, denoiser, most_calls=plan.block_length)
  return rollouts


def select_certain(entropy: Float[Array, "b s"], is_masked: Bool[Array, "b s"], bound: float) -> Bool[Array, "b s"]:
  """Keep the largest set U of the most certain masked positions with sum_U H - max_U H <= bound.

  The left side bounds from above what the tokens of U tell of each other, and so the error of deciding them at once
  (arXiv 2505.24857). The most certain position always goes: its own entropy does not count.
  """
  is_before = comes_before(-entropy, is_masked)
  return is_masked & (jnp.where(is_before, entropy[:, None, :], 0.0).sum(-1) <= bound)
