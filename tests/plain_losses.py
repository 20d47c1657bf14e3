"""Likelihoods and losses the plain way, for tests to compare with: float64 NumPy, one rollout after the other.

A rollout that was dropped is not among those given.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class View:
  """What a policy says of one rollout under r masks."""

  log_p: np.ndarray  # [r, c]
  is_masked: np.ndarray  # [r, c]
  ratio: np.ndarray  # [r] or [r, c]; with which probability each mask sample masks a position
  is_counted: np.ndarray  # [c]
  committed_at: np.ndarray  # [c]
  divergence: np.ndarray | None = None  # [r, c]; from the teacher
  block: np.ndarray | None = None  # [c]; number of the block of a model that attends by blocks
  o: object = None  # the objective's settings, which say how the blocks' masks were drawn

  @property
  def num_counted(self):
    return int(self.is_counted.sum())

  def is_read(self, r):
    """Which positions mask sample r predicts."""
    return self.is_masked[r] & self.is_counted

  def mean(self, values):
    """Average over each mask sample's masked positions, then over the mask samples; an empty mask counts as 0."""
    sums = [
      sum(self.by_count(r, l) * values[r, l] for l in np.flatnonzero(self.is_read(r))) for r in range(len(values))
    ]
    return float(np.mean(sums)) / max(self.num_counted, 1)

  def by_count(self, r, l):
    """What a masked position counts in the ELBO of its mask sample, or of its block."""
    if self.block is None:
      return self.num_counted / self.is_read(r).sum()
    is_own = self.block == self.block[l]
    size = (self.is_counted & is_own).sum()
    return size / (self.is_read(r) & is_own).sum() / self._nonempty(r, size)

  def _nonempty(self, r, size):
    """For which share of the ratios a block has masks."""
    if not self.o.antithetic:
      return 1.0
    low, high = self.o.min_mask_ratio, self.o.max_mask_ratio
    if r < len(self.log_p) / 2:  # at least one is masked from 1 / (n + 1) on
      return (high - max(low, 1 / (size + 1))) / (high - low)
    return (min(high, size / (size + 1)) - low) / (high - low)

  def elbo(self):
    return self.num_counted * self.mean(self.log_p)


@dataclasses.dataclass(frozen=True)
class Rollout:
  """One rollout, and what the policies say of it."""

  view: View  # by the policy that is being updated, under the update's masks
  reward: float
  weight: float = 0.0
  negative_weight: float = 0.0
  old: float = 0.0  # log p of the whole completion
  token_old: np.ndarray | None = None  # [c], or one a draw; under the update's masks
  token_ref: np.ndarray | None = None


def chunks_of(view, num_chunks):
  """The chunk of each position: model calls are spread over the chunks."""
  scope = np.zeros(len(view.is_counted), int) if view.block is None else view.block
  result = np.zeros(len(scope), int)
  for number in np.unique(scope[view.is_counted]):
    is_own = scope == number
    called_at = view.committed_at[is_own & view.is_counted]
    first = 0 if view.block is None else called_at.min()
    result[is_own] = (view.committed_at[is_own] - first) * num_chunks // (called_at.max() - first + 1)
  return result


def tokens(name, o, view):
  """Each position's part of the estimate of log p."""
  result, num_mask_samples = np.zeros(len(view.is_counted)), len(view.log_p)
  for l in np.flatnonzero(view.is_counted):
    of_position = view.log_p[:, l]
    read = [r for r in range(num_mask_samples) if view.is_masked[r, l]]
    by_count = [view.by_count(r, l) / num_mask_samples if view.is_read(r)[l] else 0 for r in range(num_mask_samples)]
    lower = sum(by_count[r] * of_position[r] for r in read)
    if name == "one_step":
      result[l] = of_position.mean()
    elif name == "elbo":
      result[l] = lower
    elif name == "unweighted":
      result[l] = sum(of_position[r] for r in read) / num_mask_samples
    elif name == "eubo":
      power = sum(by_count[r] * math.exp(o.eubo.beta * of_position[r]) for r in read)
      upper = math.log(power) / o.eubo.beta if read else 0.0
      result[l] = o.eubo.mixture * upper + (1 - o.eubo.mixture) * lower
    elif name == "elbo_quadrature":
      num_points = o.elbo_quadrature.num_points
      nodes, weights = np.polynomial.legendre.leggauss(num_points)
      share = [weights[i] / 2 / ((nodes[i] + 1) / 2) for i in range(num_points)]
      result[l] = sum(share[r % num_points] * of_position[r] for r in read) * num_points / num_mask_samples
    elif name == "coupled":
      ratio = np.broadcast_to(view.ratio.reshape(num_mask_samples, -1), view.log_p.shape)[:, l]
      result[l] = sum(of_position[r] / ratio[r] for r in read) / (num_mask_samples // 2 + 1)
    elif name == "trajectory":
      result[l] = of_position[chunks_of(view, num_mask_samples)[l]]
    else:
      raise ValueError(name)
  return result


def by_draw(name, o, view, num_draws):
  """Estimate log p of a completion from each independent draw; several draws have one mask sample each."""
  rows = [slice(None)] if num_draws == 1 else [[number] for number in range(num_draws)]
  views = [
    dataclasses.replace(view, log_p=view.log_p[own], is_masked=view.is_masked[own], ratio=view.ratio[own])
    for own in rows
  ]
  return np.array([tokens(name, o, of_draw).sum() for of_draw in views])


def softmax(values):
  shares = np.exp(np.asarray(values, np.float64) - max(values))
  return shares / shares.sum()


def weights_of(rewards, log_p_ref, log_p_old, o):
  """The importance weights of a group, and those of the opposite target."""
  log_ratio = np.subtract(log_p_ref, log_p_old)
  tilt = np.asarray(rewards, np.float64) / o.alpha
  return softmax(o.kappa * (log_ratio + tilt)), softmax(o.kappa * (log_ratio - tilt))


def advantages(group):
  rewards = np.array([rollout.reward for rollout in group], np.float64)
  return rewards - rewards.mean()


def wdce(group, o):
  ratio = [rollout.view.elbo() - rollout.old for rollout in group]
  subtracted = {
    "none": np.zeros(len(group)),
    "mean": np.full(len(group), np.mean([rollout.weight for rollout in group])),
    "model": softmax(ratio),
    "negative": np.array([rollout.negative_weight for rollout in group]),
  }[o.wdce.baseline]
  total = 0.0
  for i, rollout in enumerate(group):
    coefficient = rollout.weight - o.wdce.baseline_strength * subtracted[i]
    if o.wdce.unlearning == "bounded" and coefficient < 0 and ratio[i] < o.wdce.min_log_ratio:
      continue
    total -= coefficient * rollout.view.mean(rollout.view.log_p)
  return total


def wddo(group, o):
  own = o.wddo
  real = fake = 0.0
  for rollout in group:
    distance = own.beta * (rollout.view.elbo() - rollout.old)
    real += rollout.weight * math.log1p(math.exp(-distance))
    fake += math.log1p(math.exp(distance)) / len(group)
  return real + own.alpha_ddo * fake


def surrogate(log_ratio, advantage, o):
  ratio, clip = math.exp(log_ratio), o[o.name].clip
  return min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)


def k3(distance):
  return math.exp(distance) - distance - 1


def _by_token(group, o, name, advantage):
  total = 0.0
  for rollout, own in zip(group, advantage, strict=True):
    new = tokens(name, o, rollout.view)
    for l in np.flatnonzero(rollout.view.is_counted):
      token_loss = -surrogate(new[l] - rollout.token_old[l], own, o)
      if o[o.name].kl_weight:
        token_loss += o[o.name].kl_weight * k3(rollout.token_ref[l] - new[l])
      total += token_loss / rollout.view.num_counted
  return total / len(group)


def diffu_grpo(group, o):
  return _by_token(group, o, o.likelihood, advantages(group))


def coupled_grpo(group, o):
  n = len(group)
  return _by_token(group, o, o.likelihood, advantages(group) * (n / (n - 1) if n > 1 else 0))


def gdpo(group, o):
  total = 0.0
  for rollout, advantage in zip(group, advantages(group), strict=True):
    n = rollout.view.num_counted
    new = tokens(o.likelihood, o, rollout.view).sum() / n
    total -= surrogate(new - rollout.token_old.sum() / n, advantage, o)
    if o[o.name].kl_weight:
      total += o[o.name].kl_weight * k3(rollout.token_ref.sum() / n - new)
  return total / len(group)


def espo(group, o):
  total = 0.0
  n = len(group)
  for rollout, advantage in zip(group, advantages(group) * (n / (n - 1) if n > 1 else 0), strict=True):
    length = rollout.view.num_counted
    new = tokens(o.likelihood, o, rollout.view).sum()
    total -= surrogate((new - rollout.token_old.mean()) / length, advantage, o)
    if o.espo.kl_weight:
      total += o.espo.kl_weight * (new - rollout.token_ref.mean()) ** 2 / 2 / length
  return total / n


def gdsd(group, o):
  own, n, total = o.gdsd, len(group), 0.0
  for rollout, advantage in zip(group, advantages(group) * (n / (n - 1) if n > 1 else 0), strict=True):
    length, num_draws = rollout.view.num_counted, len(rollout.token_old)
    new = by_draw(o.likelihood, o, rollout.view, num_draws)
    for draw in range(num_draws):
      moved = min(max(new[draw] - rollout.token_old[draw], math.log(1 - own.clip)), math.log(1 + own.clip))
      total += (moved / length - own.guidance * advantage) ** 2
      if own.kl_weight:
        total += own.kl_weight * (new[draw] - rollout.token_ref[draw]) ** 2 / 2 / length / num_draws
  return total / n


def standardised(group):
  centred = advantages(group)
  deviation = math.sqrt((centred**2).mean())
  return centred / deviation if deviation > 1e-6 else 0 * centred


def ebpo(group, o):
  own, total = o.ebpo, 0.0
  for rollout, advantage in zip(group, standardised(group), strict=True):
    new = tokens(o.likelihood, o, rollout.view).sum()
    ratio = math.exp(new - rollout.token_old.mean())
    total -= min(ratio * advantage, min(max(ratio, 1 - own.clip), 1 + own.clip_high) * advantage)
    if own.kl_weight:
      total += own.kl_weight * (new - rollout.token_ref.mean()) ** 2 / 2
  return total / len(group)


def bgpo(group, o):
  own, total = o.bgpo, 0.0
  for rollout, advantage in zip(group, standardised(group), strict=True):
    length, num_draws = rollout.view.num_counted, len(rollout.token_old)
    new = by_draw(o.likelihood, o, rollout.view, num_draws)
    for draw in range(num_draws):
      moved = (new[draw] - rollout.token_old[draw]) / length
      ratio = 1 + moved if advantage > 0 else math.exp(moved)
      loss = -min(ratio * advantage, min(max(ratio, 1 - own.clip), 1 + own.clip) * advantage)
      total += min(loss, -own.most * advantage) / num_draws if advantage < 0 else loss / num_draws
      if own.kl_weight:
        total += own.kl_weight * (new[draw] - rollout.token_ref[draw]) ** 2 / 2 / length / num_draws
  return total / len(group)


def tracerl(group, o):
  total = 0.0
  for rollout, advantage in zip(group, standardised(group), strict=True):
    view, new = rollout.view, tokens(o.likelihood, o, rollout.view)
    chunks = [np.flatnonzero(is_read) for is_read in _read_by_mask_sample(o.likelihood, view) if is_read.any()]
    for chunk in chunks:
      mean = np.mean([surrogate(new[l] - rollout.token_old[l], advantage, o) for l in chunk])
      divergence = sum(k3(rollout.token_old[l] - new[l]) for l in chunk)
      total += (o[o.name].kl_weight * divergence - mean) / len(chunks)
  return total / len(group)


def _read_by_mask_sample(name, view):
  num_mask_samples = len(view.log_p)
  if name == "one_step":
    return [view.is_counted] * num_mask_samples
  if name == "trajectory":
    chunk = chunks_of(view, num_mask_samples)
    return [view.is_counted & (chunk == number) for number in range(num_mask_samples)]
  return [view.is_read(r) for r in range(num_mask_samples)]


def wd1(group, o):
  advantage = o.wd1.sharpness * advantages(group)
  coefficient = softmax(advantage) - softmax(-advantage)
  return -sum(c * tokens(o.likelihood, o, rollout.view).sum() for c, rollout in zip(coefficient, group, strict=True))


def spg(group, o):
  total = 0.0
  for rollout, advantage in zip(group, advantages(group), strict=True):
    view = rollout.view
    lower = tokens("elbo", o, view).sum() / view.num_counted
    mixed = 2 * [0.0]
    for mixture in (0, 1):
      o_of = _Mixed(o, mixture)
      mixed[mixture] = tokens("eubo", o_of, view).sum()
    num_read = sum(any(view.is_masked[:, l]) for l in np.flatnonzero(view.is_counted))
    mixture = o.eubo.mixture
    bad = mixture * mixed[1] / max(num_read, 1) + (1 - mixture) * mixed[0] / view.num_counted
    total -= advantage * (lower if advantage > 0 else bad)
  return total / len(group)


class _Mixed:
  """The same settings with another mixture of the two bounds."""

  def __init__(self, o, mixture):
    self.eubo = dataclasses.make_dataclass("Eubo", ["beta", "mixture"])(o.eubo.beta, mixture)


def dtm(group, o):
  own, total = o.dtm, 0.0
  for rollout, advantage in zip(group, advantages(group), strict=True):
    weight = math.exp(own.tilt * advantage) - own.control_variate
    view = rollout.view
    total += view.mean(own.control_variate * view.divergence - weight * view.log_p)
  return total / len(group)


def denoise(group, o):
  total = 0.0
  for rollout in group:
    view = rollout.view
    for r in range(len(view.log_p)):
      own = -view.log_p[r][view.is_read(r)].sum() / view.num_counted
      total += own / (np.ravel(view.ratio[r])[0] or 1.0) / len(view.log_p)
  return total / len(group)


LOSSES = {
  loss.__name__: loss
  for loss in (wdce, wddo, diffu_grpo, coupled_grpo, gdpo, espo, gdsd, ebpo, bgpo, tracerl, wd1, spg, dtm, denoise)
}
