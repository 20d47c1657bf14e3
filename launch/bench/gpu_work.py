"""What `launch/bench/gpu.py` does on the GPU, each in a process of its own: figures of it, checks, LLaDA-8B's programs.

A check compares with the plain definition: attention with its sums written out, in float32; a sampler as the host's
processor runs it. In bfloat16 the definition is off as well, so it is run in bfloat16 too, and twice its error is
allowed where that is more than the tolerance.
"""

import dataclasses
import importlib.metadata
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from dmpo_jax import noise, sharding
from dmpo_jax.models.attention import attend, choose_attention
from dmpo_jax.models.config import ModelConfig
from dmpo_jax.models.denoiser import make_denoiser
from dmpo_jax.models.trainable import Trainable
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.samplers import SAMPLERS
from launch.bench import programs, timing, workload

TOLERANCE = 0.02  # of values, gradients and logits in bfloat16, relative to the largest
GRADIENTS = ("value", "gradient of queries", "gradient of keys", "gradient of values")
EXACT = {"sampler.temperature": 0.0, "model.attention": "xla", "model.dtype": "float32"}
COMPILERS = 8  # programs compiled at a time


class Check(NamedTuple):
  """A comparison with the plain definition."""

  what: str
  error: float
  tolerance: float

  @property
  def is_right(self) -> bool:
    """Whether the error is allowed; NaN is not."""
    return self.error <= self.tolerance


@dataclasses.dataclass(frozen=True)
class Case:
  """A call of attention, from `queries` to `keys` positions; `is_padded`: the first keys of all rows but one are not
  attended to."""

  what: str
  rows: int
  queries: int
  keys: int
  heads: int
  kv_heads: int
  head_dim: int = 128
  is_padded: bool = True


def make_description() -> timing.Contender:
  """Describe the GPU, or where there is none the processor, and say why there is none."""
  why = ""
  try:
    device = jax.devices("gpu")[0]
  except RuntimeError as error:
    device, why = jax.devices("cpu")[0], str(error).splitlines()[0]
  facts = {
    "platform": device.platform,
    "why": why,
    "device": device.device_kind,
    "runtime": " ".join(device.client.platform_version.split()),
    "jax": jax.__version__,
    "cudnn": _version_of("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"),
    "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
    "nvidia_smi": _ask_driver() if device.platform == "gpu" else "",
  }
  return timing.Contender(lambda: None, facts=facts)


def _version_of(*packages: str) -> str:
  for package in packages:
    try:
      return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return ""


def _ask_driver() -> str:
  """Return the name, driver, power limit and clock of the GPUs, as their driver says; "" where it cannot be asked."""
  query = "--query-gpu=name,driver_version,power.limit,clocks.max.sm"
  try:
    done = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
  except (OSError, subprocess.TimeoutExpired):
    return ""
  return done.stdout.strip()


def make_products(size: int, times: int) -> timing.Contender:
  """Measure the rate of matrix products in bfloat16: `times` of them in one program, each of the one before.

  Random numbers, as zeros would take less power and so run faster.
  """
  first, factor = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
  factor = factor / size**0.5  # keeps the product's size

  @jax.jit
  def run(first: jax.Array, factor: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, times, lambda _, product: product @ factor, first)

  seconds = seconds_of(run, first, factor)
  return timing.Contender(lambda: None, facts={"flops_per_second": times * 2.0 * size**3 / seconds})


def seconds_of(run: Callable[..., PyTree], *args: PyTree, turns: int = 5) -> float:
  """Return the median time of a jitted function, after a turn that compiles it."""
  jax.block_until_ready(run(*args))
  spans = []
  for _ in range(turns):
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    spans.append(time.perf_counter() - start)
  return statistics.median(spans)


def make_attention(cases: tuple[Case, ...]) -> timing.Contender:
  """Check the device's attention kernel and its gradients, and time the first case beside plain JAX."""
  kernel = _kernel(cases[0].head_dim)
  checks = [check for case in cases for check in check_attention(case, kernel)]
  arrays, is_key = _attention_inputs(cases[0])
  seconds = {name: seconds_of(_attention(name), *arrays, is_key) for name in dict.fromkeys((kernel, "xla"))}
  facts = {"kernel": kernel, "checks": checks, "seconds": seconds}
  return timing.Contender(lambda: None, facts=facts)


def _kernel(head_dim: int) -> str:
  platform = sharding.platform(sharding.make_mesh(devices=jax.devices()[:1]))
  return choose_attention("auto", platform=platform, head_dim=head_dim, dtype="bfloat16")


def _attention_inputs(case: Case) -> tuple[list[jax.Array], jax.Array | None]:
  """Draw queries, keys, values and a direction of the result, and say which keys count."""
  draw = np.random.default_rng(0).standard_normal
  of_queries, of_keys = (case.rows, case.queries), (case.rows, case.keys)
  shapes = (
    (*of_queries, case.heads, case.head_dim),
    (*of_keys, case.kv_heads, case.head_dim),
    (*of_keys, case.kv_heads, case.head_dim),
    (*of_queries, case.heads * case.head_dim),
  )
  arrays = [jnp.asarray(draw(shape, np.float32), jnp.bfloat16) for shape in shapes]
  if not case.is_padded:
    return arrays, None
  num_padded = np.linspace(0, case.keys - 1, case.rows).astype(int)[:, None]
  return arrays, jnp.asarray(np.arange(case.keys) >= num_padded)


def _attention(name: str) -> Callable[..., tuple[jax.Array, ...]]:
  """Jit attention's value, and the gradient of its product with a direction."""

  @jax.jit
  def run(
    query: jax.Array, key: jax.Array, value: jax.Array, direction: jax.Array, is_key: jax.Array | None
  ) -> tuple[jax.Array, ...]:
    mask = None if is_key is None else is_key[:, None]
    mixed, back = jax.vjp(lambda q, k, v: attend(q, k, v, mask, name), query, key, value)
    return mixed, *back(direction)

  return run


def check_attention(case: Case, kernel: str) -> list[Check]:
  """Compare a kernel's value and gradients with the definition's."""
  arrays, is_key = _attention_inputs(case)
  with jax.default_matmul_precision("highest"):
    exact = _attention("xla")(*(array.astype(jnp.float32) for array in arrays), is_key)
  plain, found = _attention("xla")(*arrays, is_key), _attention(kernel)(*arrays, is_key)
  names = [f"{kernel}, {case.what}: {name}" for name in GRADIENTS]
  return check_rounded(dict(zip(names, zip(found, plain, exact, strict=True), strict=True)))


def check_rounded(numbers: Mapping[str, tuple[jax.Array, jax.Array, jax.Array]]) -> list[Check]:
  """Compare numbers in bfloat16 (found, by the plain definition, exactly)."""
  checks = []
  for what, arrays in numbers.items():
    found, plain, exact = (np.asarray(array, np.float32) for array in arrays)
    error, allowed = (timing.relative_error(own, exact) for own in (found, plain))
    checks.append(Check(what, error, max(TOLERANCE, 2 * allowed)))
  return checks


def make_samplers(config: ConfigDict) -> timing.Contender:
  """Check every sampler, and in bfloat16 the model calls that they make."""
  jax.config.update("jax_default_matmul_precision", "highest")
  work = workload.make(workload.changed(config, EXACT))
  return timing.Contender(lambda: None, facts={"checks": check_samplers(work) + check_calls(work)})


def check_samplers(work: workload.Workload) -> list[Check]:
  """Decode greedily in float32 by every sampler, here and on the host, and compare the tokens.

  The error is the share of rows that differ; none may.
  """
  devices = (jax.devices()[0], jax.devices("cpu")[0])
  arguments = jax.device_get((work.policies, work.experience.prompts))
  places = [(name, device) for name in SAMPLERS for device in dict.fromkeys(devices)]
  lowered = [_lower_sampler(workload.changed(work.config, {"sampler.name": name}), where) for name, where in places]
  with ThreadPoolExecutor(COMPILERS) as pool:
    compiled = list(pool.map(jax.stages.Lowered.compile, lowered))
  key, checks, tokens = noise.step_key(work.config.seed, "rollout", 0), [], {}
  for place, program in zip(places, compiled, strict=True):
    rollouts = jax.device_get(program(*arguments, jax.device_put(key, place[1]), 0))
    tokens[place] = rollouts.completion.reshape(-1, rollouts.completion.shape[-1])
  for name in SAMPLERS:
    found, wanted = (tokens[name, device] for device in devices)
    checks.append(Check(f"{name}: rows with other tokens", float((found != wanted).any(1).mean()), 0.0))
  return checks


def _lower_sampler(config: ConfigDict, device: jax.Device) -> jax.stages.Lowered:
  return programs.trace("sample", config, *programs.place(config, [device])).lower()


def check_calls(work: workload.Workload) -> list[Check]:
  """Compare the logits of every kind of model call in bfloat16, with the device's kernel, with exact ones."""
  own, trainable = work.model.config, Trainable.of(work.model.config)
  variables = trainable.policy(work.policies.trainable, work.policies.frozen)
  kernel = _kernel(own.head_dim)
  found, plain, exact = (
    _logits_of_calls(dataclasses.replace(own, dtype=dtype, attention=attention), variables, work)
    for dtype, attention in (("bfloat16", kernel), ("bfloat16", "xla"), ("float32", "xla"))
  )
  return check_rounded({f"logits with {kernel}, {call}": (found[call], plain[call], exact[call]) for call in exact})


def _logits_of_calls(own: ModelConfig, variables: PyTree, work: workload.Workload) -> dict[str, jax.Array]:
  """Run a prompt with padding and a half-decided completion through each of the denoiser's calls."""
  config, prompts = work.config, work.experience.prompts
  size, start = config.sampler.block_length, config.sampler.completion_length - config.sampler.block_length

  @jax.jit
  def run(variables: PyTree, tokens: jax.Array, completion: jax.Array) -> dict[str, jax.Array]:
    is_valid = jnp.arange(tokens.shape[1]) >= jnp.arange(len(tokens))[:, None] * (tokens.shape[1] // 2)
    denoiser = make_denoiser(Transformer(own), variables, tokens, is_valid)
    first, kv_cache = denoiser.prefill(completion)
    hidden = {
      "whole rows": denoiser.hidden(completion),
      "rows into a cache": first,
      "a suffix over a cache": denoiser.suffix(completion, jnp.int32(start), kv_cache, size),
      "a block over a cache": denoiser.block(completion[:, start:], jnp.int32(start), kv_cache),
      "a block and its shadow": denoiser.shadowed(completion, jnp.int32(start), size),
    }
    return {call: denoiser.logits(states, 0)[0] for call, states in hidden.items()}

  completion = np.array(work.experience.completion[:2, 0])
  completion[:, start + size // 2 :] = work.model.config.mask_token_id
  return run(variables, prompts.tokens[:2], completion)


def make_program(make: Callable[[ConfigDict], timing.Contender], config: ConfigDict) -> timing.Contender:
  """Build a program's contender; its turns also tell the most that the device has held so far, in bytes."""
  contender = make(config)

  def turn() -> dict[str, float]:
    facts = dict(contender.run() or {})
    memory = jax.devices()[0].memory_stats()
    return facts if memory is None else facts | {"held_bytes": memory["peak_bytes_in_use"]}  # CPUs keep no account

  return timing.Contender(turn, facts=contender.facts)
