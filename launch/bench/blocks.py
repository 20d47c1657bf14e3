"""The command `python -m launch.bench.blocks`: log-probs of a block-diffusion model, against their plain form.

The plain form has a row [prompt; clean completion; noised completion] for each mask sample. The model of this
repository runs the clean completion once for all mask samples of a rollout, and the prompt once for its rollouts.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dmpo_jax.models.config import ModelConfig
from dmpo_jax.models.denoiser import run_routed
from dmpo_jax.models.head import token_scores
from dmpo_jax.models.noised import noised_hidden
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.structs import Prompts
from launch.bench.costs import count_flops

P, G, Q, C = 2, 4, 64, 64
TURNS = 5
CONFIG = ModelConfig(
  vocab_size=1024,
  embedding_size=1024,
  d_model=256,
  num_layers=4,
  num_heads=4,
  num_kv_heads=2,
  mlp_hidden_size=768,
  mask_token_id=1023,
  eos_token_id=1022,
  pad_token_id=1021,
  qk_norm=True,
  block_length=4,
  remat="full",
)
HiddenOf = Callable[..., tuple[Float[Array, "p g r c d"], Any]]


def plain_hidden(
  model: Transformer,
  variables: Mapping[str, Any],
  prompts: Prompts,
  clean: Int[Array, "p g c"],
  noised: Int[Array, "p g r c"],
) -> tuple[Float[Array, "p g r c d"], None]:
  """Compute what `noised_hidden` computes. The prompt's last columns stand before the noised completion again.

  They are for the prompt's remainder, which shares a block with the completion.
  """
  size, (p, g, r, c) = model.config.block_length, noised.shape

  def rows(array: jax.Array) -> jax.Array:
    return jnp.broadcast_to(array, (p, g, r, array.shape[-1])).reshape(p * g * r, -1)

  prompt, is_valid = rows(prompts.tokens[:, None, None]), rows(prompts.is_valid[:, None, None])
  q, tail = prompt.shape[1], min(size - 1, prompt.shape[1])
  tokens = jnp.concatenate([prompt, rows(clean[:, :, None]), prompt[:, q - tail :], rows(noised)], axis=1)
  is_valid = jnp.concatenate([is_valid, jnp.ones((p * g * r, c), bool)], axis=1)
  positions = jnp.maximum(jnp.cumsum(is_valid, axis=1) - 1, 0)
  is_valid, positions = (jnp.concatenate([each, each[:, q - tail :]], axis=1) for each in (is_valid, positions))
  is_noised = jnp.arange(tokens.shape[1]) >= q + c
  key, query = (positions // size)[:, None], (positions // size)[:, :, None]
  from_noised, to_noised = is_noised[:, None], is_noised[None, :]
  sees_clean = ~to_noised & jnp.where(from_noised, key < query, key <= query)
  may_see = sees_clean | (from_noised & to_noised & (key == query))
  hidden, _ = run_routed(model, variables, tokens, is_valid=is_valid, positions=positions, attention_mask=may_see)
  return hidden[:, -c:].reshape(p, g, r, c, -1), None


def make_inputs(num_masks: int) -> tuple[Prompts, Int[Array, "p g c"], Int[Array, "p g r c"]]:
  """Draw prompts, completions and masks."""
  rng = np.random.default_rng(0)
  prompts = Prompts(rng.integers(0, 1000, (P, Q)), np.ones((P, Q), bool), np.arange(P, dtype=np.uint32))
  clean = rng.integers(0, 1000, (P, G, C))
  is_masked = rng.random((P, G, num_masks, C)) < 0.5
  return jax.tree.map(jnp.asarray, (prompts, clean, np.where(is_masked, CONFIG.mask_token_id, clean[:, :, None])))


def gradient_of(hidden_of: HiddenOf, model: Transformer) -> Callable[..., tuple[jax.Array, Any]]:
  """Close over the mean log-probability of the completions, and its gradient."""

  def mean(variables: Mapping[str, Any], prompts: Prompts, clean: jax.Array, noised: jax.Array) -> jax.Array:
    hidden, _ = hidden_of(model, variables, prompts, clean, noised)
    targets = jnp.broadcast_to(clean[:, :, None], noised.shape).reshape(-1)
    return token_scores(hidden.reshape(targets.size, -1), model.head_of(variables), targets).log_prob.mean()

  return jax.value_and_grad(mean)


def measure(num_masks: int, turns: int = TURNS) -> dict[str, list[float]]:
  """Return operations, and the median seconds of turns that alternate, of the plain form and of ours.

  Raises:
    AssertionError: their gradients differ.
  """
  model, given = Transformer(CONFIG), make_inputs(num_masks)
  variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
  traced = [jax.jit(gradient_of(each, model)).trace(variables, *given) for each in (plain_hidden, noised_hidden)]
  programs = [each.lower().compile() for each in traced]
  plain, ours = (jax.tree.leaves(program(variables, *given)) for program in programs)
  for a, b in zip(plain, ours, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(a).max()))
  seconds: list[list[float]] = [[], []]
  for _ in range(turns):
    for program, own in zip(programs, seconds, strict=True):
      begin = time.perf_counter()
      jax.block_until_ready(program(variables, *given))
      own.append(time.perf_counter() - begin)
  return {
    "operations": [count_flops(each.jaxpr) for each in traced],
    "seconds": list(map(statistics.median, seconds)),
    "bytes": list(map(_planned_bytes, programs)),
  }


def _planned_bytes(program: jax.stages.Compiled) -> float:
  memory = program.memory_analysis()
  assert memory is not None  # XLA's compilers have one
  return memory.temp_size_in_bytes


def main() -> None:
  """Print a table for 1, 2 and 4 mask samples."""
  head = "mask samples r", "GFLOP, plain", "ours", "ratio", "r(q+2c) / (q/g+c+rc)", "s, plain", "ours", "ratio"
  print(f"| {' | '.join((*head, 'MiB, plain', 'ours'))} |\n{'|---' * (len(head) + 2)}|")
  for r in (1, 2, 4):
    found = measure(r)
    (plain, ours), (slow, fast) = found["operations"], found["seconds"]
    tokens = r * (Q + 2 * C) / (Q / G + C + r * C)
    memory = " | ".join(f"{each / 2**20:.0f}" for each in found["bytes"])
    print(
      f"| {r} | {plain / 1e9:.1f} | {ours / 1e9:.1f} | {plain / ours:.2f} | {tokens:.2f} "
      f"| {slow:.2f} | {fast:.2f} | {slow / fast:.2f} | {memory} |"
    )


if __name__ == "__main__":
  main()
