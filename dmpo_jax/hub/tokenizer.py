"""Tokenizers: a task's strings -> the token ids that the model sees, and back.

There are two kinds with one interface: a sentencepiece model, and a folder in Hugging Face's layout with its chat
template.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jinja2
import sentencepiece
import tokenizers
from etils import epath

from dmpo_jax.hub import chat
from dmpo_jax.hub.families import FAMILIES, is_of
from dmpo_jax.messages import Turn

MASK_PIECE = "<mask>"
MASK_TOKEN = "<|mask|>"  # what `adapt` adds to a tokenizer in Hugging Face's layout, as dllm does

# The files of a tokenizer in Hugging Face's layout. The first is needed, or both QWEN_FILES.
TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
SPECIAL_FILE, TEMPLATE_FILE = "special_tokens_map.json", "chat_template.jinja"
QWEN_FILES = ("vocab.json", "merges.txt")  # Dream's, which has its special tokens in tokenizer_config.json
FILES = (TOKENIZER_FILE, CONFIG_FILE, SPECIAL_FILE, TEMPLATE_FILE, *QWEN_FILES)
# how Qwen2's tokenizer splits text before the merges
QWEN_PIECES = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# of the model, read for its special ids where they are in the folder
MODEL_FILE, GENERATION_FILE = "config.json", "generation_config.json"


@runtime_checkable
class Tokenizer(Protocol):
  """The interface of a tokenizer."""

  vocab_size: int  # ids are 0 .. vocab_size - 1
  pad_token_id: int  # pads prompts on the left; never attended to
  bos_token_id: int | None
  eos_token_id: int  # ends a completion and pads it to its length
  end_token_ids: tuple[int, ...]  # EOS, and other tokens that end a completion
  eot_token_id: int  # ends a turn of a conversation; EOS without a chat template
  mask_token_id: int  # a position that is not decided yet

  def encode(self, text: str) -> list[int]:
    """Return the ids of a text, without special tokens around it."""
    ...

  def encode_prompt(self, prompt: str | Sequence[Turn], prefill: str = "") -> list[int]:
    """Return the ids that a completion continues.

    A chat template renders the conversation and opens the assistant's turn. Without one, the ids are those of the text.

    Args:
      prompt: what the user says, or a conversation.
      prefill: the beginning of the answer, which the model does not have to write.

    Raises:
      ValueError: the chat template refuses the conversation, or there is none and it is more than one user turn.
    """
    ...

  def encode_answer(self, prompt: str | Sequence[Turn], answer: str, prefill: str = "") -> list[int]:
    """Return the ids of an answer to what `encode_prompt` returns, up to the end of the turn and without EOS."""
    ...

  def lacking(self, text: str) -> str:
    """Return the characters of a text without a token: the model sees them as unknown, or not at all."""
    ...

  def decode(self, ids: Sequence[int]) -> str:
    """Return the text of a completion before the first EOS or EOT, without other special tokens."""
    ...

  def piece(self, token_id: int) -> str:
    """Return the text of one token, or the name of a special token; U+FFFD for a part of a character."""
    ...


class SentencePieceTokenizer:
  """A sentencepiece model with the special pieces <pad>, <s>, </s> and <mask>, without a chat template."""

  def __init__(self, path: epath.PathLike):
    """Load the model file at `path`, local or gs://.

    Raises:
      ValueError: the file is missing, not a sentencepiece model, or lacks a special piece.
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
    self.bos_token_id: int | None = self._model.bos_id()
    self.eos_token_id = self.eot_token_id = self._model.eos_id()
    self.end_token_ids = (self.eos_token_id,)
    self.mask_token_id = self._model.piece_to_id(MASK_PIECE)
    self._specials = frozenset((self.pad_token_id, self.bos_token_id, self.eos_token_id, self.mask_token_id))
    if min(self._specials) < 0 or self.mask_token_id == self._model.unk_id():
      raise ValueError(
        f"tokenizer.path={str(path)!r}: the model must have the pieces <pad>, <s>, </s> and {MASK_PIECE}; "
        "launch/train_tokenizer.py makes such a model"
      )

  def encode(self, text: str) -> list[int]:
    """Return the ids of a text, without special tokens around it."""
    return self._model.encode(text)

  def encode_prompt(self, prompt: str | Sequence[Turn], prefill: str = "") -> list[int]:
    """Return the ids of what the user says and of the prefill."""
    return self._model.encode(_plain_text(prompt) + prefill)

  def encode_answer(self, prompt: str | Sequence[Turn], answer: str, prefill: str = "") -> list[int]:
    """Return the ids of the answer."""
    return self._model.encode(answer)

  def lacking(self, text: str) -> str:
    """Return the characters of a text that are the unknown piece."""
    return _lacking(text, self.encode, self._model.unk_id())

  def decode(self, ids: Sequence[int]) -> str:
    """Return the text of a completion before the first EOS, without other special tokens."""
    ids = list(ids)
    end = ids.index(self.eos_token_id) if self.eos_token_id in ids else len(ids)
    return self._model.decode([token for token in ids[:end] if token not in self._specials])

  def piece(self, token_id: int) -> str:
    """Return a token's text, or a special token's name."""
    return self._model.id_to_piece(token_id).replace("\u2581", " ")  # sentencepiece's symbol for a space


class HuggingFaceTokenizer:
  """A folder with tokenizer.json, tokenizer_config.json and perhaps the model's config.json.

  Special ids come from the tokenizer's special tokens. The model's config may add ids (LLaDA's mask is only there) and
  must not contradict them. Both its config.json and its generation_config.json may list several ids of EOS, which all
  end a completion.
  """

  def __init__(self, path: epath.PathLike, *, is_chat: bool, switches: Mapping[str, Any] | None = None):
    """Load the folder at `path`, local or gs://.

    Args:
      is_chat: render prompts by the chat template.
      switches: of the template, see `chat.Template`.

    Raises:
      ValueError: files are missing or damaged, there is no valid chat template though `is_chat`, or special ids are
        missing or differ from the model's.
    """
    self._where = f"tokenizer.path={str(path)!r}"
    folder = epath.Path(path)
    config = _read_json(folder / SPECIAL_FILE, self._where) | _read_json(folder / CONFIG_FILE, self._where)
    self._model = self._load(folder, config)
    names = {key: text for key, value in config.items() if key.endswith("_token") and (text := _content(value))}
    self._template = None
    if is_chat:
      self._template = self._compile(chat.find_template(folder / TEMPLATE_FILE, config), names, switches)
    self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
    self._set_special_ids(
      names, _read_json(folder / MODEL_FILE, self._where), _read_json(folder / GENERATION_FILE, self._where)
    )

  def _load(self, folder: epath.Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    path, parts = folder / TOKENIZER_FILE, [folder / name for name in QWEN_FILES]
    try:
      if path.is_file():
        return tokenizers.Tokenizer.from_str(path.read_text())
      if all(part.is_file() for part in parts):
        vocabulary, merges = (part.read_text() for part in parts)
        return _qwen_tokenizer(vocabulary, merges, config["added_tokens_decoder"])
    except Exception as error:  # the library raises plain Exceptions
      raise ValueError(f"{self._where}: {path.name} is not a tokenizer ({error})") from error
    raise ValueError(f"{self._where}: no {path.name} there; give the folder of a model in Hugging Face's layout")

  def _compile(self, source: str | None, names: Mapping[str, str], switches: Mapping[str, Any] | None) -> chat.Template:
    if source is None:
      raise ValueError(f"{self._where} has no chat template: set tokenizer.is_chat=False for prompts of plain text")
    try:
      return chat.Template(source, names, switches)
    except jinja2.TemplateError as error:
      raise ValueError(f"{self._where}: the chat template is invalid ({error})") from error
    except ValueError as error:
      raise ValueError(f"tokenizer.chat_template_kwargs: {error}") from error

  def _set_special_ids(self, names: Mapping[str, str], model: dict[str, Any], generation: Mapping[str, Any]) -> None:
    ends, problems = self._listed_ends(model, generation)
    wrong = {name for family in FAMILIES.values() if is_of(family, model) for name in family.wrong_ids}
    model = {key: value for key, value in model.items() if key not in wrong}

    def find(kind: str, token: str | None, is_needed: bool = True) -> int | None:
      own = None if token is None else self._model.token_to_id(token)
      given = model.get(f"{kind}_token_id")
      wanted: Any = given
      if kind == "eos" and isinstance(given, list) and given:
        wanted = own if own in given else given[0]
      if wanted is not None and type(wanted) is not int:
        problems.append(f"{MODEL_FILE} has {kind}_token_id={wanted!r}, where one id is needed")
        return own
      if token is not None and own is None:
        problems.append(f"the {kind} token {token!r} has no id")
      elif own is None and wanted is None and is_needed:
        remedy = f" (launch/convert_hf.py --adapt would add {MASK_TOKEN!r})" if kind == "mask" else ""
        where = f"neither in {CONFIG_FILE} nor as {kind}_token_id in {MODEL_FILE}"
        problems.append(f"there is no {kind} token, {where}{remedy}")
      elif own is None and wanted is not None and self._model.id_to_token(wanted) is None:
        problems.append(f"{MODEL_FILE} has {kind}_token_id={wanted}, which is no token")
      elif own is not None and wanted is not None and wanted != own:
        problems.append(f"{MODEL_FILE} has {kind}_token_id={wanted}, but the {kind} token {token!r} is {own}")
      return wanted if own is None else own

    mask = find("mask", names.get("mask_token"))
    eos = find("eos", names.get("eos_token"))
    pad = find("pad", names.get("pad_token"))
    self.bos_token_id = find("bos", names.get("bos_token"), is_needed=False)
    eot = find("eot", names.get("eot_token") or self._end_of_turn(), is_needed=False)
    size = model.get("vocab_size")
    if isinstance(size, int) and size < self.vocab_size:  # other types are refused when the model is converted
      problems.append(f"{MODEL_FILE} has vocab_size={size}, but there are {self.vocab_size} tokens")
    if problems or mask is None or eos is None or pad is None:
      raise ValueError(f"{self._where}: " + "; ".join(problems))
    self.mask_token_id, self.eos_token_id, self.pad_token_id = mask, eos, pad
    self.end_token_ids = tuple(dict.fromkeys((eos, *ends)))
    self.eot_token_id = eos if eot is None else eot

  def _listed_ends(self, model: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[list[int], list[str]]:
    """Return the ids of EOS that the model's files list, and which of them cannot be."""
    found, problems = [], []
    for file, value in ((MODEL_FILE, model.get("eos_token_id")), (GENERATION_FILE, generation.get("eos_token_id"))):
      if not isinstance(value, list):
        value = [value] if type(value) is int and file == GENERATION_FILE else []
      unknown = [
        token for token in value if type(token) is not int or token < 0 or self._model.id_to_token(token) is None
      ]
      problems += [f"{file} has {unknown} in eos_token_id={value}, which are no tokens"] if unknown else []
      found += [token for token in value if token not in unknown]
    return found, problems

  def _end_of_turn(self) -> str | None:
    """Return the special token that the chat template puts after an answer."""
    if self._template is None:
      return None
    special = {token.content for token in self._model.get_added_tokens_decoder().values() if token.special}
    answer = "answer"
    rest = self._template.render([Turn("user", "question"), Turn("assistant", answer)], is_answering=False).split(
      answer
    )[-1]
    return next(
      (token for token in self._model.encode(rest, add_special_tokens=False).tokens if token in special), None
    )

  def encode(self, text: str) -> list[int]:
    """Return the ids of a text, without special tokens around it; names of special tokens in it become their ids."""
    return self._model.encode(text, add_special_tokens=False).ids

  def encode_prompt(self, prompt: str | Sequence[Turn], prefill: str = "") -> list[int]:
    """Return the ids of the conversation, rendered by the chat template if there is one, and of the prefill."""
    if self._template is None:
      return self.encode(_plain_text(prompt) + prefill)
    return self.encode(self._template.render(_as_turns(prompt)) + prefill)

  def encode_answer(self, prompt: str | Sequence[Turn], answer: str, prefill: str = "") -> list[int]:
    """Return the ids that the chat template puts behind the prompt for this answer, up to the end of the turn.

    Without a template, or where it renders an answered prompt otherwise, they are those of the answer and of EOT.
    """
    if self._template is None:
      return self.encode(answer)
    turns = _as_turns(prompt)
    opened = self._template.render(turns) + prefill
    whole = self._template.render([*turns, Turn("assistant", prefill + answer)], is_answering=False)
    ids = self.encode(whole.removeprefix(opened) if whole.startswith(opened) else answer)
    end = ids.index(self.eot_token_id) if self.eot_token_id in ids else len(ids)
    return ids[:end] + [self.eot_token_id] * (self.eot_token_id != self.eos_token_id)

  def lacking(self, text: str) -> str:
    """Return the characters of a text that are the unknown token, or none; a tokenizer of bytes lacks none."""
    unknown = getattr(self._model.model, "unk_token", None)
    return _lacking(text, self.encode, self._model.token_to_id(unknown) if unknown else None)

  def decode(self, ids: Sequence[int]) -> str:
    """Return the text of a completion before the first EOS or EOT, without other special tokens."""
    ids = list(ids)
    ends = (*self.end_token_ids, self.eot_token_id)
    end = min((ids.index(token) for token in ends if token in ids), default=len(ids))
    kept = [token for token in ids[:end] if token != self.mask_token_id]
    return self._model.decode(kept, skip_special_tokens=True)

  def piece(self, token_id: int) -> str:
    """Return a token's text, or a special token's name; nothing for an id that no token has."""
    return self._model.decode([token_id], skip_special_tokens=False)


def _lacking(text: str, encode: Callable[[str], list[int]], unknown: int | None) -> str:
  found = ((letter, encode(letter)) for letter in sorted(set(text)) if not letter.isspace())
  return "".join(letter for letter, ids in found if not ids or unknown in ids)


def _as_turns(prompt: str | Sequence[Turn]) -> Sequence[Turn]:
  return [Turn("user", prompt)] if isinstance(prompt, str) else prompt


def _plain_text(prompt: str | Sequence[Turn]) -> str:
  """Return what the user says, where there is no chat template."""
  if isinstance(prompt, str):
    return prompt
  if [role for role, _ in prompt] != ["user"]:
    raise ValueError(
      "a conversation needs a chat template (tokenizer.is_chat=True); without one it must be one message of the user"
    )
  return prompt[0][1]


def _qwen_tokenizer(vocab: str, merges: str, added: Mapping[str, Mapping[str, Any]]) -> tokenizers.Tokenizer:
  """Build a byte-level BPE tokenizer like Qwen2's from its two files and its added tokens by id."""
  pairs = [tuple(line.split(" ")) for line in merges.splitlines() if line and not line.startswith("#version")]
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(json.loads(vocab), pairs))
  tokenizer.normalizer = tokenizers.normalizers.NFC()
  cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_PIECES), behavior="isolated")
  to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([cut, to_bytes])
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  for number, token in sorted(added.items(), key=lambda item: int(item[0])):
    tokenizer.add_tokens([tokenizers.AddedToken(**token)])
    if tokenizer.token_to_id(token["content"]) != int(number):
      raise ValueError(f"the added token {token['content']!r} does not get its id {number}")
  return tokenizer


def _content(value: object) -> str | None:
  """Return the text of a special token, given as text or with its properties; None for other settings."""
  text = value.get("content") if isinstance(value, Mapping) else value
  return text if isinstance(text, str) else None


def _read_json(path: epath.Path, where: str) -> dict[str, Any]:
  """Read a JSON object; {} if the file is missing."""
  if not path.is_file():
    return {}
  try:
    return dict(json.loads(path.read_text()))
  except (ValueError, TypeError) as error:
    raise ValueError(f"{where}: {path.name} is not a JSON object ({error})") from error


def has_tokenizer(folder: epath.Path) -> bool:
  """Whether a folder holds a tokenizer in Hugging Face's layout."""
  return any((folder / name).exists() for name in (TOKENIZER_FILE, QWEN_FILES[0]))


TOKENIZERS = ("sentencepiece", "huggingface")


def load_tokenizer(
  name: str, path: epath.PathLike, *, is_chat: bool = False, switches: Mapping[str, Any] | None = None
) -> Tokenizer:
  """Load the tokenizer of kind `name` (see TOKENIZERS) from `path`.

  Args:
    is_chat: render prompts by the tokenizer's chat template.
    switches: of the template, see `chat.Template`.

  Raises:
    ValueError: there is no such kind, the file is missing or damaged, or it has no such chat template.
  """
  if name == "huggingface":
    return HuggingFaceTokenizer(path, is_chat=is_chat, switches=switches)
  if name != "sentencepiece":
    raise ValueError(f"tokenizer.name={name!r}: must be one of {', '.join(TOKENIZERS)}")
  if is_chat:
    raise ValueError("tokenizer.is_chat=True: a sentencepiece model has no chat template; set it to False")
  return SentencePieceTokenizer(path)
