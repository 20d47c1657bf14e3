"""Which completion positions the model has to predict: the random masks under every likelihood bound and loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key


def draw_masks(
  keys: Key[Array, "p g"],
  is_counted: Bool[Array, "p g c"],
  *,
  num_mask_samples: int,
  antithetic: bool,
  min_ratio: float,
  max_ratio: float,
) -> tuple[Bool[Array, "p g {num_mask_samples} c"], Float[Array, "p g {num_mask_samples}"]]:
  """Draw masks of each rollout: lambda ~ U(min_ratio, max_ratio), then each counted position with probability lambda.

  Mask sample i of a rollout depends on the rollout's key and on i, and its position l on these and on l: not on the
  other rows, the number of mask samples or of positions.

  Args:
    keys: the rollouts' keys.
    is_counted: positions that may be masked.
    num_mask_samples: masks of each rollout.
    antithetic: see `place_masks`.
    min_ratio, max_ratio: range of lambda, 0 <= min_ratio <= max_ratio <= 1.

  Returns:
    is_masked, and the probability with which each mask sample's positions were masked (see `place_masks`).

  Raises:
    ValueError: an odd number of antithetic mask samples, or a range outside [0, 1].
  """
  _check(num_mask_samples, antithetic, min_ratio, max_ratio)
  num_draws = num_mask_samples // 2 if antithetic else num_mask_samples

  uniform = uniform_noise(keys, num_draws, 1 + is_counted.shape[-1])
  return place_masks(
    uniform[..., 0], uniform[..., 1:], is_counted, antithetic=antithetic, min_ratio=min_ratio, max_ratio=max_ratio
  )


def draw_block_masks(
  keys: Key[Array, "p g"],
  is_counted: Bool[Array, "p g c"],
  *,
  num_mask_samples: int,
  antithetic: bool,
  min_ratio: float,
  max_ratio: float,
  block_length: int,
) -> tuple[Bool[Array, "p g {num_mask_samples} c"], Bool[Array, "p g {num_mask_samples} c"]]:
  """Draw masks within one block of each mask sample, drawn among those with a counted position; all after it is hidden.

  A block-wise sampler's view of a completion: the blocks before are whole, those after are MASK.

  Args:
    block_length: of the blocks; 0: `draw_masks`, over the whole completion.

  Returns:
    is_read, the masked positions of the block, and is_masked, these and everything after the block.
  """
  ratios = dict(antithetic=antithetic, min_ratio=min_ratio, max_ratio=max_ratio)
  if not block_length:
    is_masked, _ = draw_masks(keys, is_counted, num_mask_samples=num_mask_samples, **ratios)
    return is_masked, is_masked
  _check(num_mask_samples, antithetic, min_ratio, max_ratio)
  num_draws = num_mask_samples // 2 if antithetic else num_mask_samples
  uniform = uniform_noise(keys, num_draws, 2 + is_counted.shape[-1])
  block = jnp.arange(is_counted.shape[-1]) // block_length
  num_blocks = jnp.where(is_counted, block + 1, 1).max(-1)
  chosen = (uniform[..., 0] * num_blocks[:, :, None]).astype(jnp.int32)[..., None]
  is_drawn, _ = place_masks(uniform[..., 1], uniform[..., 2:], is_counted, **ratios)
  chosen = jnp.concatenate([chosen, chosen], axis=2) if antithetic else chosen
  is_read = is_drawn & (block == chosen)
  return is_read, is_read | (block > chosen)


def complementary_pairs(num_mask_samples: int, antithetic: bool, first: int = 0) -> tuple[tuple[int, int], ...]:
  """Name the mask samples (i, j) that `draw_masks` makes complements of each other, counted from `first`."""
  half = num_mask_samples // 2 if antithetic else 0
  return tuple((first + i, first + half + i) for i in range(half))


def uniform_noise(keys: Key[Array, "p g"], num_draws: int, width: int) -> Float[Array, "p g {num_draws} {width}"]:
  """Draw numbers in [0, 1) that belong to (rollout, draw, position), whatever the numbers of draws and positions."""

  def draw(key: Key[Array, ""], mask_sample: jax.Array) -> jax.Array:
    # element i of uniform(key, (n,)) depends on the key and on i alone
    return jax.random.uniform(jax.random.fold_in(key, mask_sample), (width,))

  over_mask_samples = jax.vmap(draw, (None, 0))
  return jax.vmap(jax.vmap(over_mask_samples, (0, None)), (0, None))(keys, jnp.arange(num_draws))


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


def _check(num_mask_samples: int, antithetic: bool, min_ratio: float, max_ratio: float) -> None:
  if num_mask_samples < 1:
    raise ValueError(f"objective.num_mask_samples (num_elbo_samples)={num_mask_samples}: must be at least 1")
  if antithetic and num_mask_samples % 2:
    raise ValueError(
      f"objective.num_mask_samples (num_elbo_samples)={num_mask_samples} with objective.antithetic=True: masks come in "
      "complementary pairs, so give an even number or set objective.antithetic=False"
    )
  if not 0 <= min_ratio <= max_ratio <= 1:
    raise ValueError(
      f"objective.min_mask_ratio={min_ratio}, objective.max_mask_ratio={max_ratio}: must be 0 <= min <= max <= 1"
    )
