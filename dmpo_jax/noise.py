"""Where randomness comes from: the seed, then its purpose, the step, the prompt and the rollout.

Keys are derived, never carried, so a row's noise does not depend on its batch, its padding, the devices or where a run
was interrupted. Below a row's key, its users fold in what is theirs: sampler step, mask sample, position.
"""

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, UInt32


def step_key(seed: int | Key[Array, ""], purpose: str, step: int | Int[Array, ""]) -> Key[Array, ""]:
  """Key of one step of one purpose, such as ("rollout", buffer) or ("loss", update).

  Args:
    seed: or `jax.random.key(seed)`, the argument of a compiled program that serves every seed.
  """
  root = jax.random.key(seed) if isinstance(seed, int) else seed
  return jax.random.fold_in(jax.random.fold_in(root, zlib.crc32(purpose.encode())), step)


def row_keys(
  key: Key[Array, ""], prompt_id: UInt32[Array, "p"], group_size: int, first: int | Int[Array, ""] = 0
) -> Key[Array, "p g"]:
  """Key of each rollout of each prompt: the step's key, then the prompt's id, then the rollout's index.

  Args:
    group_size: rollouts of each prompt that keys are wanted for, where they are a part of the group.
    first: index of the first of them.
  """
  by_prompt = jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_id)
  return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(by_prompt, first + jnp.arange(group_size))
