"""Which experts a token takes, and with which weights; and the figures that say how evenly they are used."""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

from dmpo_jax.structs import Routing

ROUTING = "routing"  # the collection in which layers leave their `Routing`, where it is mutable


class Choice(NamedTuple):
  """What a router did with each token."""

  experts: Int[Array, "b l j"]
  entropy: Float32[Array, "b l"]  # of softmax over all experts, nats


class Share(NamedTuple):
  """What a token takes of a layer's experts."""

  number: int  # of experts
  num_groups: int = 1  # neighbouring experts, as many in each; a token takes its experts from a few groups
  groups_per_token: int = 1
  scale: float = 1.0  # of the weights


@runtime_checkable
class Router(Protocol):
  """How a family chooses a token's experts, the best first, and weighs their outputs."""

  def __call__(
    self, logits: Float32[Array, "t e"], bias: Float32[Array, "e"] | None, share: Share
  ) -> tuple[Int[Array, "t j"], Float32[Array, "t j"]]: ...


def softmax(
  logits: Float32[Array, "t e"], bias: Float32[Array, "e"] | None, share: Share
) -> tuple[Int[Array, "t j"], Float32[Array, "t j"]]:
  """Take the highest of softmax over all experts + bias, and weigh by these values.

  This is LLaDA-MoE's, oddities included: weights are not normalised over the chosen experts, and contain the bias.
  """
  score = jax.nn.softmax(logits, axis=-1)
  score = score if bias is None else score + bias
  weights, chosen = jax.lax.top_k(score, share.number)
  return chosen, weights


def softmax_normalised(
  logits: Float32[Array, "t e"], bias: Float32[Array, "e"] | None, share: Share
) -> tuple[Int[Array, "t j"], Float32[Array, "t j"]]:
  """Do the same, and divide the weights of the chosen experts by their sum (Qwen3-MoE, SDAR)."""
  chosen, weights = softmax(logits, bias, share)
  return chosen, weights / weights.sum(-1, keepdims=True)


def sigmoid(
  logits: Float32[Array, "t e"], bias: Float32[Array, "e"] | None, share: Share
) -> tuple[Int[Array, "t j"], Float32[Array, "t j"]]:
  """Weigh by sigmoid, divided by the sum over the chosen experts, times a scale (LLaDA2).

  The bias enters the choice alone. A group counts as much as its two best experts together, and a token's experts are
  the best of its best groups. As in the authors' code, the weight of a single expert is not divided by itself.
  """
  score = jax.nn.sigmoid(logits)
  ranked = score if bias is None else score + bias
  if share.num_groups > 1:
    ranked = _within_groups(ranked, share)
  chosen = jax.lax.top_k(ranked, share.number)[1]
  weights = jnp.take_along_axis(score, chosen, axis=-1)
  if share.number > 1:
    weights /= weights.sum(-1, keepdims=True) + 1e-20
  return chosen, weights * share.scale


def _within_groups(score: Float32[Array, "t e"], share: Share) -> Float32[Array, "t e"]:
  """Set the scores of experts outside of a token's best groups to -inf."""
  grouped = score.reshape(score.shape[0], share.num_groups, -1)
  best = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)
  kept = jax.lax.top_k(best, share.groups_per_token)[1]
  is_kept = (kept[:, :, None] == jnp.arange(share.num_groups)).any(1)
  return jnp.where(is_kept[:, :, None], grouped, -jnp.inf).reshape(score.shape)


# by the name in `ModelConfig.router`
ROUTERS: dict[str, Router] = {"softmax": softmax, "softmax_normalised": softmax_normalised, "sigmoid": sigmoid}


def tally(choice: Choice, is_valid: Bool[Array, "b l"], num_experts: int) -> Routing:
  """Add up what a layer's router did with the valid tokens of each row."""
  is_taken = (choice.experts[..., None] == jnp.arange(num_experts)) & is_valid[..., None, None]
  return Routing(is_taken.sum((1, 2), dtype=jnp.float32), jnp.where(is_valid, choice.entropy, 0).sum(1))


def describe(routing: Routing, experts_per_token: int) -> dict[str, Float32[Array, ""]]:
  """Compute the figures of a model's routers, means over its layers with experts.

  `router_max_load` is the load of the busiest expert, as a multiple of an even share. `router_load_entropy` is the
  entropy of the shares of the load, ln e where it is even, and `router_entropy` that of a token's softmax over all
  experts, mean over tokens; nats.

  Args:
    routing: sums over any tokens, the same multiple of all of them.
  """
  total = routing.load.sum(-1)
  share = routing.load / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[:, None]
  figures = {
    "router_max_load": share.max(-1) * share.shape[-1],
    "router_load_entropy": jax.scipy.special.entr(share).sum(-1),
    "router_entropy": routing.entropy * experts_per_token / jnp.maximum(total, jnp.finfo(jnp.float32).tiny),
  }
  return {name: value.mean() for name, value in figures.items()}
