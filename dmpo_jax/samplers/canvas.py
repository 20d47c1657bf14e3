"""What a model that attends by blocks decodes: the prompt's remainder and the completion, up to whole blocks.

Such a model counts blocks from the prompt's first token, so the tokens behind the prompt's last whole block share one
with the first of the completion. A row's canvas begins there. Its blocks are the model's, whatever the prompt's length.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Num

from dmpo_jax.structs import Denoiser


class Canvas(NamedTuple):
  """The rows before the first call. With full attention they are the completion, and the last two are None."""

  tokens: Int[Array, "b c"]  # of the prompt, then MASK
  is_open: Bool[Array, "b c"] | None  # False for the prompt's tokens, and behind the completion's last block
  num_given: Int[Array, "b"] | None  # the prompt's tokens

  def open_only(self, array: Bool[Array, "b c"]) -> Bool[Array, "b c"]:
    """Make an array of whole rows False where nothing is to be decided."""
    return array if self.is_open is None else array & self.is_open

  def cut(self, array: Num[Array, "b c"], length: int) -> Num[Array, "b d"]:
    """Take the completion's `length` positions out of an array of whole rows."""
    if self.num_given is None:
      return array
    return jnp.take_along_axis(array, self.num_given[:, None] + jnp.arange(length), axis=1)


def make_canvas(denoiser: Denoiser, num_rows: int, completion_length: int) -> Canvas:
  """Lay out the rows of a sampler.

  A canvas has a block more than the completion. It takes what the prompt's remainder moves out, and the positions that
  the completion's last block has beyond it: they are decoded with it, as SDAR's code does, and dropped.
  """
  mask, size = denoiser.mask_token_id, denoiser.block_length
  if not size:
    return Canvas(jnp.full((num_rows, completion_length), mask, jnp.int32), None, None)
  given, num_given = denoiser.remainder()
  index = jnp.arange(completion_length + size)
  end = -(-(num_given + completion_length) // size) * size
  is_given = index < num_given[:, None]
  given = jnp.pad(given, ((0, 0), (0, completion_length)))
  return Canvas(jnp.where(is_given, given, mask), ~is_given & (index < end[:, None]), num_given)
