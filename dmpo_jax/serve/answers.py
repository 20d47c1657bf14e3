"""From a completion's ids to what a client gets: text that ends where it should, and the shape of OpenAI's answers."""

import dataclasses
import itertools
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dmpo_jax import files
from dmpo_jax.hub.tokenizer import Tokenizer
from dmpo_jax.serve.asked import Asked, Limits

TINY = 1e-38  # the least probability whose logarithm is said; JSON has no infinity


class Text(NamedTuple):
  """A finished completion."""

  text: str
  reason: str  # why it ends: stop (an end token or a stop string), length
  num_tokens: int
  pieces: Sequence[str] = ()  # of the tokens, where their log-probabilities were asked for
  log_probs: Sequence[float] = ()


@dataclasses.dataclass(frozen=True)
class Reader:
  """Reads completions' ids as text, as far as a request wants it."""

  tokenizer: Tokenizer
  limits: Limits
  asked: Asked

  def decided(self, ids: np.ndarray) -> str:
    """The text that nothing will change any more.

    That is what stands before the first MASK, less a character that is not whole and what may become a stop string.
    """
    is_masked = ids == self.tokenizer.mask_token_id
    end = int(np.argmax(is_masked)) if is_masked.any() else len(ids)
    if self.limits.can_revoke:
      end -= end % self.limits.block_length
    text = self._decode(ids[: min(end, self.asked.max_tokens)]).rstrip("\ufffd")
    cut = _find(text, self.asked.stops)
    return text[: len(text) - _num_held(text, self.asked.stops)] if cut is None else text[:cut]

  def finish(self, ids: np.ndarray, confidence: np.ndarray) -> Text:
    """The whole text, why it ends and how many tokens it took, an end token and a stop string not counted.

    Args:
      confidence: of the model in each token, at the call that decided it.
    """
    text = self._end(ids[: self.asked.max_tokens])
    if not self.asked.with_logprobs:
      return text
    kept = slice(text.num_tokens)
    # A character of several tokens is the last one's: before it the text ends in what is not whole.
    whole = [self._decode(ids[:end]).rstrip("\ufffd") for end in range(text.num_tokens)] + [self._decode(ids[kept])]
    pieces = [after[len(before) :] for before, after in itertools.pairwise(whole)]
    return text._replace(pieces=pieces, log_probs=[math.log(max(p, TINY)) for p in confidence[kept].tolist()])

  def _end(self, kept: np.ndarray) -> Text:
    ends = np.flatnonzero(np.isin(kept, [self.tokenizer.eos_token_id, self.tokenizer.eot_token_id]))
    num_tokens, reason = (int(ends[0]), "stop") if len(ends) else (len(kept), "length")
    text = self._decode(kept)
    cut = _find(text, self.asked.stops)
    if cut is None:
      return Text(text, reason, num_tokens)
    num_tokens = next(n for n in range(num_tokens + 1) if len(self._decode(kept[:n])) >= cut)
    return Text(text[:cut], "stop", num_tokens)

  def _decode(self, ids: np.ndarray) -> str:
    return self.tokenizer.decode(ids.tolist())


def _find(text: str, stops: Sequence[str]) -> int | None:
  """Where the first of the stop strings begins."""
  found = [text.find(stop) for stop in stops]
  return min((start for start in found if start >= 0), default=None)


def _num_held(text: str, stops: Sequence[str]) -> int:
  """How many of the last characters may be the beginning of a stop string."""
  sizes = [size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
  return max(sizes, default=0)


def usage(num_prompt: int, num_tokens: int) -> dict[str, int]:
  """The tokens' numbers."""
  return {"prompt_tokens": num_prompt, "completion_tokens": num_tokens, "total_tokens": num_prompt + num_tokens}


@dataclasses.dataclass(frozen=True)
class Form:
  """The shape of answers: of `/v1/chat/completions`, or of `/v1/completions`."""

  model: str
  is_chat: bool
  number: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
  created: int = dataclasses.field(default_factory=lambda: int(time.time()))

  def whole(self, texts: Sequence[Text], num_prompt: int, asked: Asked) -> dict[str, Any]:
    """An answer in one piece."""
    choices = []
    for index, text in enumerate(texts):
      said = {"message": {"role": "assistant", "content": text.text}} if self.is_chat else {"text": text.text}
      choices.append(_choice(index, said, text.reason, self._log_probs(text, asked)))
    return self._envelope(choices, "") | {"usage": usage(num_prompt, sum(text.num_tokens for text in texts))}

  def _log_probs(self, text: Text, asked: Asked) -> dict[str, Any] | None:
    if not asked.with_logprobs:
      return None
    pairs = list(zip(text.pieces, text.log_probs, strict=True))
    if self.is_chat:
      tokens = [{"token": piece, "logprob": p, "bytes": list(piece.encode())} for piece, p in pairs]
      return {"content": [token | {"top_logprobs": [token] if asked.with_top else []} for token in tokens]}
    return {
      "tokens": list(text.pieces),
      "token_logprobs": list(text.log_probs),
      "top_logprobs": [{piece: p} if asked.with_top else {} for piece, p in pairs],
      "text_offset": list(itertools.accumulate(map(len, text.pieces[:-1]), initial=0))[: len(pairs)],
    }

  def event(self, index: int, text: str, *, role: str = "", reason: str | None = None) -> str:
    """A further piece of a choice in a stream."""
    delta = ({"role": role} if role else {}) | ({"content": text} if text or role else {})
    said = {"delta": delta} if self.is_chat else {"text": text}
    return _line(self._envelope([_choice(index, said, reason)], ".chunk"))

  def last_event(self, num_prompt: int, num_tokens: int) -> str:
    """The tokens' numbers at the end of a stream."""
    return _line(self._envelope([], ".chunk") | {"usage": usage(num_prompt, num_tokens)})

  def _envelope(self, choices: list[dict[str, Any]], chunk: str) -> dict[str, Any]:
    return {
      "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.number}",
      "object": f"chat.completion{chunk}" if self.is_chat else "text_completion",
      "created": self.created,
      "model": self.model,
      "choices": choices,
    }


def _choice(
  index: int, said: dict[str, Any], reason: str | None, log_probs: dict[str, Any] | None = None
) -> dict[str, Any]:
  return {"index": index, **said, "finish_reason": reason, "logprobs": log_probs}


def _line(value: dict[str, Any]) -> str:
  return f"data: {files.to_json(value)}\n\n"
