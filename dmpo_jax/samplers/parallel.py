"""Parallel decoding (Fast-dLLM, arXiv 2505.22618): a model call commits as many tokens as their confidence allows.

Three samplers share the rules. They differ in what the calls after a block's first one compute: whole rows; the block
and what follows it (prefix cache); or the block alone (dual cache).

Where a position predicts the next one's token (Dream), a block's first token is predicted by a position outside, and
calls with a cache learn nothing new of it. As in the authors' code, the first call with a cache commits that token and
no other, whatever the rule; it costs a call a block.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree

from dmpo_jax.samplers import checks
from dmpo_jax.samplers.loop import Decision, Forward, Plan, Prefill, Rule, View, decode
from dmpo_jax.samplers.prediction import Prediction, predict
from dmpo_jax.samplers.selection import (
  certain_shares,
  num_transfer_tokens,
  select_count,
  select_dynamic,
  select_factor,
  select_share,
  select_threshold,
)
from dmpo_jax.spans import take_span
from dmpo_jax.structs import Denoiser, Rollouts

RULES = ("count", "threshold", "factor", "entropy", "dynamic", "sequential")


@dataclasses.dataclass(frozen=True)
class Options:
  """How many tokens a model call commits.

  Args:
    rule: `count`: the number that `plan.steps` asks for; `threshold`, `factor`: see `select_threshold` and
      `select_factor`, at least one token a call; `entropy`: Dream's own, the most certain positions, as many as
      `plan.steps` asks for by `certain_shares`; `dynamic`: see `select_dynamic`, at least as many as for `count`;
      `sequential`: as many as for `count`, from the left.
    threshold: of the rules `threshold` and `dynamic`, at least 0.
    factor: of the rule `factor`, at least 0.

  Raises:
    ValueError: an option has a wrong value; see `checks.refuse`.
  """

  rule: str = "threshold"
  threshold: float = 0.9
  factor: float = 1.0

  def __post_init__(self) -> None:
    checks.refuse(
      checks.one_of("rule", self.rule, RULES),
      checks.from_zero("threshold", self.threshold),
      checks.from_zero("factor", self.factor),
    )


def make_rule(denoiser: Denoiser, plan: Plan, options: Options) -> Rule:
  """Build the rule that runs the model on whole rows (arXiv 2505.22618, algorithm 1 without its cache)."""

  def forward(view: View, state: tuple[()], kv_cache: None) -> Float[Array, "b s d"]:
    return take_span(denoiser.hidden(view.completion), view.start, plan.block_length)

  return _make_rule(denoiser, plan, options, forward)


def sample(denoiser: Denoiser, keys: Key[Array, "b"], plan: Plan, options: Options) -> Rollouts:
  """Decode b completions, running the model on whole rows."""
  return decode(make_rule(denoiser, plan, options), keys, plan, denoiser)[0]


def sample_with_prefix_cache(denoiser: Denoiser, keys: Key[Array, "b"], plan: Plan, options: Options) -> Rollouts:
  """Decode b completions with each block's prefix cached (arXiv 2505.22618, algorithm 1).

  A block's first call runs whole rows and commits tokens too. Until the block is done, later calls take the keys and
  values of the prompt and the earlier blocks from that call.
  """

  def forward(view: View, state: tuple[()], kv_cache: PyTree) -> Float[Array, "b s d"]:
    return denoiser.suffix(view.completion, view.start, kv_cache, plan.block_length)

  return decode(_make_rule(denoiser, plan, options, forward, is_cached=True), keys, plan, denoiser)[0]


def sample_with_dual_cache(denoiser: Denoiser, keys: Key[Array, "b"], plan: Plan, options: Options) -> Rollouts:
  """Decode b completions with everything but the current block cached (arXiv 2505.22618, section 3.2).

  As with the prefix cache, but the masked positions behind the block are cached too.
  """

  def forward(view: View, state: tuple[()], kv_cache: PyTree) -> Float[Array, "b s d"]:
    return denoiser.block(view.tokens, view.start, kv_cache)

  return decode(_make_rule(denoiser, plan, options, forward, is_cached=True), keys, plan, denoiser)[0]


def _make_prefill(denoiser: Denoiser, plan: Plan) -> Prefill:
  def prefill(view: View) -> tuple[Float[Array, "b s d"], PyTree]:
    hidden, kv_cache = denoiser.prefill(view.completion)
    return take_span(hidden, view.start, plan.block_length), kv_cache

  return prefill


def _make_rule(denoiser: Denoiser, plan: Plan, options: Options, forward: Forward, *, is_cached: bool = False) -> Rule:
  size, prefill = plan.block_length, _make_prefill(denoiser, plan) if is_cached else None
  most_calls = {"threshold": size, "factor": size, "entropy": min(plan.steps_per_block, size)}.get(
    options.rule, plan.steps_per_block
  )
  is_first_alone = prefill is not None and denoiser.shift_logits and most_calls > 1
  select = _make_select(options, size, most_calls, is_first_alone)

  def accept(view: View, hidden: Float[Array, "b s d"], state: tuple[()]) -> tuple[Decision, tuple[()]]:
    chosen = predict(denoiser, hidden, view.keys, view.positions, plan.temperature)
    is_kept = select(view, chosen)
    if is_first_alone:
      is_kept = jnp.where(view.step == 0, view.is_masked & (view.positions == view.start), is_kept)
    return Decision(jnp.where(is_kept, chosen.tokens, view.tokens), chosen.confidence), state

  return Rule(forward, accept, most_calls, prefill)


def _make_select(
  options: Options, size: int, most_calls: int, is_first_alone: bool
) -> Callable[[View, Prediction], Bool[Array, "b s"]]:
  """Close over the rule of `options`; `is_first_alone`: a block's first call takes one token, the others the rest."""
  if is_first_alone:
    schedule = jnp.concatenate([jnp.ones(1, jnp.int32), num_transfer_tokens(jnp.int32(size - 1), most_calls - 1)])
  else:
    schedule = num_transfer_tokens(jnp.int32(size), most_calls)
  shares = jnp.asarray(certain_shares(most_calls))

  def select(view: View, chosen: Prediction) -> Bool[Array, "b s"]:
    if options.rule == "count":
      return select_count(chosen.confidence, view.is_masked, schedule[view.step])
    if options.rule == "sequential":
      from_left = jnp.broadcast_to(-view.positions.astype(jnp.float32), view.is_masked.shape)
      return select_count(from_left, view.is_masked, schedule[view.step])
    if options.rule == "dynamic":
      return select_dynamic(chosen.confidence, view.is_masked, schedule[view.step], options.threshold)
    if options.rule == "threshold":
      return select_threshold(chosen.confidence, view.is_masked, options.threshold)
    if options.rule == "factor":
      return select_factor(chosen.confidence, view.is_masked, options.factor)
    return select_share(-chosen.entropy, view.is_masked, shares[view.step])

  return select
