"""The head: from hidden states to logits, part after part of the vocabulary, and to the scores of given tokens.

This module defines the policy's distribution, for samplers, likelihoods, entropies and divergences alike: the softmax
of the logits over the vocabulary's ids. Rows of the table beyond them have no probability. MASK keeps its share, as in
the published code: samplers never draw it, and training leaves it next to nothing, as it is never a target.

Full [tokens, vocabulary] logits of a large vocabulary are never materialised, not even in the backward pass.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Float32, Int

from dmpo_jax import sharding
from dmpo_jax.models.layers import project
from dmpo_jax.sharding import constrain
from dmpo_jax.structs import VOCAB_TILE, Scores

CHUNK_SIZE = 8192  # ids whose logits exist at one time; smaller vocabularies are one part
WIDTH_MULTIPLE = 128  # parts have one width, about a multiple of it


class Split(NamedTuple):
  """How a table of n equal shares is read: `width` neighbouring rows of each share at one time."""

  num_shares: int
  share: int
  width: int
  num_ids: int | None = None  # rows from here on are no ids of the vocabulary; None: all are

  @property
  def step(self) -> int:
    """From one part to the next: the width, but for the odd ids of a share that is no whole number of groups."""
    return self.width if self.width == self.share else self.width - self.share % VOCAB_TILE

  @property
  def num_chunks(self) -> int:
    return -(-self.share // self.step)

  def start(self, number: Int[Array, ""] | int) -> Int[Array, ""]:
    """Where part `number` begins in every share; the last part reaches back where the step does not divide it."""
    return jnp.minimum(jnp.int32(number) * self.step, self.share - self.width)

  def ids(self, number: Int[Array, ""] | int) -> tuple[Int[Array, "n w"], Bool[Array, "n w"]]:
    """Give the ids of a part, from a multiple of VOCAB_GROUP in each share on, and which of them are its own: in no
    other part, and in the vocabulary.
    """
    column = self.start(number) + jnp.arange(self.width)
    ids = jnp.arange(self.num_shares)[:, None] * self.share + column
    return ids, (column // self.step == number) & self.has(ids)

  def has(self, ids: Int[Array, "*n"]) -> Bool[Array, "*n"]:
    """Tell which rows of the table are ids of the vocabulary."""
    return jnp.ones(ids.shape, bool) if self.num_ids is None else ids < self.num_ids

  @property
  def axes(self) -> tuple[str | None, str | None]:
    """The logical axes of a part's two."""
    is_whole = self.width == self.num_shares * self.share
    return ("vocab", None) if self.num_shares > 1 else (None, "vocab" if is_whole else None)


def split_vocabulary(size: int, multiple: int = 1, num_ids: int | None = None) -> tuple[Split, int]:
  """Choose the parts of a table, and count them: each device's share of it is read from its own weights.

  Args:
    multiple: that each device's share has to be of. Where it cannot be, parts are read one device after the other.
    num_ids: the vocabulary's; rows from there on are none of its ids. None: all rows are.
  """
  if size <= CHUNK_SIZE:
    return Split(1, size, size, num_ids), 1
  num_shares = sharding.num_shares("vocab")
  if size % (num_shares * multiple):
    num_shares = 1  # correct, but parts then lie on few devices
  share = size // num_shares
  num_chunks = -(-size // CHUNK_SIZE)
  width = -(-share // (num_chunks * WIDTH_MULTIPLE)) * WIDTH_MULTIPLE  # parts of one size, but for the rounding
  split = Split(num_shares, share, min(share, width + share % VOCAB_TILE), num_ids)
  return split, split.num_chunks


def chunk_logits(
  hidden: Float[Array, "*t d"], head: Float[Array, "d v"], split: Split, number: Int[Array, ""] | int
) -> Float32[Array, "*t n w"]:
  """Give the float32 logits of one part of the vocabulary; the head is best whole on every device, or split by it."""
  return _project(hidden, constrain(_slice(head, split, number), None, *split.axes), split)


def _slice(head: Float[Array, "d v"], split: Split, number: Int[Array, ""] | int) -> Float[Array, "d n w"]:
  shares = head.reshape(head.shape[0], split.num_shares, split.share)
  if split.width == split.share:
    return shares
  return jax.lax.dynamic_slice_in_dim(shares, split.start(number), split.width, axis=2)


def _gather(head: Float[Array, "d v"], split: Split, number: Int[Array, ""] | int) -> Float[Array, "d n w"]:
  """Take a part's columns from where the weights are, whole but for the vocabulary, which may stay split."""
  # Without the barrier XLA may gather the whole head, before the loop over its parts; on a CPU it does.
  part = jax.lax.optimization_barrier(constrain(_slice(head, split, number), "embed", split.axes[0], None))
  return constrain(part, None, *split.axes)


def _project(hidden: Float[Array, "*t d"], part: Float[Array, "d n w"], split: Split) -> Float32[Array, "*t n w"]:
  logits = project(hidden, part.reshape(part.shape[0], -1), jnp.float32)
  logits = logits.reshape(*hidden.shape[:-1], *part.shape[1:])
  return constrain(logits, "batch", *(None,) * (hidden.ndim - 2), *split.axes)


def token_scores(
  hidden: Float[Array, "t d"], head: Float[Array, "d v"], targets: Int[Array, "t"], num_ids: int | None = None
) -> Scores:
  """Score tokens under the policy's distribution: the softmax over the first `num_ids` columns of the head (None: all).

  A large vocabulary is read in parts, under a running log-sum-exp. The gradient by a hidden state does not depend on
  the one that comes from above but by a factor,

    d log p(y) / d h = W_y - sum_v p(v) W_v,

  so where it is asked for it is summed up beside the logits, as flash attention sums up its output (arXiv 2205.14135):
  a head that is frozen costs nothing in the backward pass. One that is trained has its logits computed again there.
  """
  split, num_chunks = split_vocabulary(head.shape[1], num_ids=num_ids)
  score = _score_whole if num_chunks == 1 else _score_in_chunks
  log_prob, entropy = score(split, constrain(hidden, "batch", None), head, targets)
  return Scores(log_prob, jax.lax.stop_gradient(entropy))


class _Pair(NamedTuple):
  """Of tokens' two distributions over the ids read so far."""

  highest: Float32[Array, "t"]  # logit
  teacher_highest: Float32[Array, "t"]
  total: Float32[Array, "t"]  # sum of exp(logit - highest)
  teacher_total: Float32[Array, "t"]
  weighted: Float32[Array, "t"]  # sum of exp(teacher's logit - teacher_highest) * (teacher's logit - logit)


def divergence(
  hidden: Float[Array, "t d"],
  head: Float[Array, "d v"],
  teacher: Float[Array, "t d"],
  teacher_head: Float[Array, "d v"],
  num_ids: int | None = None,
) -> Float32[Array, "t"]:
  """Give KL(p_teacher || p) of the softmaxes over the first `num_ids` columns of two heads (None: all), in nats.

  The teacher's distribution carries no gradient. The vocabulary is read in parts, whose logits are computed again in
  the backward pass.
  """
  split, num_chunks = split_vocabulary(head.shape[1], num_ids=num_ids)
  hidden, teacher = constrain(hidden, "batch", None), constrain(jax.lax.stop_gradient(teacher), "batch", None)

  @jax.checkpoint
  def read(before: _Pair, number: Int[Array, ""]) -> tuple[_Pair, None]:
    _, is_own = split.ids(number)
    own, taught = (
      _project(states, _gather(weights, split, number), split)
      for states, weights in ((hidden, head), (teacher, jax.lax.stop_gradient(teacher_head)))
    )
    kept = jnp.where(is_own, own, -jnp.inf), jnp.where(is_own, taught, -jnp.inf)
    highest = [
      jnp.maximum(level, jax.lax.stop_gradient(logits.max((-2, -1))))
      for level, logits in zip((before.highest, before.teacher_highest), kept, strict=True)
    ]
    share, taught_share = (jnp.exp(logits - level[:, None, None]) for logits, level in zip(kept, highest, strict=True))
    shrunk, taught_shrunk = jnp.exp(before.highest - highest[0]), jnp.exp(before.teacher_highest - highest[1])
    return _Pair(
      *highest,
      before.total * shrunk + share.sum((-2, -1)),
      before.teacher_total * taught_shrunk + taught_share.sum((-2, -1)),
      before.weighted * taught_shrunk + (taught_share * (taught - own)).sum((-2, -1)),
    ), None

  zero = jnp.zeros(len(hidden))
  least = jnp.full_like(zero, -jnp.inf)
  sums, _ = jax.lax.scan(read, _Pair(least, least, zero, zero, zero), jnp.arange(num_chunks))
  log_normalizer, taught_normalizer = (
    level + jnp.log(total) for level, total in ((sums.highest, sums.total), (sums.teacher_highest, sums.teacher_total))
  )
  return sums.weighted / sums.teacher_total + log_normalizer - taught_normalizer


def _score_whole(split: Split, hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  logits = chunk_logits(hidden, head, split, 0)[:, 0]
  # Selecting the target by comparison rather than by index keeps a split vocabulary split, in the gradient too.
  is_target = jnp.arange(logits.shape[-1]) == targets[:, None]
  is_id = split.has(jnp.arange(logits.shape[-1]))
  log_normalizer = jax.nn.logsumexp(logits, axis=-1, where=is_id)
  log_prob = jnp.where(is_target, logits, 0).sum(-1) - log_normalizer
  probability = jnp.where(is_id, jnp.exp(jnp.where(is_id, logits, -jnp.inf) - log_normalizer[:, None]), 0)
  return log_prob, log_normalizer - (probability * logits).sum(-1)


class _Sums(NamedTuple):
  """Of tokens' distributions over the ids read so far, each share of the vocabulary for itself."""

  highest: Float32[Array, "t n"]  # logit
  total: Float32[Array, "t n"]  # sum of exp(logit - highest)
  weighted: Float32[Array, "t n"]  # sum of exp(logit - highest) * (logit - highest)
  target: Float32[Array, "t n"]  # logit of the target; 0: it is not among the ids
  column: (
    Float32[Array, "t n d"] | None
  )  # sum of exp(logit - highest) * the id's column of the head; None: not asked for

  def beside(self, highest: Float32[Array, "t #n"]) -> "_Sums":
    """Give the same, relative to a logit at least as high."""
    shift = jnp.where(self.total > 0, self.highest - highest, 0)  # nothing read yet: minus infinity
    shrunk = jnp.where(self.total > 0, jnp.exp(shift), 0)
    return _Sums(
      jnp.broadcast_to(highest, self.highest.shape),
      self.total * shrunk,
      (self.weighted + self.total * shift) * shrunk,
      self.target,
      None if self.column is None else self.column * shrunk[..., None],
    )

  def joined(self) -> "_Sums":
    """Take the shares as one."""
    level = self.beside(self.highest.max(1, keepdims=True))
    return _Sums(level.highest[:, :1], *jax.tree.map(lambda array: array.sum(1, keepdims=True), tuple(level[1:])))

  @property
  def log_normalizer(self) -> Float32[Array, "t n"]:
    return self.highest + jnp.log(self.total)


def _read(
  split: Split, hidden: Float[Array, "t d"], head: Float[Array, "d v"], targets: Int[Array, "t"], with_column: bool
) -> _Sums:
  """Sum up the whole vocabulary, part after part."""

  def add(number: Int[Array, ""], before: _Sums) -> _Sums:
    part, (ids, is_own) = _gather(head, split, number), split.ids(number)
    logits = jnp.where(is_own, _project(hidden, part, split), -jnp.inf)
    sums = before.beside(jnp.maximum(before.highest, logits.max(-1)))
    shifted = logits - jnp.where(sums.highest > -jnp.inf, sums.highest, 0)[..., None]  # a share may have no ids
    share = jnp.exp(shifted)
    return _Sums(
      sums.highest,
      sums.total + share.sum(-1),
      sums.weighted + jnp.where(share > 0, share * shifted, 0).sum(-1),
      sums.target + jnp.where(is_own & (ids == targets[:, None, None]), logits, 0).sum(-1),
      sums.column + _product("tnw,dnw->tnd", share, part, hidden.dtype) if with_column else None,
    )

  shape = (len(targets), split.num_shares)
  zero = constrain(jnp.zeros(shape), "batch", split.axes[0])
  column = constrain(jnp.zeros((*shape, head.shape[0])), "batch", split.axes[0], None) if with_column else None
  first = _Sums(jnp.full_like(zero, -jnp.inf), zero, zero, zero, column)
  return jax.lax.fori_loop(0, split.num_chunks, add, first).joined()


def _product(spec: str, a: jax.Array, b: jax.Array, dtype: Any) -> Float32[Array, "..."]:
  """Multiply in the activations' dtype, as all products with weights are, and sum in float32."""
  return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score_in_chunks(
  split: Split, hidden: jax.Array, head: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
  return _verdict(_read(split, hidden, head, targets, with_column=False))


def _verdict(sums: _Sums) -> tuple[Float32[Array, "t"], Float32[Array, "t"]]:
  """The target's log-probability and the entropy."""
  log_prob, entropy = sums.target - sums.log_normalizer, jnp.log(sums.total) - sums.weighted / sums.total
  return log_prob[:, 0], entropy[:, 0]


def _score_forward(split: Split, hidden: Any, head: Any, targets: Any) -> tuple[Any, Any]:
  """Score, and keep what the gradients need that are asked for."""
  sums = _read(split, hidden.value, head.value, targets.value, with_column=hidden.perturbed)
  slope = again = None
  if hidden.perturbed:
    mean = sums.column[:, 0] / sums.total
    slope = (_columns(head.value, targets.value) - mean).astype(hidden.value.dtype)
  if head.perturbed:
    again = (hidden.value, head.value, targets.value, sums.log_normalizer)
  return _verdict(sums), (slope, again)


def _score_backward(split: Split, saved: tuple[Any, Any], from_above: tuple[Any, Any]) -> tuple[Any, Any, None]:
  (slope, again), (of_log_prob, _) = saved, from_above
  if isinstance(of_log_prob, SymbolicZero):
    return None, None, None
  by_hidden = None if slope is None else (of_log_prob[:, None] * slope).astype(slope.dtype)
  return by_hidden, None if again is None else _head_gradient(split, *again, of_log_prob), None


_score_in_chunks.defvjp(_score_forward, _score_backward, symbolic_zeros=True)


def _columns(head: Float[Array, "d v"], ids: Int[Array, "t"]) -> Float[Array, "t d"]:
  """Look up columns; each shard its part of the width for all rows, which then part."""
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
  """Sum of_log_prob * h (1(v = y) - p(v)) over the tokens, from logits that are computed again."""

  def add(number: Int[Array, ""], gradient: Float[Array, "d n s"]) -> Float[Array, "d n s"]:
    part, (ids, is_own) = _gather(head, split, number), split.ids(number)
    probability = jnp.exp(_project(hidden, part, split) - log_normalizer[..., None])
    slope = jnp.where(is_own, (ids == targets[:, None, None]) - probability, 0) * of_log_prob[:, None, None]
    found = constrain(_product("td,tnw->dnw", hidden, slope, hidden.dtype), "embed", split.axes[0], None)
    start = (0, 0, split.start(number))
    found += jax.lax.dynamic_slice(gradient, start, found.shape)
    return jax.lax.dynamic_update_slice(gradient, found.astype(gradient.dtype), start)

  zero = jnp.zeros((head.shape[0], split.num_shares, split.share), head.dtype)
  return jax.lax.fori_loop(0, split.num_chunks, add, constrain(zero, "embed", split.axes[0], None)).reshape(head.shape)
