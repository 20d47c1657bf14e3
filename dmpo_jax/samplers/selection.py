"""Which of a block's masked positions are kept at a model call: the rules of LLaDA and of parallel decoding."""

import difflib
import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmpo_jax.samplers.loop import Accept, Decision, Denoiser, Plan, View
from dmpo_jax.samplers.prediction import predict, rank

RULES = ("count", "threshold", "factor")


def num_transfer_tokens(num_masked: Int[Array, "*b"], steps: int) -> Int[Array, "*b {steps}"]:
  """Spread the masked tokens of a block evenly over its calls; the remainder goes to the first ones."""
  share, remainder = jnp.divmod(num_masked[..., None], steps)
  return (share + (jnp.arange(steps) < remainder)).astype(jnp.int32)


def select_count(
  score: Float[Array, "b s"], is_masked: Bool[Array, "b s"], count: Int[Array, "*b"]
) -> Bool[Array, "b s"]:
  """Keep the `count` masked positions of highest score, the leftmost first among equals."""
  return is_masked & (rank(score, is_masked) < jnp.broadcast_to(count, score.shape[:1])[:, None])


def select_threshold(
  confidence: Float[Array, "b s"], is_masked: Bool[Array, "b s"], threshold: float
) -> Bool[Array, "b s"]:
  """Keep every masked position whose confidence reaches the threshold, and always the best (Fast-dLLM, 2505.22618)."""
  return is_masked & ((confidence >= threshold) | (rank(confidence, is_masked) == 0))


def select_factor(confidence: Float[Array, "b s"], is_masked: Bool[Array, "b s"], factor: float) -> Bool[Array, "b s"]:
  """Keep as many as the least confident of them allows (Fast-dLLM, arXiv 2505.22618, section 3.3).

  Sorted by confidence, number i (from 0) passes with confidence >= 1 - factor / (i + 2), number 0 always; kept are
  those before the first that fails. As in the authors' code the last masked position goes along with the rest where
  it alone fails, so that two are always kept together; each row counts for itself.
  """
  place = rank(confidence, is_masked)
  num_masked = is_masked.sum(1, keepdims=True)
  fails = is_masked & (place > 0) & ~(confidence >= 1 - factor / (place + 2))
  count = jnp.where(fails, place, num_masked).min(1, keepdims=True)
  return is_masked & (place < jnp.where((count == num_masked - 1) & (count > 0), num_masked, count))


def make_accept(denoiser: Denoiser, plan: Plan, *, rule: str, threshold: float, factor: float) -> tuple[Accept, int]:
  """Close over a rule of parallel decoding; also give the most calls that it makes in a block.

  Args:
    rule: `count`: as many a call as `plan.steps` asks for; `threshold`, `factor`: see `select_threshold` and
      `select_factor`, at most one call a token.

  Raises:
    ValueError: an unknown rule, or a threshold or factor that is not a number from 0 up.
  """
  _check_rule(rule, threshold, factor)
  schedule = num_transfer_tokens(jnp.int32(plan.block_length), plan.steps_per_block)

  def accept(view: View, seen: Float[Array, "b s d"], state: tuple[()]) -> tuple[Decision, tuple[()]]:
    tokens, confidence, *_ = predict(denoiser, seen, view.keys, view.positions, plan.temperature)
    if rule == "count":
      is_kept = select_count(confidence, view.is_masked, schedule[view.step])
    elif rule == "threshold":
      is_kept = select_threshold(confidence, view.is_masked, threshold)
    else:
      is_kept = select_factor(confidence, view.is_masked, factor)
    return Decision(jnp.where(is_kept, tokens, view.tokens), confidence), state

  return accept, plan.steps_per_block if rule == "count" else plan.block_length


def check_choice(path: str, value: str, choices: tuple[str, ...]) -> None:
  """Check a name.

  Raises:
    ValueError: it is none of the choices; the message names them and the nearest.
  """
  if value not in choices:
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{path}={value!r}: must be one of {', '.join(choices)}{hint}")


def check_number(path: str, value: float, low: float = 0.0) -> None:
  """Check that a number is finite and at least `low`.

  Raises:
    ValueError: it is not.
  """
  if not low <= value < math.inf:
    raise ValueError(f"{path}={value}: must be a number from {low:g} up")


def _check_rule(rule: str, threshold: float, factor: float) -> None:
  check_choice("sampler.<name>.rule", rule, RULES)
  check_number("sampler.<name>.threshold", threshold)
  check_number("sampler.<name>.factor", factor)
