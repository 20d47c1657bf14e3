"""Rows of a model that attends by blocks, in which its prompt and its clean completions stand once for all noised ones.

A row is a prompt and, for some of its rollouts, the completion without masks and with each of several. A token sees its
own block, and the blocks before it without masks (BD3-LM, arXiv 2503.09573).
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Bool, Int


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Copies:
  """Where everything stands in a row [prompt; copies of the first rollout, clean and noised; of the second; ...].

  Blocks begin at the same columns in all rows: the prompt has its whole blocks alone, at its right end, and a copy
  begins with the rest of the prompt.

  Args:
    prompt: columns of the prompt.
    rollouts: of the row.
    noised: copies of each rollout beside the clean one.
    width: columns of a copy, a multiple of the block.
    block: tokens.
  """

  prompt: int
  rollouts: int
  noised: int
  width: int
  block: int

  @property
  def shape(self) -> tuple[int, int, int, int]:
    """What the columns behind the prompt divide into: rollouts, copies, blocks, tokens."""
    return self.rollouts, 1 + self.noised, self.width // self.block, self.block

  def rows(self, layer_rows: int) -> int:
    """Translate a number of mask samples to rows, at least one; 0, which means all, stays 0."""
    return min(layer_rows, max(layer_rows // (self.rollouts * self.noised), 1))

  def may_see(self, query: Int[np.ndarray, "l"], key: Int[np.ndarray, "m"]) -> Bool[np.ndarray, "l m"]:
    """Whether tokens may attend to others, by their columns; columns behind the row are further copies."""
    (query_copy, query_block), (key_copy, key_block) = self._place(query[:, None]), self._place(key[None])
    is_own = (key_copy == query_copy) & (key_block == query_block)
    is_clean = (key_copy % (1 + self.noised) == 0) & (key_copy // (1 + self.noised) == query_copy // (1 + self.noised))
    in_prompt = np.where(query_copy < 0, key_block <= query_block, True)
    return np.where(key_copy < 0, in_prompt, is_own | (is_clean & (key_block < query_block))) & (
      (query_copy >= 0) | (key_copy < 0)
    )

  def _place(self, column: Int[np.ndarray, "*n"]) -> tuple[Int[np.ndarray, "*n"], Int[np.ndarray, "*n"]]:
    """Return the number of a column's copy, -1 in the prompt, and of its block there; the prompt's are negative."""
    behind = column - self.prompt
    copy = np.where(behind < 0, -1, behind // self.width)
    return copy, np.where(behind < 0, behind, behind % self.width) // self.block
