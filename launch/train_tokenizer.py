"""Train a sentencepiece tokenizer: configs/tokenizers/tiny.model, or subwords from a text of your own.

    python -m launch.train_tokenizer [--output=FILE]
    python -m launch.train_tokenizer --output=FILE --text=FILE [--vocab_size=2048]

The first form makes a character model of the text that the tasks generate. It learns only the alphabet, and ids follow
the code points, so that a generator with another mix of puzzles changes no id. The second form learns subwords from a
text file or from the strings in JSON lines; digits are single pieces, answer tags are whole, and unknown text becomes
bytes. The same command makes the same file, byte for byte.
"""

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import sentencepiece
from absl import flags
from etils import epath

from configs import base
from dmpo_jax.hub.tokenizer import MASK_PIECE
from dmpo_jax.run import buckets
from dmpo_jax.tasks import TASKS, answers
from dmpo_jax.tasks.base import GeneratedTask
from launch import commands

TASK_NAMES = ("sudoku", "countdown")  # the tasks that generate their text
NUM_RECORDS = 1000  # of each task

TAGS = ("\n", *answers.TAGS)  # pieces that a subword model never splits

_TEXT = flags.DEFINE_string("text", None, "A text or .jsonl file to learn subwords from.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 2048, "Number of pieces of a subword model.", lower_bound=300)
_OUTPUT = flags.DEFINE_string("output", base.get_config().tokenizer.path, "The model file to write.")


def find_alphabet(num_records: int = NUM_RECORDS) -> str:
  """Return the characters of the tasks' prompts and demonstrations, in the order of their code points."""
  config = base.get_config()
  rng = np.random.default_rng(0)
  seen: set[str] = set()
  for name in TASK_NAMES:
    task = TASKS[name](**config.task[name])
    assert isinstance(task, GeneratedTask)
    for record in task.generate("train", num_records, seed=0):
      seen |= set(task.prompt(record) + task.demonstration(record, rng))
  return "".join(sorted(seen))


def train_model(alphabet: str) -> bytes:
  """Return a sentencepiece model with one piece per character, after <pad>, <s>, </s>, <unk> and <mask>."""
  special_pieces = 5
  return _train([alphabet], model_type="char", vocab_size=special_pieces + len(alphabet), character_coverage=1.0)


def train_subwords(sentences: Sequence[str], vocab_size: int) -> bytes:
  """Return a BPE model with the same special pieces, the answer tags and all bytes."""
  own = dict(model_type="bpe", vocab_size=vocab_size, byte_fallback=True, user_defined_symbols=list(TAGS))
  return _train(sentences, character_coverage=0.9999, **own)


def read_sentences(path: epath.PathLike) -> list[str]:
  """Return the lines of a text file, or of all strings in a file of JSON lines."""
  try:
    lines = epath.Path(path).read_bytes().decode().split("\n")
    rows = [json.loads(line) for line in lines if line.strip()] if str(path).endswith(".jsonl") else None
  except (OSError, ValueError) as error:  # no such file, not UTF-8, not JSON
    raise ValueError(f"--text={path} cannot be read ({error}): give a text file in UTF-8, or JSON lines") from error
  if rows is not None:
    lines = [line for row in rows for value in row.values() if isinstance(value, str) for line in value.split("\n")]
  return [line for line in lines if line]


def _train(sentences: Sequence[str], **own: Any) -> bytes:
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(sentences),
    model_writer=model,
    split_digits=True,
    add_dummy_prefix=False,  # no space before the text, so that decode(encode(text)) == text
    remove_extra_whitespaces=False,
    normalization_rule_name="identity",
    pad_id=0,
    bos_id=1,
    eos_id=2,
    unk_id=3,
    unk_surface="?",
    control_symbols=[MASK_PIECE],
    num_threads=1,
    minloglevel=2,
    **own,
  )
  return model.getvalue()


def main() -> None:
  """Write the model file."""
  output = _OUTPUT.value
  assert output is not None  # it has a default
  buckets.check({"--text": _TEXT.value or ""}, {"--output": output})
  path = epath.Path(output)
  sentences = read_sentences(_TEXT.value) if _TEXT.value else []
  path.parent.mkdir(parents=True, exist_ok=True)
  if _TEXT.value:
    path.write_bytes(train_subwords(sentences, _VOCAB_SIZE.value))
    print(f"{path}: {_VOCAB_SIZE.value} pieces from {_TEXT.value}")
    return
  alphabet = find_alphabet()
  path.write_bytes(train_model(alphabet))
  print(f"{path}: {len(alphabet)} characters {alphabet}")


if __name__ == "__main__":
  commands.start(main)
