"""LLaDA's own decoding: a fixed number of tokens a model call, the most confident (or random) positions first."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dmpo_jax.samplers import checks
from dmpo_jax.samplers.loop import Decision, Plan, Rule, View, decode
from dmpo_jax.samplers.prediction import predict, uniform_noise
from dmpo_jax.samplers.selection import num_transfer_tokens, select_count
from dmpo_jax.spans import take_span
from dmpo_jax.structs import Denoiser, Rollouts

REMASKING = ("low_confidence", "random")


@dataclasses.dataclass(frozen=True)
class Options:
  """What a model call commits first.

  Args:
    remasking: `low_confidence`: the most probable tokens; `random`: any.

  Raises:
    ValueError: an unknown `remasking`.
  """

  remasking: str = "low_confidence"

  def __post_init__(self) -> None:
    checks.refuse(checks.one_of("remasking", self.remasking, REMASKING))


def make_rule(denoiser: Denoiser, plan: Plan, options: Options) -> Rule:
  """Build LLaDA's rule with its fixed schedule (arXiv 2502.09992, algorithms 4 and 5, block by block).

  Each call predicts every masked position of the current block and commits the scheduled number of them. With more
  calls than tokens in a block, the last calls commit nothing. All rows make the same `plan.steps` calls.
  Their keys are unused with temperature 0 and low_confidence.
  """
  schedule = num_transfer_tokens(jnp.int32(plan.block_length), plan.steps_per_block)

  def forward(view: View, state: tuple[()], kv_cache: None) -> Float[Array, "b s d"]:
    return take_span(denoiser.hidden(view.completion), view.start, plan.block_length)

  def accept(view: View, hidden: Float[Array, "b s d"], state: tuple[()]) -> tuple[Decision, tuple[()]]:
    tokens, confidence, *_ = predict(denoiser, hidden, view.keys, view.positions, plan.temperature)
    is_random = options.remasking == "random"
    score = uniform_noise(view.keys, view.positions) if is_random else confidence
    is_kept = select_count(score, view.is_masked, schedule[view.step])
    return Decision(jnp.where(is_kept, tokens, view.tokens), confidence), state

  is_fixed = not denoiser.block_length  # a block that begins with the prompt's tokens has less to decide
  return Rule(forward, accept, plan.steps_per_block, is_fixed=is_fixed)


def sample(denoiser: Denoiser, keys: Key[Array, "b"], plan: Plan, options: Options) -> Rollouts:
  """Decode b completions by that rule."""
  return decode(make_rule(denoiser, plan, options), keys, plan, denoiser)[0]
