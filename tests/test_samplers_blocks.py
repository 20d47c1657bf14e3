"""Models that attend by blocks: trajectories of SDAR's code, and rows that depend on no cache, neighbour or padding."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded_models import params_of
from safetensors.numpy import load_file

from dmpo_jax.hub.families import natural_family
from dmpo_jax.hub.model_config import model_config_from_hf
from dmpo_jax.models.denoiser import make_denoiser
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.samplers import SAMPLERS, Plan, make_options

FOLDER = pathlib.Path(__file__).parent / "goldens" / "blocks"
CASES = json.loads((FOLDER / "sampled.json").read_text())
# where the reference does otherwise than we do, on purpose
OTHERWISE = ("overwrites_given_tokens", "v20_eos_early_stop")
RECORDED = np.load(FOLDER / "sampled.npz")


@functools.cache
def load(checkpoint, block_length, **changes):
  folder = FOLDER / checkpoint
  config = model_config_from_hf(json.loads((folder / "config.json").read_text()))
  variables = {"params": params_of(load_file(folder / "model.safetensors"), config, natural_family(config))}
  return Transformer(dataclasses.replace(config, block_length=block_length, **changes)), variables


class Uncached:
  """A denoiser that runs whole rows at every call; its cache is the tokens themselves."""

  def __init__(self, model, variables, prompt, is_valid):
    self._inner = make_denoiser(model, variables, prompt, is_valid)
    self._run = functools.partial(model.apply, variables, method="hidden")
    self._prompt, self._is_valid, self._q = prompt, is_valid, prompt.shape[1]

  def __getattr__(self, name):
    return getattr(self._inner, name)

  def open(self, length):
    return jnp.zeros((self._prompt.shape[0], length), jnp.int32)

  def keep(self, tokens, start, kv_cache):
    return self.block(tokens, start, kv_cache), jax.lax.dynamic_update_slice_in_dim(kv_cache, tokens, start, axis=1)

  def block(self, tokens, start, kv_cache):
    size = self._inner.block_length
    is_whole = self._is_valid & (jnp.arange(self._q) < self._q - self._inner.remainder()[1][:, None])
    is_seen = jnp.broadcast_to(jnp.arange(kv_cache.shape[1]) < start + size, kv_cache.shape)
    kept = jax.lax.dynamic_update_slice_in_dim(kv_cache, tokens, start, axis=1)
    rows = jnp.concatenate([self._prompt, kept], axis=1)
    hidden, _ = self._run(rows, is_valid=jnp.concatenate([is_whole, is_seen], axis=1))
    return jax.lax.dynamic_slice_in_dim(hidden, self._q + start, size, axis=1)


def sample(model, variables, prompts, plan, name="parallel", own=None, width=None, first=0, make=make_denoiser):
  """Decode prompts of any lengths, left-padded to one, with the keys of rows from `first` on."""
  width = width or max(map(len, prompts))
  tokens = np.stack([np.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
  is_valid = np.arange(width) >= width - np.array([[len(prompt)] for prompt in prompts])
  keys = jax.random.wrap_key_data(jnp.asarray([[0, first + row] for row in range(len(prompts))], jnp.uint32))

  @jax.jit
  def decode(variables, tokens, is_valid, keys):
    denoiser = make(model, variables, tokens, is_valid)
    return SAMPLERS[name].sample(denoiser, keys, plan, make_options(name, own or {}))

  rollouts = jax.tree.map(np.asarray, decode(variables, jnp.asarray(tokens), jnp.asarray(is_valid), keys))
  jax.effects_barrier()
  return rollouts


def replay(name):
  """Decode a recorded case; give the rollouts, what stood after each call, and where the completion ends."""
  case, prompt, final = CASES[name], RECORDED[f"{name}_prompt"], RECORDED[f"{name}_final"]
  size, q = case["block_length"], prompt.shape[1]
  length = (final.shape[1] - q) // size * size  # the code returns the rest of the last block too
  stops = [token for token in case["stop_ids"] if token in final]
  eos = {"eos_token_id": stops[0]} if stops else {}
  model, variables = load(case["checkpoint"], size, **eos)
  states = {}
  plan = Plan(
    completion_length=length,
    block_length=size,
    steps=case["steps_per_block"] * length // size,
    early_exit=bool(stops),
    on_call=lambda number, completion, *_: states.update({int(number): completion[0]}),
  )
  own = case.get("own") or {"rule": case["rule"], "threshold": case["threshold"]}
  rollouts = sample(model, variables, list(prompt), plan, case.get("sampler", "parallel"), own)
  return rollouts, [states[number] for number in range(len(states))], q + length


def quick(name):
  """Cases that stand for the others of their rule."""
  is_quick = not name.startswith(("v2", "moe")) or name in ("moe_dynamic", "v20_minimal_topk", "v21_default")
  return name if is_quick else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [quick(name) for name in CASES if name not in OTHERWISE])
def test_every_call_is_the_recorded_one(name):
  rollouts, states, end = replay(name)
  prompt, final, calls = (RECORDED[f"{name}_{part}"] for part in ("prompt", "final", "calls"))
  assert rollouts.num_calls == len(states) == len(calls)
  np.testing.assert_array_equal(rollouts.seen[0], final[0, prompt.shape[1] : end])
  mask = load(CASES[name]["checkpoint"], CASES[name]["block_length"])[0].config.mask_token_id
  before = [np.full_like(states[0], mask), *states[:-1]]
  for call, start, completion in zip(calls, RECORDED[f"{name}_starts"], before, strict=True):
    row = np.concatenate([prompt[0], completion])
    np.testing.assert_array_equal(row[start : start + len(call)], call[: len(row) - start])


def test_decided_tokens_are_kept_where_the_reference_overwrites_them():
  """Its first block has one token to decide, where two are due at a call: it takes a token of the prompt too."""
  name = "overwrites_given_tokens"
  rollouts, states, _ = replay(name)
  prompt, calls = RECORDED[f"{name}_prompt"][0], RECORDED[f"{name}_calls"]
  assert not np.array_equal(RECORDED[f"{name}_final"][0, : len(prompt)], prompt)
  mask = load("ss_sharp", 4)[0].config.mask_token_id
  assert (states[0] != mask).sum() == 1
  assert states[0][0] == RECORDED[f"{name}_final"][0, len(prompt)]
  assert rollouts.num_calls == len(states) <= len(calls)
  assert (rollouts.completion != mask).all()


@pytest.mark.slow
def test_a_block_with_eos_is_decoded_to_its_end():
  """dllm's code leaves it as soon as it has one, masks and all, and goes on with the next block."""
  name = "v20_eos_early_stop"
  rollouts, states, _ = replay(name)
  prompt, final = RECORDED[f"{name}_prompt"][0], RECORDED[f"{name}_final"][0]
  mask, end = load("l2_sharp", 8)[0].config.mask_token_id, 16 - len(prompt)  # of the block, the second one
  assert CASES[name]["stop_ids"] == [final[len(prompt) + 2]]
  np.testing.assert_array_equal(states[1][:end], final[len(prompt) : 16])  # where that code leaves it
  assert (states[1][3:end] == mask).all()
  assert (rollouts.seen[0, :end] != mask).all()
  assert (rollouts.seen[0, end:] == mask).all()
  assert rollouts.num_calls == len(states) > 2


PROMPTS = [RECORDED[f"{name}_prompt"][0] for name in ("dynamic_085", "sequential", "prompt_shorter_than_block")]
RULES = [
  ("parallel", {"rule": "threshold", "threshold": 0.5}),
  ("parallel", {"rule": "factor"}),
  ("parallel", {"rule": "entropy"}),
  ("entropy_bound", {"bound": 0.5}),
  ("llada", {"remasking": "random"}),
]


def plan_of(**changes):
  return Plan(**(dict(completion_length=12, block_length=4, steps=9, temperature=1.0, early_exit=True) | changes))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "own"), RULES)
def test_a_row_alone_and_uncached_is_the_row_in_its_batch(name, own):
  """Prompts of 10, 6 and 3 tokens; an EOS that ends some rows early."""
  model, variables = load("ss_sharp", 4, eos_token_id=157)
  together = sample(model, variables, PROMPTS, plan_of(), name, own, width=12)
  plain = sample(model, variables, PROMPTS, plan_of(), name, own, make=Uncached)
  fields = ("completion", "committed_at", "num_calls", "num_saved", "seen", "confidence")

  def same(found, wanted):
    for field in fields:
      np.testing.assert_allclose(getattr(found, field), getattr(wanted, field), rtol=0, atol=1e-4, err_msg=field)

  same(plain, together)
  for row, prompt in enumerate(PROMPTS):
    alone = sample(model, variables, [prompt], plan_of(), name, own, first=row)
    same(alone, jax.tree.map(lambda array, row=row: array[row : row + 1], together))


@pytest.mark.slow
def test_a_row_ends_with_the_block_of_its_first_eos():
  model, variables = load("ss_sharp", 4)
  whole = sample(model, variables, PROMPTS, plan_of(temperature=0.0, early_exit=False))
  eos = int(whole.completion[0, 4])  # in the second block of the canvas: the prompt has 2 tokens in the first
  ended = sample(load("ss_sharp", 4, eos_token_id=eos)[0], variables, PROMPTS[:1], plan_of(temperature=0.0))
  first = whole.completion[0].tolist().index(eos)
  last = (first + 2) // 4 * 4 + 2  # where its block ends
  np.testing.assert_array_equal(ended.seen[0, :last], whole.completion[0, :last])
  assert (ended.seen[0, last:] == model.config.mask_token_id).all()
  assert (ended.completion[0, first:] == eos).all()
  assert ended.num_tokens[0] == first + 1


def test_blocks_must_be_the_models():
  model, variables = load("ss_sharp", 4)
  with pytest.raises(ValueError, match=r"sampler.block_length=6: must be model.block_length=4"):
    sample(model, variables, PROMPTS, plan_of(block_length=6, steps=2))
