"""Between the model and the objectives: the log-probabilities of a group's completions under given masks."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from dmpo_jax.models.denoiser import Scores, completion_scores
from dmpo_jax.models.llada import LLaDA
from dmpo_jax.structs import Prompts

Score = Callable[..., Scores]  # of is_masked [p, g, r, c], and prompt_is_masked [p, g, r, q] or None


def make_score(
  model: LLaDA,
  variables: Mapping[str, Any],
  prompts: Prompts,
  completion: Int[Array, "p g c"],
  *,
  chunk: int = 0,
  dropout_keys: Key[Array, "p g"] | None = None,
) -> Score:
  """Close over a policy and its completions; the result maps masks to scores.

  `score(is_masked, prompt_is_masked=None)`, [p, g, r, c] and [p, g, r, q], gives log p(y_l | prompt, y with the masked
  positions hidden) and the entropy of that distribution at *every* completion position, float32 [p, g, r, c].

  Args:
    chunk: completion positions whose logits exist at one time; 0 for all.
    dropout_keys: keys of the rollouts when the adapters' dropout is on; a replicate folds in its index.
  """

  def score(is_masked: Bool[Array, "p g r c"], prompt_is_masked: Bool[Array, "p g r q"] | None = None) -> Scores:
    p, g, r, c = is_masked.shape

    def rows(array: jax.Array) -> jax.Array:
      return jnp.broadcast_to(array, (p, g, r, array.shape[-1])).reshape(p * g * r, -1)

    keys = None
    if dropout_keys is not None:
      keys = jax.vmap(jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(r))))(dropout_keys)
      keys = keys.reshape(p * g * r)
    targets = rows(completion[:, :, None])
    noised = jnp.where(rows(is_masked), model.config.mask_token_id, targets)
    prompt = rows(prompts.tokens[:, None, None])
    if prompt_is_masked is not None:
      prompt = jnp.where(rows(prompt_is_masked), model.config.mask_token_id, prompt)
    scores = completion_scores(
      model,
      variables,
      prompt,
      rows(prompts.is_valid[:, None, None]),
      noised,
      targets,
      chunk=chunk,
      dropout_keys=keys,
    )
    return jax.tree.map(lambda array: array.reshape(p, g, r, c), scores)

  return score
