"""The sections `cache` and `slots`: a model that attends by blocks, without and with its cache, and in slots.

Random weights never end a completion. So, where `rollout.early_exit` lets rollouts end, the head column of EOS is
set along the mean hidden state, which gives EOS about the same probability everywhere: one for which a completion has a
quarter of the positions on average.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dmpo_jax import continuous, noise, policy, samplers
from dmpo_jax.models.denoiser import make_denoiser
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.policy import Policies
from dmpo_jax.structs import Params, Prompts, Rollouts
from launch.bench import timing, workload
from launch.bench.results import Options, Result, compare

TOLERANCES = {"tokens": 0.0}
SHARE = 4  # completions have one in so many of the positions, on average


def run(config: ConfigDict, options: Options) -> Result:
  """Measure rollouts of a buffer without and with the exact cache; both have to give the same tokens.

  Raises:
    ValueError: the configuration's model has no blocks, or it has adapters.
  """
  check(config)
  ours: dict[str, timing.Maker] = {"exact cache": (make_fixed, (config,))}
  plain: dict[str, timing.Maker] = {"without cache": (make_uncached, (config,))}
  return compare("cache", config, options, ours, plain, amount=count_tokens(config, options), tolerances=TOLERANCES)


def check(config: ConfigDict) -> None:
  """Refuse a configuration that cannot be measured.

  Raises:
    ValueError: its model has no blocks, or it has adapters.
  """
  if not config.model.block_length or config.model.lora.rank:
    raise ValueError(
      f"config.model.block_length = {config.model.block_length}, config.model.lora.rank = {config.model.lora.rank}: "
      "these sections need a model that attends by blocks, without adapters"
    )


def count_tokens(config: ConfigDict, options: Options) -> float:
  """Count the tokens of a buffer up to where its completions end, and say so."""
  found = make_fixed(config).run()
  assert found is not None  # a turn counts them
  mean, length = (
    found["tokens"] / config.rollout.num_prompts / config.rollout.group_size,
    config.sampler.completion_length,
  )
  options.say(f"completions of {mean:.1f} of {length} tokens on average")
  return found["tokens"]


def make_slots(config: ConfigDict) -> timing.Contender:
  """Compile continuous batching as training runs it."""
  return _contender(config, _decode_in_slots)


def make_fixed(config: ConfigDict) -> timing.Contender:
  """Compile fixed batches, of as many rows as there are slots, or of all."""
  return _contender(config, _decode_batches)


def make_uncached(config: ConfigDict) -> timing.Contender:
  """Compile the same with every model call on whole rows."""
  return _contender(config, functools.partial(_decode_batches, is_cached=False))


def _contender(config: ConfigDict, make: Any) -> timing.Contender:
  work = workload.make(config)
  policies = _with_ends(work) if config.rollout.early_exit else work.policies
  prompts = jax.tree.map(np.asarray, work.experience.prompts)
  key = noise.step_key(config.seed, "rollout", 0)
  decode = make(config, work, config.sampler.temperature)

  def turn() -> dict[str, float]:
    rollouts = decode(policies, prompts, key)
    return {"tokens": float(rollouts.num_tokens.sum()), "calls": float(rollouts.num_calls.sum())}

  def check() -> dict[str, np.ndarray]:
    greedy = make(config, work, 0.0)
    return {"tokens": greedy(policies, prompts, key).completion.reshape(-1)}

  return timing.Contender(turn, check)


def _decode_in_slots(config: ConfigDict, work: workload.Workload, temperature: float) -> continuous.Sample:
  settings = dict(num_slots=config.sampler.slots, temperature=temperature, early_exit=config.rollout.early_exit)
  programs = continuous.Programs(config, work.model, work.meshes[1], **settings)
  return continuous.Sample(programs, config.rollout.group_size)


def _decode_batches(config: ConfigDict, work: workload.Workload, temperature: float, *, is_cached: bool = True) -> Any:
  """Decode batch after batch, each of as many rows as there are slots, or all rows at once."""
  plan = policy.make_plan(config, temperature=temperature, early_exit=config.rollout.early_exit)
  own, group_size = config.sampler, config.rollout.group_size
  options = samplers.make_options(own.name, own.to_dict().get(own.name, {}))

  @jax.jit
  def sample(policies: Policies, rows: continuous.Queued, key: jax.Array) -> Rollouts:
    make = make_denoiser if is_cached else Uncached
    denoiser = make(work.model, {"params": policies.trainable}, jnp.asarray(rows.tokens), jnp.asarray(rows.is_valid))
    keys = jax.vmap(lambda prompt_id, first: noise.row_keys(key, prompt_id[None], 1, first)[0, 0])(
      jnp.asarray(rows.prompt_id), jnp.asarray(rows.rollout)
    )
    return samplers.SAMPLERS[own.name].sample(denoiser, keys, plan, options)

  def decode(policies: Policies, prompts: Prompts, key: jax.Array) -> Rollouts:
    queue = continuous.Queued.of_prompts(prompts, group_size)
    rows = np.arange(len(queue.rollout))
    size = own.slots or len(rows)
    batches = [rows[first : first + size] for first in range(0, len(rows), size)]
    done = [jax.device_get(sample(policies, queue.take(batch), key)) for batch in batches]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays).reshape(-1, group_size, *arrays[0].shape[1:]), *done)

  return decode


class Uncached:
  """A denoiser that runs whole rows at every model call; its cache is the tokens of the blocks before."""

  def __init__(self, model: Transformer, variables: Params, prompt: Int[Array, "b q"], is_valid: Array):
    self._inner = make_denoiser(model, variables, prompt, is_valid)
    self._run = functools.partial(model.apply, variables, method="hidden")
    self._prompt, self._is_valid, self._q = prompt, is_valid, prompt.shape[1]

  def __getattr__(self, name: str) -> Any:
    return getattr(self._inner, name)

  def open(self, length: int) -> Int[Array, "b c"]:
    return jnp.zeros((self._prompt.shape[0], length), jnp.int32)

  def keep(self, tokens: Int[Array, "b s"], start: Int[Array, ""], kept: Int[Array, "b c"]) -> tuple[None, Array]:
    return None, jax.lax.dynamic_update_slice_in_dim(kept, tokens, start, axis=1)

  def block(self, tokens: Int[Array, "b s"], start: Int[Array, ""], kept: Int[Array, "b c"]) -> Float[Array, "b s d"]:
    size = self._inner.block_length
    is_whole = self._is_valid & (jnp.arange(self._q) < self._q - self._inner.remainder()[1][:, None])
    is_seen = jnp.broadcast_to(jnp.arange(kept.shape[1]) < start + size, kept.shape)
    rows = jnp.concatenate([self._prompt, self.keep(tokens, start, kept)[1]], axis=1)
    hidden, _ = self._run(rows, is_valid=jnp.concatenate([is_whole, is_seen], axis=1))
    return jax.lax.dynamic_slice_in_dim(hidden, self._q + start, size, axis=1)


def _with_ends(work: workload.Workload) -> Policies:
  """Give EOS about the probability for which completions have 1 / SHARE of the positions on average."""
  params, own = work.policies.trainable, work.model.config
  prompts = work.experience.prompts
  masks = jnp.full((prompts.tokens.shape[0], own.block_length), own.mask_token_id)
  rows = jnp.concatenate([prompts.tokens, masks], axis=1)
  hidden = jax.jit(lambda rows: work.model.apply({"params": params}, rows, method="hidden")[0])(rows)
  hidden = hidden[:, -own.block_length :].reshape(-1, own.d_model)
  logits = (hidden @ params["head"]).at[:, own.eos_token_id].set(-jnp.inf)
  mean = hidden.mean(0)
  # In about every third of the places where EOS is drawn it stands behind a token that is still to be decided.
  chance = 0.7 * SHARE / work.config.sampler.completion_length
  logit = jnp.log(chance / (1 - chance)) + jax.nn.logsumexp(logits, axis=-1).mean()
  column = mean * logit / (mean @ mean)
  head = params["head"].at[:, own.eos_token_id].set(column)
  return Policies({**params, "head": head}, {})
