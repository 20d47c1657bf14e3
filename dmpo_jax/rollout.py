"""One buffer: prompts -> rollouts -> log-probabilities and rewards -> what the objective needs -> Experience.

Forward passes only. `Collector.generate` samples, begins the grading, and scores meanwhile. `Collector.complete` waits
for the grades and makes the experience. The jitted programs run on chunks, so a buffer may be larger than what fits on
the devices at one time; their results are small and replicated, and every host reads them.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from dmpo_jax import noise
from dmpo_jax.chunks import Arriving, Chunk, Chunking, fetch_ahead, join_rows
from dmpo_jax.grading import Grades, Grading, grade
from dmpo_jax.hub.tokenizer import Tokenizer
from dmpo_jax.objectives import weights
from dmpo_jax.objectives.weights import Weighing
from dmpo_jax.policy import Policies, check_confidence
from dmpo_jax.rollout_metrics import Stopwatch, describe, log_confidence
from dmpo_jax.run import progress
from dmpo_jax.run.preemption import Preempted
from dmpo_jax.sharding import everywhere
from dmpo_jax.structs import Experience, LogProbs, PendingRollouts, Prompts, Rollouts


class Batch(NamedTuple):
  """The prompts of a buffer."""

  buffer: int  # its index, part of its noise
  prompts: Prompts
  records: Sequence[dict[str, Any]]  # the task's records of the prompts, for grading


@runtime_checkable
class Scoring(Protocol):
  """How an objective gets what it needs of rollouts besides their rewards."""

  @property
  def score(self) -> Callable[..., LogProbs] | None:
    """The function that dispatches the forward passes on a chunk; None: there are no forward passes.

    `score(policies, prompts, rollouts, is_counted, buffer, first)` returns log-probabilities that are still on the
    devices; `first` is the index of the chunk's first rollout of each prompt.
    """
    ...

  def complete(
    self, policies: Policies, experience: Experience, rollouts: Rollouts, log_probs: LogProbs | None, buffer: int
  ) -> tuple[Experience, dict[str, float]]:
    """Complete an experience that has its rewards, and return figures for the log. All arrays are on the host.

    Without log-probabilities, where `score` gives some, the policy is its own reference (`phases.num_scored`).
    """
    ...


@dataclasses.dataclass(frozen=True)
class Collector:
  """What a run's buffers have in common.

  Args:
    sample: lays policies out for the sampler, and returns `sample(prompts, key, first) -> Rollouts` [p, g, ...]: the
      rollouts of a chunk, which begin with the `first` of each prompt.
    stream: samples in a queue instead, whatever the chunks: `stream(policies, prompts, key, row)` yields the buffer's
      rows from that one on with their numbers, each as it is done.
    chunking: what is sampled and scored at one time.
    counted: completion positions that the likelihood counts, see `count_positions`.
  """

  sample: Callable[[Policies], Callable[[Prompts, jax.Array, int], Rollouts]]
  scoring: Scoring
  grading: Grading
  tokenizer: Tokenizer
  seed: int
  chunking: Chunking
  counted: str
  stream: Callable[[Policies, Prompts, jax.Array, int], Iterator[tuple[int, Rollouts]]] | None = None

  def generate(
    self, policies: Policies, batch: Batch, begun: PendingRollouts | None = None, *, is_scored: bool = True
  ) -> PendingRollouts:
    """Sample a buffer of rollouts from the policy, begin to grade them, and score them meanwhile.

    Args:
      begun: what an earlier start had generated of this buffer; its whole chunks are kept.
      is_scored: False: there are no forward passes, as the policy is its own reference.

    Raises:
      Preempted: between two chunks, with those that are finished; in a queue, with the rows before the first one that
        is not finished.
      NotFinite: see `policy.check_confidence`.
    """
    watch, key = Stopwatch(), noise.step_key(self.seed, "rollout", batch.buffer)
    chunks = self.chunking.cut(len(batch.records))
    sampled = self.chunking.finished(begun and begun.rollouts, chunks)
    scored = self.chunking.finished(begun and begun.log_probs, chunks) if is_scored else []
    on_devices: dict[int, Rollouts] = {}  # the chunks that are still to be scored
    arriving = Arriving(chunks, begun and begun.rollouts)
    sample = self.sample(policies) if self.stream is None and len(sampled) < len(chunks) else None

    def sample_chunk(number: int) -> Rollouts:
      assert sample is not None  # until all chunks are sampled
      prompts, rollouts = chunks[number]
      progress.part("sampling prompts", prompts.start, len(batch.records))
      on_devices[number] = sample(self.chunking.prompts_of(chunks[number], batch.prompts), key, rollouts.start)
      return on_devices[number]

    def score_chunk(number: int) -> LogProbs:
      progress.part("scoring prompts", chunks[number].prompts.start, len(batch.records))
      rollouts = on_devices.pop(number) if number in on_devices else everywhere(sampled[number])
      return self._score(policies, batch, chunks[number], rollouts)

    to_sample = range(len(sampled), len(chunks))
    to_score = range(len(scored), len(chunks)) if self.scoring.score and is_scored else ()
    graded = [self._grade(batch, chunk.prompts, done) for chunk, done in zip(chunks, sampled, strict=False)]
    calls = [functools.partial(sample_chunk, number) for number in to_sample]
    to_do = [functools.partial(score_chunk, number) for number in to_score]
    if self.stream is None:
      results = fetch_ahead(calls + to_do)
    else:
      results = itertools.chain(self._sample_queue(policies, batch, key, arriving, len(sampled)), fetch_ahead(to_do))
    try:
      for number, rollouts in zip(to_sample, results, strict=False):
        check_confidence(rollouts)
        sampled.append(rollouts)
        graded.append(self._grade(batch, chunks[number].prompts, rollouts))
      watch.lap("sample")
      sample = None  # and with it the parameters that were laid out for it
      for log_probs in results:
        scored.append(log_probs)  # one by one, as a notice may come between
    except Preempted as notice:
      watch.lap("score" if len(sampled) == len(chunks) else "sample")
      sampled += arriving.tail() if self.stream is not None else []
      notice.pending = _join(sampled, scored, watch, begun, is_whole=False) if sampled else None
      raise
    watch.lap("score")
    pending, group_size = _join(sampled, scored, watch, begun, is_whole=True), self.chunking.group_size
    return dataclasses.replace(pending, batch=batch, wait=lambda: Grades.join([wait() for wait in graded], group_size))

  def _sample_queue(
    self, policies: Policies, batch: Batch, key: jax.Array, arriving: Arriving, num_given: int
  ) -> Iterator[Rollouts]:
    """Sample the rows that are missing, and yield each chunk, but the given ones, as soon as it is whole."""
    assert self.stream is not None  # else chunks are sampled
    yield from itertools.islice(arriving.whole(), num_given, None)
    if arriving.num_begun == len(batch.records) * self.chunking.group_size:
      return
    for number, row in self.stream(policies, batch.prompts, key, arriving.num_begun):
      arriving.add(number, row)
      progress.part("sampling prompts", len(arriving) // self.chunking.group_size, len(batch.records))
      yield from arriving.whole()

  def complete(self, pending: PendingRollouts, policies: Policies) -> tuple[Experience, dict[str, float]]:
    """Wait for the grades of a generated buffer, and complete it for the objective.

    Returns:
      The experience, and what the log says of it: seconds and tokens/s by phase among it.
    """
    watch, batch = Stopwatch(), pending.batch
    rollouts, log_probs = self.chunking.groups((pending.rollouts, pending.log_probs))
    progress.part("waiting for rewards")
    grades = (pending.wait or self._grade(batch, slice(None), rollouts))()
    watch.lap("reward")  # what grading took longer than all that was done meanwhile
    is_counted = count_positions(rollouts.completion, self.tokenizer.end_token_ids, self.counted)
    experience = Experience(
      prompts=batch.prompts,
      completion=rollouts.completion,
      is_counted=is_counted,
      reward=grades.reward,
      is_kept=grades.is_kept,
      log_p_old=0 * grades.reward,
      log_p_ref=0 * grades.reward,
      weight=0 * grades.reward,
      negative_weight=0 * grades.reward,
      committed_at=decided_at(rollouts),
      seen=rollouts.seen,
      reward_parts=grades.parts,
    )
    experience, figures = self.scoring.complete(policies, experience, rollouts, log_probs, batch.buffer)
    watch.lap("score")
    is_until_eos = count_positions(rollouts.completion, self.tokenizer.end_token_ids, "until_eos")
    metrics = describe(grades, rollouts, is_until_eos, self.tokenizer.end_token_ids) | figures
    for name, seconds in pending.seconds.items():
      watch.add(name, float(seconds))
    return experience, metrics | watch.rates(tokens=rollouts.completion.size)

  def _score(self, policies: Policies, batch: Batch, chunk: Chunk, rollouts: Rollouts) -> LogProbs:
    assert self.scoring.score is not None  # else there is nothing to score
    is_counted = count_positions(rollouts.completion, self.tokenizer.end_token_ids, self.counted)
    prompts = self.chunking.prompts_of(chunk, batch.prompts)
    return self.scoring.score(policies, prompts, rollouts, is_counted, batch.buffer, chunk.rollouts.start)

  def _grade(self, batch: Batch, prompts: slice, rollouts: Rollouts) -> Callable[[], Grades]:
    return grade(self.grading, self.tokenizer, batch.records[prompts], rollouts.completion)


def pool(collected: Experience, batch: Experience) -> Experience:
  """Take as many groups as a batch has of both, those that updates learn from first, else in order."""
  both = jax.tree.map(lambda *parts: np.concatenate(parts), collected, batch)
  order = np.argsort(~both.is_informative, kind="stable")[: len(batch.is_kept)]
  return jax.tree.map(lambda array: array[order], both)


class RewardsOnly:
  """For objectives that learn from rewards and the current policy alone."""

  score = None

  def complete(
    self, policies: Policies, experience: Experience, rollouts: Rollouts, log_probs: LogProbs | None, buffer: int
  ) -> tuple[Experience, dict[str, float]]:
    return experience, {}


@dataclasses.dataclass(frozen=True)
class SampledWeights:
  """Importance weights from the log-probabilities that the sampler gave of its own tokens (random_order).

  They are exact for the order in which the tokens were drawn, and cost no further model call. The entropy is their
  Monte-Carlo estimate, -log p of the counted tokens.
  """

  weighing: Weighing
  score = None

  def complete(
    self, policies: Policies, experience: Experience, rollouts: Rollouts, log_probs: LogProbs | None, buffer: int
  ) -> tuple[Experience, dict[str, float]]:
    assert rollouts.log_p_old is not None  # the sampler computes it
    by_reference = rollouts.log_p_old if rollouts.log_p_ref is None else rollouts.log_p_ref  # None: it is the policy
    log_p_old, log_p_ref = (
      np.where(experience.is_counted, log_p, 0.0).sum(-1, keepdims=True) for log_p in (rollouts.log_p_old, by_reference)
    )
    entropy = -log_p_old[..., 0] / experience.is_counted.sum(-1)
    return _weigh(experience, LogProbs(log_p_old, log_p_ref, entropy), self.weighing)


@dataclasses.dataclass(frozen=True)
class EstimatedWeights:
  """Importance weights from estimates of both policies' log-probabilities (`logprobs.make_log_probs`).

  Args:
    log_probs: the jitted estimates, one a draw.
    max_noise: after each round of draws another one follows, until the log-ratio's standard error is at most max_noise
      times the spread of reward / alpha.
    max_rounds: most rounds of draws; 1: there is one, however noisy. All rounds are one compiled program.
  """

  log_probs: Callable[..., LogProbs]
  weighing: Weighing
  seed: int
  chunking: Chunking
  max_noise: float = 0.0
  max_rounds: int = 1

  def score(
    self,
    policies: Policies,
    prompts: Prompts,
    rollouts: Rollouts,
    is_counted: Bool[np.ndarray | jax.Array, "p g c"],
    buffer: int,
    first: int = 0,
    number: int = 0,
  ) -> LogProbs:
    """Estimate a chunk's log-probabilities; `number` is the round of draws."""
    key = noise.step_key(self.seed, "measure", buffer)
    key = jax.random.fold_in(key, number) if number else key
    about = rollouts.completion, is_counted, decided_at(rollouts)
    return self.log_probs(policies, prompts, *about, key, rollouts.seen, first)

  def complete(
    self, policies: Policies, experience: Experience, rollouts: Rollouts, log_probs: LogProbs | None, buffer: int
  ) -> tuple[Experience, dict[str, float]]:
    if log_probs is None:
      return _weigh_without_ratio(experience, self.weighing)
    rounds = [log_probs]
    while True:
      weighed, figures = _weigh(experience, _join_rounds(rounds), self.weighing)
      if len(rounds) == self.max_rounds or figures["log_ratio_noise"] <= self.max_noise:
        break
      score = functools.partial(self.score, policies, number=len(rounds))
      rounds.append(score_groups(score, self.chunking, experience, rollouts, buffer))
    sampled = np.where(experience.is_counted, log_confidence(rollouts), 0).sum(-1)
    gap = (sampled - weighed.log_p_old)[weighed.is_kept]
    figures["sampler_gap"] = float(gap.mean()) if gap.size else float("nan")
    return weighed, figures | {"elbo_rounds": float(len(rounds))}


@dataclasses.dataclass(frozen=True)
class TokenLogProbs:
  """Log-probabilities of tokens, or completions, under the views of each update that the buffer will serve, for ratios.

  A rollout with one that is not finite is dropped.

  Args:
    log_probs: the jitted estimates, position by position or one a draw.
    num_views: updates with views of their own; 1 where the estimator draws nothing and all updates share one estimate.
    with_reference: keep those of the reference.
  """

  log_probs: Callable[..., LogProbs]
  seed: int
  updates_per_buffer: int
  num_views: int
  with_reference: bool

  def score(
    self,
    policies: Policies,
    prompts: Prompts,
    rollouts: Rollouts,
    is_counted: Bool[np.ndarray | jax.Array, "p g c"],
    buffer: int,
    first: int = 0,
  ) -> LogProbs:
    step = buffer * self.updates_per_buffer
    keys = [noise.step_key(self.seed, "loss", step + update) for update in range(self.num_views)]
    batch = policies, prompts, rollouts.completion, is_counted, decided_at(rollouts)
    scored = [self.log_probs(*batch, key, rollouts.seen, first) for key in keys]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays, axis=2), *scored)

  def complete(
    self, policies: Policies, experience: Experience, rollouts: Rollouts, log_probs: LogProbs | None, buffer: int
  ) -> tuple[Experience, dict[str, float]]:
    assert log_probs is not None  # `score` returns them
    is_kept = experience.is_kept & np.isfinite(log_probs.log_p_old + log_probs.log_p_ref).all((2, 3))
    figures = {"entropy": float(log_probs.entropy.mean()), "scores_failed": _num_failed(experience.is_kept, is_kept)}
    return dataclasses.replace(
      experience,
      is_kept=is_kept,
      token_log_p_old=log_probs.log_p_old,
      token_log_p_ref=log_probs.log_p_ref if self.with_reference else None,
    ), figures


@dataclasses.dataclass(frozen=True)
class WithUpdates:
  """A scoring, and log p_old of the completions under the masks of each update that the buffer will serve.

  These are scored when the buffer is completed, by the policy that drew it.
  """

  scoring: Scoring
  of_updates: TokenLogProbs
  chunking: Chunking

  @property
  def score(self) -> Callable[..., LogProbs] | None:
    return self.scoring.score

  def complete(
    self, policies: Policies, experience: Experience, rollouts: Rollouts, log_probs: LogProbs | None, buffer: int
  ) -> tuple[Experience, dict[str, float]]:
    experience, figures = self.scoring.complete(policies, experience, rollouts, log_probs, buffer)
    score = functools.partial(self.of_updates.score, policies)
    scored = score_groups(score, self.chunking, experience, rollouts, buffer)
    is_kept = experience.is_kept & np.isfinite(scored.log_p_old).all((2, 3))
    figures["scores_failed"] = figures.get("scores_failed", 0.0) + _num_failed(experience.is_kept, is_kept)
    return dataclasses.replace(experience, is_kept=is_kept, token_log_p_old=scored.log_p_old), figures


def score_groups(
  score: Callable[..., LogProbs], chunking: Chunking, experience: Experience, rollouts: Rollouts, buffer: int
) -> LogProbs:
  """Score all rollouts of a buffer whose sampling is done, chunk by chunk.

  Args:
    score: takes a chunk's prompts, rollouts and counted positions, the buffer and the chunk's first rollout.
  """
  arrays = rollouts, experience.is_counted

  def score_chunk(chunk: Chunk) -> LogProbs:
    own, is_counted = chunk.of_rollouts(arrays)  # on the devices, as when they are sampled: it is the same program
    prompts = chunking.prompts_of(chunk, experience.prompts)
    return score(prompts, everywhere(own), is_counted, buffer, chunk.rollouts.start)

  chunks = chunking.cut(len(experience.completion))
  scored = fetch_ahead([functools.partial(score_chunk, chunk) for chunk in chunks])
  return chunking.groups(join_rows(list(scored)))


def _weigh(experience: Experience, log_probs: LogProbs, weighing: Weighing) -> tuple[Experience, dict[str, float]]:
  """Give an experience its importance weights, with how far they are spread and how much of that is noise."""
  weighed, figures = jax.device_get(
    weights.weigh_buffer(
      experience.reward,
      experience.is_kept,
      log_probs.log_p_ref,
      log_probs.log_p_old,
      weighing,
      experience.reward_parts,
    )
  )
  figures["scores_failed"] = _num_failed(experience.is_kept, weighed.is_kept)
  figures["entropy"] = log_probs.entropy.mean()
  experience = dataclasses.replace(
    experience,
    is_kept=weighed.is_kept,
    log_p_old=log_probs.log_p_old.mean(-1),
    log_p_ref=log_probs.log_p_ref.mean(-1),
    weight=weighed.weight,
    negative_weight=weighed.negative_weight,
  )
  return experience, {name: float(value) for name, value in figures.items()}


def _weigh_without_ratio(experience: Experience, weighing: Weighing) -> tuple[Experience, dict[str, float]]:
  """Do the same where the policy is its own reference, so that the log-ratio is 0; log p_old is unknown then."""
  unknown = np.full(experience.reward.shape, np.nan, np.float32)
  zeros = np.zeros((*unknown.shape, 2), np.float32)
  experience, figures = _weigh(experience, LogProbs(zeros, zeros, unknown), weighing)
  experience = dataclasses.replace(experience, log_p_old=unknown, log_p_ref=unknown)
  return experience, figures | {"sampler_gap": float("nan"), "elbo_rounds": 0.0}


def _num_failed(is_graded: Bool[np.ndarray, "p g"], is_kept: Bool[np.ndarray, "p g"]) -> float:
  """Count the graded rollouts that were dropped since their log-probabilities are not finite."""
  return float((is_graded & ~is_kept).sum())


def demonstrate(prompts: Prompts, completion: Int[np.ndarray, "p c"]) -> Experience:
  """Wrap demonstrations as groups of one, for an objective that learns from them."""
  one = np.ones((completion.shape[0], 1), np.float32)
  return Experience(
    prompts=prompts,
    completion=completion[:, None],
    is_counted=np.ones((completion.shape[0], 1, completion.shape[1]), bool),
    reward=0 * one,
    is_kept=one > 0,
    log_p_old=0 * one,
    log_p_ref=0 * one,
    weight=one,
    negative_weight=0 * one,
    committed_at=np.zeros((completion.shape[0], 1, completion.shape[1]), np.int32),
  )


def count_positions(
  completion: Int[np.ndarray | jax.Array, "*b c"], end_token_ids: Sequence[int], counted: str
) -> Bool[np.ndarray, "*b c"]:
  """Mark the completion positions that the likelihood counts: `all`, or `until_eos`.

  The latter ends with the first token that ends completions, and includes it. Positions that are not counted are
  neither scored nor shown to the model (`logprobs.make_score`).
  """
  if counted == "all":
    return np.ones(completion.shape, bool)
  is_end = np.isin(completion, end_token_ids)
  return is_end.cumsum(-1) - is_end == 0


def decided_at(rollouts: Rollouts) -> Int[np.ndarray | jax.Array, "p g c"]:
  """Return the calls that decided the tokens that the sampler saw."""
  return rollouts.committed_at if rollouts.seen_at is None else rollouts.seen_at


def _join(
  sampled: list[Rollouts], scored: list[LogProbs], watch: Stopwatch, begun: PendingRollouts | None, *, is_whole: bool
) -> PendingRollouts:
  for name, seconds in begun.seconds.items() if begun is not None else ():
    watch.add(name, float(seconds))
  return PendingRollouts(
    rollouts=join_rows(sampled),
    log_probs=join_rows(scored) if scored else None,
    seconds={name: np.array(seconds, np.float32) for name, seconds in watch.seconds.items()},
    is_whole=np.array(is_whole),
  )


def _join_rounds(rounds: list[LogProbs]) -> LogProbs:
  return LogProbs(
    log_p_old=np.concatenate([log_probs.log_p_old for log_probs in rounds], axis=-1),
    log_p_ref=np.concatenate([log_probs.log_p_ref for log_probs in rounds], axis=-1),
    entropy=np.mean([log_probs.entropy for log_probs in rounds], axis=0),
  )
