"""Write a model in Hugging Face's layout: a policy with its adapters merged, adapters for PEFT, a converted model.

Arrays are read one at a time and written shard by shard.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from etils import epath

from dmpo_jax import files
from dmpo_jax.hub import layout, pretrained
from dmpo_jax.hub.families import FAMILIES, Family
from dmpo_jax.hub.fused import put_together
from dmpo_jax.hub.layout import Path
from dmpo_jax.hub.model_config import model_config_to_hf
from dmpo_jax.hub.peft import lora_config_to_peft
from dmpo_jax.hub.shards import ADAPTER, write_file, write_shards
from dmpo_jax.hub.tokenizer import CONFIG_FILE, FILES, TOKENIZER_FILE
from dmpo_jax.models.config import ModelConfig
from dmpo_jax.models.layers import KERNEL_SCALE, SCALE

SENTENCEPIECE = "tokenizer.model"  # a sentencepiece tokenizer beside exported weights


@runtime_checkable
class Params(Protocol):
  """Saved parameters, of which one array is read at a time (`run.params.SavedParams`)."""

  def check(self) -> None:
    """Raise a ValueError if files are missing or damaged."""
    ...

  def dtypes(self) -> Mapping[Path, np.dtype]:
    """Return the dtype of every array, by its keys."""
    ...

  def load(self, keys: Path) -> np.ndarray:
    """Read one array."""
    ...


class Source(NamedTuple):
  """What to export."""

  config: ModelConfig
  family: str
  base: Params | None  # the parameters under the adapters, or before training; None: not stored
  policy: Params | None  # adapters if `config.lora` is set, else all parameters; None: the base itself
  side_files: epath.Path | None = None  # the folder of the files to copy
  origin: str = ""  # name of the base, for PEFT
  tokenizer: epath.Path | None = None  # a run's tokenizer, if it is not the checkpoint's


class Rounding:
  """How much of an update is lost as the exported weights are rounded."""

  def __init__(self) -> None:
    self._squares: dict[str, tuple[float, float]] = {}  # of the loss and of the update, by tensor

  def add(self, name: str, base: np.ndarray, exact: np.ndarray, written: np.ndarray) -> None:
    """Compare a tensor's update in float32 with the update that is left in the written dtype."""
    update = exact - base
    lost = written.astype(np.float32) - base.astype(written.dtype).astype(np.float32) - update
    self._squares[name] = (float(np.square(lost).sum()), float(np.square(update).sum()))

  def error(self) -> tuple[float, str, float] | None:
    """Return the relative norm of the loss, and the tensor with the largest one and its value; None: no update."""
    changed = {name: pair for name, pair in self._squares.items() if pair[1] > 0}
    if not changed:
      return None
    errors = {name: math.sqrt(lost / update) for name, (lost, update) in changed.items()}
    worst = max(errors, key=errors.__getitem__)
    lost, update = (sum(pair[i] for pair in changed.values()) for i in (0, 1))
    return math.sqrt(lost / update), worst, errors[worst]


class ModelExport:
  """Weights in the layout of their family, merged with the adapters if there are any.

  Args:
    dtype: of the weights; "same": as stored, and int8 kernels as the embedding is.

  Raises:
    ValueError: saved parameters are damaged.
  """

  def __init__(self, source: Source, dtype: str):
    weights = source.base if source.config.lora else source.policy or source.base
    assert weights is not None
    for saved in filter(None, dict.fromkeys((weights, source.policy))):
      saved.check()
    self._source, self._weights = source, weights
    self._places = layout.checkpoint_places(source.config, source.family)
    self._names = layout.leaves_of(self._places)
    self._dtypes = _written_dtypes(weights, dtype)
    self.rounding = Rounding()  # complete once the weights are written

  @property
  def num_parameters(self) -> int:
    """The number of parameters."""
    return sum(math.prod(place.shape) for place in self._places.values())

  @property
  def num_bytes(self) -> int:
    """The number of bytes that `write` writes."""
    return sum(self._sizes().values())

  def _sizes(self) -> dict[str, int]:
    """Return the bytes of every tensor, in the order in which they are written: by their last parts."""
    sizes: dict[str, int] = {}
    for name in (name for names in self._names.values() for name in names):
      place, tensor = self._places[name], layout.whole(name)
      sizes[tensor] = sizes.pop(tensor, 0) + math.prod(place.shape) * self._dtypes[place.path].itemsize
    return sizes

  def write(self, out: epath.Path, shard_bytes: int, report: Callable[[int], None] = lambda size: None) -> None:
    """Write the weights and the files beside them.

    Args:
      report: called with the number of bytes written since the last call.

    Raises:
      ValueError: `out` exists, or weights are not finite.
    """
    with files.new_folder(out, "--out"):
      _write_side_files(self._source, out, jnp.result_type(*self._dtypes.values()).name)
      tensors = _checked(layout.to_tensors(self._read, self._places), report)
      write_shards(out, self._sizes(), tensors, shard_bytes)

  def _read(self, path: Path) -> np.ndarray:
    """Read a leaf; int8 times its scale, plus its adapters: W + (alpha / rank) A B, in float32, rounded once."""
    stored, lora, dtype = self._weights.load(path), self._source.config.lora, self._dtypes[path]
    adapted = lora if lora is not None and path[-1] == "kernel" and path[1] in lora.targets else None
    if stored.dtype != np.int8 and adapted is None:
      written = stored.astype(dtype, copy=False)
      if lora is None and self._source.policy and self._source.base and dtype != stored.dtype:
        self._compare(path, self._source.base.load(path), stored, written)
      return written
    written = np.empty(stored.shape, dtype)
    scale = self._weights.load((*path[:-1], f"{path[-1]}{SCALE}")) if stored.dtype == np.int8 else None
    adapters = [] if adapted is None else [self._adapter((*path[:-1], part)) for part in "AB"]
    for layer, kernel in enumerate(stored):
      kernel = kernel.astype(np.float32)
      if scale is not None:
        kernel *= scale[layer][..., None, :]
      merged = kernel
      if adapted is not None:
        a, b = adapters
        merged = kernel + adapted.scale * (a[layer] @ b[layer])
      written[layer] = merged
      if adapted is not None and dtype != np.float32:
        self.rounding.add(self._names[path][layer], kernel, merged, written[layer])
    return written

  def _adapter(self, path: Path) -> np.ndarray:
    assert self._source.policy is not None  # where adapters come from
    return self._source.policy.load(path).astype(np.float32)

  def _compare(self, path: Path, base: np.ndarray, policy: np.ndarray, written: np.ndarray) -> None:
    """Add the tensors of a leaf that was itself trained to the rounding error."""
    names = self._names[path]
    shape = (len(names), *self._places[names[0]].shape)
    each = zip(*(array.reshape(shape) for array in (base, policy, written)), strict=True)
    for name, (before, after, rounded) in zip(names, each, strict=True):
      self.rounding.add(name, before.astype(np.float32), after.astype(np.float32), rounded)


def export_adapter(source: Source, out: epath.Path, base_name: str = "") -> int:
  """Write the adapters as PEFT reads them; return their number of parameters.

  Args:
    base_name: what the adapter names as its base; "": `source.origin`.

  Raises:
    ValueError: the run has no adapters, they are damaged, or `out` exists.
  """
  lora = source.config.lora
  if lora is None or source.policy is None:
    raise ValueError("--adapter: all parameters were trained (model.lora.rank = 0); leave it out to write the weights")
  source.policy.check()
  arrays = dict(layout.to_arrays(source.policy.load, layout.adapter_places(source.config, source.family)))
  tensors, said = put_together(arrays, source.config, source.family)
  with files.new_folder(out, "--out"):
    write_file(out / ADAPTER, tensors)
    _write_json(
      out / "adapter_config.json", lora_config_to_peft(lora, source.family, base_name or source.origin) | said
    )
  return sum(array.size for array in tensors.values())


def _checked(
  tensors: Iterable[tuple[str, np.ndarray]], report: Callable[[int], None]
) -> Iterator[tuple[str, np.ndarray]]:
  for name, array in tensors:
    if not np.isfinite(array).all():
      raise ValueError(f"tensor {name} has values that are not finite: the run has diverged; export another policy")
    report(array.nbytes)
    yield name, array


def _written_dtypes(weights: Params, dtype: str) -> dict[Path, np.dtype]:
  """Return the dtype in which each leaf is written; with "same", int8 becomes the embedding's dtype."""
  saved = weights.dtypes()
  own = {path: saved[("embedding",)] if saved_as == np.int8 else saved_as for path, saved_as in saved.items()}
  kept = {path: stored for path, stored in own.items() if not path[-1].endswith(KERNEL_SCALE)}
  return {
    path: np.dtype(stored) if dtype == "same" else layout.cast(path, stored, dtype) for path, stored in kept.items()
  }


def _write_side_files(source: Source, out: epath.Path, dtype: str) -> None:
  """Copy the side files and write config.json, the original's if there is one; `dtype` can hold every weight."""
  config: dict[str, Any] = model_config_to_hf(source.config, source.family)
  if source.side_files is not None:
    pretrained.copy_side_files(source.side_files, out)
    config = files.read_object(out / "config.json")
    family = FAMILIES[source.family]
    key, blocks = family.keys.get("block_length"), source.config.block_length
    if key and blocks != (
      config.get(key) or family.defaults.get("block_length", 0)
    ):  # a run may have trained other blocks, or none
      config[key] = blocks or None
  if source.tokenizer is not None:
    _copy_tokenizer(source.tokenizer, out)
  config["torch_dtype"] = dtype
  if "dtype" in config:  # the key's name in later releases of transformers
    config["dtype"] = dtype
  _write_json(out / "config.json", config)


def _copy_tokenizer(tokenizer: epath.Path, out: epath.Path) -> None:
  """Copy a run's tokenizer: a folder's files, or a sentencepiece model."""
  if tokenizer.is_dir():
    copies = {tokenizer / name: out / name for name in FILES if (tokenizer / name).exists()}
  else:
    copies = {tokenizer: out / SENTENCEPIECE}
  for path, copy in copies.items():
    copy.write_bytes(path.read_bytes())


def _write_json(path: epath.Path, value: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n")


def how_to_load(source: Source, out: epath.Path) -> str:
  """Return Python lines that load an exported model with `transformers`; comments say what else that needs."""
  family, config, is_in_bucket = FAMILIES[source.family], files.read_object(out / "config.json"), "://" in str(out)
  folder = "DIR" if is_in_bucket else out
  has_head = family.code.get("AutoModel") == family.code.get("AutoModelForCausalLM", family.code.get("AutoModel"))
  auto, remote = ("AutoModel" if family.code and has_head else "AutoModelForCausalLM"), ""
  remote = ", trust_remote_code=True" if family.code else ""
  is_dllms = config["model_type"] in family.diffusion_types
  if is_dllms:
    auto = "AutoModelForMaskedLM"
  lines = [
    ("import dllm; " if is_dllms else "") + f"from transformers import {auto}, AutoTokenizer",
    f'tokenizer = AutoTokenizer.from_pretrained("{folder}"{remote})',
    f'model = {auto}.from_pretrained("{folder}"{remote})',
  ]
  if (out / SENTENCEPIECE).exists() and not (out / TOKENIZER_FILE).exists():  # transformers has no class for it
    lines[:2] = [
      f"import sentencepiece; from transformers import {auto}",
      f'tokenizer = sentencepiece.SentencePieceProcessor(model_file="{folder}/{SENTENCEPIECE}")',
    ]
  if family.code:
    lines = _code_remarks(source, config, out, folder) + lines
  elif is_dllms:
    lines.insert(0, f"# {config['model_type']} is a model of dllm: pip install git+https://github.com/ZHZisZZ/dllm")
  else:
    lines.insert(
      0, "# Its attention is causal there; attention_mask=torch.zeros(1, 1, l, l) makes it full for l tokens"
    )
  if is_in_bucket:  # transformers cannot load from there
    lines.insert(0, f"# gcloud storage cp -r {out} {folder}")
  return "\n".join(f"  {line}" for line in lines)


def _code_remarks(source: Source, config: Mapping[str, Any], out: epath.Path, folder: object) -> list[str]:
  """Say what an export needs to be loaded by the code that was published with its family."""
  family, remarks = FAMILIES[source.family], []
  if "auto_map" not in config:  # the original has none, and its config.json is exported as it was
    remarks.append(f'# Add to its config.json: "auto_map": {json.dumps(dict(family.code))}')
  if missing := sorted(name for name in _code_files(family, config, out) if not (out / name).exists()):
    remarks.append(f"# Copy {', '.join(missing)} from {family.published_at} on the hub to {folder} first")
  if source.config.head_dim * source.config.num_heads != source.config.d_model:
    remarks.append("# It cannot load this model: it has no head_dim, only hidden size / heads")
  remarks.append(f"# The published code of {family.architecture} needs transformers 4: pip install 'transformers<5'")
  return remarks


def _code_files(family: Family, config: Mapping[str, Any], out: epath.Path) -> set[str]:
  """Name the files that the classes of a config.json and of a tokenizer_config.json need beside them."""
  tokenizer = files.read_object(out / CONFIG_FILE) if (out / CONFIG_FILE).exists() else {}
  classes = list(config.get("auto_map", family.code).values())
  for entry in tokenizer.get("auto_map", {}).values():  # a class, or a slow and a fast one of which either may be null
    classes += [entry] if isinstance(entry, str) else filter(None, entry)
  own = [name for name in classes if "--" not in name]  # REPOSITORY--MODULE.CLASS, which transformers fetches
  return {name.partition(".")[0] + ".py" for name in own} | (set(family.code_needs) if own else set())
