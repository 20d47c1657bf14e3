"""Which completion positions the model has to predict: the masks under every likelihood bound and loss."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dmpo_jax.ranges import one_of

KINDS = ("random", "trajectory", "stratified")
_OF_GROUP = 2**31 - 2  # what the group's number folds into the key of its first rollout: no index of a mask sample


@dataclasses.dataclass(frozen=True)
class MaskSampling:
  """How masks of a rollout are drawn.

  Args:
    num: mask samples of each rollout.
    antithetic: masks come in complementary pairs, i and num / 2 + i: each pair masks every counted position once.
    min_ratio, max_ratio: the mask ratio is drawn from U(min_ratio, max_ratio); a complement's is 1 minus it.
    block_length: where positive, a sample masks some of one block of so many positions and everything after it, as a
      block-wise sampler meets it; 0: anywhere. Read by `draw_block_masks` alone.
    kind: `random`: a ratio, then each position with that probability. `stratified`: the same, but the ratios of a
      group are spread evenly (`spread_evenly`). `trajectory`: states that the sampler met (`mask_along_trajectory`).
  """

  num: int
  antithetic: bool = True
  min_ratio: float = 0.0
  max_ratio: float = 1.0
  block_length: int = 0
  kind: str = "random"

  def problem(self) -> str:
    """Return why masks cannot be drawn like this; "" where they can."""
    if self.num < 1:
      return f"{self.num} mask samples: must be at least 1"
    if self.antithetic and self.num % 2:
      return f"{self.num} mask samples: must be even, as objective.antithetic = True draws them in complementary pairs"
    if not 0 <= self.min_ratio <= self.max_ratio <= 1:
      return f"mask ratios from {self.min_ratio} to {self.max_ratio}: must be 0 <= min <= max <= 1"
    return f"{self.kind} masks: must be {wrong}" if (wrong := self.kind_problem()) else ""

  def kind_problem(self) -> str:
    """Return which kind the masks can be instead of theirs; "" where they can be of it."""
    if unknown := one_of(*KINDS).problem(self.kind):
      return unknown
    if self.kind == "trajectory" and self.antithetic:
      return "random or stratified, as objective.antithetic = True adds complements, states that no sampler met"
    if self.kind == "trajectory" and self.block_length:
      return f"random or stratified, as objective.mask_block_length = {self.block_length} masks within one block"
    return ""

  def ratio(self, uniform: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Turn noise in [0, 1) into mask ratios, U(min_ratio, max_ratio)."""
    return self.min_ratio + (self.max_ratio - self.min_ratio) * uniform

  @property
  def num_draws(self) -> int:
    """Independent draws: half of the samples where they are antithetic."""
    return self.num // 2 if self.antithetic else self.num

  def pairs(self, first: int = 0) -> tuple[tuple[int, int], ...]:
    """Name the samples (i, j) that are complements of each other, counted from `first`."""
    return tuple((first + i, first + self.num_draws + i) for i in range(self.num - self.num_draws))


def draw_masks(
  keys: Key[Array, "p g"],
  is_counted: Bool[Array, "p g c"],
  masks: MaskSampling,
  committed_at: Int[Array, "p g c"] | None = None,
) -> tuple[Bool[Array, "p g r c"], Float[Array, "p g r"]]:
  """Draw masks of each rollout: a ratio, then as many positions by `masks.kind`.

  Sample i of a rollout depends on the rollout's key and on i, and its position l on these and on l: not on other rows,
  nor on the number of samples or of positions. Stratified ratios depend on those numbers, and on the key of the group's
  first rollout.

  Args:
    keys: the rollouts' keys.
    is_counted: positions that may be masked.
    committed_at: the call that decided each position; read by `trajectory` alone.

  Returns:
    is_masked, and the probability with which each sample's positions were masked (see `place_masks`); along a
    trajectory the share of the counted positions that are.

  Raises:
    ValueError: see `MaskSampling.problem`.
  """
  if problem := masks.problem():
    raise ValueError(problem)
  uniform = uniform_noise(keys, masks.num_draws, 1 + is_counted.shape[-1])
  u_ratio = spread_evenly(keys, masks.num_draws) if masks.kind == "stratified" else uniform[..., 0]
  if masks.kind == "trajectory":
    assert committed_at is not None  # the losses and estimators that allow this kind know it
    return mask_along_trajectory(masks.ratio(u_ratio), committed_at, is_counted)
  return place_masks(u_ratio, uniform[..., 1:], is_counted, masks)


def mask_along_trajectory(
  ratio: Float[Array, "p g r"], committed_at: Int[Array, "p g c"], is_counted: Bool[Array, "p g c"]
) -> tuple[Bool[Array, "p g r c"], Float[Array, "p g r"]]:
  """Mask what the sampler had still to decide at a point of its trajectory.

  Of n counted positions, in the order in which calls decided them, the one with j before it is chosen,
  j = min(floor((1 - ratio) n), n - 1). Masked is M_k = {l: committed_at_l >= k}, k the call that decided it: a call's
  positions are masked together, and there is always one. With ratio ~ U(0, 1) the sample is M_k with probability
  |C_k| / n, C_k the positions that call k decided. A loss or an estimate that takes the mean over each sample's masked
  positions, the weight (n/m) 1(l in M) of `likelihood.elbo`, is then one of

    sum_k (|C_k| / |M_k|) sum_{l in M_k} log p(y_l | M_k),

  log p(y | x) along the trajectory if each call had decided random masked positions. For uniform orders of one position
  a call (the sampler `random_order`) its mean over orders is the ELBO. For another sampler it is not a bound; it
  compares policies at the states that sampling meets. Position l has the weight sum_{k <= committed_at_l} |C_k| / |M_k|
  there: from 1/n for the first of n calls to 1 + 1/2 + ... + 1/n for the last, where random masks give each 1; all add
  up to n, as those do. The best prediction at each such state is that of y_l given the state, whatever its weight.

  Where not all positions count, those that do not are hidden, in whatever order the sampler decided them.
  """
  num = is_counted.sum(-1)[..., None]
  before = jnp.maximum(jnp.minimum(jnp.floor((1 - ratio) * num).astype(jnp.int32), num - 1), 0)
  in_order = jnp.sort(jnp.where(is_counted, committed_at, jnp.iinfo(jnp.int32).max), axis=-1)
  call = jnp.take_along_axis(in_order, before, axis=-1)
  is_masked = (committed_at[:, :, None] >= call[..., None]) & is_counted[:, :, None]
  return is_masked, is_masked.sum(-1) / jnp.maximum(num, 1)


def spread_evenly(keys: Key[Array, "p g"], num_draws: int) -> Float[Array, "p g {num_draws}"]:
  """Draw numbers in [0, 1) that each are uniform and together spread: a shifted lattice.

  Draw j of n of rollout i of g gets frac(u + j / n + i / (n g)), u one uniform number of the group: the draws of a
  rollout are 1/n apart, and those of the group 1/(n g). Each is U(0, 1), so what is unbiased under independent numbers
  stays so. A standard error that takes a rollout's draws for independent is, as a rule, too large.
  """
  shift = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, _OF_GROUP)))(keys[:, 0])
  place = jnp.arange(num_draws) / num_draws + jnp.arange(keys.shape[1])[:, None] / (num_draws * keys.shape[1])
  numbers = shift[:, None, None] + place
  return numbers - jnp.floor(numbers)


def draw_block_masks(
  keys: Key[Array, "p g"],
  is_counted: Bool[Array, "p g c"],
  masks: MaskSampling,
  committed_at: Int[Array, "p g c"] | None = None,
) -> tuple[Bool[Array, "p g r c"], Bool[Array, "p g r c"]]:
  """Draw masks within one block of each sample, chosen among those with a counted position; all after it is hidden.

  This is a block-wise sampler's view of a completion: the blocks before are whole, those after are MASK. With a
  block_length of 0 it is `draw_masks`, over the whole completion.

  Returns:
    is_read, the masked positions of the block, and is_masked, these and everything after the block.
  """
  if not masks.block_length:
    is_masked, _ = draw_masks(keys, is_counted, masks, committed_at)
    return is_masked, is_masked
  if problem := masks.problem():
    raise ValueError(problem)
  uniform = uniform_noise(keys, masks.num_draws, 2 + is_counted.shape[-1])
  block = jnp.arange(is_counted.shape[-1]) // masks.block_length
  num_blocks = jnp.where(is_counted, block + 1, 1).max(-1)
  chosen = (uniform[..., 0] * num_blocks[:, :, None]).astype(jnp.int32)[..., None]
  u_ratio = spread_evenly(keys, masks.num_draws) if masks.kind == "stratified" else uniform[..., 1]
  is_drawn, _ = place_masks(u_ratio, uniform[..., 2:], is_counted, masks)
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

  lambda = `masks.ratio(u_ratio)`. Antithetic: the n draws are followed by their complements
  within the counted positions, r = 2n, so that each pair predicts every counted position exactly once. A complement's
  ratio is 1 - lambda, in [1 - max_ratio, 1 - min_ratio]; either half of a pair may be empty.
  """
  ratio = masks.ratio(u_ratio)
  is_drawn = u_position < ratio[..., None]
  if masks.antithetic:
    ratio = jnp.concatenate([ratio, 1 - ratio], axis=2)
    is_drawn = jnp.concatenate([is_drawn, ~is_drawn], axis=2)
  return is_drawn & is_counted[:, :, None], ratio
