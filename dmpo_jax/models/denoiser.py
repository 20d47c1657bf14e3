"""The model as samplers and objectives see it: closures over parameters and prompts, and scores of completions."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from dmpo_jax.sharding import constrain


class Denoiser(NamedTuple):
  """A policy with its rows' prompts: what a sampler calls.

  `hidden(completion [b, c]) -> [b, c, d]` runs whole rows [prompt; completion] and keeps the completion's positions.
  `logits(hidden [b, s, d]) -> float32 [b, s, v]` is the head, with -inf for ids that no token has. MASK keeps its share
  of the probability, as in the likelihood; samplers never choose it.
  """

  hidden: Callable[[jax.Array], jax.Array]
  logits: Callable[[jax.Array], jax.Array]
  mask_token_id: int
  eos_token_id: int


class Scores(NamedTuple):
  """The model's verdict on every completion position, in nats."""

  log_prob: Float32[Array, "b c"]  # of the target
  entropy: Float32[Array, "b c"]  # of the distribution that the target was scored under


def make_denoiser(
  model: nn.Module,
  variables: Mapping[str, Any],
  prompt_tokens: Int[Array, "b q"],
  prompt_is_valid: Bool[Array, "b q"],
) -> Denoiser:
  """Close over a policy (`variables`) and the prompts of b rows, padding marked by `prompt_is_valid`."""

  def hidden(completion: Int[Array, "b c"]) -> Float[Array, "b c d"]:
    return _completion_hidden(model, variables, prompt_tokens, prompt_is_valid, completion, None)

  def logits(hidden: Float[Array, "b s d"]) -> Float32[Array, "b s v"]:
    logits = model.apply(variables, hidden, method="logits")
    return jnp.where(jnp.arange(logits.shape[-1]) < model.config.vocab_size, logits, -jnp.inf)

  return Denoiser(hidden, logits, model.config.mask_token_id, model.config.eos_token_id)


def completion_scores(
  model: nn.Module,
  variables: Mapping[str, Any],
  prompt_tokens: Int[Array, "b q"],
  prompt_is_valid: Bool[Array, "b q"],
  noised: Int[Array, "b c"],
  targets: Int[Array, "b c"],
  *,
  chunk: int = 0,
  dropout_keys: Key[Array, "b"] | None = None,
) -> Scores:
  """Give log p(targets_l | prompt, noised) and its distribution's entropy at every completion position l.

  The softmax is over all rows of the embedding table. Only completion positions go through the head.

  Args:
    chunk: positions of each row whose logits exist at one time, recomputed in the backward pass; 0: all, kept.
    dropout_keys: the rows' keys of the adapters' dropout; None: no dropout.

  Raises:
    ValueError: chunk is negative.
  """
  if chunk < 0:
    raise ValueError(f"model.loss_chunk={chunk}: must be 0 (all positions at one time) or more")
  hidden = _completion_hidden(model, variables, prompt_tokens, prompt_is_valid, noised, dropout_keys)

  def score(hidden: Float[Array, "b s d"], targets: Int[Array, "b s"]) -> Scores:
    return _score(model.apply(variables, hidden, method="logits"), targets)

  b, c = targets.shape
  if not 0 < chunk < c:
    return score(hidden, targets)

  def split(array: jax.Array) -> jax.Array:
    padding = [(0, 0), (0, -c % chunk)] + [(0, 0)] * (array.ndim - 2)
    return jnp.pad(array, padding).reshape(b, -1, chunk, *array.shape[2:]).swapaxes(0, 1)

  parts = jax.lax.map(lambda part: jax.checkpoint(score)(*part), (split(hidden), split(targets)))
  return jax.tree.map(lambda array: array.swapaxes(0, 1).reshape(b, -1)[:, :c], parts)


def _completion_hidden(
  model: nn.Module,
  variables: Mapping[str, Any],
  prompt_tokens: Int[Array, "b q"],
  prompt_is_valid: Bool[Array, "b q"],
  completion: Int[Array, "b c"],
  dropout_keys: Key[Array, "b"] | None,
) -> Float[Array, "b c d"]:
  rows = constrain(jnp.concatenate([prompt_tokens, completion], axis=1), "rows", None)
  is_valid = jnp.concatenate([prompt_is_valid, jnp.ones(completion.shape, bool)], axis=1)
  hidden, _ = model.apply(variables, rows, is_valid=is_valid, dropout_keys=dropout_keys, method="hidden")
  first = prompt_tokens.shape[1] - model.config.shift_logits  # whose logits predict the completion's first token
  return hidden[:, first : first + completion.shape[1]]


def _score(logits: Float32[Array, "b s v"], targets: Int[Array, "b s"]) -> Scores:
  # Selecting the target by comparison rather than by index keeps a split vocabulary split, in the gradient too.
  is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
  log_normalizer = jax.nn.logsumexp(logits, axis=-1)
  log_prob = jnp.where(is_target, logits, 0).sum(-1) - log_normalizer
  probability = jnp.exp(logits - log_normalizer[..., None])
  return Scores(log_prob, log_normalizer - (probability * logits).sum(-1))
