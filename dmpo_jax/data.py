"""Records to token arrays: a task's records are written once, read whole, and then accessed by position.

`TaskData` stores generated or published records as ArrayRecord files (a TFDS builder). `PromptStream` turns them into
padded prompts and, for the warm start, demonstrations. Neither imports TensorFlow. The stream's only state is its
position: its content is a function of (records, seed, position).
"""

import bisect
import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import absl.logging
import grain
import jax
import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import Int, UInt32

from dmpo_jax import files
from dmpo_jax.hub.tokenizer import Tokenizer
from dmpo_jax.messages import Turn, as_text, turns_of
from dmpo_jax.processes import meet, working
from dmpo_jax.structs import Prompts
from dmpo_jax.tasks import option_types, sources
from dmpo_jax.tasks.base import GeneratedTask, Record, Split, Task, UserTask

logger = logging.getLogger(__name__)

RECORDS_SECONDS = 3600.0  # for process 0 to download a data set or to generate records
_MAX_LISTED = 20  # overlong prompts that the error describes; all are counted


@dataclasses.dataclass
class TaskRecordsConfig(tfds.core.BuilderConfig):
  """All that the stored records depend on."""

  task: Task | None = None
  splits: tuple[Split, ...] = ()
  num_train: int = 0
  num_test: int = 0
  seed: int = 0
  data_dir: str = ""  # folder of published files, which their checksums identify


class TaskRecords(tfds.core.GeneratorBasedBuilder):
  """Writes a task's generated or published records in order, each as JSON text."""

  url_infos = None  # `sources.py` downloads; otherwise TFDS 4.9 imports a package that it does not install

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict({"record": tfds.features.Text()})
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, dict]]]:
    return {split: self._generate_examples(split) for split in self._own.splits}

  @property
  def _own(self) -> TaskRecordsConfig:
    assert isinstance(self.builder_config, TaskRecordsConfig)
    return self.builder_config

  def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict]]:
    config = self._own
    if isinstance(config.task, GeneratedTask):
      num = config.num_train if split == "train" else config.num_test
      records = config.task.generate(split, num, config.seed)
    else:
      assert isinstance(config.task, sources.PublishedTask)
      records = sources.read_source(config.task.source(split), config.data_dir, config.task.read_row)
    for index, record in enumerate(records):
      yield index, {"record": json.dumps(record, ensure_ascii=False)}


class TaskData:
  """The records of a task: generated or read from a published file on first use, and stored in `records_dir`.

  The name of the folder contains the task's version and a hash of all that the records depend on, so records of other
  options are never reused. The folder is renamed into place once complete; an incomplete one is written again. Records
  of a user's own task are not stored, as their file may change.
  """

  def __init__(
    self,
    task: Task,
    name: str,
    *,
    records_dir: epath.PathLike,
    num_train: int,
    num_test: int,
    data_dir: str = "",
    eval_path: epath.PathLike = "",
    seed: int = 0,
  ):
    """Describe the data; nothing is read or written yet.

    Args:
      task: the source of the records. name: its name in `tasks.TASKS`, or the path of a user's file.
      records_dir: folder where records are stored for all runs.
      num_train, num_test: number of records to generate for each split, or the most to use of existing ones (0: all).
      data_dir: folder of published data files; "": download them.
      eval_path: a published test file that replaces the test split; "" for none.
      seed: seed of the generator, not of the run: all runs train and evaluate on the same records.
    """
    self._task, self._name = task, name
    self._eval_path = eval_path
    self._records_dir = epath.Path(records_dir)
    self._nums = {"train": num_train, "test": num_test}
    self._common: dict[str, Any] = dict(
      version=task.version, task=task, num_train=num_train, num_test=num_test, seed=seed
    )
    self._common["data_dir"] = data_dir

  def train(self) -> list[Record]:
    """Return the training records."""
    return self._take("train")

  def test(self) -> list[Record]:
    """Return the records to evaluate on, from `eval_path` or the test split."""
    if self._eval_path:
      return self._task.read_published(self._eval_path)
    return self._take("test")

  def path(self, split: Split) -> epath.Path:
    """Return the folder of a split's stored records; generated splits share one."""
    return self._records_dir / TaskRecords.name / self._config(split).name / self._task.version

  def _config(self, split: Split) -> TaskRecordsConfig:
    if isinstance(self._task, GeneratedTask):
      options = {name: getattr(self._task, name) for name in option_types(self._name)}
      depends_on = dict(task=self._name, seed=self._common["seed"], options=options)
      depends_on |= {f"num_{part}": num for part, num in self._nums.items()}
      digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:12]
      return TaskRecordsConfig(name=f"{self._name}_{digest}", splits=("train", "test"), **self._common)
    label = self._task.source(split).label if isinstance(self._task, sources.PublishedTask) else ""
    return TaskRecordsConfig(name="_".join(filter(None, (self._name, split, label))), splits=(split,), **self._common)

  def _take(self, split: Split) -> list[Record]:
    if isinstance(self._task, GeneratedTask):
      for part, num in self._nums.items():  # both splits are generated together
        if not num:
          raise ValueError(f"task.num_{part}=0: so many records of {self._name} are generated; give 1 or more")
      return self._read(split)
    records = self._task.records(split) if isinstance(self._task, UserTask) else self._read(split)
    if not records:
      raise ValueError(f"task.name={self._name!r}: there is no {split} record in it{self._hint(split)}")
    return records[: self._nums[split] or None]

  def _hint(self, split: Split) -> str:
    if not self._name.endswith(".jsonl"):
      return f"; records({split!r}) returns none"
    own = ", or a file of their own as task.eval_path" if split == "test" else ""
    return f"; a tenth of its rows, by a hash of their prompts, is the test split: give more rows{own}"

  def _read(self, split: Split) -> list[Record]:
    """Read a whole split, after writing its records if they are absent.

    Process 0 goes first. The others then find its records or, if their `records_dir` is on a disk of their own, write
    them too.

    Raises:
      ValueError: `records_dir` is not in a file system (ArrayRecord cannot write to object stores), or a process cannot
        write to it; raised in every process.
      Unreadable: the records are damaged.
    """
    if "://" in str(self._records_dir):
      raise ValueError(
        f"task.records_dir={str(self._records_dir)!r}: a task's records need a local or mounted folder (every host may "
        'have its own); set task.records_dir to one, or leave it ""'
      )
    first = jax.process_index() == 0
    self._write_together(split, is_mine=first, when="by process 0")
    if jax.process_count() > 1:
      self._write_together(split, is_mine=not first, when="by all")
    try:
      with _quiet_tfds():
        source = TaskRecords(data_dir=self._records_dir, config=self._config(split)).as_data_source(split)  # pyright: ignore[reportCallIssue]  # TFDS wraps it
      return [json.loads(row["record"]) for row in source.__getitems__(list(range(len(source))))]
    except Exception as error:  # ArrayRecord verifies checksums; it and TFDS raise various errors
      problem = str(error).splitlines()[0] if str(error) else type(error).__name__
      raise files.Unreadable(
        f"{self.path(split)} cannot be read ({problem:.200}): remove the folder, and its records are written again"
      ) from error

  def _write_together(self, split: Split, *, is_mine: bool, when: str) -> None:
    """Write the records if it is this process's turn, and wait for the others; a failure in one is raised in all."""
    problem = ""
    if is_mine:
      try:
        self._write(split)
      except (OSError, ValueError) as error:
        problem = str(error)
        if isinstance(error, OSError) and error.filename is not None:  # the disk's, not the source's
          problem = f"task.records_dir={str(self._records_dir)!r}: {error}; set it to a folder that can be written to"
    # The folder may differ between hosts, so the barrier's name must not contain it.
    notes = meet(f"the records of {self._config(split).name} are written {when}", RECORDS_SECONDS, note=problem)
    if notes:
      raise ValueError("; ".join(dict.fromkeys(notes.values())))

  def _write(self, split: Split) -> None:
    path = self.path(split)
    if _is_complete(path):
      return
    if path.exists():
      logger.warning("%s is incomplete and is made anew", path)
      path.rmtree()
    logger.info("writing the records of %s to %s", self._name, path)
    try:
      with working(RECORDS_SECONDS), _quiet_tfds(), tempfile.TemporaryDirectory() as downloads:
        builder = TaskRecords(data_dir=self._records_dir, config=self._config(split))
        builder.download_and_prepare(download_dir=downloads, file_format="array_record")
    except OSError:
      if not _is_complete(path):  # otherwise another run has just written the same records
        raise


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
  """Silence TFDS's messages on downloads, and its warning that the builder's options are not predefined."""
  verbosity = absl.logging.get_verbosity()
  absl.logging.set_verbosity(absl.logging.ERROR)
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    absl.logging.set_verbosity(verbosity)


def _is_complete(path: epath.Path) -> bool:
  """Whether a folder has the description that TFDS writes last, and all files listed in it."""
  try:
    info = files.read_object(path / "dataset_info.json")
    return all(
      len(list(path.glob(f"{info['name']}-{split['name']}.{info['fileFormat']}-*"))) == len(split["shardLengths"])
      for split in info["splits"]
    )
  except (OSError, files.Unreadable, KeyError, TypeError):
    return False


class PromptStream:
  """An endless stream of prompts with random access by position; each epoch is another permutation."""

  num_skipped: int  # prompts per epoch that are left out as they are too long
  num_cut: int  # prompts per epoch that are cut as they are too long

  def __init__(
    self,
    records: Sequence[Record],
    task: Task,
    tokenizer: Tokenizer,
    *,
    seed: int | None,
    max_prompt_length: int,
    overlong: Literal["error", "skip", "cut_user"] = "error",
    curriculum: int = 0,
  ):
    """Tokenise every prompt once, so that overlong ones are known before work starts and no batch waits for it.

    Args:
      seed: of the order and of the demonstrations; None: keep the order of the records in every epoch.
      max_prompt_length: tokens; every prompt is padded to this length.
      overlong: what to do with longer prompts: raise an error, leave them out and count them, or cut the beginning of
        the last turn, keeping the tokens of the chat template, and count them.
      curriculum: prompts at the beginning that come from easy to hard, of a generated task.

    Raises:
      ValueError: some prompts are too long and `overlong` is "error", no prompt is left, or the tokenizer refuses one.
    """
    self._records, self._task, self._tokenizer = records, task, tokenizer
    self._seed = seed or 0
    self._prompt_length = max_prompt_length
    self._turns = [turns_of(task.prompt(record)) for record in records]
    self._encoded = [np.array(self._encode(turns), np.int32) for turns in self._turns]
    lengths = [len(ids) for ids in self._encoded]
    overlong_ones = [index for index, length in enumerate(lengths) if length > max_prompt_length]
    cut = overlong_ones if overlong == "cut_user" else []
    for index in cut:
      self._encoded[index] = np.array(self._encode(self._cut_to_fit(self._turns[index])), np.int32)
    kept = [index for index, ids in enumerate(self._encoded) if len(ids) <= max_prompt_length]
    self.num_cut, self.num_skipped = len(cut), len(lengths) - len(kept)
    if self.num_skipped and (overlong == "error" or not kept):
      raise ValueError(_describe_overlong(lengths, max_prompt_length))
    if not kept:
      raise ValueError("task: there are no records")
    self._warn_of_letters("".join(turn.text for turns in self._turns for turn in turns) + task.prefill, "prompts")
    self._kept, self._first = kept, list[int]()
    order = grain.MapDataset.range(len(kept))
    self._order = (order if seed is None else order.shuffle(seed=_shuffle_seed(seed))).repeat()
    self._first = self._easy_to_hard(curriculum)

  def _easy_to_hard(self, num: int) -> list[int]:
    """Return the records of the first prompts by difficulty; equally difficult ones keep their random order."""
    if not num:
      return []
    task = self._task
    assert isinstance(task, GeneratedTask)  # a rule of the configuration
    return sorted(self._indices(0, num), key=lambda index: task.difficulty(self._records[index]))

  def _warn_of_letters(self, text: str, where: str) -> None:
    if lacking := self._tokenizer.lacking(text):
      logger.warning("the %s have letters that the tokenizer lacks, as unknown tokens: %s", where, " ".join(lacking))

  def __len__(self) -> int:
    """Return the number of prompts per epoch."""
    return len(self._kept)

  @property
  def lengths(self) -> list[int]:
    """The tokens of each prompt of an epoch."""
    return [len(self._encoded[index]) for index in self._kept]

  def digest(self) -> str:
    """Hash the tokens of the prompts in order: equal if records, tokenizer and settings are."""
    digest = hashlib.sha256()
    for index in self._kept:
      digest.update(len(self._encoded[index]).to_bytes(8, "little") + self._encoded[index].tobytes())
    return digest.hexdigest()[:16]

  def batch(self, position: int, n: int) -> tuple[Prompts, list[Record]]:
    """Return the `n` prompts from `position` on, padded on the left (host arrays), and their records."""
    indices = self._indices(position, n)
    return self._collate(indices), [self._records[index] for index in indices]

  def _indices(self, position: int, n: int) -> list[int]:
    order: Any = self._order  # Grain says that an element may be missing; of a range none is
    places = range(position, position + n)
    return [self._first[place] if place < len(self._first) else self._kept[order[place]] for place in places]

  def demonstrations(
    self, position: int, n: int, completion_length: int
  ) -> tuple[Prompts, Int[np.ndarray, "n c"], list[Record]]:
    """Return prompts as `batch` does, and a demonstration for each, padded with EOS to `completion_length` (int32).

    A demonstration is drawn from (seed, position), so each epoch has another one for a prompt. Overlong demonstrations
    of a data set lose their end.

    Raises:
      ValueError: a generated demonstration is longer than `completion_length`.
    """
    prompts, records = self.batch(position, n)
    completion = np.full((n, completion_length), self._tokenizer.eos_token_id, np.int32)
    for row, index in enumerate(self._indices(position, n)):
      tokens = self._encode_demonstration(index, self._demonstration(index, position + row), completion_length)
      completion[row, : len(tokens)] = tokens[:completion_length]
    return prompts, completion, records

  def check_demonstrations(self, completion_length: int) -> None:
    """Make the demonstrations of an epoch, so that errors are raised before work starts.

    Raises:
      ValueError: see `demonstrations`.
    """
    indices = self._indices(0, len(self))
    texts = [self._demonstration(index, place) for place, index in enumerate(indices)]
    self._warn_of_letters("".join(texts), "demonstrations")
    lengths = [
      len(self._encode_demonstration(index, text, completion_length))
      for index, text in zip(indices, texts, strict=True)
    ]
    if num_cut := sum(length > completion_length for length in lengths):
      logger.warning(
        "sampler.completion_length=%d: %d of %d demonstrations are longer, by up to %d tokens, and lose their end",
        *(completion_length, num_cut, len(lengths), max(lengths) - completion_length),
      )

  def _demonstration(self, index: int, position: int) -> str:
    rng = np.random.Generator(np.random.Philox(key=(self._seed, position)))
    return self._task.demonstration(self._records[index], rng)

  def _encode_demonstration(self, index: int, text: str, completion_length: int) -> list[int]:
    """Return the ids of a record's demonstration; they may be more than `completion_length` unless it is generated."""
    tokens = self._tokenizer.encode_answer(self._turns[index], text, self._task.prefill)
    if len(tokens) > completion_length and isinstance(self._task, GeneratedTask):
      raise ValueError(
        f"sampler.completion_length={completion_length}: the demonstration {text!r} has {len(tokens)} tokens"
      )
    return tokens

  def _encode(self, turns: Sequence[Turn]) -> list[int]:
    return self._tokenizer.encode_prompt(turns, self._task.prefill)

  def _cut_to_fit(self, turns: Sequence[Turn]) -> list[Turn]:
    """Cut as little as possible from the beginning of the last turn so that the prompt fits.

    Raises:
      ValueError: the prompt does not fit even with an empty last turn.
    """
    text = turns[-1].text

    def cut(start: int) -> list[Turn]:
      return [*turns[:-1], turns[-1]._replace(text=text[start:])]

    def is_fitting(start: int) -> bool:
      return len(self._encode(cut(start))) <= self._prompt_length

    start = bisect.bisect_left(range(len(text)), True, key=is_fitting)
    while start <= len(text) and not is_fitting(start):  # shorter text may have more tokens
      start += 1
    if start > len(text):
      raise ValueError(
        f"task.max_prompt_length={self._prompt_length}: even without its last turn, the chat has more tokens"
      )
    return cut(start)

  def _collate(self, indices: Sequence[int]) -> Prompts:
    shape = (len(indices), self._prompt_length)
    tokens, is_valid = np.full(shape, self._tokenizer.pad_token_id, np.int32), np.zeros(shape, bool)
    for row, index in enumerate(indices):
      start = self._prompt_length - len(self._encoded[index])
      tokens[row, start:] = self._encoded[index]
      is_valid[row, start:] = True
    texts = [as_text(self._turns[index]) + self._task.prefill for index in indices]
    return Prompts(tokens=tokens, is_valid=is_valid, prompt_id=prompt_ids(texts))


def prompt_id(text: str) -> int:
  """Return the identity of a prompt, a 32-bit hash of its text: the same in every epoch, run and file."""
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def prompt_ids(texts: Sequence[str]) -> UInt32[np.ndarray, "n"]:
  """Return the identities of the prompts of one buffer, evaluation or request.

  The first of several equal prompts gets `prompt_id`, each repeat another id, so that their rollouts and masks differ.
  A buffer that spans two epochs may contain a prompt twice, and two records may have the same prompt.
  """
  ids, seen = np.zeros(len(texts), np.uint32), collections.Counter[int]()
  for row, text in enumerate(texts):
    first = prompt_id(text)
    ids[row] = prompt_id(f"{first} {seen[first]}") if seen[first] else first
    seen[first] += 1
  return ids


def ids_of_batch(ids: UInt32[np.ndarray, "n"], further: int) -> UInt32[np.ndarray, "n"]:
  """Return the identities of prompts in a further batch: where a prompt returns, its rollouts are others."""
  return np.array([prompt_id(f"{own} in {further}") for own in ids], np.uint32)


def _shuffle_seed(seed: int) -> int:
  """Spread the seed over 32 bits, as grain adds the epoch to it, and neighbouring seeds would share permutations."""
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
