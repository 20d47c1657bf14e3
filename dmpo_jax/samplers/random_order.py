"""Random-order autoregressive decoding, block by block, with the log-probabilities of what it drew."""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Key

from dmpo_jax.samplers.loop import Decision, Denoiser, Plan, View, decode, fold_calls, take_block
from dmpo_jax.samplers.prediction import log_probs, predict, uniform_noise
from dmpo_jax.samplers.selection import num_transfer_tokens, select_count
from dmpo_jax.structs import Rollouts


@runtime_checkable
class ComparedDenoiser(Denoiser, Protocol):
  """A denoiser that may know the reference policy's with the same prompts; None: it does not."""

  reference: Denoiser | None


BothLogProbs = tuple[Float32[Array, "b c"], Float32[Array, "b c"] | None]
Seen = tuple[Float[Array, "b s d"], Float[Array, "b s d"] | None]


def sample(denoiser: ComparedDenoiser, keys: Key[Array, "b"], plan: Plan) -> Rollouts:
  """Decode b completions in an order drawn for each block of each row, `plan.steps` calls in all.

  The rollouts carry log p(y_l | prompt, what was decided before l) under the policy (`log_p_old`) and, where the
  denoiser has one, under the reference (`log_p_ref`), float32 nats. With one token a call their sums over a row are
  log-probabilities of the completion in that order.

  What is scored is the policy's distribution as all likelihoods take it (`models/head.py`): softmax(logits) over the
  vocabulary, MASK's share included, whatever the temperature. What is drawn from is softmax(logits / temperature)
  without MASK: at temperature 1 more probable than scored by a factor 1 / (1 - p(MASK)) a token.
  """
  schedule = num_transfer_tokens(jnp.int32(plan.block_length), plan.steps_per_block)

  def look(view: View, state: BothLogProbs, kv_cache: None) -> Seen:
    policies = (denoiser, denoiser.reference)
    return tuple(
      None if policy is None else take_block(policy.hidden(view.completion), view.start, plan.block_length)
      for policy in policies
    )

  def accept(view: View, seen: Seen, state: BothLogProbs) -> tuple[Decision, BothLogProbs]:
    chosen = predict(denoiser, seen[0], view.keys, view.positions, plan.temperature)
    order = uniform_noise(fold_calls(view.row_keys, view.number - view.step), view.positions)
    is_kept = select_count(order, view.is_masked, schedule[view.step])
    new = (chosen.log_prob, None if seen[1] is None else log_probs(denoiser.reference, seen[1], chosen.tokens))

    def write(rows: Float32[Array, "b c"], block: Float32[Array, "b s"]) -> Float32[Array, "b c"]:
      block = jnp.where(is_kept, block, take_block(rows, view.start, plan.block_length))
      return jax.lax.dynamic_update_slice_in_dim(rows, block, view.start, axis=1)

    tokens = jnp.where(is_kept, chosen.tokens, view.tokens)
    return Decision(tokens, chosen.confidence), jax.tree.map(write, state, new)

  zeros = jnp.zeros((keys.shape[0], plan.completion_length), jnp.float32)
  first = (zeros, None if denoiser.reference is None else zeros)
  rollouts, log_p = decode(look, accept, first, keys, plan, denoiser, most_calls=plan.steps_per_block)
  # What was decided behind an EOS has made room for EOS, and its log-probability with it.
  is_own = jnp.arange(plan.completion_length) < rollouts.num_tokens[:, None]
  log_p_old, log_p_ref = jax.tree.map(lambda array: jnp.where(is_own, array, 0.0), log_p)
  return rollouts.replace(log_p_old=log_p_old, log_p_ref=log_p_ref)
