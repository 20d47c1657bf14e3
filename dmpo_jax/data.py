"""Records to token arrays: a task's records are written once, read whole, and then taken by position.

`TaskData` keeps generated records as ArrayRecord files (a TFDS builder, nothing is downloaded), `PromptStream` turns
them into padded prompts and, for the warm start, demonstrations. Neither takes TensorFlow. The position in the stream
is its only state: what stands there is a function of (records, seed, position).
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import absl.logging
import grain
import jax
import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Int

from dmpo_jax.structs import Prompts
from dmpo_jax.tasks.base import Record, Split, Task
from dmpo_jax.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_MAX_LISTED = 20  # overlong prompts that the error describes; all are counted


@dataclasses.dataclass
class TaskRecordsConfig(tfds.core.BuilderConfig):
  """Everything that the written records depend on."""

  task: Task | None = None
  num_train: int = 0
  num_test: int = 0
  seed: int = 0


class TaskRecords(tfds.core.GeneratorBasedBuilder):
  """Writes what a task generates, one JSON text a record, in the order in which it comes."""

  url_infos = None  # nothing is downloaded; looking for these, TFDS 4.9 imports a package that it does not install

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict({"record": tfds.features.Text()})
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, dict]]]:
    config = self.builder_config
    return {
      "train": self._generate_examples("train", config.num_train),
      "test": self._generate_examples("test", config.num_test),
    }

  def _generate_examples(self, split: Split, num: int) -> Iterator[tuple[int, dict]]:
    config = self.builder_config
    for index, record in enumerate(config.task.generate(split, num, config.seed)):
      yield index, {"record": json.dumps(record, ensure_ascii=False)}


class TaskData:
  """The records of a task: generated on first use and kept in `data_dir`, or read from a published test file.

  The folder's name has the task's version and a hash of all that the records depend on, so records of other options
  are never taken for these. It is renamed into place when it is whole; an incomplete one is made anew.
  """

  def __init__(
    self,
    task: Task,
    name: str,
    *,
    data_dir: epath.PathLike,
    num_train: int,
    num_test: int,
    eval_path: epath.PathLike = "",
    seed: int = 0,
  ):
    """Describe the data; nothing is read or written yet.

    Args:
      task: its generator. name: its name in `tasks.TASKS`.
      data_dir: where generated records are kept, for all runs.
      num_train, num_test: generated records of each split.
      eval_path: a published test file that stands in for the generated test split; "" for none.
      seed: of the generator, not of the run: all runs learn from, and are measured on, the same records.
    """
    self._task = task
    self._eval_path = eval_path
    self._data_dir = epath.Path(data_dir)
    depends_on = dict(task=name, num_train=num_train, num_test=num_test, seed=seed, options=dataclasses.asdict(task))
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:12]
    self._config = TaskRecordsConfig(
      name=f"{name}_{digest}", version=task.version, task=task, num_train=num_train, num_test=num_test, seed=seed
    )

  @property
  def path(self) -> epath.Path:
    """The folder of the generated records."""
    return self._data_dir / TaskRecords.name / self._config.name / self._task.version

  def train(self) -> list[Record]:
    """Return the training records."""
    return self._read("train")

  def test(self) -> list[Record]:
    """Return the records to evaluate on: the published file's, or those of the generated test split."""
    if self._eval_path:
      return self._task.read_published(self._eval_path)
    return self._read("test")

  def _read(self, split: Split) -> list[Record]:
    """Read a split whole, after generating the records if they are not there.

    Process 0 goes first. The others then find its records or, where `data_dir` is a disk of their own, write the same.

    Raises:
      ValueError: `data_dir` is no folder of a file system: ArrayRecord cannot write to object stores.
    """
    if "://" in str(self._data_dir):
      raise ValueError(
        f"task.data_dir={str(self._data_dir)!r}: generated records need a local or mounted folder (every host may have "
        "its own); set task.data_dir to one, it is beside the workdir by default"
      )
    if jax.process_index() == 0:
      self._generate()
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f"records at {self.path}")
      self._generate()
    with _quiet_tfds():
      source = TaskRecords(data_dir=self._data_dir, config=self._config).as_data_source(split)
    return [json.loads(row["record"]) for row in source.__getitems__(list(range(len(source))))]

  def _generate(self) -> None:
    if _is_complete(self.path):
      return
    if self.path.exists():
      logger.warning("%s is incomplete and is made anew", self.path)
      self.path.rmtree()
    logger.info(
      "generating %d training and %d test records in %s", self._config.num_train, self._config.num_test, self.path
    )
    try:
      with _quiet_tfds(), tempfile.TemporaryDirectory() as downloads:
        builder = TaskRecords(data_dir=self._data_dir, config=self._config)
        builder.download_and_prepare(download_dir=downloads, file_format="array_record")
    except OSError:
      if not _is_complete(self.path):  # if it is, another run has just put the same records there
        raise


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
  """Keep TFDS from speaking of downloads on stdout, and from warning that the builder's options are not predefined."""
  verbosity = absl.logging.get_verbosity()
  absl.logging.set_verbosity(absl.logging.ERROR)
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    absl.logging.set_verbosity(verbosity)


def _is_complete(path: epath.Path) -> bool:
  """Whether a folder has the description that TFDS writes last and all files that it speaks of."""
  try:
    info = json.loads((path / "dataset_info.json").read_text())
  except (OSError, json.JSONDecodeError):
    return False
  return all(
    len(list(path.glob(f"{info['name']}-{split['name']}.{info['fileFormat']}-*"))) == len(split["shardLengths"])
    for split in info["splits"]
  )


class _Item(NamedTuple):
  """What stands at one position of a stream."""

  record: Record
  tokens: list[int]
  prompt_id: int


class PromptStream:
  """An endless stream of prompts with random access by position; every epoch is another permutation of them."""

  num_skipped: int  # prompts of an epoch that were left out because they are too long

  def __init__(
    self,
    records: Sequence[Record],
    task: Task,
    tokenizer: Tokenizer,
    *,
    seed: int | None,
    max_prompt_length: int,
    overlong: Literal["error", "skip"] = "error",
  ):
    """Tokenise every prompt once to find those that are too long.

    Args:
      seed: of the order and of the demonstrations; None: the records' own order in every epoch.
      max_prompt_length: tokens; the length that every prompt is padded to.
      overlong: what to do with prompts that are longer: refuse them all, or leave them out and count them.

    Raises:
      ValueError: some prompts are too long and `overlong` is "error", or no prompt is left.
    """
    self._records, self._task, self._tokenizer = records, task, tokenizer
    self._seed = seed or 0
    self._prompt_length = max_prompt_length
    lengths = [len(tokenizer.encode_prompt(task.prompt(record), task.prefill)) for record in records]
    kept = [index for index, length in enumerate(lengths) if length <= max_prompt_length]
    self.num_skipped = len(lengths) - len(kept)
    if self.num_skipped and (overlong == "error" or not kept):
      raise ValueError(_describe_overlong(lengths, max_prompt_length))
    if not kept:
      raise ValueError("task: there are no records, raise task.num_train and task.num_test")
    self._kept = kept
    order = grain.MapDataset.range(len(kept))
    self._order = (order if seed is None else order.shuffle(seed=_shuffle_seed(seed))).repeat()

  def __len__(self) -> int:
    """Return the number of prompts in an epoch."""
    return len(self._kept)

  def batch(self, position: int, n: int) -> tuple[Prompts, list[Record]]:
    """Return the `n` prompts from `position` on, padded on the left (arrays on the host), and their records."""
    return self._collate(self._take(position, n))

  def demonstrations(
    self, position: int, n: int, completion_length: int
  ) -> tuple[Prompts, Int[np.ndarray, "n c"], list[Record]]:
    """Return prompts as `batch` does, and a demonstration for each, filled with EOS to `completion_length` (int32).

    A demonstration is drawn by (seed, position), so a prompt has another one in every epoch.

    Raises:
      ValueError: a demonstration is longer than `completion_length`.
    """
    items = self._take(position, n)
    completion = np.full((n, completion_length), self._tokenizer.eos_token_id, np.int32)
    for row, item in enumerate(items):
      rng = np.random.Generator(np.random.Philox(key=(self._seed, position + row)))
      text = self._task.demonstration(item.record, rng)
      tokens = self._tokenizer.encode(text)
      if len(tokens) > completion_length:
        raise ValueError(
          f"sampler.completion_length={completion_length}: the demonstration {text!r} has {len(tokens)} tokens"
        )
      completion[row, : len(tokens)] = tokens
    prompts, records = self._collate(items)
    return prompts, completion, records

  def _take(self, position: int, n: int) -> list[_Item]:
    items = []
    for place in range(position, position + n):
      record = self._records[self._kept[self._order[place]]]
      text, prefill = self._task.prompt(record), self._task.prefill
      items.append(_Item(record, self._tokenizer.encode_prompt(text, prefill), prompt_id(text + prefill)))
    return items

  def _collate(self, items: Sequence[_Item]) -> tuple[Prompts, list[Record]]:
    shape = (len(items), self._prompt_length)
    tokens, is_valid = np.full(shape, self._tokenizer.pad_token_id, np.int32), np.zeros(shape, bool)
    for row, item in enumerate(items):
      start = self._prompt_length - len(item.tokens)
      tokens[row, start:] = item.tokens
      is_valid[row, start:] = True
    ids = np.array([item.prompt_id for item in items], np.uint32)
    return Prompts(tokens=tokens, is_valid=is_valid, prompt_id=ids), [item.record for item in items]


def prompt_id(text: str) -> int:
  """Return a prompt's identity, a 32-bit hash of its text: the same in every epoch, run and file."""
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def _shuffle_seed(seed: int) -> int:
  """Spread the run's seed over 32 bits: grain adds the epoch to it, so neighbours would share permutations."""
  return int(np.random.SeedSequence(seed).generate_state(1)[0])


def _describe_overlong(lengths: Sequence[int], max_prompt_length: int) -> str:
  overlong = [(index, length) for index, length in enumerate(lengths) if length > max_prompt_length]
  listing = ", ".join(f"record {index} ({length})" for index, length in overlong[:_MAX_LISTED])
  more = f" and {len(overlong) - _MAX_LISTED} more" if len(overlong) > _MAX_LISTED else ""
  longest = max(lengths)
  return (
    f"task.max_prompt_length={max_prompt_length}: {len(overlong)} of {len(lengths)} prompts have more tokens: {listing}"
    f"{more}; set it to {longest}, or set task.overlong_prompts='skip' to leave out those that are longer"
  )
