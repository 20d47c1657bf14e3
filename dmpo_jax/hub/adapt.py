"""An autoregressive checkpoint as a diffusion model: it gets a mask token, and its attention becomes full.

The files beside the weights are rewritten into a folder of their own, from which conversion copies them. The weights
stay as they are. If the table has no row for the mask token, it grows while it is converted.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from etils import epath

from dmpo_jax import files
from dmpo_jax.hub import pretrained
from dmpo_jax.hub.families import FAMILIES, family_of
from dmpo_jax.hub.shards import Shards
from dmpo_jax.hub.tokenizer import (
  CONFIG_FILE,
  MASK_TOKEN,
  MODEL_FILE,
  QWEN_FILES,
  SPECIAL_FILE,
  TOKENIZER_FILE,
  HuggingFaceTokenizer,
  has_tokenizer,
)

ADDED_FILE = "added_tokens.json"
GROWN_TO = 128  # a table that grows has a multiple of so many rows, which devices can share
CHUNK_ROWS = 4096  # of a table, read at a time


class Adaptation(NamedTuple):
  """What the user asks for."""

  is_wanted: bool = False  # an autoregressive checkpoint is to become a diffusion model
  mask_token: str = ""  # a new token or one of the tokenizer's; "": the mask token that it declares, or MASK_TOKEN
  shift_logits: bool | None = None  # whether logits predict the next position; None: as config.json says, or else not
  block_length: int | None = None  # of the blocks by which tokens attend; None: as config.json says, or else to all


AS_IT_IS = Adaptation()
FLAGS = "--adapt, --mask_token, --shift_logits and --block_length"  # of launch/convert_hf.py


class Prepared(NamedTuple):
  """A checkpoint as it is converted."""

  sides: epath.Path  # the folder of the files beside the weights
  config: dict[str, Any]  # config.json, with the special ids that it leaves to the tokenizer
  num_rows: int = 0  # to which the table grows; 0: it does not
  notes: tuple[str, ...] = ()  # what was changed, for the user


def prepare(source: epath.Path, stage: epath.Path, asked: Adaptation) -> Prepared:
  """Find or make what a checkpoint needs to be a diffusion model.

  Args:
    stage: an empty folder for rewritten files.

  Raises:
    ValueError: the checkpoint is autoregressive and no adaptation is wanted, or what is asked for does not suit it.
  """
  if not (source / MODEL_FILE).is_file():
    raise ValueError(f"{source / MODEL_FILE} is missing: give a folder in Hugging Face's layout")
  config = files.read_object(source / MODEL_FILE)
  kind, family = config.get("model_type"), FAMILIES[family_of(config)]
  if not family.is_autoregressive:
    if asked != AS_IT_IS:
      raise ValueError(f"{kind} is a model for diffusion: leave out {FLAGS}")
    return _checked(Prepared(source, config))
  has_mask = config.get("mask_token_id") is not None
  is_diffusion = has_mask or str(kind).lower() in family.diffusion_types
  if has_mask and asked.mask_token:
    raise ValueError(f"--mask_token: config.json has mask_token_id={config['mask_token_id']} already; leave it out")
  if is_diffusion and asked.is_wanted:
    raise ValueError(f"--adapt: {source} is a diffusion model already; leave it out")
  pretrained.copy_side_files(source, stage)
  own = {"shift_logits": asked.shift_logits, family.keys["block_length"]: asked.block_length}
  changes: dict[str, Any] = {key: value for key, value in own.items() if value is not None}
  if not has_tokenizer(source):
    if not has_mask:
      raise ValueError(f"{source} has no tokenizer, from which the id of its mask token would come: copy one into it")
    _write(stage / MODEL_FILE, config | changes)
    return Prepared(stage, config | changes)
  notes, num_rows = [], 0
  if not has_mask:
    token = MaskToken.find(stage, asked.mask_token)
    if not (is_diffusion or token.is_declared or asked.is_wanted):
      raise ValueError(
        f"{source} is autoregressive (model_type={kind!r}): --adapt makes a diffusion model of it, with the mask token "
        f"{token.describe()}"
      )
    token.declare(stage)
    changes |= {"mask_token_id": token.id, "used_vocab_size": token.num_ids} if asked.is_wanted else {}
    notes.append(f"mask token: {token.describe()}")
    if token.id >= (rows := config["vocab_size"]):
      changes["vocab_size"] = num_rows = -(-(token.id + 1) // GROWN_TO) * GROWN_TO
      notes.append(f"the table grows from {rows} to {num_rows} rows; a new row is the mean of the others")
    elif token.is_new:
      notes.append(f"the table has a row for it that no token uses ({rows} rows), which stays as it is")
  special, own_notes = _special_ids(stage, config, asked.is_wanted)
  config |= changes | special
  _write(stage / MODEL_FILE, config)
  return _checked(Prepared(stage, config, num_rows, (*notes, *own_notes)))


class MaskToken(NamedTuple):
  """A mask token of a tokenizer, or one to add."""

  text: str
  id: int
  is_new: bool
  is_declared: bool  # as the tokenizer's mask token
  num_ids: int  # of the tokenizer, with it

  @classmethod
  def find(cls, folder: epath.Path, asked: str) -> "MaskToken":
    """Choose the token: `asked`, else the one that the tokenizer in `folder` declares, else MASK_TOKEN.

    Raises:
      ValueError: the tokenizer declares another one than `asked`, or is damaged.
    """
    declared, vocabulary = _declared(folder, "mask"), _vocabulary(folder)
    if asked and declared and asked != declared:
      raise ValueError(f"--mask_token={asked}: the tokenizer's mask token is {declared!r}; leave it out")
    text, num_ids = asked or declared or MASK_TOKEN, max(vocabulary.values()) + 1
    if text in vocabulary:
      return cls(text, vocabulary[text], False, text == declared, num_ids)
    return cls(text, num_ids, True, False, num_ids + 1)

  def describe(self) -> str:
    """Say which it is, for the user."""
    return f"{self.text!r}, " + (f"added as id {self.id}" if self.is_new else f"id {self.id} of its tokenizer")

  def declare(self, folder: epath.Path) -> None:
    """Write the token into the tokenizer's files in `folder`."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False) | {"special": True}
    entry = {"content": self.text, **flags}
    about = _read(folder / CONFIG_FILE)
    if self.is_new:
      about["added_tokens_decoder"] = {**about.get("added_tokens_decoder", {}), str(self.id): entry}
      for name, key in ((TOKENIZER_FILE, "added_tokens"), (ADDED_FILE, None)):
        if (folder / name).is_file():
          known = files.read_object(folder / name)
          more = {key: [*known.get(key, []), {"id": self.id, **entry}]} if key else {self.text: self.id}
          _write(folder / name, {**known, **more})
    _write(folder / CONFIG_FILE, {**about, "mask_token": self.text})
    if (folder / SPECIAL_FILE).is_file():
      _write(folder / SPECIAL_FILE, {**files.read_object(folder / SPECIAL_FILE), "mask_token": self.text})


def _special_ids(folder: epath.Path, config: Mapping[str, Any], is_wanted: bool) -> tuple[dict[str, int], list[str]]:
  """Return the special ids that config.json gets, those of the tokenizer, and what to tell the user.

  They are rewritten where the checkpoint is adapted, or config.json lists several EOS ids without the tokenizer's. A
  list that has it stays.
  """
  vocabulary, changes, notes = _vocabulary(folder), {}, []
  own = {kind: vocabulary.get(_declared(folder, kind) or "") for kind in ("eos", "pad", "bos")}
  for kind, number in own.items():
    given = config.get(f"{kind}_token_id")
    if isinstance(given, list) and number in given:
      notes.append(f"{kind} token: id {number} of the tokenizer; each of config.json's {given} ends a completion")
    elif number is not None and given != number and (is_wanted or isinstance(given, list)):
      changes[f"{kind}_token_id"] = number
      notes.append(f"{kind} token: id {number} of the tokenizer, where config.json has {given}")
  if own["pad"] is None and config.get("pad_token_id") is None and own["eos"] is not None:
    changes["pad_token_id"] = own["eos"]
    notes.append(f"pad token: EOS, id {own['eos']}, as the tokenizer has none")
  return changes, notes


def _checked(prepared: Prepared) -> Prepared:
  """Read the special ids that config.json leaves open from the tokenizer beside it.

  Raises:
    ValueError: the tokenizer is damaged, lacks special tokens, or has other ids than config.json.
  """
  if not has_tokenizer(prepared.sides):
    return prepared
  tokenizer = HuggingFaceTokenizer(prepared.sides, is_chat=False)
  ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("mask", "eos", "pad")}
  return prepared._replace(config={**prepared.config, **ids})


class GrownShards(Shards):
  """A checkpoint whose tables have further rows, each the mean of those on disk.

  Args:
    names: the tables; those that the checkpoint lacks are ignored.
  """

  def __init__(self, folder: epath.PathLike, names: Sequence[str], num_rows: int):
    super().__init__(folder)
    self._means = {name: self._mean(name) for name in names if name in self.tensors}
    self._rows = {name: self.tensors[name].shape[0] for name in self._means}
    for name in self._means:
      tensor = self.tensors[name]
      self.tensors[name] = tensor._replace(shape=(num_rows, *tensor.shape[1:]))

  def _mean(self, name: str) -> np.ndarray:
    rows = self.tensors[name].shape[0]
    parts = (super(GrownShards, self).read_rows(name, i, min(i + CHUNK_ROWS, rows)) for i in range(0, rows, CHUNK_ROWS))
    return np.sum([part.astype(np.float64).sum(0) for part in parts], axis=0) / rows

  def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
    """Read the rows [start, stop) of a tensor, the new ones included."""
    if name not in self._means:
      return super().read_rows(name, start, stop)
    end, mean = self._rows[name], self._means[name].astype(self.tensors[name].dtype)
    kept = [super().read_rows(name, start, min(stop, end))] if start < end else []
    return np.concatenate([*kept, np.tile(mean, (stop - max(start, end), 1))]) if stop > end else kept[0]


def _declared(folder: epath.Path, kind: str) -> str | None:
  """Return the text of a special token that a tokenizer's files declare."""
  value = (_read(folder / SPECIAL_FILE) | _read(folder / CONFIG_FILE)).get(f"{kind}_token")
  return value.get("content") if isinstance(value, Mapping) else value


def _vocabulary(folder: epath.Path) -> dict[str, int]:
  """Return the ids of a tokenizer's tokens, added ones included."""
  if not (folder / TOKENIZER_FILE).is_file():
    added = _read(folder / CONFIG_FILE).get("added_tokens_decoder", {})
    return files.read_object(folder / QWEN_FILES[0]) | {entry["content"]: int(i) for i, entry in added.items()}
  try:
    model = tokenizers.Tokenizer.from_str((folder / TOKENIZER_FILE).read_text())
  except Exception as error:  # the library raises plain Exceptions
    raise ValueError(f"{folder}: {TOKENIZER_FILE} is not a tokenizer ({error})") from error
  return model.get_vocab(with_added_tokens=True)


def _read(path: epath.Path) -> dict[str, Any]:
  return files.read_object(path) if path.is_file() else {}


def _write(path: epath.Path, value: Mapping[str, Any]) -> None:
  path.write_text(files.to_json(value, indent=2, ensure_ascii=False) + "\n")
