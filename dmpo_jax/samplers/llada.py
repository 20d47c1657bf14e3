"""LLaDA's own decoding: a fixed number of tokens a model call, the most confident (or random) positions first."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dmpo_jax.samplers.loop import Decision, Denoiser, Plan, View, decode, take_block
from dmpo_jax.samplers.prediction import predict, uniform_noise
from dmpo_jax.samplers.selection import check_choice, num_transfer_tokens, select_count
from dmpo_jax.structs import Rollouts

REMASKING = ("low_confidence", "random")


def sample(denoiser: Denoiser, keys: Key[Array, "b"], plan: Plan, *, remasking: str = "low_confidence") -> Rollouts:
  """Decode b completions with LLaDA's fixed schedule (arXiv 2502.09992, algorithms 4 and 5, block by block).

  Each call predicts every masked position of the current block and keeps the scheduled number of them. With more
  calls than tokens in a block the last calls keep nothing. All rows make the same `plan.steps` calls.

  Args:
    denoiser: the model closed over its parameters and the rows' prompts.
    keys: the rows' keys; unused when greedy with low_confidence.
    remasking: what is kept first: `low_confidence` the most probable tokens, `random` any.

  Raises:
    ValueError: an unknown `remasking`.
  """
  check_choice("sampler.llada.remasking", remasking, REMASKING)
  schedule = num_transfer_tokens(jnp.int32(plan.block_length), plan.steps_per_block)

  def look(view: View, state: tuple[()], kv_cache: None) -> Float[Array, "b s d"]:
    return take_block(denoiser.hidden(view.completion), view.start, plan.block_length)

  def accept(view: View, seen: Float[Array, "b s d"], state: tuple[()]) -> tuple[Decision, tuple[()]]:
    tokens, confidence, *_ = predict(denoiser, seen, view.keys, view.positions, plan.temperature)
    score = confidence if remasking == "low_confidence" else uniform_noise(view.keys, view.positions)
    is_kept = select_count(score, view.is_masked, schedule[view.step])
    return Decision(jnp.where(is_kept, tokens, view.tokens), confidence), state

  rollouts, _ = decode(look, accept, (), keys, plan, denoiser, most_calls=plan.steps_per_block, is_fixed=True)
  return rollouts
