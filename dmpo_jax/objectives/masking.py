"""Which completion positions the model has to predict: the random masks under every likelihood bound and loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key


def draw_masks(
  keys: Key[Array, "p g"],
  is_counted: Bool[Array, "p g c"],
  *,
  num_replicates: int,
  antithetic: bool,
  min_ratio: float,
  max_ratio: float,
) -> tuple[Bool[Array, "p g {num_replicates} c"], Float[Array, "p g {num_replicates}"]]:
  """Draw masks of each rollout: lambda ~ U(min_ratio, max_ratio), then each counted position with probability lambda.

  Replicate i of a rollout depends on the rollout's key and on i, and its position l on these and on l: not on the
  other rows, the number of replicates or of positions.

  Args:
    keys: the rollouts' keys.
    is_counted: positions that may be masked.
    num_replicates: masks of each rollout.
    antithetic: see `place_masks`.
    min_ratio, max_ratio: range of lambda, 0 <= min_ratio <= max_ratio <= 1.

  Returns:
    is_masked, and the probability with which each replicate's positions were masked (see `place_masks`).

  Raises:
    ValueError: an odd number of antithetic replicates, or a range outside [0, 1].
  """
  _check(num_replicates, antithetic, min_ratio, max_ratio)
  num_draws = num_replicates // 2 if antithetic else num_replicates

  def draw(key: Key[Array, ""], replicate: jax.Array) -> jax.Array:
    # element i of uniform(key, (n,)) depends on the key and on i alone
    return jax.random.uniform(jax.random.fold_in(key, replicate), (1 + is_counted.shape[-1],))

  over_replicates = jax.vmap(draw, (None, 0))
  uniform = jax.vmap(jax.vmap(over_replicates, (0, None)), (0, None))(keys, jnp.arange(num_draws))
  return place_masks(
    uniform[..., 0], uniform[..., 1:], is_counted, antithetic=antithetic, min_ratio=min_ratio, max_ratio=max_ratio
  )


def place_masks(
  u_ratio: Float[Array, "p g n"],
  u_position: Float[Array, "p g n c"],
  is_counted: Bool[Array, "p g c"],
  *,
  antithetic: bool,
  min_ratio: float,
  max_ratio: float,
) -> tuple[Bool[Array, "p g r c"], Float[Array, "p g r"]]:
  """Turn uniform noise in [0, 1) into masks: position l is masked where u_position < lambda.

  lambda = min_ratio + (max_ratio - min_ratio) * u_ratio. Antithetic: the n draws are followed by their complements
  within the counted positions, r = 2n, so that each pair predicts every counted position exactly once. A complement's
  ratio is 1 - lambda, in [1 - max_ratio, 1 - min_ratio]; either half of a pair may be empty.
  """
  ratio = min_ratio + (max_ratio - min_ratio) * u_ratio
  is_drawn = u_position < ratio[..., None]
  if antithetic:
    ratio = jnp.concatenate([ratio, 1 - ratio], axis=2)
    is_drawn = jnp.concatenate([is_drawn, ~is_drawn], axis=2)
  return is_drawn & is_counted[:, :, None], ratio


def _check(num_replicates: int, antithetic: bool, min_ratio: float, max_ratio: float) -> None:
  if num_replicates < 1:
    raise ValueError(f"objective.num_replicates (num_elbo_replicates)={num_replicates}: must be at least 1")
  if antithetic and num_replicates % 2:
    raise ValueError(
      f"objective.num_replicates (num_elbo_replicates)={num_replicates} with objective.antithetic=True: masks come in "
      "complementary pairs, so give an even number or set objective.antithetic=False"
    )
  if not 0 <= min_ratio <= max_ratio <= 1:
    raise ValueError(
      f"objective.min_mask_ratio={min_ratio}, objective.max_mask_ratio={max_ratio}: must be 0 <= min <= max <= 1"
    )
