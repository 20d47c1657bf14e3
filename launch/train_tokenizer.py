"""Make configs/tokenizers/tiny.model: a character-level sentencepiece model of the tasks' generated text.

    python -m launch.train_tokenizer [--output=FILE]

The same command makes the same file, byte for byte. A character model has nothing to learn but the alphabet, so the
text is reduced to it: ids follow the code points, and a generator that changes its mix of puzzles moves none of them.
"""

import io
from collections.abc import Sequence

import numpy as np
import sentencepiece
from absl import app, flags
from etils import epath

from configs import base
from dmpo_jax.tasks import TASKS
from dmpo_jax.tokenizer import MASK_PIECE

TASK_NAMES = ("sudoku", "countdown")  # whose text it is made for
NUM_RECORDS = 1000  # of each task

_OUTPUT = flags.DEFINE_string("output", base.get_config().tokenizer.path, "The model file to write.")


def find_alphabet(num_records: int = NUM_RECORDS) -> str:
  """Return the characters in the tasks' prompts and demonstrations, in the order of their code points."""
  config = base.get_config()
  rng = np.random.default_rng(0)
  seen: set[str] = set()
  for name in TASK_NAMES:
    task = TASKS[name](**config.task[name])
    for record in task.generate("train", num_records, seed=0):
      seen |= set(task.prompt(record) + task.demonstration(record, rng))
  return "".join(sorted(seen))


def train_model(alphabet: str) -> bytes:
  """Return a sentencepiece model with one piece a character after <pad>, <s>, </s>, <unk> and <mask>."""
  special_pieces = 5
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([alphabet]),
    model_writer=model,
    model_type="char",
    vocab_size=special_pieces + len(alphabet),
    character_coverage=1.0,
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
  )
  return model.getvalue()


def main(argv: Sequence[str]) -> None:
  """Write the model file."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  alphabet = find_alphabet()
  path = epath.Path(_OUTPUT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(train_model(alphabet))
  print(f"{path}: {len(alphabet)} characters {alphabet}")


if __name__ == "__main__":
  app.run(main)
