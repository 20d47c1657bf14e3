"""Entropy-bounded decoding: a model call commits the most certain tokens as long as their entropy stays small."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from dmpo_jax.samplers import checks
from dmpo_jax.samplers.loop import Decision, Plan, Rule, View, decode
from dmpo_jax.samplers.prediction import comes_before, predict
from dmpo_jax.spans import take_span
from dmpo_jax.structs import Denoiser, Rollouts


@dataclasses.dataclass(frozen=True)
class Options:
  """How much entropy the tokens of a call may have.

  Args:
    bound: nats, at least 0; see `select_certain`. 0: one token a call, the most certain first.

  Raises:
    ValueError: the bound is negative or not finite.
  """

  bound: float = 0.1

  def __post_init__(self) -> None:
    checks.refuse(checks.from_zero("bound", self.bound))


def make_rule(denoiser: Denoiser, plan: Plan, options: Options) -> Rule:
  """Build the entropy-bounded rule (EB-Sampler, Ben-Hamu et al., arXiv 2505.24857)."""

  def forward(view: View, state: tuple[()], kv_cache: None) -> Float[Array, "b s d"]:
    return take_span(denoiser.hidden(view.completion), view.start, plan.block_length)

  def accept(view: View, hidden: Float[Array, "b s d"], state: tuple[()]) -> tuple[Decision, tuple[()]]:
    chosen = predict(denoiser, hidden, view.keys, view.positions, plan.temperature)
    is_kept = select_certain(chosen.entropy, view.is_masked, options.bound)
    return Decision(jnp.where(is_kept, chosen.tokens, view.tokens), chosen.confidence), state

  return Rule(forward, accept, plan.block_length)


def sample(denoiser: Denoiser, keys: Key[Array, "b"], plan: Plan, options: Options) -> Rollouts:
  """Decode b completions by that rule."""
  return decode(make_rule(denoiser, plan, options), keys, plan, denoiser)[0]


def select_certain(entropy: Float[Array, "b s"], is_masked: Bool[Array, "b s"], bound: float) -> Bool[Array, "b s"]:
  """Keep the largest set U of the most certain masked positions with sum_U H - max_U H <= bound.

  The left side is an upper bound on the dependence between the tokens of U, and so on the error of committing them in
  one call (arXiv 2505.24857). The most certain position is always kept.
  """
  is_before = comes_before(-entropy, is_masked)
  return is_masked & (jnp.where(is_before, entropy[:, None, :], 0.0).sum(-1) <= bound)
