"""Which completion positions the model has to predict: the random masks under every likelihood bound and loss."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key


@dataclasses.dataclass(frozen=True)
class MaskSampling:
  """How masks of a rollout are drawn.

  Args:
    num: mask samples of each rollout.
    antithetic: masks come in complementary pairs, i and num / 2 + i: each pair masks every counted position once.
    min_ratio, max_ratio: the mask ratio is drawn from U(min_ratio, max_ratio); a complement's is 1 minus it.
    block_length: where positive, a sample masks some of one block of so many positions and everything after it, as a
      block-wise sampler meets it; 0: anywhere. Read by `draw_block_masks` alone.
  """

  num: int
  antithetic: bool = True
  min_ratio: float = 0.0
  max_ratio: float = 1.0
  block_length: int = 0

  def problem(self) -> str:
    """Return why masks cannot be drawn like this; "" where they can."""
    if self.num < 1:
      return f"{self.num} mask samples: must be at least 1"
    if self.antithetic and self.num % 2:
      return f"{self.num} mask samples: must be even, as objective.antithetic = True draws them in complementary pairs"
    if not 0 <= self.min_ratio <= self.max_ratio <= 1:
      return f"mask ratios from {self.min_ratio} to {self.max_ratio}: must be 0 <= min <= max <= 1"
    return ""

  @property
  def num_draws(self) -> int:
    """Independent draws: half of the samples where they are antithetic."""
    return self.num // 2 if self.antithetic else self.num

  def pairs(self, first: int = 0) -> tuple[tuple[int, int], ...]:
    """Name the samples (i, j) that are complements of each other, counted from `first`."""
    return tuple((first + i, first + self.num_draws + i) for i in range(self.num - self.num_draws))


def draw_masks(
  keys: Key[Array, "p g"], is_counted: Bool[Array, "p g c"], masks: MaskSampling
) -> tuple[Bool[Array, "p g r c"], Float[Array, "p g r"]]:
  """Draw masks of each rollout: a ratio, then each counted position with that probability.

  Sample i of a rollout depends on the rollout's key and on i, and its position l on these and on l: not on other rows,
  nor on the number of samples or of positions.

  Args:
    keys: the rollouts' keys.
    is_counted: positions that may be masked.

  Returns:
    is_masked, and the probability with which each sample's positions were masked (see `place_masks`).

  Raises:
    ValueError: see `MaskSampling.problem`.
  """
  if problem := masks.problem():
    raise ValueError(problem)
  uniform = uniform_noise(keys, masks.num_draws, 1 + is_counted.shape[-1])
  return place_masks(uniform[..., 0], uniform[..., 1:], is_counted, masks)


def draw_block_masks(
  keys: Key[Array, "p g"], is_counted: Bool[Array, "p g c"], masks: MaskSampling
) -> tuple[Bool[Array, "p g r c"], Bool[Array, "p g r c"]]:
  """Draw masks within one block of each sample, chosen among those with a counted position; all after it is hidden.

  This is a block-wise sampler's view of a completion: the blocks before are whole, those after are MASK. With a
  block_length of 0 it is `draw_masks`, over the whole completion.

  Returns:
    is_read, the masked positions of the block, and is_masked, these and everything after the block.
  """
  if not masks.block_length:
    is_masked, _ = draw_masks(keys, is_counted, masks)
    return is_masked, is_masked
  if problem := masks.problem():
    raise ValueError(problem)
  uniform = uniform_noise(keys, masks.num_draws, 2 + is_counted.shape[-1])
  block = jnp.arange(is_counted.shape[-1]) // masks.block_length
  num_blocks = jnp.where(is_counted, block + 1, 1).max(-1)
  chosen = (uniform[..., 0] * num_blocks[:, :, None]).astype(jnp.int32)[..., None]
  is_drawn, _ = place_masks(uniform[..., 1], uniform[..., 2:], is_counted, masks)
  chosen = jnp.concatenate([chosen, chosen], axis=2) if masks.antithetic else chosen
  is_read = is_drawn & (block == chosen)
  return is_read, is_read | (block > chosen)


def uniform_noise(keys: Key[Array, "p g"], num_draws: int, width: int) -> Float[Array, "p g {num_draws} {width}"]:
  """Draw numbers in [0, 1) that belong to (rollout, draw, position), whatever the numbers of draws and positions."""

  def draw(key: Key[Array, ""], sample: jax.Array) -> jax.Array:
    # element i of uniform(key, (n,)) depends on the key and on i alone
    return jax.random.uniform(jax.random.fold_in(key, sample), (width,))

  over_samples = jax.vmap(draw, (None, 0))
  return jax.vmap(jax.vmap(over_samples, (0, None)), (0, None))(keys, jnp.arange(num_draws))


def place_masks(
  u_ratio: Float[Array, "p g n"],
  u_position: Float[Array, "p g n c"],
  is_counted: Bool[Array, "p g c"],
  masks: MaskSampling,
) -> tuple[Bool[Array, "p g r c"], Float[Array, "p g r"]]:
  """Turn uniform noise in [0, 1) into masks: position l is masked where u_position < lambda.

  lambda = min_ratio + (max_ratio - min_ratio) * u_ratio. Antithetic: the n draws are followed by their complements
  within the counted positions, r = 2n, so that each pair predicts every counted position exactly once. A complement's
  ratio is 1 - lambda, in [1 - max_ratio, 1 - min_ratio]; either half of a pair may be empty.
  """
  ratio = masks.min_ratio + (masks.max_ratio - masks.min_ratio) * u_ratio
  is_drawn = u_position < ratio[..., None]
  if masks.antithetic:
    ratio = jnp.concatenate([ratio, 1 - ratio], axis=2)
    is_drawn = jnp.concatenate([is_drawn, ~is_drawn], axis=2)
  return is_drawn & is_counted[:, :, None], ratio
