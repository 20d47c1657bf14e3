"""Fast-dLLM's dual cache: after a block's first call only the block is computed, what follows it is cached too."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, Key

from dmpo_jax.samplers.loop import Denoiser, Plan, View, decode, take_block
from dmpo_jax.samplers.selection import make_accept
from dmpo_jax.structs import Rollouts


@runtime_checkable
class DualDenoiser(Denoiser, Protocol):
  """A denoiser that remembers keys and values.

  `prefill` is `hidden` and also gives the memory of the whole row. `block` computes the completion's positions
  [start, start + s), all others as the memory has them.
  """

  def prefill(self, completion: Int[Array, "b c"]) -> tuple[Float[Array, "b c d"], Any]: ...

  def block(self, tokens: Int[Array, "b s"], start: Int[Array, ""], kv_cache: Any) -> Float[Array, "b s d"]: ...


def sample(
  denoiser: DualDenoiser,
  keys: Key[Array, "b"],
  plan: Plan,
  *,
  rule: str = "threshold",
  threshold: float = 0.9,
  factor: float = 1.0,
) -> Rollouts:
  """Decode b completions by a rule of parallel decoding, all but the block cached (arXiv 2505.22618, section 3.2).

  A block's first call runs the whole row, which also decides tokens; until the block is done, keys and values of all
  other positions, the masked ones behind it too, are those of that call.

  Args:
    rule, threshold, factor: as for `parallel.sample`.

  Raises:
    ValueError: see `rules.make_accept`.
  """
  accept, most_calls = make_accept(denoiser, plan, rule=rule, threshold=threshold, factor=factor)

  def enter(view: View) -> tuple[Float[Array, "b s d"], Any]:
    hidden, kv_cache = denoiser.prefill(view.completion)
    return take_block(hidden, view.start, plan.block_length), kv_cache

  def look(view: View, state: tuple[()], kv_cache: Any) -> Float[Array, "b s d"]:
    return denoiser.block(view.tokens, view.start, kv_cache)

  rollouts, _ = decode(look, accept, (), keys, plan, denoiser, most_calls=most_calls, enter=enter)
  return rollouts
