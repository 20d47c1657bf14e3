"""Decode in random order, block by block, and return the log-probabilities of the tokens drawn."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Key

from dmpo_jax.samplers.loop import Decision, Plan, Rule, View, decode, fold_calls
from dmpo_jax.samplers.prediction import log_probs, predict, uniform_noise
from dmpo_jax.samplers.selection import num_transfer_tokens, select_count
from dmpo_jax.spans import take_span
from dmpo_jax.structs import Denoiser, Rollouts

# Of the policy, and of the reference where there is one.
BothLogProbs = tuple[Float32[Array, "b c"], Float32[Array, "b c"] | None]
BothHidden = tuple[Float[Array, "b s d"], Float[Array, "b s d"] | None]


@dataclasses.dataclass(frozen=True)
class Options:
  """There are none: `plan` says it all."""


def sample(denoiser: Denoiser, keys: Key[Array, "b"], plan: Plan, options: Options) -> Rollouts:
  """Decode b completions in an order drawn for each block of each row, with `plan.steps` calls in all.

  The rollouts carry log p(y_l | prompt, tokens decided before l) under the policy (`log_p_old`) and, if the denoiser
  has a reference, under the reference (`log_p_ref`), float32 nats. With one token a call, their sum over a row is the
  log-probability of the completion in that order.

  The log-probabilities are those of the distribution that all likelihoods use (`models/head.py`): softmax(logits) over
  the vocabulary, MASK's share included, at any temperature. Tokens are drawn from softmax(logits / temperature) without
  MASK: at temperature 1 a token is drawn with a probability 1 / (1 - p(MASK)) times the one returned.
  """
  schedule = num_transfer_tokens(jnp.int32(plan.block_length), plan.steps_per_block)
  reference = denoiser.reference

  def block_of(policy: Denoiser, view: View) -> Float[Array, "b s d"]:
    return take_span(policy.hidden(view.completion), view.start, plan.block_length)

  def forward(view: View, state: BothLogProbs, kv_cache: None) -> BothHidden:
    return block_of(denoiser, view), None if reference is None else block_of(reference, view)

  def accept(view: View, hidden: BothHidden, state: BothLogProbs) -> tuple[Decision, BothLogProbs]:
    chosen = predict(denoiser, hidden[0], view.keys, view.positions, plan.temperature)
    order = uniform_noise(fold_calls(view.row_keys, view.number - view.step), view.positions)
    is_kept = select_count(order, view.is_masked, schedule[view.step])
    by_reference = None if reference is None or hidden[1] is None else log_probs(reference, hidden[1], chosen.tokens)
    new = (chosen.log_prob, by_reference)

    def write(rows: Float32[Array, "b c"], block: Float32[Array, "b s"]) -> Float32[Array, "b c"]:
      block = jnp.where(is_kept, block, take_span(rows, view.start, plan.block_length))
      return jax.lax.dynamic_update_slice_in_dim(rows, block, view.start, axis=1)

    tokens = jnp.where(is_kept, chosen.tokens, view.tokens)
    return Decision(tokens, chosen.confidence), jax.tree.map(write, state, new)

  def first_state(num_rows: int) -> BothLogProbs:
    zeros = jnp.zeros((num_rows, plan.completion_length), jnp.float32)
    return zeros, None if reference is None else zeros

  rollouts, log_p = decode(Rule(forward, accept, plan.steps_per_block, first_state=first_state), keys, plan, denoiser)
  # Tokens behind an EOS were replaced by EOS, so their log-probabilities are dropped.
  is_own = jnp.arange(plan.completion_length) < rollouts.num_tokens[:, None]
  log_p_old, log_p_ref = jax.tree.map(lambda array: jnp.where(is_own, array, 0.0), log_p)
  return dataclasses.replace(rollouts, log_p_old=log_p_old, log_p_ref=log_p_ref)
