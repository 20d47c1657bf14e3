"""Parallel decoding without a cache: how many tokens a model call keeps follows from its confidence (Fast-dLLM)."""

from jaxtyping import Array, Float, Key

from dmpo_jax.samplers.loop import Denoiser, Plan, View, decode, take_block
from dmpo_jax.samplers.selection import make_accept
from dmpo_jax.structs import Rollouts


def sample(
  denoiser: Denoiser,
  keys: Key[Array, "b"],
  plan: Plan,
  *,
  rule: str = "threshold",
  threshold: float = 0.9,
  factor: float = 1.0,
) -> Rollouts:
  """Decode b completions by one of the rules of parallel decoding (arXiv 2505.22618, algorithm 1 without its cache).

  Args:
    rule: count, threshold, factor; see `rules.make_accept`.
    threshold, factor: of the rules of that name.

  Raises:
    ValueError: see `rules.make_accept`.
  """
  accept, most_calls = make_accept(denoiser, plan, rule=rule, threshold=threshold, factor=factor)

  def look(view: View, state: tuple[()], kv_cache: None) -> Float[Array, "b s d"]:
    return take_block(denoiser.hidden(view.completion), view.start, plan.block_length)

  rollouts, _ = decode(look, accept, (), keys, plan, denoiser, most_calls=most_calls)
  return rollouts
