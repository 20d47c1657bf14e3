"""One buffer: prompts -> completions -> rewards -> what the objective needs of them (`measure.py`) -> Experience.

Forward passes only. The jitted programs run on chunks of prompts, so that a buffer may be larger than what fits at one
time; what leaves them is small and replicated, for every host to read.
"""

import dataclasses
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
from dmpo_jax.measure import Measure, Policies
from dmpo_jax.models import lora
from dmpo_jax.models.denoiser import make_denoiser
from dmpo_jax.models.llada import LLaDA
from dmpo_jax.objectives import weights
from dmpo_jax.sharding import replicated
from dmpo_jax.structs import Experience, Prompts, Rollouts
from dmpo_jax.tokenizer import Tokenizer


def collect(
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
) -> tuple[Experience, dict[str, float]]:
  """Draw a buffer of rollouts from the current policy, grade it, and measure what the objective needs.

  Args:
    policies: the current and the reference policy.
    records: the task's records of the prompts, for grading.
    sample: from `make_sample`; measure: from one of `measure.make_measure_...`.
    buffer: index of the buffer, part of its noise.
    chunk_prompts: prompts sampled and scored at one time; 0 for all.
    counted: see `count_positions`.

  Returns:
    The experience and what the log says of it (seconds and tokens/s by phase among it).
  """
  watch = Stopwatch()
  key = noise.step_key(seed, "rollout", buffer)
  size = chunk_prompts or len(records)
  slices = [slice(start, start + size) for start in range(0, len(records), size)]
  chunks = [sample(policies, jax.tree.map(operator.itemgetter(part), prompts), key) for part in slices]
  waits = [  # a chunk is graded while the accelerator samples the next ones
    grade(grading, tokenizer, records[part], np.asarray(chunk.completion))
    for part, chunk in zip(slices, chunks, strict=True)
  ]
  rollouts = jax.tree.map(lambda *leaves: np.concatenate(leaves), *jax.device_get(chunks))
  completion = rollouts.completion
  watch.lap("sample")
  grades = Grades.join([wait() for wait in waits])
  watch.lap("reward")  # what grading took longer than sampling
  experience = Experience(
    prompts=prompts,
    completion=completion,
    is_counted=count_positions(completion, tokenizer.eos_token_id, counted),
    reward=grades.reward,
    is_kept=grades.is_kept,
    log_p_old=0 * grades.reward,
    log_p_ref=0 * grades.reward,
    weight=0 * grades.reward,
    negative_weight=0 * grades.reward,
    committed_at=rollouts.committed_at,
  )
  experience, figures = measure(policies, experience, rollouts, buffer)
  watch.lap("score")
  is_until_eos = count_positions(completion, tokenizer.eos_token_id, "until_eos")
  metrics = describe(grades, rollouts, is_until_eos, tokenizer.eos_token_id) | figures
  metrics |= watch.rates(tokens=completion.size)
  return experience, metrics


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
  model: LLaDA,
  mesh: Mesh,
  *,
  sampler: str,
  group_size: int,
  plan: samplers.Plan,
  guidance: float = 0.0,
  with_reference: bool = False,
  **own: Any,
) -> Callable:
  """Jit `sample(policies, prompts, key[, temperature]) -> Rollouts` with fields [p, g, c] and [p, g].

  A temperature [p] of each prompt's rollouts replaces the plan's.

  Args:
    sampler: a name in `samplers.SAMPLERS`; `own` are its own keywords.
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
    keys = noise.row_keys(key, prompts.prompt_id, group_size).reshape(-1)
    tokens, is_valid = (jnp.repeat(array, group_size, axis=0) for array in (prompts.tokens, prompts.is_valid))
    denoiser = make_denoiser(model, variables, tokens, is_valid, guidance=guidance, reference=reference)
    own_plan = plan
    if temperature is not None:
      own_plan = dataclasses.replace(plan, temperature=jnp.repeat(temperature, group_size))
    rollouts = samplers.SAMPLERS[sampler](denoiser, keys, own_plan, **own)
    return jax.tree.map(lambda array: array.reshape(-1, group_size, *array.shape[1:]), rollouts)

  return jax.jit(sample, out_shardings=replicated(mesh))


def count_positions(completion: Int[np.ndarray, "*b c"], eos_token_id: int, counted: str) -> Bool[np.ndarray, "*b c"]:
  """Mark the completion positions that the likelihood counts: `all`, or `until_eos` (the first EOS included)."""
  if counted == "all":
    return np.ones(completion.shape, bool)
  is_eos = completion == eos_token_id
  return np.cumsum(is_eos, -1) - is_eos == 0


class Stopwatch:
  """Seconds of the phases of a buffer."""

  def __init__(self) -> None:
    self.seconds: dict[str, float] = {}
    self._start = time.monotonic()

  def lap(self, name: str) -> None:
    """Credit the time since the last lap to `name`."""
    now = time.monotonic()
    self.seconds[name], self._start = now - self._start, now

  def rates(self, tokens: int) -> dict[str, float]:
    """The seconds, and the completion tokens a second, of each phase."""
    seconds = {f"seconds_{name}": value for name, value in self.seconds.items()}
    return seconds | {f"tokens_per_second_{name}": tokens / value for name, value in self.seconds.items()}


def describe(
  grades: Grades, rollouts: Rollouts, is_until_eos: Bool[np.ndarray, "p g c"], eos_token_id: int
) -> dict[str, float]:
  """What the log says of a buffer's completions and rewards. Dropped rollouts count in no reward."""
  kept = grades.is_kept
  reward = grades.reward[kept]
  completion = rollouts.completion
  unique = weights.unique_rollouts(jnp.asarray(completion), jnp.asarray(kept))
  return {
    "reward_mean": _mean(reward),
    "reward_std": float(reward.std()) if reward.size else math.nan,
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
    "completion_length": _mean((is_until_eos & (completion != eos_token_id)).sum(-1)),
    "eos_rate": _mean((completion == eos_token_id).any(-1)),
  }


def _mean(values: Float[np.ndarray, "..."] | Bool[np.ndarray, "..."] | Int[np.ndarray, "..."]) -> float:
  return float(np.mean(values)) if values.size else math.nan
