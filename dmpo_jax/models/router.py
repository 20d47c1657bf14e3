"""Which experts a token takes, and with which weights."""

from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float32, Int


@runtime_checkable
class Router(Protocol):
  """How a family chooses a token's `number` experts, the best first, and weighs their outputs."""

  def __call__(
    self, logits: Float32[Array, "t e"], bias: Float32[Array, "e"] | None, number: int
  ) -> tuple[Int[Array, "t j"], Float32[Array, "t j"]]: ...


def softmax(
  logits: Float32[Array, "t e"], bias: Float32[Array, "e"] | None, number: int
) -> tuple[Int[Array, "t j"], Float32[Array, "t j"]]:
  """Take the highest of softmax over all experts + bias, and weigh by these values.

  This is LLaDA-MoE's, oddities included: weights are not normalised over the chosen experts, and contain the bias.
  """
  score = jax.nn.softmax(logits, axis=-1)
  score = score if bias is None else score + bias
  weights, chosen = jax.lax.top_k(score, number)
  return chosen, weights


ROUTERS: dict[str, Router] = {"softmax": softmax}  # by the name in `ModelConfig.router`
