"""Models for tests of samplers whose predictions can be worked out: tokens 0, 1, 2, and MASK."""

import collections
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmpo_jax import samplers

MASK = 3


class Fake(NamedTuple):
  """A denoiser whose hidden states are its logits, a pure function of the completion.

  Its kv cache is the completion as it was; the shadow of a position is the position masked.
  """

  hidden: collections.abc.Callable
  mask_token_id: int = MASK
  eos_token_id: int = -1  # none of the tokens
  num_chunks: int = 1
  shift_logits: bool = False
  block_length: int = 0
  reference: Any = None
  ends: tuple[int, ...] = ()  # EOS alone

  @property
  def end_token_ids(self):
    return self.ends or (self.eos_token_id,)

  def logits(self, hidden, number=0):
    return hidden[:, :, None], jnp.arange(hidden.shape[-1])[None]

  def prefill(self, completion):
    return self.hidden(completion), completion

  def suffix(self, completion, start, kv_cache, block_length):
    is_before = jnp.arange(completion.shape[1]) < start
    hidden = self.hidden(jnp.where(is_before, kv_cache, completion))
    return jax.lax.dynamic_slice_in_dim(hidden, start, block_length, axis=1)

  def block(self, tokens, start, kv_cache):
    hidden = self.hidden(jax.lax.dynamic_update_slice_in_dim(kv_cache, tokens, start, axis=1))
    return jax.lax.dynamic_slice_in_dim(hidden, start, tokens.shape[1], axis=1)

  def shadowed(self, completion, start, block_length):
    block = jax.lax.dynamic_slice_in_dim(self.hidden(completion), start, block_length, axis=1)
    index = jnp.arange(completion.shape[1])
    shadow = [
      jnp.take(self.hidden(jnp.where(index == start + i, self.mask_token_id, completion)), start + i, axis=1)
      for i in range(block_length)
    ]
    return jnp.concatenate([block, jnp.stack(shadow, axis=1)], axis=1)

  def remainder(self):
    raise NotImplementedError("attends to whole rows")

  open = keep = remainder


def fixed(probabilities, **own):
  """A model that predicts the same at every call: probabilities [c, v]."""
  logits = jnp.log(jnp.asarray(probabilities, jnp.float32))
  return Fake(lambda completion: jnp.broadcast_to(logits, (completion.shape[0], *logits.shape)), **own)


def contextual(seed=0, c=2, prompt=None, scale=1.5, **own):
  """A model whose every prediction depends on the whole row: the sum of a random table over what is there."""
  generator = np.random.default_rng(seed)
  table = jnp.asarray(scale * generator.normal(size=(c, MASK + 1, c, MASK + 1)), jnp.float32)

  def hidden(completion):
    logits = jnp.einsum("bcv,cvdw->bdw", jax.nn.one_hot(completion, MASK + 1), table)
    if prompt is None:
      return logits
    copies = completion.shape[0] // prompt.shape[0]
    return logits + jnp.sin(jnp.repeat(prompt, copies)[:, None, None] * jnp.arange(1.0, MASK + 2))

  return Fake(hidden, **own)


def keys(n, seed=0):
  data = np.random.default_rng(seed).integers(0, 2**32, (n, 2), np.uint32)  # from numpy: nothing to compile
  return jax.random.wrap_key_data(jnp.asarray(data))


def run(name, denoiser, keys, own=None, **settings):
  """Decode with a sampler and its own options; by default one block, one token a call, greedily."""
  length = settings["completion_length"]
  plan = samplers.Plan(**(dict(block_length=length, steps=length) | settings))
  options = samplers.make_options(name, own or {})
  rollouts = jax.jit(lambda keys: samplers.SAMPLERS[name].sample(denoiser, keys, plan, options))(keys)
  return jax.tree.map(np.asarray, rollouts)


def exact(denoiser, temperature, order, c=2):
  """Probability of every completion when one token is committed a call, by walking the whole tree.

  Args:
    order: which position is next: `confidence` (the token drawn that is most probable), `entropy` (the lowest) or
      `random`.
  """
  final = collections.defaultdict(float)
  hidden = jax.jit(denoiser.hidden)

  def walk(state, weight):
    masked = [i for i in range(c) if state[i] == MASK]
    if not masked:
      final[state] += weight
      return
    logits = np.asarray(hidden(jnp.array([state])), np.float64)[0]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    entropy = -(p * np.log(p)).sum(-1)
    proposal = np.exp(logits[:, :MASK] / temperature)
    proposal /= proposal.sum(-1, keepdims=True)
    for tokens in itertools.product(range(MASK), repeat=len(masked)):
      drawn = weight * np.prod([proposal[i, t] for i, t in zip(masked, tokens, strict=True)])
      if order == "random":
        chosen = [(j, 1 / len(masked)) for j in range(len(masked))]
      else:
        score = [p[i, t] if order == "confidence" else -entropy[i] for i, t in zip(masked, tokens, strict=True)]
        chosen = [(int(np.argmax(score)), 1.0)]
      for j, share in chosen:
        walk((*state[: masked[j]], tokens[j], *state[masked[j] + 1 :]), drawn * share)

  walk((MASK,) * c, 1.0)
  return final
