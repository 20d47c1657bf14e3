"""The arrays and interfaces that rooms share, and the letters that name axes.

Axes, here and in every jaxtyping signature of the package:

    p  prompts in a buffer                  d  model width
    g  rollouts of one prompt               y  layers
    b  rows, usually p * g                  n  attention heads
    r  mask samples of a rollout            k  key/value heads
    q  prompt positions                     h  head width
    c  completion positions                 f  feed-forward width
    l  q + c, a whole row                   e  experts
    m  keys that queries attend to          v  vocabulary
    s  positions of a block                 w  neighbouring ids of a vocabulary chunk
    t  tokens of any rows and positions     u  updates on one buffer
    z  rows, several for each prompt's      j  candidates for a row or position, experts of a token

`g` stays a real axis wherever a group matters, so that a softmax over a group cannot mix prompts. Where there are no
heads, `n` counts the mask draws of an estimate, or the runs of w ids in a chunk; where there is no attention, `w` is
half of h in rotary tables.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import jax
from flax import struct
from jaxtyping import Array, Bool, Float, Float32, Int, PyTree

Params = Mapping[str, Any]  # nested: the arrays of a model, or one collection of its Flax variables

# A field of the structures below. Programs see a jax.Array there, the host an np.ndarray, a plan a jax.ShapeDtypeStruct
# and a layout a sharding, and no type says which of them it is.
AnyArray = Any

# Samplers draw an id of a large vocabulary in two steps: a tile of this many neighbouring ids, then one of them. Tiles
# begin at multiples of this number, and no chunk of the vocabulary cuts one.
VOCAB_TILE = 32


@struct.dataclass
class Prompts:
  """A batch of prompts, left-padded to one length."""

  tokens: AnyArray  # int32 [p, q]
  is_valid: AnyArray  # bool [p, q]; False on padding
  prompt_id: AnyArray  # uint32 [p]; identifies the prompt (or its repeat) and seeds the noise of its rows


@struct.dataclass
class Rollouts:
  """What a sampler returns for b rows. Positions after an early exit are *filled*: EOS, not decided by the model."""

  completion: AnyArray  # int32 [b, c]
  committed_at: AnyArray  # int32 [b, c]; the row's model call (from 0) that decided the position; filled: num_calls
  confidence: AnyArray  # float32 [b, c]; the model's probability of the token when it was committed; filled: 0
  num_calls: AnyArray  # int32 [b]; model calls while the row was live
  num_tokens: AnyArray  # int32 [b]; positions that the model decided
  num_saved: AnyArray  # int32 [b]; model calls saved by early exit, of the most that the sampler could have made
  # Log-probabilities of the tokens under the policy and the reference, nats, if the sampler computes them; filled: 0.
  log_p_old: AnyArray | None = None  # float32 [b, c]
  log_p_ref: AnyArray | None = None  # float32 [b, c]
  # What the model saw at the end, before filling: the tokens, MASK if undecided, and the calls that decided them,
  # num_calls if none did. None in rollouts saved by older versions.
  seen: AnyArray | None = None  # int32 [b, c]
  seen_at: AnyArray | None = None  # int32 [b, c]

  @property
  def is_drawn(self) -> jax.Array:
    """Bool [b, c]; False at filled positions."""
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
  """Log-probabilities of a buffer under the sampling policy and the reference, nats; both under the same masks.

  For whole completions: [p, g, n], one estimate for each of n independent mask draws. Position by position: [p, g, c].
  Under the masks of each update u on the buffer: [p, g, u, n] and [p, g, u, c].
  """

  log_p_old: AnyArray  # float32
  log_p_ref: AnyArray  # float32
  entropy: AnyArray  # float32 [p, g], mean over masked positions, nats; position by position [p, g, u]


@struct.dataclass
class PendingRollouts:
  """A buffer of rollouts that has no rewards yet, or its first rows: some sampled, fewer of them scored."""

  rollouts: Rollouts  # its rows prompt by prompt, fields [b, c] and [b]; b need not be a multiple of g
  log_probs: LogProbs | None  # None where the objective needs none
  seconds: dict[str, AnyArray]  # float32 []; what sampling and scoring took
  is_whole: AnyArray = True  # bool []; False: the run was stopped while it was generated
  # The buffer's prompts (`rollout.Batch`), and what waits for their grades. Checkpoints hold neither.
  batch: Any = struct.field(pytree_node=False, default=None)
  wait: Callable[[], Any] | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class Experience:
  """A buffer of graded rollouts: all that the updates need, and independent of the current parameters."""

  prompts: Prompts
  completion: AnyArray  # int32 [p, g, c]
  is_counted: AnyArray  # bool [p, g, c]; positions that count in the likelihood
  reward: AnyArray  # float32 [p, g]
  is_kept: AnyArray  # bool [p, g]; False: dropped from its group (its reward failed)
  log_p_old: AnyArray  # float32 [p, g]; sequence log-probability (bound) under the sampling policy
  log_p_ref: AnyArray  # float32 [p, g]; the same under the reference policy, with the same masks
  weight: AnyArray  # float32 [p, g]; importance weights, summing to 1 over g
  negative_weight: AnyArray  # float32 [p, g]; weights of the target tilted the other way
  committed_at: AnyArray  # int32 [p, g, c]; the model call that decided the position as the sampler saw it
  # For ratios to the policy that drew the rollouts; None for objectives that take none. Where they are of whole
  # completions, the last axis is that of the estimate's draws.
  token_log_p_old: AnyArray | None = None  # float32 [p, g, u, c]; under the masks of update u of the buffer
  token_log_p_ref: AnyArray | None = None  # float32 [p, g, u, c]; the same under the reference policy
  seen: AnyArray | None = None  # int32 [p, g, c]; see `Rollouts.seen`; None: what is not counted is unknown
  reward_parts: AnyArray | None = None  # float32 [p, g, parts]; in the order of Task.reward_parts; None: it has none
  is_informative: AnyArray | None = None  # bool [p]; False: updates leave the group out; None: they take all


class Routing(NamedTuple):
  """What the routers of a model with experts did with tokens: sums over them, for each layer that has experts."""

  load: Float32[Array, "y *b e"]  # tokens that took each expert
  entropy: Float32[Array, "y *b"]  # of the router's softmax, nats


class Scores(NamedTuple):
  """What a policy says of given tokens, nats."""

  log_prob: Float32[Array, "*t"]  # of the token
  entropy: Float32[Array, "*t"]  # of the distribution that it was scored under; carries no gradient
  divergence: Float32[Array, "*t"] | None = None  # KL(teacher || that distribution), if there is a teacher
  routing: Routing | None = None  # of each rollout's rows, [y, p, g], if the model has experts; carries no gradient


Pairs = tuple[tuple[int, int], ...]  # indices of mask samples


@runtime_checkable
class Score(Protocol):
  """Score the tokens of a group's completions under given masks: a policy, its prompts and completions closed over.

  `log_prob` is log p(y_l | prompt, y with the masked positions hidden) at every position, [p, g, r, c].

  Args:
    is_masked: positions hidden from the model.
    prompt_is_masked: the same for the prompt; None: none.
    pairs: mask samples (i, j) of which one score is read at each position: that of i where i masks it, else that of j.
      Both then hold this one score.
  """

  def __call__(
    self, is_masked: Bool[Array, "p g r c"], prompt_is_masked: Bool[Array, "p g r q"] | None = None, pairs: Pairs = ()
  ) -> Scores: ...


@runtime_checkable
class Denoiser(Protocol):
  """The model as samplers see it: parameters and the prompts of b rows closed over.

  Hidden states are given at the positions that they predict. They may hold several things side by side along d (with
  guidance: the row with and without its prompt). Samplers only slice them by position and pass them to `logits`.
  """

  mask_token_id: int
  eos_token_id: int
  end_token_ids: tuple[int, ...]  # the first of these ends a completion: EOS, and others where a checkpoint names some
  num_chunks: int  # of the vocabulary
  shift_logits: bool  # the hidden state of a position predicts the next one's token (Dream)
  block_length: int  # of a model that attends by blocks, which has the last three methods; 0: full attention

  @property
  def reference(self) -> Self | None:
    """The reference policy's denoiser with the same prompts, if it was asked for."""
    ...

  def hidden(self, completion: Int[Array, "z c"]) -> Float[Array, "z c d"]:
    """Run whole rows [prompt; completion], for z a multiple of b, and return the completion's positions."""
    ...

  def prefill(self, completion: Int[Array, "b c"]) -> tuple[Float[Array, "b c d"], PyTree]:
    """Do the same for b rows, and return the whole row's kv cache too."""
    ...

  def suffix(
    self, completion: Int[Array, "b c"], start: Int[Array, ""], kv_cache: PyTree, block_length: int
  ) -> Float[Array, "b s d"]:
    """Compute positions from `start` on (a multiple of `block_length`), the ones before cached; return a block."""
    ...

  def block(self, tokens: Int[Array, "b s"], start: Int[Array, "*b"], kv_cache: PyTree) -> Float[Array, "b s d"]:
    """Compute positions [start, start + s), all others cached. The start is of all rows or, by blocks, of each.

    With `shift_logits` the position before the block predicts its first token. It is cached too, here and in `suffix`,
    so the prediction of the first token stays that of `prefill`.
    """
    ...

  def shadowed(self, completion: Int[Array, "b c"], start: Int[Array, ""], block_length: int) -> Float[Array, "b t d"]:
    """Compute a block, then its shadow: t = 2 * block_length.

    The shadow is a second copy of the positions that predict the block's tokens, all MASK. A shadow position sees the
    whole row but the token that it predicts, and the row does not see the shadow: so it predicts each decided token as
    if that were still masked.
    """
    ...

  def remainder(self) -> tuple[Int[Array, "b s"], Int[Array, "b"]]:
    """Give the tokens behind each prompt's last whole block, and how many there are; what follows them is anything."""
    ...

  def open(self, length: int) -> PyTree:
    """Run the prompts' whole blocks; return their kv cache, with room for `length` positions behind them.

    `block` then counts positions from there on, and computes those in [start, start + s) from what is kept before.
    """
    ...

  def keep(
    self, tokens: Int[Array, "b s"], start: Int[Array, "*b"], kv_cache: PyTree
  ) -> tuple[Float[Array, "b s d"], PyTree]:
    """Do the same and add the block to the cache of the blocks before it: for good, if it is finished."""
    ...

  def logits(
    self, hidden: Float[Array, "z s d"], number: Int[Array, ""] | int
  ) -> tuple[Float32[Array, "z s n w"], Int[Array, "n w"]]:
    """Give the logits of vocabulary chunk `number`, and its ids: n runs of w neighbours.

    If there are several chunks, runs begin at multiples of VOCAB_TILE and cut no tile. Logits of ids that belong to
    another chunk, or to none, are -inf.
    """
    ...


@struct.dataclass
class TrainState:
  """Everything that an update changes."""

  step: AnyArray  # int32 []; gradient steps tried so far
  trainable: PyTree  # parameters that are learned: all of them, or the LoRA adapters
  opt_state: PyTree
  num_skipped: AnyArray  # int32 []; updates skipped because something was not finite
  num_skipped_in_a_row: AnyArray  # int32 []
  reference: PyTree = None  # like `trainable`, if the reference follows the policy; None: it stays the base
