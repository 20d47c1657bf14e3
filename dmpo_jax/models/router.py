"""Which experts a token takes, and with which weights."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int


@dataclasses.dataclass(frozen=True)
class Router:
  """How a family chooses a token's experts from the softmax over all of them, and weighs their outputs.

  Args:
    is_normalised: the weights of a token's experts are divided by their sum.
    bias_weighs: the expert bias is part of the weights; False: of the choice alone.
  """

  is_normalised: bool = False
  bias_weighs: bool = True


# By the name in `ModelConfig.router`. A family that routes otherwise is an entry, and what it needs a field above.
ROUTERS = {"softmax": Router()}  # LLaDA-MoE's, oddities included: no normalisation, and the bias enters the weights


def route(
  logits: Float32[Array, "t e"], bias: Float32[Array, "e"] | None, router: Router, number: int
) -> tuple[Int[Array, "t j"], Float32[Array, "t j"]]:
  """Choose each token's `number` experts, the best first, and their weights."""
  weights = jax.nn.softmax(logits, axis=-1)
  score = weights if bias is None else weights + bias
  _, chosen = jax.lax.top_k(score, number)
  taken = jnp.take_along_axis(score if router.bias_weighs else weights, chosen, axis=-1)
  return chosen, taken / taken.sum(-1, keepdims=True) if router.is_normalised else taken
