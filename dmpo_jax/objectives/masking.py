"""Which completion positions the model has to predict: the masks under every likelihood bound and loss."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from dmpo_jax.ranges import one_of
from dmpo_jax.structs import Experience

KINDS = ("random", "trajectory", "stratified")
_OF_GROUP = 2**31 - 2  # what the group's number folds into the key of its first rollout: no index of a mask sample
# Multiples of it modulo 1 are spread evenly, however many there are: the golden ratio.
_STEP = (5**0.5 - 1) / 2


class Completions(NamedTuple):
  """What masks may depend on besides a completion's tokens."""

  is_counted: Bool[Array, "p g c"]
  committed_at: Int[Array, "p g c"]  # the model call that decided the position; after all that count: none did
  prompt_is_valid: Bool[Array, "p q"]

  @classmethod
  def of(cls, experience: Experience) -> "Completions":
    """Take them from a buffer."""
    return cls(experience.is_counted, experience.committed_at, experience.prompts.is_valid)


class Drawn(NamedTuple):
  """Masks of completions.

  `weight` is by how much a position counts in the mean over its sample's masked ones, in which the ELBO of every block
  of the model counts by the block's positions; None: all count alike.
  """

  is_masked: Bool[Array, "p g r c"]
  ratio: Float[Array, "p g r #c"]  # the probability with which a position was masked, or the share that is
  weight: Float[Array, "p g r c"] | None = None


@dataclasses.dataclass(frozen=True)
class MaskSampling:
  """How masks of a rollout are drawn.

  Args:
    num: mask samples of each rollout.
    antithetic: masks come in complementary pairs, i and num / 2 + i: each pair masks every counted position once.
    min_ratio, max_ratio: the mask ratio is drawn from U(min_ratio, max_ratio); a complement's is 1 minus it.
    block_length: where positive, a sample masks some of one block of so many positions and everything after it, as a
      block-wise sampler meets it; 0: anywhere. Read by `draw_block_masks` alone.
    model_block: tokens of a block of a model that attends by blocks; 0: full attention. Each block then has a ratio of
      its own (`draw`).
    kind: `random`: a ratio, then each position with that probability. `stratified`: the same, but the ratios of a
      group are spread evenly (`spread_evenly`). `trajectory`: states that the sampler met (`mask_along_trajectory`).
  """

  num: int
  antithetic: bool = True
  min_ratio: float = 0.0
  max_ratio: float = 1.0
  block_length: int = 0
  kind: str = "random"
  model_block: int = 0

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


def draw(keys: Key[Array, "p g"], about: Completions, masks: MaskSampling) -> Drawn:
  """Draw masks for a loss or a likelihood bound: by `draw_masks` or, for a model that attends by blocks, in each block.

  Such a model predicts a block from its own noised tokens and clean earlier ones, so its bound of log p(y | x) is the
  sum of the blocks' bounds, each under a ratio of its own (BD3-LM, arXiv 2503.09573). In a block of n counted positions
  so many are masked, of a ratio from U(min_ratio, max_ratio): floor(ratio n) + 1, or floor(ratio (n + 1)) of
  antithetic pairs, at most n. Which ones is by chance, or along the trajectory in the order of the block's own calls.
  For ratios from U(0, 1) that is 1 to n, or 0 to n, each as often: the mean over masked positions is without bias, once
  it is divided by the probability that a block has any (`Drawn.weight`). Stratified ratios are spread over the blocks
  of a completion, too.

  Raises:
    ValueError: see `MaskSampling.problem`.
  """
  if not masks.model_block:
    is_masked, ratio = draw_masks(keys, about.is_counted, masks, about.committed_at)
    return Drawn(is_masked, ratio[..., None])
  if problem := masks.problem():
    raise ValueError(problem)
  blocks = Blocks.of(about, masks.model_block)
  is_counted = blocks.split(about.is_counted, False)
  uniform = uniform_noise(keys, masks.num_draws, blocks.number + about.is_counted.shape[-1])
  u_ratio, u_position = uniform[..., : blocks.number], uniform[..., blocks.number :]
  if masks.kind == "stratified":
    u_ratio = blocks.spread(keys, masks.num_draws)
  if masks.kind == "trajectory":
    is_masked = _along_trajectories(masks.ratio(u_ratio), blocks.split(about.committed_at, 0), is_counted)
  else:
    is_masked = _place_in_blocks(masks, u_ratio, blocks.split(u_position, 1.0), is_counted[:, :, None])
  return blocks.weigh(is_masked, is_counted, _nonempty(masks, is_counted.sum(-1)))


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Where completions divide into the blocks of a model, which count from the prompt's first token.

  Args:
    start: tokens of each prompt in the block where its completions begin.
    number: of blocks, enough for any start.
  """

  start: Int[Array, "p"]
  size: int
  number: int
  length: int

  @classmethod
  def of(cls, about: Completions, size: int) -> "Blocks":
    """Divide completions."""
    length = about.is_counted.shape[-1]
    return cls(about.prompt_is_valid.sum(1) % size, size, -(-(length + size - 1) // size), length)

  def split(self, array: Shaped[Array, "p *g c"], filling: float | bool) -> Shaped[Array, "p *g n s"]:
    """Give each block its positions, and `filling` where it has tokens of the prompt, or none."""
    index = jnp.arange(self.number * self.size) - self.start[:, None]
    index = index.reshape(index.shape[0], *[1] * (array.ndim - 2), -1)
    found = jnp.take_along_axis(array, jnp.clip(index, 0, self.length - 1), axis=-1)
    found = jnp.where((index >= 0) & (index < self.length), found, filling)
    return found.reshape(*found.shape[:-1], self.number, self.size)

  def spread(self, keys: Key[Array, "p g"], num_draws: int) -> Float[Array, "p g {num_draws} n"]:
    """Spread numbers over a group by `spread_evenly`, and those of a draw over the blocks of its completion."""
    numbers = spread_evenly(keys, num_draws)[..., None] + _STEP * jnp.arange(self.number)
    return numbers - jnp.floor(numbers)

  def join(self, array: Shaped[Array, "p *g n s"]) -> Shaped[Array, "p *g c"]:
    """Undo `split`."""
    index = jnp.arange(self.length) + self.start[:, None]
    index = index.reshape(index.shape[0], *[1] * (array.ndim - 3), -1)
    return jnp.take_along_axis(array.reshape(*array.shape[:-2], -1), index, axis=-1)

  def weigh(
    self, is_masked: Bool[Array, "p g r n s"], is_counted: Bool[Array, "p g n s"], nonempty: Float[Array, "p g r n"]
  ) -> Drawn:
    """Say how masks in blocks count."""
    num_masked, num_counted = is_masked.sum(-1), is_counted.sum(-1)[:, :, None]
    of_sample = num_masked.sum(-1, keepdims=True) / jnp.maximum(num_counted.sum(-1, keepdims=True), 1)
    weight = of_sample * num_counted / jnp.maximum(num_masked, 1) / nonempty
    ratio = num_masked / jnp.maximum(num_counted, 1)
    weight, ratio = (jnp.broadcast_to(each[..., None], is_masked.shape) for each in (weight, ratio))
    return Drawn(*map(self.join, (is_masked, ratio, weight)))


def _place_in_blocks(
  masks: MaskSampling,
  u_ratio: Float[Array, "p g d n"],
  u_position: Float[Array, "p g d n s"],
  is_counted: Bool[Array, "p g 1 n s"],
) -> Bool[Array, "p g r n s"]:
  """Mask as many positions of each block as its ratio says, those with the least noise; then the complements."""
  size = is_counted.sum(-1)
  ratio = masks.ratio(u_ratio)
  num = jnp.floor(ratio * (size + 1)) if masks.antithetic else jnp.floor(ratio * size) + 1
  place = jnp.argsort(jnp.argsort(jnp.where(is_counted, u_position, 2.0), axis=-1), axis=-1)
  is_drawn = place < jnp.minimum(num, size)[..., None]
  return jnp.concatenate([is_drawn, ~is_drawn & is_counted], axis=2) if masks.antithetic else is_drawn


def _along_trajectories(
  ratio: Float[Array, "p g r n"], committed_at: Int[Array, "p g n s"], is_counted: Bool[Array, "p g n s"]
) -> Bool[Array, "p g r n s"]:
  """Mask in each block what the sampler had still to decide at a point of the block's own trajectory."""
  (p, g, r, n), s = ratio.shape, committed_at.shape[-1]
  flat = ratio.swapaxes(2, 3).reshape(p, g * n, r)
  is_masked, _ = mask_along_trajectory(flat, *(x.reshape(p, g * n, s) for x in (committed_at, is_counted)))
  return is_masked.reshape(p, g, n, r, s).swapaxes(2, 3)


def _nonempty(masks: MaskSampling, size: Int[Array, "p g n"]) -> Float[Array, "p g r n"]:
  """The probability that a sample masks some of a block's counted positions; at least a little."""
  if not masks.antithetic:
    return jnp.ones((*size.shape[:2], masks.num, size.shape[-1]))
  width = masks.max_ratio - masks.min_ratio
  drawn_none = jnp.clip(1 / (size + 1) - masks.min_ratio, 0, width)
  drawn_all = jnp.clip(masks.max_ratio - size / (size + 1), 0, width)
  by_half = [1 - each / width if width else jnp.ones(size.shape) for each in (drawn_none, drawn_all)]
  return jnp.repeat(jnp.maximum(jnp.stack(by_half, axis=2), 1e-6), masks.num_draws, axis=2)


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
  u_ratio: Float[Array, "p g n *k"],
  u_position: Float[Array, "p g n c"],
  is_counted: Bool[Array, "p g c"],
  masks: MaskSampling,
) -> tuple[Bool[Array, "p g r c"], Float[Array, "p g r *k"]]:
  """Turn uniform noise in [0, 1) into masks: position l is masked where u_position < lambda.

  lambda = `masks.ratio(u_ratio)`. Antithetic: the n draws are followed by their complements
  within the counted positions, r = 2n, so that each pair predicts every counted position exactly once. A complement's
  ratio is 1 - lambda, in [1 - max_ratio, 1 - min_ratio]; either half of a pair may be empty.
  """
  ratio = masks.ratio(u_ratio)
  is_drawn = u_position < ratio.reshape(*ratio.shape[:3], -1)
  if masks.antithetic:
    ratio = jnp.concatenate([ratio, 1 - ratio], axis=2)
    is_drawn = jnp.concatenate([is_drawn, ~is_drawn], axis=2)
  return is_drawn & is_counted[:, :, None], ratio
