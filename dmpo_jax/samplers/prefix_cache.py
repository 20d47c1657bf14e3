"""Fast-dLLM's prefix cache: after a block's first call only the block and what follows it are computed."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, Key

from dmpo_jax.samplers.loop import Denoiser, Plan, View, decode, take_block
from dmpo_jax.samplers.selection import make_accept
from dmpo_jax.structs import Rollouts


@runtime_checkable
class PrefixDenoiser(Denoiser, Protocol):
  """A denoiser that remembers keys and values.

  `prefill` is `hidden` and also gives the memory of the whole row. `suffix` computes the completion's positions from
  `start` (a multiple of `block_length`) on, all before it as the memory has it, and returns the first `block_length`.
  """

  def prefill(self, completion: Int[Array, "b c"]) -> tuple[Float[Array, "b c d"], Any]: ...

  def suffix(
    self, completion: Int[Array, "b c"], start: Int[Array, ""], kv_cache: Any, block_length: int
  ) -> Float[Array, "b s d"]: ...


def sample(
  denoiser: PrefixDenoiser,
  keys: Key[Array, "b"],
  plan: Plan,
  *,
  rule: str = "threshold",
  threshold: float = 0.9,
  factor: float = 1.0,
) -> Rollouts:
  """Decode b completions by a rule of parallel decoding, each block's prefix cached (arXiv 2505.22618, algorithm 1).

  A block's first call runs the whole row, which also decides tokens; until the block is done, keys and values of the
  prompt and the blocks before are those of that call.

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
    return denoiser.suffix(view.completion, view.start, kv_cache, plan.block_length)

  rollouts, _ = decode(look, accept, (), keys, plan, denoiser, most_calls=most_calls, enter=enter)
  return rollouts
