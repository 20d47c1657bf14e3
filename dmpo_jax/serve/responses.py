"""Responses: a completion's ids become text, cut at the first stop string, in OpenAI's format."""

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
from dmpo_jax.serve.requests import Limits, Options

TINY = 1e-38  # probabilities are at least this, as JSON has no -infinity for log 0


class Text(NamedTuple):
  """A finished completion."""

  text: str
  reason: str  # why it ends: stop (an end token or a stop string), length
  num_tokens: int
  pieces: Sequence[str] = ()  # of the tokens, if log-probs were requested
  log_probs: Sequence[float] = ()


@dataclasses.dataclass(frozen=True)
class Reader:
  """Turns completions' ids into text under a request's options."""

  tokenizer: Tokenizer
  limits: Limits
  options: Options

  def decided(self, ids: np.ndarray, given: int = 0) -> str:
    """Return the text that later model calls cannot change.

    This is the text before the first MASK, without an incomplete character or the possible start of a stop string.

    Args:
      given: tokens of the prompt in the completion's first block.
    """
    is_masked = ids == self.tokenizer.mask_token_id
    end = int(np.argmax(is_masked)) if is_masked.any() else len(ids)
    if self.limits.can_revoke:
      end = max(end - (end + given) % self.limits.block_length, 0)
    text = self._decode(ids[: min(end, self.options.max_tokens)]).rstrip("\ufffd")
    cut = _find(text, self.options.stops)
    return text[: len(text) - _num_held(text, self.options.stops)] if cut is None else text[:cut]

  def finish(self, ids: np.ndarray, confidence: np.ndarray) -> Text:
    """Return the finished text, why it ends, and its number of tokens without an end token or a stop string.

    Args:
      confidence: the model's probability of each token, at the call that decided it.
    """
    text = self._end(ids[: self.options.max_tokens])
    if not self.options.with_logprobs:
      return text
    kept = slice(text.num_tokens)
    # A character of several tokens belongs to the last of them: before it the character is incomplete.
    whole = [self._decode(ids[:end]).rstrip("\ufffd") for end in range(text.num_tokens)] + [self._decode(ids[kept])]
    pieces = [after[len(before) :] for before, after in itertools.pairwise(whole)]
    return text._replace(pieces=pieces, log_probs=[math.log(max(p, TINY)) for p in confidence[kept].tolist()])

  def _end(self, kept: np.ndarray) -> Text:
    ends = np.flatnonzero(np.isin(kept, [*self.tokenizer.end_token_ids, self.tokenizer.eot_token_id]))
    num_tokens, reason = (int(ends[0]), "stop") if len(ends) else (len(kept), "length")
    text = self._decode(kept)
    cut = _find(text, self.options.stops)
    if cut is None:
      return Text(text, reason, num_tokens)
    num_tokens = next(n for n in range(num_tokens + 1) if len(self._decode(kept[:n])) >= cut)
    return Text(text[:cut], "stop", num_tokens)

  def _decode(self, ids: np.ndarray) -> str:
    return self.tokenizer.decode(ids.tolist())


def _find(text: str, stops: Sequence[str]) -> int | None:
  """Return where the first stop string begins; None if there is none."""
  found = [text.find(stop) for stop in stops]
  return min((start for start in found if start >= 0), default=None)


def _num_held(text: str, stops: Sequence[str]) -> int:
  """Return how many characters at the end may be the start of a stop string."""
  sizes = [size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
  return max(sizes, default=0)


def usage(num_prompt: int, num_tokens: int) -> dict[str, int]:
  """Count tokens, in OpenAI's format."""
  return {"prompt_tokens": num_prompt, "completion_tokens": num_tokens, "total_tokens": num_prompt + num_tokens}


@dataclasses.dataclass(frozen=True)
class ResponseFormat:
  """Formats the responses to one request, of `/v1/chat/completions` or of `/v1/completions`."""

  model: str
  is_chat: bool
  number: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
  created: int = dataclasses.field(default_factory=lambda: int(time.time()))

  def whole(self, texts: Sequence[Text], num_prompt: int, options: Options) -> dict[str, Any]:
    """Format a response that is not streamed."""
    choices = []
    for index, text in enumerate(texts):
      content = {"message": {"role": "assistant", "content": text.text}} if self.is_chat else {"text": text.text}
      choices.append(_choice(index, content, text.reason, self._log_probs(text, options)))
    return self._envelope(choices, "") | {"usage": usage(num_prompt, sum(text.num_tokens for text in texts))}

  def _log_probs(self, text: Text, options: Options) -> dict[str, Any] | None:
    if not options.with_logprobs:
      return None
    pairs = list(zip(text.pieces, text.log_probs, strict=True))
    if self.is_chat:
      tokens = [{"token": piece, "logprob": p, "bytes": list(piece.encode())} for piece, p in pairs]
      return {"content": [token | {"top_logprobs": [token] if options.with_top else []} for token in tokens]}
    return {
      "tokens": list(text.pieces),
      "token_logprobs": list(text.log_probs),
      "top_logprobs": [{piece: p} if options.with_top else {} for piece, p in pairs],
      "text_offset": list(itertools.accumulate(map(len, text.pieces[:-1]), initial=0))[: len(pairs)],
    }

  def event(self, index: int, text: str, *, role: str = "", reason: str | None = None) -> str:
    """Format the next piece of a choice in a stream."""
    delta = ({"role": role} if role else {}) | ({"content": text} if text or role else {})
    content = {"delta": delta} if self.is_chat else {"text": text}
    return _line(self._envelope([_choice(index, content, reason)], ".chunk"))

  def last_event(self, num_prompt: int, num_tokens: int) -> str:
    """Format the token counts at the end of a stream."""
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
  index: int, content: dict[str, Any], reason: str | None, log_probs: dict[str, Any] | None = None
) -> dict[str, Any]:
  return {"index": index, **content, "finish_reason": reason, "logprobs": log_probs}


def _line(value: dict[str, Any]) -> str:
  return f"data: {files.to_json(value)}\n\n"
