"""The head: from hidden states to logits, one chunk of the vocabulary at a time, and to the scores of given tokens.

This module defines the policy's distribution, for samplers, likelihoods, entropies and divergences: the softmax of the
logits over the vocabulary's ids. Rows of the embedding table beyond the vocabulary have no probability. MASK keeps its
share, as in the published code; samplers never draw it, and it is never a target, so training leaves it almost none.

Full [tokens, vocab] logits of a large vocabulary are never materialised, not even in the backward pass.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from dmpo_jax import sharding
from dmpo_jax.logsumexp import LogSumExp
from dmpo_jax.models.layers import project
from dmpo_jax.sharding import constrain
from dmpo_jax.structs import VOCAB_TILE, Scores

CHUNK_SIZE = 8192  # ids whose logits exist at one time; a vocabulary up to this size is one chunk
WIDTH_MULTIPLE = 128  # all chunks have the same width, a multiple of this but for incomplete tiles


class Split(NamedTuple):
  """How the vocabulary is read in chunks: `width` neighbouring columns of each of `num_shares` equal shares.

  A share is what one device of the tensor axis holds, so every device reads chunks from its own weights.
  """

  num_shares: int
  share: int  # columns
  width: int
  num_ids: int | None = None  # columns from here on are no ids of the vocabulary; None: all are

  @property
  def step(self) -> int:
    """Columns from one chunk to the next: the width, less the ids of a share's incomplete tile."""
    return self.width if self.width == self.share else self.width - self.share % VOCAB_TILE

  @property
  def num_chunks(self) -> int:
    return -(-self.share // self.step)

  def start(self, number: Int[Array, ""] | int) -> Int[Array, ""]:
    """Return where chunk `number` begins in every share. The last chunk overlaps the one before if it must."""
    return jnp.minimum(jnp.int32(number) * self.step, self.share - self.width)

  def ids(self, number: Int[Array, ""] | int) -> tuple[Int[Array, "n w"], Bool[Array, "n w"]]:
    """Return a chunk's ids, and which of them are its own: in no other chunk, and in the vocabulary."""
    column = self.start(number) + jnp.arange(self.width)
    ids = jnp.arange(self.num_shares)[:, None] * self.share + column
    return ids, (column // self.step == number) & self.has(ids)

  def has(self, ids: Int[Array, "*n"]) -> Bool[Array, "*n"]:
    """Return which columns are ids of the vocabulary."""
    return jnp.ones(ids.shape, bool) if self.num_ids is None else ids < self.num_ids

  @property
  def axes(self) -> tuple[str | None, str | None]:
    """The logical axes of a chunk [n, w]."""
    is_whole = self.width == self.num_shares * self.share
    return ("vocab", None) if self.num_shares > 1 else (None, "vocab" if is_whole else None)


def split_vocabulary(size: int, multiple: int = 1, num_ids: int | None = None) -> Split:
  """Choose the chunks in which a head of `size` columns is read.

  Args:
    multiple: each device's share must be a multiple of it. If it is not, a chunk is taken from one device after the
      other, which is correct but slower.
    num_ids: the vocabulary's size; columns from there on are none of its ids. None: all columns are.
  """
  if size <= CHUNK_SIZE:
    return Split(1, size, size, num_ids)
  num_shares = sharding.num_shares("vocab")
  if size % (num_shares * multiple):
    num_shares = 1
  share = size // num_shares
  num_chunks = -(-size // CHUNK_SIZE)
  width = -(-share // (num_chunks * WIDTH_MULTIPLE)) * WIDTH_MULTIPLE
  return Split(num_shares, share, min(share, width + share % VOCAB_TILE), num_ids)


def chunk_logits(
  hidden: Float[Array, "*t d"], head: Float[Array, "d v"], split: Split, number: Int[Array, ""] | int
) -> Float32[Array, "*t n w"]:
  """Compute the float32 logits of chunk `number`, with a head that is whole on every device or sharded by "vocab"."""
  return _project(hidden, constrain(_slice(head, split, number), None, *split.axes), split)


def _slice(head: Float[Array, "d v"], split: Split, number: Int[Array, ""] | int) -> Float[Array, "d n w"]:
  shares = head.reshape(head.shape[0], split.num_shares, split.share)
  if split.width == split.share:
    return shares
  return jax.lax.dynamic_slice_in_dim(shares, split.start(number), split.width, axis=2)


def _gather(head: Float[Array, "d v"], split: Split, number: Int[Array, ""] | int) -> Float[Array, "d n w"]:
  """Slice a chunk's columns where the weights are, then gather d; the vocabulary may stay sharded."""
  # Without the barrier XLA may gather the whole head before the loop over chunks. On CPU it does.
  chunk = jax.lax.optimization_barrier(constrain(_slice(head, split, number), "embed", split.axes[0], None))
  return constrain(chunk, None, *split.axes)


def _project(hidden: Float[Array, "*t d"], chunk: Float[Array, "d n w"], split: Split) -> Float32[Array, "*t n w"]:
  logits = project(hidden, chunk.reshape(chunk.shape[0], -1), jnp.float32)
  logits = logits.reshape(*hidden.shape[:-1], *chunk.shape[1:])
  return constrain(logits, "batch", *(None,) * (hidden.ndim - 2), *split.axes)


def token_scores(
  hidden: Float[Array, "t d"], head: Float[Array, "d v"], targets: Int[Array, "t"], num_ids: int | None = None
) -> Scores:
  """Score tokens under the policy's distribution: the softmax over the first `num_ids` columns of the head (None: all).

  A large vocabulary is read in chunks, under a running log-sum-exp. The gradient with respect to a hidden state is the
  incoming one, a number, times

    d log p(y) / d h = W_y - sum_v p(v) W_v.

  If it is needed, the sum is accumulated along with the logits, as flash attention accumulates its output (arXiv
  2205.14135), so a frozen head costs nothing in the backward pass. A trained head has its logits recomputed there.
  """
  split = split_vocabulary(head.shape[1], num_ids=num_ids)
  score = _score_whole if split.num_chunks == 1 else _score_in_chunks
  # functools.partial hides the result's type from `custom_vjp`
  log_prob, entropy = score(split, constrain(hidden, "batch", None), head, targets)  # pyright: ignore[reportGeneralTypeIssues]
  return Scores(log_prob, jax.lax.stop_gradient(entropy))


class _Pair(NamedTuple):
  """Sums over the ids read so far, of tokens' distributions by the model and by the teacher."""

  own: LogSumExp
  teacher: LogSumExp
  apart: Float32[Array, "t"]  # sum of exp(teacher's logit - its highest) * (teacher's logit - logit)


def divergence(
  hidden: Float[Array, "t d"],
  head: Float[Array, "d v"],
  teacher: Float[Array, "t d"],
  teacher_head: Float[Array, "d v"],
  num_ids: int | None = None,
) -> Float32[Array, "t"]:
  """Compute KL(p_teacher || p) of the softmaxes over the first `num_ids` columns of two heads (None: all), nats.

  The teacher's distribution carries no gradient. The vocabulary is read in chunks; the backward pass recomputes their
  logits.
  """
  split = split_vocabulary(head.shape[1], num_ids=num_ids)
  hidden, teacher = constrain(hidden, "batch", None), constrain(jax.lax.stop_gradient(teacher), "batch", None)

  @jax.checkpoint
  def read(before: _Pair, number: Int[Array, ""]) -> tuple[_Pair, None]:
    _, is_own = split.ids(number)
    own, taught = (
      _project(states, _gather(weights, split, number), split)
      for states, weights in ((hidden, head), (teacher, jax.lax.stop_gradient(teacher_head)))
    )
    sums, _, _ = before.own.add(jnp.where(is_own, own, -jnp.inf), (-2, -1))
    taught_sums, share, shrunk = before.teacher.add(jnp.where(is_own, taught, -jnp.inf), (-2, -1))
    return _Pair(sums, taught_sums, before.apart * shrunk + (share * (taught - own)).sum((-2, -1))), None

  zero = jnp.zeros(len(hidden))
  nothing = LogSumExp.start(zero, with_entropy=False)
  sums, _ = jax.lax.scan(read, _Pair(nothing, nothing, zero), jnp.arange(split.num_chunks))
  return sums.apart / sums.teacher.total + sums.own.log_normalizer - sums.teacher.log_normalizer


def _score_whole(split: Split, hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  logits = chunk_logits(hidden, head, split, 0)[:, 0]
  # Selecting the target by comparison rather than by index keeps a sharded vocabulary sharded, in the gradient too.
  is_target = jnp.arange(logits.shape[-1]) == targets[:, None]
  is_id = split.has(jnp.arange(logits.shape[-1]))
  log_normalizer = jax.nn.logsumexp(logits, axis=-1, where=is_id)
  log_prob = jnp.where(is_target, logits, 0).sum(-1) - log_normalizer
  probability = jnp.where(is_id, jnp.exp(jnp.where(is_id, logits, -jnp.inf) - log_normalizer[:, None]), 0)
  return log_prob, log_normalizer - (probability * logits).sum(-1)


class _Sums(NamedTuple):
  """Sums over the ids read so far, for tokens (t) and each share of the vocabulary (n)."""

  logits: LogSumExp  # [t, n]
  target: Float32[Array, "t n"]  # logit of the target; 0 if it is not among the ids
  column: Float32[Array, "t n d"] | None  # sum of exp(logit - highest) * the id's column of the head; None: not needed

  def joined(self) -> "_Sums":
    """Add up the shares."""
    level, shrunk = self.logits.beside(self.logits.highest.max(1, keepdims=True))
    column = None if self.column is None else self.column * shrunk[..., None]
    logits, target, column = jax.tree.map(
      lambda array: array.sum(1, keepdims=True), (level._replace(highest=None), self.target, column)
    )
    return _Sums(logits._replace(highest=level.highest[:, :1]), target, column)


def _read(
  split: Split, hidden: Float[Array, "t d"], head: Float[Array, "d v"], targets: Int[Array, "t"], with_column: bool
) -> _Sums:
  """Sum over the whole vocabulary, chunk by chunk."""

  def add(number: Int[Array, ""], before: _Sums) -> _Sums:
    chunk, (ids, is_own) = _gather(head, split, number), split.ids(number)
    logits = jnp.where(is_own, _project(hidden, chunk, split), -jnp.inf)
    sums, share, shrunk = before.logits.add(logits, -1)  # a share may have no ids
    column = before.column
    if column is not None:
      column = column * shrunk[..., None] + _product("tnw,dnw->tnd", share, chunk, hidden.dtype)
    return _Sums(sums, before.target + jnp.where(is_own & (ids == targets[:, None, None]), logits, 0).sum(-1), column)

  shape = (len(targets), split.num_shares)
  zero = constrain(jnp.zeros(shape), "batch", split.axes[0])
  column = constrain(jnp.zeros((*shape, head.shape[0])), "batch", split.axes[0], None) if with_column else None
  first = _Sums(LogSumExp.start(zero), zero, column)
  return jax.lax.fori_loop(0, split.num_chunks, add, first).joined()


def _product(spec: str, a: jax.Array, b: jax.Array, dtype: DTypeLike) -> Float32[Array, "..."]:
  """Multiply in the activations' dtype, like all products with weights, and sum in float32."""
  return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score_in_chunks(
  split: Split, hidden: jax.Array, head: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
  return _verdict(_read(split, hidden, head, targets, with_column=False))


def _verdict(sums: _Sums) -> tuple[Float32[Array, "t"], Float32[Array, "t"]]:
  """Return the target's log-probability and the entropy."""
  return (sums.target - sums.logits.log_normalizer)[:, 0], sums.logits.entropy[:, 0]


# What each gradient needs, if it is needed: the slope by the hidden state; the inputs, to recompute logits.
_Saved = tuple[jax.Array | None, tuple[jax.Array, jax.Array, jax.Array, jax.Array] | None]


def _score_forward(
  split: Split, hidden: CustomVJPPrimal, head: CustomVJPPrimal, targets: CustomVJPPrimal
) -> tuple[tuple[jax.Array, jax.Array], _Saved]:
  """Score, and save what the required gradients need."""
  sums = _read(split, hidden.value, head.value, targets.value, with_column=hidden.perturbed)
  slope = again = None
  if sums.column is not None:
    mean = sums.column[:, 0] / sums.logits.total
    slope = (_columns(head.value, targets.value) - mean).astype(hidden.value.dtype)
  if head.perturbed:
    again = (hidden.value, head.value, targets.value, sums.logits.log_normalizer)
  return _verdict(sums), (slope, again)


def _score_backward(
  split: Split, saved: _Saved, from_above: tuple[jax.Array | SymbolicZero, jax.Array | SymbolicZero]
) -> tuple[jax.Array | None, jax.Array | None, None]:
  (slope, again), (of_log_prob, _) = saved, from_above
  if isinstance(of_log_prob, SymbolicZero):
    return None, None, None
  by_hidden = None if slope is None else (of_log_prob[:, None] * slope).astype(slope.dtype)
  return by_hidden, None if again is None else _head_gradient(split, *again, of_log_prob), None


_score_in_chunks.defvjp(_score_forward, _score_backward, symbolic_zeros=True)


def _columns(head: Float[Array, "d v"], ids: Int[Array, "t"]) -> Float[Array, "t d"]:
  """Look up columns. Each fsdp shard looks up its part of d for all tokens; then the tokens are sharded again."""
  found = jnp.take(head, constrain(ids, "gathered_batch"), axis=1, mode="clip")
  return constrain(constrain(found, "embed", "gathered_batch").T, "batch", None)


def _head_gradient(
  split: Split,
  hidden: Float[Array, "t d"],
  head: Float[Array, "d v"],
  targets: Int[Array, "t"],
  log_normalizer: Float32[Array, "t 1"],
  of_log_prob: Float32[Array, "t"],
) -> Float[Array, "d v"]:
  """Sum of_log_prob * h (1(v = y) - p(v)) over the tokens, from recomputed logits."""

  def add(number: Int[Array, ""], gradient: Float[Array, "d n s"]) -> Float[Array, "d n s"]:
    chunk, (ids, is_own) = _gather(head, split, number), split.ids(number)
    probability = jnp.exp(_project(hidden, chunk, split) - log_normalizer[..., None])
    slope = jnp.where(is_own, (ids == targets[:, None, None]) - probability, 0) * of_log_prob[:, None, None]
    found = constrain(_product("td,tnw->dnw", hidden, slope, hidden.dtype), "embed", split.axes[0], None)
    start = (0, 0, split.start(number))
    found += jax.lax.dynamic_slice(gradient, start, found.shape)
    return jax.lax.dynamic_update_slice(gradient, found.astype(gradient.dtype), start)

  zero = jnp.zeros((head.shape[0], split.num_shares, split.share), head.dtype)
  return jax.lax.fori_loop(0, split.num_chunks, add, constrain(zero, "embed", split.axes[0], None)).reshape(head.shape)
