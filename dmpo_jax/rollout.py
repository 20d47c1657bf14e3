"""One buffer: prompts -> completions -> rewards -> what the objective needs of them (`measure.py`) -> Experience.

Forward passes only. `draw` does all that takes the policy, and begins the grading; `finish` waits for the grades and
makes experience of both. Whatever the devices do between the two, they do while rewards are graded. The jitted programs
run on chunks of prompts, so that a buffer may be larger than what fits at one time; what leaves them is small and
replicated, for every host to read.
"""

import dataclasses
import functools
import math
import operator
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from dmpo_jax import noise, samplers
from dmpo_jax.grading import Grades, Grading, grade
from dmpo_jax.hub.tokenizer import Tokenizer
from dmpo_jax.measure import Measure, Policies, check_confidence, chunks, concatenate, fetch_ahead, log_confidence
from dmpo_jax.models import lora
from dmpo_jax.models.denoiser import make_denoiser
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.objectives import weights
from dmpo_jax.run import progress
from dmpo_jax.run.preemption import Preempted
from dmpo_jax.sharding import everywhere, fill_rows, replicated
from dmpo_jax.structs import Drawn, Experience, Prompts, Rollouts


def draw(
  policies: Policies,
  prompts: Prompts,
  records: Sequence[dict],
  *,
  sample: Callable,
  measure: Measure,
  grading: Grading,
  tokenizer: Tokenizer,
  seed: int,
  buffer: int,
  chunk_prompts: int,
  counted: str,
  begun: Drawn | None = None,
) -> Drawn:
  """Draw a buffer of rollouts from the current policy, begin to grade them, and score them meanwhile.

  Args:
    policies: the current and the reference policy.
    records: the task's records of the prompts, for grading.
    sample: from `make_sample`, closed over the policies; measure: from one of `measure.make_measure_...`.
    buffer: index of the buffer, part of its noise.
    chunk_prompts: prompts sampled and scored at one time; 0 for all.
    counted: see `count_positions`.
    begun: what an earlier start had drawn of it; its whole chunks are not drawn again.

  Raises:
    Preempted: between two chunks, with those that are finished.
    NotFinite: see `measure.check_confidence`.
  """
  watch, key = Stopwatch(), noise.step_key(seed, "rollout", buffer)
  parts = chunks(len(records), chunk_prompts)
  sampled, scored = _chunks_of(begun, parts)
  waits = [
    grade(grading, tokenizer, records[part], each.completion) for part, each in zip(parts, sampled, strict=False)
  ]
  on_devices: dict[int, Rollouts] = {}  # those that are still to be scored, by their first prompt

  def sample_part(part: slice) -> Rollouts:
    progress.part("sampling prompts", part.start, len(records))
    on_devices[part.start] = sample(_take(prompts, part), key)
    return on_devices[part.start]

  def score_part(index: int, part: slice) -> Any:
    progress.part("scoring prompts", part.start, len(records))
    rollouts = on_devices.pop(part.start) if part.start in on_devices else everywhere(sampled[index])
    is_counted = count_positions(rollouts.completion, tokenizer.eos_token_id, counted)
    about = rollouts.completion, is_counted, _decided_at(rollouts)
    return measure.score(policies, _take(prompts, part), *about, buffer, seen=rollouts.seen)

  to_sample = list(enumerate(parts))[len(sampled) :]
  to_score = list(enumerate(parts))[len(scored) :] if measure.score else []
  calls = [functools.partial(sample_part, part) for _, part in to_sample]
  results = fetch_ahead(calls + [functools.partial(score_part, *each) for each in to_score])
  try:
    for (_, part), rollouts in zip(to_sample, results, strict=False):
      check_confidence(rollouts)
      sampled.append(rollouts)
      waits.append(grade(grading, tokenizer, records[part], rollouts.completion))
    watch.lap("sample")
    del sample  # and with it parameters that were laid out for it
    for measures in results:
      scored.append(measures)  # one by one, as a notice may come between
  except Preempted as notice:
    watch.lap("score" if len(sampled) == len(parts) else "sample")
    notice.drawn = _as_drawn(sampled, scored, watch, begun, is_whole=False) if sampled else None
    raise
  watch.lap("score")
  drawn = _as_drawn(sampled, scored, watch, begun, is_whole=True)
  return drawn.replace(wait=lambda: Grades.join([wait() for wait in waits]))


def _chunks_of(begun: Drawn | None, parts: Sequence[slice]) -> tuple[list[Rollouts], list[Any]]:
  """Cut what was drawn into its whole chunks: rollouts and measures of the first prompts, on the host."""
  sampled, scored = [], []
  if begun is not None:
    for whole, cut in ((begun.rollouts, sampled), (begun.measures, scored)):
      num = len(jax.tree.leaves(whole)[0]) if whole is not None else 0
      cut += [_take(whole, part) for part in parts if part.stop <= num]
  return sampled, scored


def _as_drawn(
  sampled: list[Rollouts], scored: list[Any], watch: "Stopwatch", begun: Drawn | None, *, is_whole: bool
) -> Drawn:
  for name, seconds in begun.seconds.items() if begun is not None else ():
    watch.add(name, float(seconds))
  return Drawn(
    rollouts=concatenate(sampled),
    measures=concatenate(scored) if scored else None,
    seconds={name: np.array(seconds, np.float32) for name, seconds in watch.seconds.items()},
    is_whole=np.array(is_whole),
  )


def finish(
  drawn: Drawn,
  policies: Policies,
  prompts: Prompts,
  records: Sequence[dict],
  *,
  measure: Measure,
  grading: Grading,
  tokenizer: Tokenizer,
  buffer: int,
  counted: str,
) -> tuple[Experience, dict[str, float]]:
  """Wait for the grades of a buffer that was drawn, and complete it for the objective.

  Args:
    drawn: from `draw` with the same arguments; from a checkpoint it is graded here.

  Returns:
    The experience and what the log says of it (seconds and tokens/s by phase among it).
  """
  watch = Stopwatch()
  rollouts, measures = drawn.rollouts, drawn.measures
  completion = rollouts.completion
  progress.part("waiting for rewards")
  grades = (drawn.wait or grade(grading, tokenizer, records, completion))()
  watch.lap("reward")  # what grading took longer than all that was done meanwhile
  experience = Experience(
    prompts=prompts,
    completion=completion,
    is_counted=count_positions(completion, tokenizer.eos_token_id, counted),
    reward=grades.reward,
    reward_parts=grades.parts,
    is_kept=grades.is_kept,
    log_p_old=0 * grades.reward,
    log_p_ref=0 * grades.reward,
    weight=0 * grades.reward,
    negative_weight=0 * grades.reward,
    committed_at=_decided_at(rollouts),
    seen=rollouts.seen,
  )
  experience, figures = measure.finish(policies, experience, rollouts, measures, buffer)
  watch.lap("score")
  is_until_eos = count_positions(completion, tokenizer.eos_token_id, "until_eos")
  metrics = describe(grades, rollouts, is_until_eos, tokenizer.eos_token_id) | figures
  for name, seconds in drawn.seconds.items():
    watch.add(name, float(seconds))
  metrics |= watch.rates(tokens=completion.size)
  return experience, metrics


def _decided_at(rollouts: Rollouts) -> Any:
  """The calls that decided the tokens that the sampler saw."""
  return rollouts.committed_at if rollouts.seen_at is None else rollouts.seen_at


def _take(arrays: Any, part: slice) -> Any:
  return jax.tree.map(operator.itemgetter(part), arrays)


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


def make_sample(
  model: Transformer,
  mesh: Mesh,
  *,
  sampler: str,
  group_size: int,
  plan: samplers.Plan,
  guidance: float = 0.0,
  with_reference: bool = False,
  options: Any,
) -> Callable:
  """Jit `sample(policies, prompts, key[, temperature]) -> Rollouts` with fields [p, g, c] and [p, g].

  A temperature [p] of each prompt's rollouts replaces the plan's. Where the devices do not divide the rows, copies of
  the last one fill them up and are dropped again.

  Args:
    mesh: where the rollouts are to lie, on every device; the sampler runs on the mesh that is set when it is called.
    sampler: a name in `samplers.SAMPLERS`.
    options: the sampler's own; see `samplers.make_options`.
    group_size: rollouts of each prompt.
    guidance: see `make_denoiser`.
    with_reference: let the sampler see the reference policy, for its log-probabilities of the tokens.
  """
  has_adapters = model.config.lora is not None

  def sample(policies: Policies, prompts: Prompts, key: jax.Array, temperature: jax.Array | None = None) -> Rollouts:
    variables = lora.policy_variables(policies.trainable, policies.frozen, has_adapters)
    reference = None
    if with_reference:
      reference = lora.reference_variables(policies.frozen, policies.reference, has_adapters)
    num_rows = prompts.tokens.shape[0] * group_size

    def rows(array: jax.Array) -> jax.Array:
      return fill_rows(jnp.repeat(array, group_size, axis=0))

    keys = fill_rows(noise.row_keys(key, prompts.prompt_id, group_size).reshape(-1))
    tokens, is_valid = rows(prompts.tokens), rows(prompts.is_valid)
    denoiser = make_denoiser(model, variables, tokens, is_valid, guidance=guidance, reference=reference)
    own_plan = plan
    if temperature is not None:
      own_plan = dataclasses.replace(plan, temperature=rows(temperature))
    rollouts = samplers.SAMPLERS[sampler].sample(denoiser, keys, own_plan, options)
    return jax.tree.map(lambda array: array[:num_rows].reshape(-1, group_size, *array.shape[1:]), rollouts)

  return jax.jit(sample, out_shardings=replicated(mesh))


class Compiled:
  """A jitted sampler whose programs, one for each shape of the prompts, are compiled apart, so that this can be timed.

  It is called with `(policies, prompts, key)`; `seconds` of compiling add up.
  """

  def __init__(self, sample: jax.stages.Wrapped):
    self.seconds = 0.0
    self._sample = sample
    self._programs: dict[tuple[int, ...], jax.stages.Compiled] = {}

  def __call__(self, policies: Policies, prompts: Prompts, key: jax.Array) -> Rollouts:
    return self.compile(policies, prompts, key)(policies, prompts, key)

  def compile(self, policies: Policies, prompts: Prompts, key: jax.Array) -> jax.stages.Compiled:
    """Return the program for prompts of this shape, compiled where it is not yet."""
    shape = prompts.tokens.shape
    if shape not in self._programs:
      start = time.monotonic()
      self._programs[shape] = self._sample.lower(policies, prompts, key).compile()
      self.seconds += time.monotonic() - start
    return self._programs[shape]


def count_positions(
  completion: Int[np.ndarray | jax.Array, "*b c"], eos_token_id: int, counted: str
) -> Bool[np.ndarray | jax.Array, "*b c"]:
  """Mark the completion positions that the likelihood counts: `all`, or `until_eos` (the first EOS included).

  Positions that are not counted are neither scored nor shown to the model (`scoring.make_score`).
  """
  if counted == "all":
    return np.ones(completion.shape, bool)
  is_eos = completion == eos_token_id
  return is_eos.cumsum(-1) - is_eos == 0


class Stopwatch:
  """Seconds of the phases of a buffer."""

  def __init__(self) -> None:
    self.seconds: dict[str, float] = {}
    self._start = time.monotonic()

  def lap(self, name: str) -> None:
    """Credit the time since the last lap to `name`."""
    now = time.monotonic()
    self.add(name, now - self._start)
    self._start = now

  def add(self, name: str, seconds: float) -> None:
    """Credit seconds that were measured elsewhere."""
    self.seconds[name] = self.seconds.get(name, 0.0) + seconds

  def rates(self, tokens: int) -> dict[str, float]:
    """The seconds, and the completion tokens a second, of each phase."""
    seconds = {f"seconds_{name}": value for name, value in self.seconds.items()}
    return seconds | {f"tokens_per_second_{name}": tokens / value for name, value in self.seconds.items()}


def lack_of_signal(reward: Float[np.ndarray, "p g *parts"], is_kept: Bool[np.ndarray, "p g"], *, compares: bool) -> str:
  """Say that the rewards of a buffer teach nothing; "" where they teach something.

  Args:
    reward: or its parts, where the objective takes them apart.
    compares: the objective learns from differences inside a group; else from the rewards themselves.
  """
  num, parts = len(reward), reward.reshape(*is_kept.shape, -1)
  highest = np.where(is_kept[..., None], parts, -np.inf).max(1)
  if not is_kept.any():
    return "no signal: no reward could be computed"
  if not reward[is_kept].any():
    return f"no signal: all rewards equal in {num} of {num} groups, all are 0"
  if not compares or (highest > np.where(is_kept[..., None], parts, np.inf).min(1)).any():
    return ""
  alone = ", as rollout.group_size=1 leaves nothing to compare" if reward.shape[1] == 1 else ""
  return f"no signal: all rewards equal in {num} of {num} groups{alone}"


def describe(
  grades: Grades, rollouts: Rollouts, is_until_eos: Bool[np.ndarray, "p g c"], eos_token_id: int
) -> dict[str, float]:
  """What the log says of a buffer's completions and rewards. Dropped rollouts count in no reward."""
  kept = grades.is_kept
  reward = grades.reward[kept]
  completion = rollouts.completion
  drawn = log_confidence(rollouts)[rollouts.is_drawn]
  unique = weights.unique_rollouts(*map(jnp.asarray, (completion, is_until_eos, kept)))
  return {
    "reward_mean": _mean(reward),
    "reward_std": float(reward.std()) if reward.size else math.nan,
    **{f"reward_{name}": _mean(grades.parts[kept][:, index]) for index, name in enumerate(grades.part_names)},
    "solve_rate": _mean(grades.is_solved[kept]),
    "rewards_failed": float((~kept).sum()),
    "grading_timeouts": float(grades.num_timeouts),
    "grading_crashes": float(grades.num_crashes),
    "graded_per_second": grades.per_second,
    "groups_without_variance": float(weights.fraction_without_variance(*map(jnp.asarray, (grades.reward, kept)))),
    "unique_rollouts": float(unique.mean()),
    "tokens_per_call": _mean(rollouts.num_tokens) / _mean(rollouts.num_calls),
    "calls_saved": _mean(rollouts.num_saved),
    "confidence": float(rollouts.confidence.sum() / rollouts.num_tokens.sum()),
    "sampled_nll": -_mean(drawn),  # nats a token; unlike `entropy` it is the same measure for every objective
    "completion_length": _mean((is_until_eos & (completion != eos_token_id)).sum(-1)),
    "eos_rate": _mean((completion == eos_token_id).any(-1)),
  }


def _mean(values: Float[np.ndarray, "..."] | Bool[np.ndarray, "..."] | Int[np.ndarray, "..."]) -> float:
  return float(np.mean(values)) if values.size else math.nan
