"""The arrays that travel between the rooms, and the letters that name their axes.

Axes, here and in every jaxtyping signature of the package:

    p  prompts in a buffer          d  model width
    g  rollouts of one prompt       n  attention heads
    b  rows, usually p * g          k  key/value heads
    r  mask replicates of a row     h  head width
    q  prompt positions             f  feed-forward width
    c  completion positions         v  vocabulary
    l  q + c, a whole row

`g` stays an axis of its own wherever a group matters, so that a softmax over a group cannot mix prompts.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import struct

VOCAB_TILE = 32  # ids, from a multiple of it on, that no part of a large vocabulary divides: one is drawn among them


@struct.dataclass
class Prompts:
  """A batch of prompts, left-padded to one length."""

  tokens: jax.Array  # int32 [p, q]
  is_valid: jax.Array  # bool [p, q]; False on padding
  prompt_id: jax.Array  # uint32 [p]; identity of the prompt, or of its repeat: seeds the noise of its rows


@struct.dataclass
class Rollouts:
  """What a sampler returns for b rows."""

  completion: jax.Array  # int32 [b, c]
  committed_at: jax.Array  # int32 [b, c]; the row's model call (from 0) that decided the position; filled: num_calls
  confidence: jax.Array  # float32 [b, c]; the model's probability of the token when it was committed; filled: 0
  num_calls: jax.Array  # int32 [b]; model calls that the row was live in
  num_tokens: jax.Array  # int32 [b]; positions that the model decided; early exit fills the rest with EOS
  num_saved: jax.Array  # int32 [b]; calls that early exit left out, of the most that the sampler would have made
  log_p_old: jax.Array | None = None  # float32 [b, c]; log-probabilities that a sampler gives of its own tokens, in
  log_p_ref: jax.Array | None = None  # nats, under the policy and under the reference; filled: 0
  # What the model saw in the end, before early exit filled in EOS: tokens [b, c], MASK where none was decided, and the
  # calls that decided them [b, c]; never: num_calls. None in rollouts of before they were kept.
  seen: jax.Array | None = None  # int32
  seen_at: jax.Array | None = None  # int32

  @property
  def is_drawn(self) -> jax.Array:
    """Bool [b, c]; False where early exit filled a position."""
    return self.committed_at < self.num_calls[..., None]

  @property
  def tokens_per_call(self) -> jax.Array:
    """Float [b]."""
    return self.num_tokens / self.num_calls

  @property
  def mean_confidence(self) -> jax.Array:
    """Float [b]; over the tokens that the model decided."""
    return self.confidence.sum(-1) / self.num_tokens


@struct.dataclass
class LogProbs:
  """Estimates of a buffer's log-probabilities under the sampling and the reference policy, by the same masks for both.

  One a mask draw for the whole completion, [p, g, draws]; or position by position, under the masks of update u of the
  buffer, [p, g, u, c] (of one update alone: [p, g, c]).
  """

  log_p_old: jax.Array  # float32
  log_p_ref: jax.Array  # float32
  entropy: jax.Array  # float32 [p, g]; mean over masked positions, nats; position by position: [p, g, u]


@struct.dataclass
class Drawn:
  """A buffer of rollouts that has no rewards yet, or its first prompts: some sampled, fewer of them scored."""

  rollouts: Rollouts  # fields [p, g, c] and [p, g]
  measures: LogProbs | None  # None where the objective needs none
  seconds: dict[str, jax.Array]  # float32 []; what sampling and scoring took
  is_whole: jax.Array | np.ndarray | bool = True  # bool []; False: the run was stopped while it was drawn
  # Waits for their grades; None where grading is not under way, as in a buffer that comes from a checkpoint.
  wait: Callable[[], Any] | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class Experience:
  """A buffer of graded rollouts: all that the updates need, and independent of the current parameters."""

  prompts: Prompts
  completion: jax.Array  # int32 [p, g, c]
  is_counted: jax.Array  # bool [p, g, c]; positions that count in the likelihood
  reward: jax.Array  # float32 [p, g]
  is_kept: jax.Array  # bool [p, g]; False: dropped from its group (its reward failed)
  log_p_old: jax.Array  # float32 [p, g]; sequence log-probability (bound) under the sampling policy
  log_p_ref: jax.Array  # float32 [p, g]; the same under the reference policy, with the same masks
  weight: jax.Array  # float32 [p, g]; importance weights, summing to 1 over g
  negative_weight: jax.Array  # float32 [p, g]; weights of the target tilted the other way
  committed_at: jax.Array  # int32 [p, g, c]; the model call that decided the position as the sampler saw it
  # For ratios to the policy that drew the rollouts; None for objectives that take none.
  token_log_p_old: jax.Array | None = None  # float32 [p, g, u, c]; under the masks of update u of the buffer
  token_log_p_ref: jax.Array | None = None  # float32 [p, g, u, c]; the same under the reference policy
  seen: jax.Array | None = None  # int32 [p, g, c]; see `Rollouts.seen`; None: what is not counted is unknown


@struct.dataclass
class TrainState:
  """Everything that an update changes."""

  step: jax.Array  # int32 []; gradient steps tried so far
  trainable: Any  # parameters that are learned: all of them, or the LoRA adapters
  opt_state: Any
  num_skipped: jax.Array  # int32 []; updates skipped because something was not finite
  num_skipped_in_a_row: jax.Array  # int32 []
  reference: Any = (
    None  # like `trainable`: the reference policy, where it follows the trained one; None: it stays the base
  )
