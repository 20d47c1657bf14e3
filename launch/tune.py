"""Search the settings of a configuration that are fastest on a slice, of those that fit it by the TPU compiler.

Searched are train.microbatch_prompts, model.remat, model.layer_rows and the mesh of the updates, then the samplers'
mesh and rollout.chunk_prompts. A candidate's operations, and the least that it must send, bound its seconds from below;
candidates are compiled in the order of their bounds, until none that is left can be faster than the best so far. What
needs at least as much memory as a candidate that did not fit is left out.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from jaxtyping import PyTree
from ml_collections import ConfigDict

from dmpo_jax.models.config import REMAT_POLICIES, ModelConfig
from dmpo_jax.policy import abstract_collection, abstract_trained
from dmpo_jax.run import progress
from launch import tpu
from launch.bench import costs, programs
from launch.bench.workload import changed

SECONDS = 8.0  # that a chunk or a microbatch may take: between two of them hosts look for a notice of preemption
LAYER_ROWS = (0, 4, 1)
MOST_TENSOR = 8  # devices that share a layer
LEAST_GAIN = 0.005  # share of a buffer's time that another candidate must be able to save
ITEMSIZE = {"float32": 4, "bfloat16": 2}
UPDATE_MESH = ("sharding.data", "sharding.fsdp", "sharding.tensor")
ROLLOUT_MESH = ("sharding.rollout.data", "sharding.rollout.fsdp", "sharding.rollout.tensor")

Keys = dict[str, Any]
# What the compiler says of settings: GiB of a device, and seconds of a buffer; None: they do not fit.
Measure = Callable[[Keys], tuple[float, float | None]]


class Candidate(NamedTuple):
  """Some settings, and what is known of them before they are compiled.

  Args:
    bound: seconds of a buffer that they take at least.
    guess: GiB of a device that they may need.
    kind, weight: of two candidates of one kind the one whose weights are all at least as large needs as much memory.
    rank: of candidates with the same bound, the one that is tried first has the least.
  """

  keys: Keys
  bound: float
  guess: float
  kind: tuple[int, ...]
  weight: tuple[float, ...]
  rank: tuple[float, ...] = ()

  def needs_at_least(self, other: "Candidate") -> bool:
    """Whether it surely needs as much memory as another candidate."""
    return self.kind == other.kind and all(a >= b for a, b in zip(self.weight, other.weight, strict=True))


class Found(NamedTuple):
  """The result of a search."""

  keys: Keys | None  # None: nothing fits
  seconds: float  # of a buffer
  num_compiled: int


def search(candidates: Sequence[Candidate], room: float, measure: Measure) -> Found:
  """Find the fastest candidate that fits.

  Of candidates with one bound, those that seem to fit come first, by rank; then the others, the smallest first. What
  was measured corrects the guesses.

  Args:
    room: GiB of a device.
  """
  best, least, num_compiled, scale = None, math.inf, 0, 1.0
  left, refused = list(candidates), []
  with progress.Progress("tuning", len(left), unit="candidates") as shown:
    while left:

      def order(candidate: Candidate, scale: float = scale) -> tuple[float, bool, tuple[float, ...]]:
        fits = scale * candidate.guess <= room
        return round(candidate.bound, 2), not fits, candidate.rank if fits else (candidate.guess,)

      candidate = min(left, key=order)
      if candidate.bound >= (1 - LEAST_GAIN) * least:
        break
      shown.part(describe(candidate.keys))
      peak, seconds = measure(candidate.keys)
      num_compiled, scale = num_compiled + 1, max(scale, peak / candidate.guess)
      if seconds is None:
        refused.append(candidate)
      elif seconds < least:
        best, least = candidate.keys, seconds
      num_before = len(left)
      left = [each for each in left if each is not candidate and not any(map(each.needs_at_least, refused))]
      shown.advance(num_before - len(left))
  return Found(best, least, num_compiled)


class _Sizes(NamedTuple):
  """What the bounds and guesses are made of, in bytes and operations."""

  model: ModelConfig
  layers: float  # bytes of the layers' parameters
  params: float  # of all frozen or computing parameters
  state: float  # of what is trained, its moments and its gradient
  length: int  # tokens of a row
  chips: int
  rate: float  # operations a second of a chip
  links: float  # bytes a second

  @classmethod
  def of(cls, config: ConfigDict, where: tpu.Slice) -> "_Sizes":
    model, (mesh, _) = programs.place(config, where.devices[:1])
    params = abstract_collection(model, mesh, "params")
    layers = {name: params[name] for name in (run.name for run in model.config.runs)}
    length = config.task.max_prompt_length + config.sampler.completion_length
    return cls(
      model.config,
      _bytes(layers),
      _bytes(params),
      4 * _bytes(abstract_trained(model, mesh)),
      length,
      len(where.devices),
      where.chip.peak * tpu.MXU_SHARE,
      where.chip.links * tpu.LINK_SHARE,
    )

  @property
  def itemsize(self) -> int:
    return ITEMSIZE[self.model.dtype]

  @property
  def width(self) -> int:
    """Numbers of a token between the products of the feed-forward, of its experts together."""
    own = self.model
    is_dense = own.router == "none"
    return own.mlp_hidden_size if is_dense else own.experts_per_token * own.expert_size + own.shared_expert_size

  def kept(self, remat: str) -> int:
    """Count the numbers that a layer keeps of a token for the gradient, beside its input."""
    own = self.model
    mixed = own.num_heads * own.head_dim
    attention = mixed + 2 * own.num_kv_heads * own.head_dim + own.d_model
    wide = 2 * self.width + (own.router != "none") * own.experts_per_token * own.d_model
    adapters = own.lora.rank * len(own.lora.targets) if own.lora is not None else 0
    named = {"full": 0, "attention": attention + mixed, "dots": attention + wide}
    return named.get(remat, attention + mixed + wide + adapters)

  def exchanged(self, tokens: float, tensor: int) -> float:
    """Estimate the bytes that a device gathers and scatters of the layers' activations, forward."""
    return 4 * tokens * self.model.d_model * self.itemsize * self.model.num_layers * (tensor - 1) / tensor

  def seconds(self, flops: float, sent: float) -> float:
    """Return the seconds of so many operations of all devices, with so many bytes sent by each beside them."""
    return max(flops / (self.rate * self.chips), sent / self.links)


def of_updates(config: ConfigDict, where: tpu.Slice) -> list[Candidate]:
  """Return the candidates for the gradient step."""
  own, num = _Sizes.of(config, where), config.rollout.num_prompts
  rows = config.rollout.group_size * config.objective.num_mask_samples  # of a prompt
  flops = {remat: _flops_of_prompt("accumulate", config, where, {"model.remat": remat}) for remat in REMAT_POLICIES}
  found = []
  for (data, fsdp, tensor), size in _meshes_and_parts(config, where, UPDATE_MESH):
    of_device = math.ceil(size * rows / (data * fsdp))  # rows
    waste = of_device * data * fsdp / (size * rows)
    tokens = of_device * own.length
    sent = 2 * own.layers / tensor * (fsdp > 1) + 2 * own.exchanged(tokens, tensor)
    held = (own.params + own.state) / (fsdp * tensor) + 2 * own.layers / own.model.num_layers / tensor
    for remat, each in flops.items():
      seconds = own.seconds(size * each * waste, sent)
      if seconds > SECONDS and size > 1:
        continue
      for layer_rows in (each for each in LAYER_ROWS if each < of_device):
        kept = (own.kept(remat) + own.model.d_model) / tensor * own.model.num_layers * tokens
        working = (layer_rows or of_device) * own.length * 6 * (own.model.d_model + own.width / tensor)
        guess = (held + (kept + working) * own.itemsize) / tpu.GIB
        keys = {"train.microbatch_prompts": size, "model.remat": remat, "model.layer_rows": layer_rows}
        keys |= zip(UPDATE_MESH, (data, fsdp, tensor), strict=True)
        bound = config.train.updates_per_buffer * num // size * seconds
        weight = (of_device, own.kept(remat), layer_rows or of_device)
        # Larger parts have less overhead, and so have products that are not split.
        rank = (-size, tensor, -weight[-1], -fsdp)
        found.append(Candidate(keys, bound, guess, (data, fsdp, tensor), weight, rank))
  return found


def of_rollouts(config: ConfigDict, where: tpu.Slice) -> list[Candidate]:
  """Return the candidates for the samplers: their mesh, and the prompts of a chunk."""
  own, num = _Sizes.of(config, where), config.rollout.num_prompts
  each = _flops_of_prompt("sample", config, where, {})
  found = []
  for (data, fsdp, tensor), size in _meshes_and_parts(config, where, ROLLOUT_MESH):
    rows = size * config.rollout.group_size
    while size == 1 and rows % 2 == 0 and own.seconds(each * rows / config.rollout.group_size, 0) > SECONDS:
      rows //= 2  # of a prompt whose rollouts take too long some at a time
    of_device = math.ceil(rows / (data * fsdp))
    exchanged = own.exchanged(of_device * config.sampler.block_length, tensor)
    sent = config.sampler.steps * (own.layers / tensor * (fsdp > 1) + exchanged)
    seconds = own.seconds(each * of_device * data * fsdp / config.rollout.group_size, sent)
    if seconds > SECONDS and size > 1:
      continue
    cache = 2 * own.model.num_layers * own.model.num_kv_heads * own.model.head_dim / tensor * of_device * own.length
    guess = (own.params / (fsdp * tensor) + 2 * cache * own.itemsize) / tpu.GIB
    is_whole = rows == size * config.rollout.group_size
    keys = {"rollout.chunk_prompts": size, "rollout.chunk_rollouts": 0 if is_whole else rows}
    keys |= zip(ROLLOUT_MESH, (data, fsdp, tensor), strict=True)
    kind, rank = (data, fsdp, tensor), (-size, tensor, fsdp)
    times = num * config.rollout.group_size // rows
    found.append(Candidate(keys, times * seconds, guess, kind, (of_device,), rank))
  return found


def _meshes_and_parts(
  config: ConfigDict, where: tpu.Slice, paths: Sequence[str]
) -> Iterator[tuple[tuple[int, int, int], int]]:
  """Yield the sizes (data, fsdp, tensor) that devices and model allow, each with every divisor of a buffer's prompts.

  Args:
    paths: the three keys of the mesh.
  """
  chips, num = len(where.devices), config.rollout.num_prompts
  powers = [2**n for n in range(chips.bit_length()) if chips % 2**n == 0]
  for tensor in (each for each in powers if each <= MOST_TENSOR):
    for fsdp in (each for each in powers if chips % (each * tensor) == 0):
      sizes = chips // (fsdp * tensor), fsdp, tensor
      try:
        programs.place(changed(config, dict(zip(paths, sizes, strict=True))), where.devices)
      except ValueError:  # the mesh does not divide the model, or spans slices
        continue
      yield from ((sizes, part) for part in range(1, num + 1) if num % part == 0)


def _flops_of_prompt(name: str, config: ConfigDict, where: tpu.Slice, keys: Mapping[str, Any]) -> float:
  """Count the operations of a program for one prompt and all its rollouts."""
  parts = {"train.microbatch_prompts": 1, "rollout.chunk_prompts": 1, "rollout.chunk_rollouts": 0}
  own = changed(config, {**keys, **parts})
  traced = programs.trace(name, own, *programs.place(own, where.devices[:1]))
  return costs.count_flops(traced.jaxpr, programs.loop_calls(own))


def _bytes(tree: PyTree) -> float:
  return float(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


def tune(config: ConfigDict, where: tpu.Slice, kept: epath.Path | None, say: Callable[[str], None]) -> Keys:
  """Find the settings of the updates, and with them those of the samplers.

  Args:
    kept: see `tpu.cost_of`: a search that was stopped goes on where it was.
    say: gets a line about every program that was compiled.

  Raises:
    ValueError: nothing fits the slice.
  """

  def measuring(*names: str) -> Measure:
    def measure(keys: Keys) -> tuple[float, float | None]:
      own, peak, seconds, held = changed(config, keys), 0.0, 0.0, 0.0
      for name in (name for name in names if programs.is_needed(name, own)):
        cost, times = tpu.cost_of(name, own, where, kept), programs.calls_of(name, own)
        peak = max(peak, held + cost.peak)
        fits = where.fits(cost) and peak <= where.room
        say(f"{describe(keys)}: {name} {cost.peak:.2f} GiB, {f'{times} x {cost.seconds:.2f} s' if fits else 'no'}")
        if not fits:
          return peak, None
        seconds += times * cost.seconds
        held = cost.arguments if name == "move" else 0.0  # what was copied stays where it was, too
      return peak, seconds

    return measure

  keys: Keys = {}
  for what, find, names in (
    ("the gradient step", of_updates, ("accumulate",)),
    ("the samplers", of_rollouts, ("move", "sample")),
  ):
    if not any(programs.is_needed(name, config) for name in names):
      continue
    found = search(find(config, where), where.room, measuring(*names))
    if found.keys is None:
      raise ValueError(f"--topology={where.topology}: {what} fits with no settings; take a larger slice")
    say(f"{what}: {describe(found.keys)}, {found.seconds:.1f} s a buffer, after compiling {found.num_compiled}")
    keys |= found.keys
    config = changed(config, found.keys)
  return keys


def describe(keys: Mapping[str, Any]) -> str:
  """Name settings in one line."""
  return " ".join(f"{path.removeprefix('sharding.')}={value}" for path, value in keys.items())


def as_file(given: str, keys: Mapping[str, Any], about: str) -> str:
  """Write a configuration file that changes keys of another one.

  Args:
    given: the other one as --config names it, such as configs/llada_8b.py:256.
    about: what the file's first line says of it.

  Raises:
    ValueError: it is not in configs/.
  """
  path, _, settings = given.partition(":")
  folder, _, file = path.rpartition("/")
  if folder != "configs" or not file.endswith(".py"):
    raise ValueError(f"--config={given}: only what changes a file of configs/ can be written, named configs/NAME.py")
  name = file.removesuffix(".py")
  changes = "\n".join(f"    c.{path} = {value!r}" for path, value in keys.items())
  arguments = f'"{settings}"' if settings else ""
  return (
    f'"""{about}"""\n\nfrom configs import {name}\n\n\n'
    f"def get_config():\n  c = {name}.get_config({arguments})\n  with c.unlocked():\n{changes}\n  return c\n"
  )
