"""LLaDA's own decoding: a fixed number of tokens a model call, the most confident (or random) positions first."""

import difflib
import math

import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from dmpo_jax.samplers.loop import Decision, Denoiser, View, decode, take_block, validate_schedule
from dmpo_jax.samplers.prediction import predict, select_highest, uniform_noise
from dmpo_jax.structs import Rollouts

REMASKING = ("low_confidence", "random")


def sample(
  denoiser: Denoiser,
  keys: Key[Array, "b"],
  *,
  completion_length: int,
  block_length: int,
  steps: int,
  temperature: float,
  remasking: str = "low_confidence",
) -> Rollouts:
  """Decode b completions with LLaDA's fixed schedule (arXiv 2502.09992, algorithms 4 and 5, block by block).

  Each call predicts every masked position of the current block and keeps the scheduled number of them. With more
  calls than tokens in a block the last calls keep nothing. All rows make the same `steps` calls.

  Args:
    denoiser: the model closed over its parameters and the rows' prompts.
    keys: the rows' keys; unused when greedy with low_confidence.
    steps: model calls for the whole completion, a multiple of the number of blocks.
    temperature: of the tokens, at least 0; 0 is greedy.
    remasking: what is kept first: `low_confidence` the most probable tokens, `random` any.

  Raises:
    ValueError: see `validate`.
  """
  validate(completion_length, block_length, steps, temperature, remasking)
  steps_per_block = steps * block_length // completion_length
  schedule = num_transfer_tokens(jnp.int32(block_length), steps_per_block)
  most = math.ceil(block_length / steps_per_block)

  def visit(view: View, state: tuple[()]) -> tuple[Decision, tuple[()]]:
    hidden = take_block(denoiser.hidden(view.completion), view.start, block_length)
    positions = view.start + jnp.arange(block_length)
    prediction = predict(
      denoiser.logits(hidden),
      view.keys,
      positions,
      mask_token_id=denoiser.mask_token_id,
      temperature=temperature,
    )
    score = prediction.confidence if remasking == "low_confidence" else uniform_noise(view.keys, positions)
    count = jnp.broadcast_to(schedule[view.step], keys.shape)
    is_kept = select_highest(score, view.is_masked, count, most)
    return Decision(jnp.where(is_kept, prediction.tokens, view.tokens), prediction.confidence), state

  rollouts, _ = decode(
    visit,
    (),
    keys,
    mask_token_id=denoiser.mask_token_id,
    completion_length=completion_length,
    block_length=block_length,
    steps=steps,
  )
  return rollouts


def num_transfer_tokens(num_masked: Int[Array, "*b"], steps: int) -> Int[Array, "*b {steps}"]:
  """Spread the masked tokens of a block evenly over its calls; the remainder goes to the first ones."""
  share, remainder = jnp.divmod(num_masked[..., None], steps)
  return (share + (jnp.arange(steps) < remainder)).astype(jnp.int32)


def validate(completion_length: int, block_length: int, steps: int, temperature: float, remasking: str) -> None:
  """Check the arguments of `sample`.

  Raises:
    ValueError: the first that is wrong, with the configuration's name for it and what would do.
  """
  validate_schedule(completion_length, block_length, steps)
  if not 0 <= temperature < math.inf:
    raise ValueError(f"sampler.temperature={temperature}: must be a number from 0 (greedy) up")
  if remasking not in REMASKING:
    near = difflib.get_close_matches(str(remasking), REMASKING, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"sampler.llada.remasking={remasking!r}: must be one of {', '.join(REMASKING)}{hint}")
