"""Continuous batching: a queue of rows goes through a fixed number of slots that are kept full.

There are two programs, each of one shape: `fill` puts rows into a few slots, `advance` makes model calls. Between them
the host sees which rows are done, and puts the next ones into their slots. A row's result depends on neither slot,
neighbours nor arrival.

With several processes each of them runs this. What it decides (which row goes where, when to stop) follows from the
rows, which all have, and from results that are replicated, so all run the same programs in the same order.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int, UInt32
from ml_collections import ConfigDict

from dmpo_jax import noise, samplers, sharding
from dmpo_jax.models.denoiser import make_denoiser
from dmpo_jax.models.trainable import Trainable
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.policy import Policies, make_plan
from dmpo_jax.samplers import slots
from dmpo_jax.structs import Denoiser, Prompts, Rollouts

FILLED = 8  # one of so many slots is filled at a time
POLLED = 4  # blocks between two polls


class Queued(NamedTuple):
  """Rows on the host."""

  tokens: Int[np.ndarray, "b q"]
  is_valid: Bool[np.ndarray, "b q"]
  prompt_id: UInt32[np.ndarray, "b"]
  rollout: Int[np.ndarray, "b"]  # its index among those of its prompt
  temperature: Float[np.ndarray, "b"]

  @classmethod
  def of_prompts(cls, prompts: Prompts, group_size: int, first: int = 0) -> "Queued":
    """Queue so many rollouts of each prompt, from the one with index `first` on."""
    prompts = jax.tree.map(lambda array: np.repeat(np.asarray(array), group_size, axis=0), prompts)
    num = len(prompts.prompt_id)
    rollout = (first + np.arange(num) % group_size).astype(np.int32)
    return cls(prompts.tokens, prompts.is_valid, prompts.prompt_id, rollout, np.zeros(num, np.float32))

  def take(self, index: Sequence[int] | np.ndarray) -> "Queued":
    """Take some of the rows."""
    return Queued(*(array[np.asarray(index)] for array in self))


class Programs:
  """The programs of one sampler, compiled for each width of prompts on first use.

  Args:
    num_slots: rounded up so that the mesh's devices divide it.
    temperature: of all rows; None: each brings its own.
    early_exit: see `samplers.Plan`.

  Attributes:
    seconds: spent on compiling so far.
  """

  def __init__(
    self,
    config: ConfigDict,
    model: Transformer,
    mesh: Mesh,
    *,
    num_slots: int,
    temperature: float | None,
    early_exit: bool,
  ):
    self.seconds, self.mesh = 0.0, mesh
    with jax.set_mesh(mesh):
      self.num_shares = sharding.num_shares("batch")
    self.num_slots = -(-num_slots // self.num_shares) * self.num_shares
    self.num_filled = max(self.num_slots // self.num_shares // FILLED, 1) * self.num_shares
    self._model, self._trainable, self._own_temperature = model, Trainable.of(model.config), temperature is None
    self._plan = make_plan(config, temperature=temperature or 0.0, early_exit=early_exit)
    name = config.sampler.name
    self._sampler, self._options = (
      samplers.SAMPLERS[name],
      samplers.make_options(name, config.sampler.to_dict().get(name, {})),
    )
    self._compiled: dict[tuple[str, int], jax.stages.Compiled] = {}

  @property
  def calls_of_block(self) -> int:
    """The most model calls from a block's first one to the next block's, where each decides a token."""
    return self._plan.block_length + 1

  def empty(self, policies: Policies, rows: Queued, key: jax.Array) -> slots.Slots:
    """Make slots for rows as wide as these."""
    return self._run("empty", self._empty, policies, rows, key)

  def fill(
    self, policies: Policies, state: slots.Slots, rows: Queued, index: np.ndarray, key: jax.Array
  ) -> slots.Slots:
    """Fill `num_filled` slots; see `slots.place`."""
    return self._run("fill", self._fill, policies, state, rows, index, key)

  def advance(
    self, policies: Policies, state: slots.Slots, is_held: np.ndarray, num_done: int, most_calls: int
  ) -> tuple[slots.Slots, Rollouts, jax.Array]:
    """Make model calls; see `slots.advance`."""
    return self._run("advance", self._advance, policies, state, is_held, np.int32(num_done), np.int32(most_calls))

  def _begin(self, policies: Policies, rows: Queued, key: jax.Array) -> slots.Slots:
    of_rows = jax.vmap(lambda prompt_id, first: noise.row_keys(key, prompt_id[None], 1, first)[0, 0])
    keys = of_rows(jnp.asarray(rows.prompt_id), jnp.asarray(rows.rollout))
    own = slots.Rows(jnp.asarray(rows.tokens), jnp.asarray(rows.is_valid), keys, jnp.asarray(rows.temperature))
    own = jax.tree.map(lambda array: sharding.constrain(array, "batch", *(None,) * (array.ndim - 1)), own)
    denoiser, plan = self._denoiser(policies, own), self._plan_of(own)
    return slots.begin(self._rule(denoiser, plan), plan, denoiser, own)

  def _empty(self, policies: Policies, rows: Queued, key: jax.Array) -> slots.Slots:
    return slots.empty(jax.eval_shape(self._begin, policies, rows, key), self.num_slots, key)

  def _fill(
    self, policies: Policies, state: slots.Slots, rows: Queued, index: jax.Array, key: jax.Array
  ) -> slots.Slots:
    return slots.place(state, self._begin(policies, rows, key), jnp.asarray(index))

  def _advance(
    self, policies: Policies, state: slots.Slots, is_held: jax.Array, num_done: jax.Array, most_calls: jax.Array
  ) -> tuple[slots.Slots, Rollouts, jax.Array]:
    denoiser, plan = self._denoiser(policies, state.rows), self._plan_of(state.rows)
    return slots.advance(self._rule(denoiser, plan), plan, denoiser, state, is_held, num_done, most_calls)

  def _plan_of(self, rows: slots.Rows) -> samplers.Plan:
    return dataclasses.replace(self._plan, temperature=rows.temperature) if self._own_temperature else self._plan

  def _rule(self, denoiser: Denoiser, plan: samplers.Plan) -> samplers.Rule:
    assert self._sampler.make_rule is not None  # other samplers are refused
    return self._sampler.make_rule(denoiser, plan, self._options)

  def _denoiser(self, policies: Policies, rows: slots.Rows) -> Denoiser:
    variables = self._trainable.policy(policies.trainable, policies.frozen)
    return make_denoiser(self._model, variables, rows.prompt, rows.prompt_is_valid)

  def _run(self, name: str, program: Callable[..., Any], policies: Policies, first: Any, *others: Any) -> Any:
    """Run a program on slots, which it consumes, or on rows; compile it before, if it is the first of their width."""
    width = (first.rows.prompt if isinstance(first, slots.Slots) else first.tokens).shape[1]
    with jax.set_mesh(self.mesh):
      if (name, width) not in self._compiled:
        start = time.monotonic()
        jitted = jax.jit(program, donate_argnums=() if name == "empty" else 1, out_shardings=self._layout(name, width))
        self._compiled[name, width] = jitted.lower(policies, first, *others).compile()
        self.seconds += time.monotonic() - start
      return self._compiled[name, width](policies, first, *others)

  def _layout(self, name: str, width: int) -> Any:
    """Return where a program's results lie: slots as `empty` leaves them, what the host reads everywhere."""
    if name == "empty":
      return None
    own = self._compiled["empty", width].output_shardings
    return own if name == "fill" else (own, *2 * (sharding.replicated(self.mesh),))


class Session:
  """Slots on the devices, and what the host knows of them.

  Args:
    rows: any, as wide as all that will come.

  Attributes:
    tags: of each slot, what the caller knows its row by; None: it is free.
    rows: of each slot, as they stood after the last model call.
  """

  def __init__(self, programs: Programs, policies: Policies, key: jax.Array, rows: Queued):
    self._programs, self._policies, self._key = programs, policies, key
    self.tags: list[Any] = [None] * programs.num_slots
    self.rows: Rollouts | None = None
    self._state = programs.empty(policies, rows.take([0]), key)

  @property
  def num_free(self) -> int:
    """Slots without a row."""
    return self.tags.count(None)

  def fill(self, rows: Queued, tags: Sequence[Any]) -> int:
    """Put the first of these rows into free slots, at most `Programs.num_filled`; return how many."""
    shares, num = self._programs.num_shares, self._programs.num_filled
    size = self._programs.num_slots // shares
    index, source, taken = np.full(num, size, np.int32), np.zeros(num, np.int64), 0
    for share in range(shares):
      free = [slot for slot in range(size) if self.tags[share * size + slot] is None]
      for place, slot in zip(range(share * num // shares, (share + 1) * num // shares), free, strict=False):
        if taken == len(tags):
          break
        index[place], source[place] = slot, taken
        self.tags[share * size + slot] = tags[taken]
        taken += 1
    if taken:
      self._state = self._programs.fill(self._policies, self._state, rows.take(source), index, self._key)
    return taken

  def advance(self, num_done: int, most_calls: int) -> list[tuple[Any, Rollouts]]:
    """Make model calls until so many slots are free or done; take out the rows that are done, with their tags."""
    is_held = np.array([tag is not None for tag in self.tags])
    self._state, *seen = self._programs.advance(self._policies, self._state, is_held, num_done, most_calls)
    self.rows, is_done = jax.device_get(seen)
    done = np.flatnonzero(is_done & is_held).tolist()
    found = [(self.tags[slot], jax.tree.map(lambda array, slot=slot: array[slot], self.rows)) for slot in done]
    for slot in done:
      self.tags[slot] = None
    return found

  def drop(self, tag: Any) -> None:
    """Free the slot of a row that is no longer wanted."""
    self.tags[self.tags.index(tag)] = None


def decode(
  programs: Programs,
  policies: Policies,
  rows: Queued,
  key: jax.Array,
  poll: Callable[[], Any] = lambda: None,
) -> Iterator[tuple[int, Rollouts]]:
  """Decode rows in the order of the queue; yield each as it is done, with its number in the queue.

  Args:
    key: the step's, from which those of the rows are derived.
    poll: called once in about POLLED blocks, or more often; what it raises ends the decoding.
  """
  num, size, num_filled = len(rows.prompt_id), programs.num_slots, programs.num_filled
  session, following = Session(programs, policies, key, rows), 0
  while following < num or session.num_free < size:
    poll()
    while following < num and session.num_free >= num_filled:
      left = range(following, min(following + num_filled, num))
      following += session.fill(rows.take(left), left)
    yield from session.advance(num_filled if following < num else size, POLLED * programs.calls_of_block)


@dataclasses.dataclass(frozen=True)
class Sample:
  """Rollouts of a batch of prompts, [p, g, ...], as `policy.make_sample` gives them, but on the host."""

  programs: Programs
  group_size: int
  poll: Callable[[], Any] = lambda: None

  @property
  def seconds(self) -> float:
    """Spent on compiling so far."""
    return self.programs.seconds

  def __call__(self, policies: Policies, prompts: Prompts, key: jax.Array, first: int = 0) -> Rollouts:
    queue = Queued.of_prompts(prompts, self.group_size, first)
    found = dict(decode(self.programs, policies, queue, key, self.poll))
    return stack([found[number] for number in range(len(found))], self.group_size)


def stack(rows: Sequence[Rollouts], group_size: int) -> Rollouts:
  """Join single rows to groups [p, g, ...]."""
  return jax.tree.map(lambda *arrays: np.stack(arrays).reshape(-1, group_size, *arrays[0].shape), *rows)
