"""The samplers against each other, and against a plain PyTorch one, on random weights and prompts."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from dmpo_jax.models.denoiser import make_denoiser
from dmpo_jax.models.llada import LLaDA, ModelConfig
from dmpo_jax.samplers import SAMPLERS, Plan
from dmpo_jax.structs import Rollouts
from launch import timing

# name in the table -> sampler and its keywords
CONTENDERS = {
  "llada": ("llada", {}),
  "prefix cache": ("prefix_cache", dict(rule="count")),
  "dual cache": ("dual_cache", dict(rule="count")),
  "threshold 0.9": ("parallel", dict(rule="threshold", threshold=0.9)),
}
PEER = "llada, PyTorch"


@dataclasses.dataclass(frozen=True)
class Workload:
  """What all contenders decode."""

  model: LLaDA
  variables: Mapping[str, Any]
  prompt: np.ndarray  # int32 [b, q]
  plan: Plan


def define_flags() -> None:
  """Declare the section's flags."""
  flags.DEFINE_integer("d_model", 256, "Model width.", lower_bound=1)
  flags.DEFINE_integer("num_layers", 8, "Layers.", lower_bound=1)
  flags.DEFINE_integer("num_heads", 4, "Attention heads.", lower_bound=1)
  flags.DEFINE_integer("mlp_hidden_size", 1024, "Feed-forward width.", lower_bound=1)
  flags.DEFINE_integer("vocab_size", 32_000, "Vocabulary.", lower_bound=4)
  flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and activations.")
  flags.DEFINE_integer("batch", 8, "Rows.", lower_bound=1)
  flags.DEFINE_integer("prompt", 128, "Prompt tokens.", lower_bound=1)
  flags.DEFINE_integer("completion", 128, "Completion tokens.", lower_bound=1)
  flags.DEFINE_integer("block", 32, "Block length.", lower_bound=1)
  flags.DEFINE_integer("steps", 64, "Model calls of the samplers with a schedule.", lower_bound=1)
  flags.DEFINE_float("sharpness", 20.0, "Factor on the head: how sure random weights are of their predictions.")
  flags.DEFINE_integer("repeats", 3, "Runs of each; the median counts.", lower_bound=1)
  flags.DEFINE_enum("peer", "none", ["none", "torch"], "Also time a plain implementation on transformers' Llama.")


def run() -> None:
  """Time the contenders in turns and print the table."""
  given = flags.FLAGS
  work = make_workload(given)
  counted = {
    name: count_calls(work, sampler, own) if own.get("rule") == "threshold" else work.plan.steps
    for name, (sampler, own) in CONTENDERS.items()
  }
  programs: dict[str, Callable[[], Any]] = {name: make_program(work, *CONTENDERS[name]) for name in CONTENDERS}
  if given.peer == "torch":
    from launch import peer_torch  # here, as PyTorch is an optional extra

    programs[PEER] = peer_torch.make_program(work.model.config, work.variables["params"], work.prompt, work.plan)
    counted[PEER] = work.plan.steps
  measured = timing.run_in_turns(programs, given.repeats)
  Console(width=120).print(make_table(work, measured, counted))
  ours = np.asarray(measured["llada"].result)
  if PEER in measured:
    print(f"tokens on which PyTorch and JAX agree: {(measured[PEER].result == ours).mean():.1%}")


def make_workload(given: Any) -> Workload:
  """Draw weights and prompts."""
  model = LLaDA(
    ModelConfig(
      vocab_size=given.vocab_size,
      embedding_size=given.vocab_size,
      d_model=given.d_model,
      num_layers=given.num_layers,
      num_heads=given.num_heads,
      num_kv_heads=given.num_heads,
      mlp_hidden_size=given.mlp_hidden_size,
      mask_token_id=given.vocab_size - 1,
      eos_token_id=given.vocab_size - 2,
      pad_token_id=given.vocab_size - 3,
      dtype=given.dtype,
      param_dtype=given.dtype,
    )
  )
  params = nn.unbox(jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))())["params"]
  params = params | {"head": params["head"] * given.sharpness}
  prompt = np.random.default_rng(0).integers(0, given.vocab_size - 3, (given.batch, given.prompt)).astype(np.int32)
  plan = Plan(completion_length=given.completion, block_length=given.block, steps=given.steps)
  return Workload(model, {"params": params}, prompt, plan)


def make_program(work: Workload, sampler: str, own: Mapping[str, Any]) -> Callable[[], jax.Array]:
  """Jit a sampler on the workload; the program gives the completions."""
  decode = _jit(work, sampler, own, work.plan)
  return lambda: jax.block_until_ready(decode(work.variables).completion)


def count_calls(work: Workload, sampler: str, own: Mapping[str, Any]) -> int:
  """Count the model calls that the batch makes, by watching it once."""
  numbers = set()
  plan = dataclasses.replace(work.plan, on_call=lambda number, *_: numbers.add(int(number)))
  jax.block_until_ready(_jit(work, sampler, own, plan)(work.variables))
  jax.effects_barrier()
  return len(numbers)


def _jit(work: Workload, sampler: str, own: Mapping[str, Any], plan: Plan) -> Callable[[Any], Rollouts]:
  prompt, keys = jnp.asarray(work.prompt), jax.random.split(jax.random.key(0), len(work.prompt))

  def decode(variables: Any) -> Rollouts:
    denoiser = make_denoiser(work.model, variables, prompt, jnp.ones(prompt.shape, bool))
    return SAMPLERS[sampler](denoiser, keys, plan, **own)

  return jax.jit(decode)


def make_table(work: Workload, measured: Mapping[str, timing.Timing], counted: Mapping[str, int]) -> Table:
  """Lay out calls, tokens/s and memory, and how each compares with what it is measured against."""
  config, plan = work.model.config, work.plan
  table = Table(
    title=f"{timing.describe_machine()}; d_model {config.d_model}, {config.num_layers} layers, vocabulary "
    f"{config.vocab_size}, {config.dtype}; {len(work.prompt)} rows, prompt {work.prompt.shape[1]}, completion "
    f"{plan.completion_length}, block {plan.block_length}"
  )
  for column in ("sampler", "calls", "seconds", "tokens/s", "memory", "against", "tokens/s", "fewer calls"):
    table.add_column(column, justify="left" if column in ("sampler", "against") else "right")
  num_tokens = len(work.prompt) * plan.completion_length
  for name, own in measured.items():
    other = "" if name == "llada" else "llada"
    if name == PEER:
      ratio = f"llada is {own.median / measured['llada'].median:.2f} x"
    else:
      ratio = f"{measured[other].median / own.median:.2f} x" if other else ""
    table.add_row(
      name,
      str(counted[name]),
      f"{own.median:.2f}",
      f"{num_tokens / own.median:.1f}",
      "-" if own.peak_bytes is None else f"{own.peak_bytes / 2**20:.0f} MiB",
      other,
      ratio,
      f"{counted[other] / counted[name]:.2f} x" if other else "",
    )
  return table
