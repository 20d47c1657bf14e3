"""Lengths that prompts are padded to: a few, as every length is a program to compile."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, PyTree

from dmpo_jax import processes
from dmpo_jax.structs import Prompts

GRAIN = 32  # lengths that are chosen are multiples of it
COMPILE_SECONDS = 900.0  # for a program of one length, at most


def choose(lengths: Sequence[int], longest: int, most: int) -> tuple[int, ...]:
  """Choose at most so many lengths such that prompts, each padded to the next of them, have least padding.

  Args:
    lengths: of the prompts, at most `longest`.
    longest: the length where there is only one.

  Returns:
    In ascending order; the last one holds every prompt.
  """
  if most == 1:
    return (longest,)
  sizes, counts = np.unique(np.minimum(-(-np.asarray(lengths) // GRAIN) * GRAIN, longest), return_counts=True)
  num_shorter = np.cumsum(counts)
  # Of the prompts up to each size: their fewest tokens with so many lengths of which it is the last, and these lengths.
  fewest, chosen = (sizes * num_shorter).astype(float), sizes[:, None]
  between = np.where(sizes[:, None] < sizes, sizes * (num_shorter - num_shorter[:, None]), np.inf)
  for _ in range(min(most, len(sizes)) - 1):
    tokens = fewest[:, None] + between
    fewest, chosen = tokens.min(0), np.column_stack([chosen[tokens.argmin(0)], sizes])
  return tuple(chosen[-1].tolist())


def order(prompts: Prompts, lengths: Sequence[int]) -> Int[np.ndarray, "p"] | None:
  """Return the order that puts prompts of one length together, the longest first; None where there is one length.

  Prompts that are equally long keep their order.
  """
  return np.argsort(-prompts.is_valid.sum(1), kind="stable") if len(lengths) > 1 else None


def cut(prompts: Prompts, lengths: Iterable[int]) -> Prompts:
  """Drop padding that all prompts have: down to the first of the ascending lengths that holds every one.

  Prompts that were no longer padded than this stay as they are; so do all if there are no lengths.
  """
  needed = prompts.is_valid.sum(1).max()
  length = next((length for length in lengths if length >= needed), 0)
  return dataclasses.replace(prompts, tokens=prompts.tokens[:, -length:], is_valid=prompts.is_valid[:, -length:])


class Ahead:
  """A jitted program on prompts. When it is first called, it is compiled for the prompts' other lengths, too.

  So no program is compiled in the middle of a run.
  """

  def __init__(self, program: Any, lengths: Sequence[int]):
    """Wrap a program, a `jax.stages.Wrapped`, one of whose arguments is or holds `Prompts`."""
    self._program, self._lengths = program, lengths
    self._known: set[tuple[Any, ...]] = set()

  def __call__(self, *args: Any) -> PyTree:
    key = tuple((np.shape(leaf), getattr(leaf, "sharding", None)) for leaf in jax.tree.leaves(_resized(args, 1)))
    if key not in self._known:
      self._known.add(key)
      for length in self._lengths:
        # A host may find in its cache what others compile: it waits for them here, for one program at a time.
        processes.meet("the next length of prompts", COMPILE_SECONDS)
        with processes.working(COMPILE_SECONDS):
          self._program.lower(*_resized(args, length)).compile()
    return self._program(*args)


def ahead(program: Any, lengths: Sequence[int]) -> Callable[..., Any]:
  """Return a jitted program that is compiled for all lengths at once; itself where there is one length."""
  return Ahead(program, lengths) if len(lengths) > 1 else program


def _resized(args: PyTree, length: int) -> PyTree:
  """Give all prompts in a program's arguments another length; their tokens are lost."""

  def resize(part: Any) -> Any:
    if not isinstance(part, Prompts):
      return part
    shape = (len(part.tokens), length)
    return dataclasses.replace(part, tokens=np.zeros(shape, part.tokens.dtype), is_valid=np.zeros(shape, bool))

  return jax.tree.map(resize, args, is_leaf=lambda part: isinstance(part, Prompts))
