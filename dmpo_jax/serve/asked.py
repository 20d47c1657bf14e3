"""What a request asks for, read from its body and checked: every mistake is answered by name.

What would change the result and is not supported is refused rather than left out.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse

from dmpo_jax.hub.chat import Turn
from dmpo_jax.hub.tokenizer import Tokenizer

MAX_STOPS, MAX_STOP_LENGTH = 64, 256  # strings, characters of one
MAX_TEMPERATURE = 2.0  # as at OpenAI
MAX_WHOLE = 2**31  # of tokens; more than the completion has are as many as it has
LENGTHS = ("max_tokens", "max_completion_tokens")
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}  # theirs -> a template's
IGNORED = {"user", "metadata", "store"}  # say nothing of the result
FIXED = {  # OpenAI's defaults, which may be said as well
  "top_p": 1,
  "frequency_penalty": 0,
  "presence_penalty": 0,
  "echo": False,
  "logit_bias": {},
  "tools": [],
  "parallel_tool_calls": True,
  "response_format": {"type": "text"},
  "modalities": ["text"],
}
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}  # of answers with errors, by status


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a request may ask for."""

  completion_length: int  # tokens
  block_length: int
  can_revoke: bool  # the sampler may take tokens of its current block back
  temperature: float  # where a request names none
  max_choices: int  # completions of one prompt
  max_jobs: int  # completions of all prompts of one request
  max_prompt_length: int  # tokens
  max_seconds: float  # from its arrival to its answer


class Refused(Exception):
  """A request that is answered with an error of OpenAI's form."""

  def __init__(self, status: int, message: str, param: str | None = None):
    super().__init__(message)
    self.status, self.param = status, param

  def response(self) -> JSONResponse:
    return JSONResponse({"error": self.body()}, self.status, HEADERS.get(self.status))

  def body(self) -> dict[str, Any]:
    kind = "invalid_request_error" if self.status < 500 else "server_error"
    return {"message": str(self), "type": kind, "param": self.param, "code": None}


@dataclasses.dataclass(frozen=True)
class Asked:
  """How a prompt is to be completed."""

  max_tokens: int
  temperature: float
  seed: int | None
  num_choices: int
  stops: tuple[str, ...]  # the answer ends before the first of them
  is_streamed: bool
  with_usage: bool  # a stream ends with the tokens' numbers
  with_logprobs: bool  # each token with the log-probability of the model call that decided it
  with_top: bool  # and as the most likely one of that call, which a greedy answer's token is


def read_asked(fields: dict[str, Any], limits: Limits, *, is_chat: bool) -> Asked:
  """Check a body's fields, of which the prompt or the messages have been taken.

  Raises:
    Refused: a field is not what it may be, or is not supported.
  """
  fields = dict(fields)
  fields.pop("model", None)
  most = limits.completion_length
  lengths = [_whole(fields.pop(name, None), name, 1, MAX_WHOLE) or most for name in LENGTHS]
  num_choices = _whole(fields.pop("n", None), "n", 1, limits.max_choices) or 1
  is_streamed = _flag(fields.pop("stream", None), "stream")
  temperature = _temperature(fields.pop("temperature", None), limits.temperature)
  with_logprobs, with_top = _logprobs(fields, is_chat, is_streamed=is_streamed, is_greedy=temperature == 0)
  asked = Asked(
    max_tokens=min(most, *lengths),
    temperature=temperature,
    seed=_whole(fields.pop("seed", None), "seed", -(2**63), 2**63 - 1),
    num_choices=num_choices,
    stops=_stops(fields.pop("stop", None)),
    is_streamed=is_streamed,
    with_usage=_usage(fields.pop("stream_options", None), is_streamed),
    with_logprobs=with_logprobs,
    with_top=with_top,
  )
  for name, only in (FIXED | {"best_of": num_choices}).items():
    value = fields.pop(name, None)
    is_same = value == only and (type(value) is bool) == (type(only) is bool)  # to Python true is 1
    if value is not None and not is_same:
      raise Refused(400, f"{name} is {json.dumps(only)} on this server: leave it out", name)
  for name, value in fields.items():
    if name not in IGNORED and value is not None:
      raise Refused(400, f"{name} is not supported", name)
  return asked


def _logprobs(fields: dict[str, Any], is_chat: bool, *, is_streamed: bool, is_greedy: bool) -> tuple[bool, bool]:
  """Take what is asked of log-probabilities: whether they are, and the most likely token of each position with them."""
  value, top = fields.pop("logprobs", None), fields.pop("top_logprobs", None)
  if is_chat:
    is_asked, num_top, name = _flag(value, "logprobs"), _whole(top, "top_logprobs", 0, 1) or 0, "top_logprobs"
  else:  # where the number of the most likely tokens stands in logprobs itself
    value = None if value is False else value
    is_asked, num_top, name = value is not None, _whole(value, "logprobs", 0, 1) or 0, "logprobs"
    if top is not None:
      raise Refused(400, "top_logprobs is for chats: set logprobs", "top_logprobs")
  if num_top and not is_asked:
    raise Refused(400, "top_logprobs needs logprobs: true", "top_logprobs")
  if num_top and not is_greedy:
    raise Refused(400, f"{name} must be 0 where temperature is not: only the answer's own tokens are known", name)
  if is_asked and is_streamed:
    raise Refused(400, "logprobs needs stream: false", "logprobs")
  return is_asked, bool(num_top)


def read_prompts(prompt: Any, tokenizer: Tokenizer) -> list[list[int]]:
  """Read the prompts of `/v1/completions`: a text, ids, or a list of texts or of ids.

  Raises:
    Refused: they are none of these, or an id is not the tokenizer's.
  """
  prompts = prompt if isinstance(prompt, list) and not _are_ids(prompt) else [prompt]
  if not prompts or not all(isinstance(one, str) or _are_ids(one) for one in prompts):
    raise Refused(400, "prompt must be a string, a list of token ids, or a list of strings or of such lists", "prompt")
  for ids in prompts:
    if not isinstance(ids, str) and not all(0 <= token < tokenizer.vocab_size for token in ids):
      raise Refused(400, f"prompt must have token ids from 0 to {tokenizer.vocab_size - 1}", "prompt")
  return [tokenizer.encode(one) if isinstance(one, str) else one for one in prompts]


def _are_ids(value: Any) -> bool:
  return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def read_messages(messages: Any) -> list[Turn]:
  """Read a conversation: roles as a chat template knows them, and texts.

  Raises:
    Refused: it is none, or it ends with the assistant's turn.
  """
  if not isinstance(messages, list) or not messages:
    raise Refused(400, "messages must be a list of at least one message", "messages")
  turns = [_turn(message, f"messages[{number}]") for number, message in enumerate(messages)]
  if turns[-1][0] == "assistant":
    raise Refused(400, "the last message must not be the assistant's, who is to answer", "messages")
  return turns


def _turn(message: Any, where: str) -> Turn:
  if not isinstance(message, Mapping) or message.get("role") not in list(ROLES):  # not even hashable, perhaps
    raise Refused(400, f"{where} must have a role, one of {', '.join(ROLES)}", "messages")
  extra = [name for name, value in message.items() if name not in ("role", "content") and value is not None]
  if extra:
    raise Refused(400, f"{where}: {extra[0]} is not supported", "messages")
  content = message.get("content")
  if isinstance(content, list):  # in parts, of which there may be texts alone
    content = "".join(map(_text_of, content)) if all(_text_of(part) is not None for part in content) else None
  if not isinstance(content, str):
    raise Refused(400, f"{where} must have a text as its content", "messages")
  return ROLES[message["role"]], content


def _text_of(part: Any) -> str | None:
  is_text = isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
  return part["text"] if is_text else None


def _whole(value: Any, name: str, low: int, high: int) -> int | None:
  if value is not None and (type(value) is not int or not low <= value <= high):
    raise Refused(400, f"{name} must be a whole number from {low} to {high}", name)
  return value


def _temperature(value: Any, otherwise: float) -> float:
  if value is None:
    return otherwise
  if type(value) not in (int, float) or not 0 <= value <= MAX_TEMPERATURE:
    raise Refused(400, f"temperature must be a number from 0 (greedy) to {MAX_TEMPERATURE:g}", "temperature")
  return float(value)


def _flag(value: Any, name: str) -> bool:
  if value is not None and type(value) is not bool:
    raise Refused(400, f"{name} must be true or false", name)
  return bool(value)


def _usage(options: Any, is_streamed: bool) -> bool:
  if options is None:
    return False
  if not isinstance(options, Mapping) or not is_streamed:
    raise Refused(400, "stream_options must be an object, and needs stream: true", "stream_options")
  unknown = [name for name, value in options.items() if name != "include_usage" and value is not None]
  if unknown:
    raise Refused(400, f"stream_options: {unknown[0]} is not supported", "stream_options")
  return _flag(options.get("include_usage"), "stream_options")


def _stops(value: Any) -> tuple[str, ...]:
  stops: Sequence[Any] = [] if value is None else [value] if isinstance(value, str) else value
  is_list = isinstance(stops, list) and len(stops) <= MAX_STOPS
  if not is_list or not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
    allowed = f"a string or a list of at most {MAX_STOPS}, of 1 to {MAX_STOP_LENGTH} characters each"
    raise Refused(400, f"stop must be {allowed}", "stop")
  return tuple(stops)
