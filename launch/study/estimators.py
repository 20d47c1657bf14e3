"""Measure the likelihood estimators against the exact likelihood: bias, spread and cost, as a table and a picture.

    python -m launch.study.estimators --out=docs

The model is a table over four positions and three tokens, so log p(y | x) is a sum over all orders; the estimates are
averaged over all 81 completions. Writes estimators.md and estimators.svg.
"""

import itertools
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import scipy.special
from absl import flags
from etils import epath

from dmpo_jax import files
from dmpo_jax.objectives.estimators import Coupled, Elbo, ElboQuadrature, Eubo, OneStep, Trajectory
from dmpo_jax.objectives.likelihood import Linear
from dmpo_jax.objectives.masking import Completions, MaskSampling
from dmpo_jax.run import buckets
from launch import commands

matplotlib.use("svg")
import matplotlib.pyplot as plt

TOKENS, LENGTH, MASK = 3, 4, 3
COMPLETIONS = np.array(list(itertools.product(range(TOKENS), repeat=LENGTH)))
DRAWS = 400  # independent estimates of each completion

INTRODUCTION = """# The likelihood estimators

All figures of [objectives.md](objectives.md#bias-and-noise), in nats per completion, against the exact log p of a
model with four positions and three tokens. Bias is the mean of estimate - log p. Spread is the standard deviation
of the estimates of one completion. Centred error is the root mean square of estimate - log p after subtracting its
mean: what differences between completions see. Written by `python -m launch.study.estimators --out=docs`.
"""


class Figures(NamedTuple):
  """Figures of an estimator at one cost, in nats per completion, averaged over completions by their probability."""

  name: str
  calls: int  # model calls per completion
  bias: float  # mean of estimate - log p
  spread: float  # standard deviation of the estimates of one completion
  error: float  # root mean square of estimate - log p after subtracting its mean


def define_flags() -> None:
  """Declare the command's flags; not on import, as every command has an --out of its own."""
  flags.DEFINE_string("out", "docs", "The folder to write to.")
  flags.DEFINE_float("sharpness", 1.5, "Standard deviation of the logits in the table.")


def main() -> None:
  """Measure all estimators and write the table and the picture."""
  given = flags.FLAGS
  buckets.refuse("--out", given.out)
  logits = given.sharpness * np.random.default_rng(0).standard_normal((*[TOKENS + 1] * LENGTH, LENGTH, TOKENS))
  table = scipy.special.log_softmax(logits, axis=-1)
  exact = exact_log_likelihood(table)
  figures = [measure(name, estimator, table, exact) for name, estimator in candidates()]
  out = pathlib.Path(given.out)
  files.write_whole(epath.Path(out / "estimators.md"), markdown(figures))
  draw(figures, out / "estimators.svg")
  print(markdown(figures))


def candidates() -> Iterator[tuple[str, Linear]]:
  """List the estimators by name, each at several costs."""
  for count in (1, 2, 4, 8, 16, 32):
    yield "elbo", Elbo(MaskSampling(count, antithetic=False))
    if count > 1:
      yield "elbo, antithetic", Elbo(MaskSampling(count))
      yield "elbo_quadrature, 2 points", ElboQuadrature(MaskSampling(count), num_points=2)
      yield "eubo, beta 1", Eubo(MaskSampling(count, antithetic=False), beta=1.0, mixture=1.0)
      yield "eubo, beta 1.5, mixture 0.5", Eubo(MaskSampling(count, antithetic=False), beta=1.5, mixture=0.5)
      yield "coupled", Coupled(MaskSampling(count + 1, min_ratio=0.2, max_ratio=0.8))
  yield "one_step", OneStep(MaskSampling(1), prompt_mask_ratio=0.0)
  for count in (1, 2, 4):
    yield "trajectory", Trajectory(MaskSampling(count))


def exact_log_likelihood(table: np.ndarray) -> np.ndarray:
  """Compute log p of every completion: the mean over all orders of the product along each."""
  totals = []
  for completion in COMPLETIONS:
    by_order = []
    for order in itertools.permutations(range(LENGTH)):
      state, total = [MASK] * LENGTH, 0.0
      for position in order:
        total += table[tuple(state)][position, completion[position]]
        state[position] = completion[position]
      by_order.append(total)
    totals.append(scipy.special.logsumexp(by_order) - math.log(len(by_order)))
  return np.array(totals)


def measure(name: str, estimator: Linear, table: np.ndarray, exact: np.ndarray) -> Figures:
  """Estimate every completion `DRAWS` times."""
  p = len(COMPLETIONS)
  keys = jax.random.split(jax.random.key(0), (p, DRAWS))
  order = jnp.argsort(jax.random.uniform(jax.random.key(1), (p, DRAWS, LENGTH)), axis=-1)
  known = Completions(jnp.ones((p, DRAWS, LENGTH), bool), order, jnp.ones((p, 1), bool))

  @jax.jit
  def estimate(keys: jax.Array) -> jax.Array:
    views = estimator.views(keys, known)
    tokens = jnp.asarray(COMPLETIONS)[:, None, None]
    state = jnp.where(views.is_masked, MASK, tokens)
    rows = jnp.asarray(table, jnp.float32)[tuple(state[..., position] for position in range(LENGTH))]
    log_prob = jnp.take_along_axis(rows, jnp.broadcast_to(tokens, state.shape)[..., None], axis=-1)[..., 0]
    return estimator.tokens(log_prob, views).sum(-1)

  estimates, weight = np.asarray(estimate(keys)), np.exp(exact)
  errors = estimates - exact[:, None]
  bias = float((weight * errors.mean(-1)).sum())
  spread = float(np.sqrt((weight * errors.var(-1)).sum()))
  centred = float(np.sqrt((weight * ((errors - bias) ** 2).mean(-1)).sum()))
  return Figures(name, estimator.masks.num, bias, spread, centred)


def markdown(figures: Sequence[Figures]) -> str:
  """Lay the figures out as a Markdown page with one table."""
  lines = [INTRODUCTION, "| estimator | model calls | bias | spread | centred error |", "|---|---|---|---|---|"]
  for row in sorted(figures, key=lambda row: (row.name, row.calls)):
    lines.append(f"| {row.name} | {row.calls} | {row.bias:+.3f} | {row.spread:.3f} | {row.error:.3f} |")
  return "\n".join(lines) + "\n"


def draw(figures: Sequence[Figures], path: pathlib.Path) -> None:
  """Plot bias and centred error over the cost."""
  figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
  for name in dict.fromkeys(row.name for row in figures):
    rows = [row for row in figures if row.name == name]
    calls = [row.calls for row in rows]
    axes[0].plot(calls, [row.bias for row in rows], marker="o", markersize=4, label=name)
    axes[1].plot(calls, [row.error for row in rows], marker="o", markersize=4)
  axes[0].set_ylabel("bias, nats")
  axes[1].set_ylabel("error without the bias, nats")
  for axis in axes:
    axis.set_xscale("log", base=2)
    axis.set_xlabel("model calls per completion")
    axis.grid(alpha=0.3)
  figure.legend(loc="outside right upper", fontsize="small")
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, metadata={"Date": None})
  plt.close(figure)


if __name__ == "__main__":
  define_flags()
  commands.start(main)
