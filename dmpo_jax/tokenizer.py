"""Text to token ids and back: between a task's strings and the arrays that the model sees."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import sentencepiece
from etils import epath

MASK_PIECE = "<mask>"


@runtime_checkable
class Tokenizer(Protocol):
  """What the rest of the package knows of a tokenizer."""

  vocab_size: int  # ids are 0 .. vocab_size - 1
  pad_token_id: int  # fills prompts on the left; never attended to
  bos_token_id: int
  eos_token_id: int  # ends a completion and fills it to its length
  mask_token_id: int  # a position that is still to be decided

  def encode(self, text: str) -> list[int]:
    """Return the ids of a text, without any special tokens around it."""
    ...

  def decode(self, ids: Sequence[int]) -> str:
    """Return the text of a completion: what stands before the first EOS, other special tokens left out."""
    ...


class SentencePieceTokenizer:
  """A sentencepiece model with the special pieces <pad>, <s>, </s> and <mask>."""

  def __init__(self, path: epath.PathLike):
    """Load the model file at `path`, local or gs://.

    Raises:
      ValueError: there is no such file, it is no sentencepiece model, or it lacks a special piece.
    """
    self._model = sentencepiece.SentencePieceProcessor()
    if not epath.Path(path).is_file():
      raise ValueError(f"tokenizer.path={str(path)!r}: no such file")
    try:
      self._model.LoadFromSerializedProto(epath.Path(path).read_bytes())
    except RuntimeError as error:
      raise ValueError(f"tokenizer.path={str(path)!r}: not a sentencepiece model ({error})") from error
    self.vocab_size = self._model.vocab_size()
    self.pad_token_id = self._model.pad_id()
    self.bos_token_id = self._model.bos_id()
    self.eos_token_id = self._model.eos_id()
    self.mask_token_id = self._model.piece_to_id(MASK_PIECE)
    self._specials = frozenset((self.pad_token_id, self.bos_token_id, self.eos_token_id, self.mask_token_id))
    if min(self._specials) < 0 or self.mask_token_id == self._model.unk_id():
      raise ValueError(
        f"tokenizer.path={str(path)!r}: the model must have the pieces <pad>, <s>, </s> and {MASK_PIECE}; "
        "launch/train_tokenizer.py makes one that has"
      )

  def encode(self, text: str) -> list[int]:
    """Return the ids of a text, without any special tokens around it."""
    return self._model.encode(text)

  def decode(self, ids: Sequence[int]) -> str:
    """Return the text of a completion: what stands before the first EOS, other special tokens left out."""
    ids = list(ids)
    end = ids.index(self.eos_token_id) if self.eos_token_id in ids else len(ids)
    return self._model.decode([token for token in ids[:end] if token not in self._specials])


TOKENIZERS = {"sentencepiece": SentencePieceTokenizer}


def load_tokenizer(name: str, path: epath.PathLike) -> Tokenizer:
  """Load the tokenizer of kind `name` (see TOKENIZERS) from `path`.

  Raises:
    ValueError: there is no such kind, or the file cannot be used.
  """
  if name not in TOKENIZERS:
    raise ValueError(f"tokenizer.name={name!r}: must be one of {', '.join(TOKENIZERS)}")
  return TOKENIZERS[name](path)
