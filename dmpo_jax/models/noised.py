"""From prompts and noised completions to hidden states in a model that attends by blocks.

The clean completion runs once for all noised copies of a rollout, and the prompt once for all rollouts of a row
(`copies.Copies`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dmpo_jax import sharding
from dmpo_jax.models.copies import Copies
from dmpo_jax.models.denoiser import run_routed
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.structs import Params, Prompts, Routing

# folded into a rollout's key for its clean copy, and into its group's first one for the prompt: no index of a copy
_CLEAN, _PROMPT = 2**31 - 3, 2**31 - 4


def noised_hidden(
  model: Transformer,
  variables: Params,
  prompts: Prompts,
  clean: Int[Array, "p g c"],
  noised: Int[Array, "p g r c"],
  dropout_keys: Key[Array, "p g"] | None = None,
) -> tuple[Float[Array, "p g r c d"], Routing | None]:
  """Return the hidden states that predict every position of noised completions.

  A position sees its own block of the noised completion, and the clean blocks before it. Where the model has experts,
  also say what its routers did with each rollout's tokens; rollouts that share a row share its sums.

  Args:
    dropout_keys: the rollouts' keys of the adapters' dropout; each copy draws for itself. None: no dropout.
  """
  config, (p, g, r, c) = model.config, noised.shape
  parts = count_parts(p, g, r, config.layer_rows)

  def rows(array: jax.Array) -> jax.Array:
    """Give a row to so many rollouts of each prompt, and fill rows up to what the devices divide."""
    return sharding.fill_rows(array.reshape(p * parts, g // parts, *array.shape[2:]))

  prompt, is_valid = (
    sharding.fill_rows(jnp.repeat(array, parts, axis=0)) for array in (prompts.tokens, prompts.is_valid)
  )
  versions = rows(jnp.concatenate([clean[:, :, None], noised], axis=2))
  tokens, is_valid, positions, copies = _lay_out(prompt, is_valid, versions, config.block_length)
  keys = None
  if dropout_keys is not None:
    first = sharding.fill_rows(jnp.repeat(_fold(dropout_keys[:, 0], _PROMPT), parts, axis=0))
    keys = _keys_of_columns(first, rows(_keys_of_copies(dropout_keys, r)), copies)
  arguments = dict(is_valid=is_valid, positions=positions, copies=copies, dropout_keys=keys)
  hidden, routing = run_routed(model, variables, sharding.constrain(tokens, "batch", None), **arguments)
  hidden = hidden[:, copies.prompt :].reshape(hidden.shape[0], g // parts, 1 + r, copies.width, -1)[:, :, 1:]
  start = prompts.is_valid.sum(1) % config.block_length
  start = sharding.fill_rows(jnp.repeat(start, parts, axis=0))
  hidden = jax.vmap(lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, c, axis=2))(hidden, start)
  routing = jax.tree.map(lambda sums: _of_rollouts(sums[:, : p * parts], g // parts, (p, g)), routing)
  return hidden[: p * parts].reshape(p, g, r, c, -1), routing


def _of_rollouts(sums: Float[Array, "y b *e"], rollouts: int, groups: tuple[int, int]) -> Float[Array, "y p g *e"]:
  """Share the sums of rows among their rollouts."""
  return (jnp.repeat(sums, rollouts, axis=1) / rollouts).reshape(sums.shape[0], *groups, *sums.shape[2:])


def count_parts(num_prompts: int, group_size: int, num_noised: int, layer_rows: int) -> int:
  """Count the rows for each prompt: as few as the devices divide, so that a device has a prompt's rollouts beside it.

  A row has at most `layer_rows` noised copies if it can; 0: any number.
  """
  for parts in range(1, group_size):
    is_small = layer_rows == 0 or group_size // parts * num_noised <= layer_rows
    if group_size % parts == 0 and num_prompts * parts % sharding.num_shares("batch") == 0 and is_small:
      return parts
  return group_size


def _lay_out(
  prompt: Int[Array, "b q"], is_valid: Bool[Array, "b q"], versions: Int[Array, "b g n c"], block: int
) -> tuple[Int[Array, "b l"], Bool[Array, "b l"], Int[Array, "b l"], Copies]:
  """Lay out rows, each with the versions of some completions of its prompt: tokens, which of them exist, positions."""
  (num_rows, q), (_, g, n, c) = prompt.shape, versions.shape
  rest = (is_valid.sum(1) % block)[:, None]  # tokens behind the prompt's last whole block
  most = min(block - 1, q)
  copies = Copies(q, g, n - 1, -(-(most + c) // block) * block, block)

  index = jnp.arange(q) - rest
  whole, is_whole = (jnp.take_along_axis(x, jnp.maximum(index, 0), axis=1) for x in (prompt, is_valid))
  is_whole &= index >= 0

  versions = versions.reshape(num_rows, g * n, c)
  tail = jnp.broadcast_to(prompt[:, None, q - most :], (num_rows, g * n, most))
  index = jnp.arange(copies.width) + most - rest
  versions = jnp.concatenate([tail, versions], axis=2)
  versions = jnp.take_along_axis(versions, jnp.minimum(index, most + c - 1)[:, None], axis=2)

  def join(of_prompt: jax.Array, of_copy: jax.Array) -> jax.Array:
    of_copy = jnp.broadcast_to(of_copy, (num_rows, g * n, copies.width))
    return jnp.concatenate([of_prompt, of_copy.reshape(num_rows, -1)], axis=1)

  num_whole = is_whole.sum(1)[:, None]
  positions = join(jnp.maximum(jnp.cumsum(is_whole, axis=1) - 1, 0), (num_whole + jnp.arange(copies.width))[:, None])
  return join(whole, versions), join(is_whole, (index < most + c)[:, None]), positions, copies


def _keys_of_copies(keys: Key[Array, "p g"], num_noised: int) -> Key[Array, "p g n"]:
  """Derive a key for the clean copy of each rollout, and for each noised one."""
  numbers = jnp.concatenate([jnp.full(1, _CLEAN), jnp.arange(num_noised)])
  return jax.vmap(jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)))(keys)


def _keys_of_columns(of_prompt: Key[Array, "b"], of_copies: Key[Array, "b g n"], copies: Copies) -> Key[Array, "b l"]:
  num_rows = of_prompt.shape[0]
  prompt = jnp.broadcast_to(of_prompt[:, None], (num_rows, copies.prompt))
  behind = jnp.broadcast_to(of_copies[..., None], (*of_copies.shape, copies.width))
  return jnp.concatenate([prompt, behind.reshape(num_rows, -1)], axis=1)


def _fold(keys: Key[Array, "p"], number: int) -> Key[Array, "p"]:
  return jax.vmap(jax.random.fold_in, (0, None))(keys, number)
