"""From gradients to changes of the parameters: clipping, AdamW, and the learning rate's course over the updates."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

NOT_DECAYED = ("scale", "bias")  # names of parameters that are no matrices, also where layers are stacked


def make_optimizer(
  learning_rate: optax.Schedule | float, *, b1: float, b2: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
  """Chain clipping by the global norm and AdamW (Loshchilov & Hutter, arXiv 1711.05101).

  Args:
    learning_rate: of each update, counted from 0.
    weight_decay: of matrices and embeddings; norms are not decayed.
    clip_norm: the gradient is scaled down to this global norm.

  Raises:
    ValueError: from the `init` of what is returned, where a parameter is not float32.
  """
  chain = optax.chain(
    optax.clip_by_global_norm(clip_norm),
    optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=_is_decayed),
  )
  return optax.GradientTransformation(lambda params: chain.init(_check_float32(params)), chain.update)


def _check_float32(params: Any) -> Any:
  # An update is often a ten-thousandth of a parameter, and bfloat16 keeps steps of a 256th: nearly all would be lost.
  for path, leaf in jax.tree.leaves_with_path(params):
    if leaf.dtype != jnp.float32:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      raise ValueError(
        f"parameters are trained in float32, as small updates are lost in others: {name} is {leaf.dtype}"
      )
  return params


def _is_decayed(params: Any) -> Any:
  return jax.tree.map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def warmup_constant(learning_rate: float, warmup_updates: int) -> optax.Schedule:
  """Rise linearly over the first `warmup_updates` updates, none of them at 0, then stay at `learning_rate`."""

  def schedule(update: jax.typing.ArrayLike) -> jax.Array:
    return learning_rate * jnp.minimum(1.0, (update + 1) / (warmup_updates + 1))

  return schedule


def warmup_cosine(learning_rate: float, *, num_updates: int) -> optax.Schedule:
  """Rise linearly over the first tenth of `num_updates`, none of them at 0, then fall to 0 by half a cosine."""
  warmup_updates = num_updates // 10

  def schedule(update: jax.typing.ArrayLike) -> jax.Array:
    rise = (update + 1) / (warmup_updates + 1)
    fallen = jnp.clip((update - warmup_updates) / (num_updates - warmup_updates), 0.0, 1.0)
    return learning_rate * jnp.minimum(rise, 0.5 * (1 + jnp.cos(jnp.pi * fallen)))

  return schedule
