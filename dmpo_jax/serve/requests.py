"""Requests: the body of a request, checked field by field. Errors name the field.

Fields that would change the result and are not supported are refused, not ignored.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from dmpo_jax.hub.tokenizer import Tokenizer
from dmpo_jax.messages import Turn, read_messages

MAX_STOPS, MAX_STOP_LENGTH = 64, 256  # strings, characters of one
MAX_TEMPERATURE = 2.0  # as at OpenAI
MAX_WHOLE = 2**31  # tokens; more than the completion length means the completion length
LENGTHS = ("max_tokens", "max_completion_tokens")
IGNORED = {"user", "metadata", "store"}  # they do not change the result
FIXED = {  # only OpenAI's default is allowed
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
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}  # of error responses, by status


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a request may ask for."""

  completion_length: int  # tokens
  block_length: int
  can_revoke: bool  # the sampler may mask tokens of its current block again
  temperature: float  # default of a request
  max_choices: int  # completions a prompt
  max_jobs: int  # completions a request, over all its prompts
  max_prompt_length: int  # tokens
  max_seconds: float  # from a request's arrival to its response


class RequestError(Exception):
  """A request is refused; the client gets an error in OpenAI's format."""

  def __init__(self, status: int, message: str, param: str | None = None):
    super().__init__(message)
    self.status, self.param = status, param

  def response(self) -> JSONResponse:
    return JSONResponse({"error": self.body()}, self.status, HEADERS.get(self.status))

  def body(self) -> dict[str, Any]:
    kind = "invalid_request_error" if self.status < 500 else "server_error"
    return {"message": str(self), "type": kind, "param": self.param, "code": None}


@dataclasses.dataclass(frozen=True)
class Options:
  """How to complete a prompt."""

  max_tokens: int
  temperature: float
  seed: int | None
  num_choices: int
  stops: tuple[str, ...]  # the completion ends before the first of them
  is_streamed: bool
  with_usage: bool  # a stream ends with token counts
  with_logprobs: bool  # each token comes with its log-prob at the model call that decided it
  with_top: bool  # and with the most likely token of that call; greedy only, where it is the token itself


def read_options(fields: dict[str, Any], limits: Limits, *, is_chat: bool) -> Options:
  """Check the fields of a body without its prompt or messages.

  Raises:
    RequestError: a field has a bad value or is not supported.
  """
  fields = dict(fields)
  fields.pop("model", None)
  most = limits.completion_length
  lengths = [_whole(fields.pop(name, None), name, 1, MAX_WHOLE) or most for name in LENGTHS]
  num_choices = _whole(fields.pop("n", None), "n", 1, limits.max_choices) or 1
  is_streamed = _flag(fields.pop("stream", None), "stream")
  temperature = _temperature(fields.pop("temperature", None), limits.temperature)
  with_logprobs, with_top = _logprobs(fields, is_chat, is_streamed=is_streamed, is_greedy=temperature == 0)
  options = Options(
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
    is_same = value == only and (type(value) is bool) == (type(only) is bool)  # in Python True == 1
    if value is not None and not is_same:
      raise RequestError(400, f"{name} must be {json.dumps(only)} here: leave it out", name)
  for name, value in fields.items():
    if name not in IGNORED and value is not None:
      raise RequestError(400, f"{name} is not supported", name)
  return options


def _logprobs(fields: dict[str, Any], is_chat: bool, *, is_streamed: bool, is_greedy: bool) -> tuple[bool, bool]:
  """Take the fields on log-probs: whether to return them, and whether with the most likely token of each position."""
  value, top = fields.pop("logprobs", None), fields.pop("top_logprobs", None)
  if is_chat:
    is_wanted, num_top, name = _flag(value, "logprobs"), _whole(top, "top_logprobs", 0, 1) or 0, "top_logprobs"
  else:  # here logprobs itself is the number of most likely tokens
    value = None if value is False else value
    is_wanted, num_top, name = value is not None, _whole(value, "logprobs", 0, 1) or 0, "logprobs"
    if top is not None:
      raise RequestError(400, "top_logprobs is for chat completions: set logprobs", "top_logprobs")
  if num_top and not is_wanted:
    raise RequestError(400, "top_logprobs needs logprobs: true", "top_logprobs")
  if num_top and not is_greedy:
    raise RequestError(400, f"{name} must be 0 unless temperature is 0: only the sampled tokens are known", name)
  if is_wanted and is_streamed:
    raise RequestError(400, "logprobs needs stream: false", "logprobs")
  return is_wanted, bool(num_top)


def read_prompts(prompt: Any, tokenizer: Tokenizer) -> list[list[int]]:
  """Read the prompts of `/v1/completions`: a text, token ids, or a list of either.

  Raises:
    RequestError: they are something else, or an id is outside the vocabulary.
  """
  prompts = prompt if isinstance(prompt, list) and not _are_ids(prompt) else [prompt]
  if not prompts or not all(isinstance(one, str) or _are_ids(one) for one in prompts):
    raise RequestError(400, "prompt must be a string, a list of token ids, or a list of either", "prompt")
  for ids in prompts:
    if not isinstance(ids, str) and not all(0 <= token < tokenizer.vocab_size for token in ids):
      raise RequestError(400, f"prompt must have token ids from 0 to {tokenizer.vocab_size - 1}", "prompt")
  return [tokenizer.encode(one) if isinstance(one, str) else one for one in prompts]


def _are_ids(value: object) -> bool:
  return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def read_turns(given: object) -> list[Turn]:
  """Read the messages of a conversation.

  Raises:
    RequestError: it is no conversation, or its last message is the assistant's.
  """
  try:
    return read_messages(given)
  except ValueError as error:
    raise RequestError(400, str(error), "messages") from error


def _whole(value: Any, name: str, low: int, high: int) -> int | None:
  if value is not None and (type(value) is not int or not low <= value <= high):
    raise RequestError(400, f"{name} must be a whole number from {low} to {high}", name)
  return value


def _temperature(value: Any, otherwise: float) -> float:
  if value is None:
    return otherwise
  if type(value) not in (int, float) or not 0 <= value <= MAX_TEMPERATURE:
    raise RequestError(400, f"temperature must be a number from 0 (greedy) to {MAX_TEMPERATURE:g}", "temperature")
  return float(value)


def _flag(value: object, name: str) -> bool:
  if value is not None and type(value) is not bool:
    raise RequestError(400, f"{name} must be true or false", name)
  return bool(value)


def _usage(options: object, is_streamed: bool) -> bool:
  if options is None:
    return False
  if not isinstance(options, Mapping) or not is_streamed:
    raise RequestError(400, "stream_options must be an object, and needs stream: true", "stream_options")
  unknown = [name for name, value in options.items() if name != "include_usage" and value is not None]
  if unknown:
    raise RequestError(400, f"stream_options: {unknown[0]} is not supported", "stream_options")
  return _flag(options.get("include_usage"), "stream_options")


def _stops(value: object) -> tuple[str, ...]:
  stops: Any = [] if value is None else [value] if isinstance(value, str) else value
  is_list = isinstance(stops, list) and len(stops) <= MAX_STOPS
  if not is_list or not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
    allowed = f"a string or a list of at most {MAX_STOPS}, of 1 to {MAX_STOP_LENGTH} characters each"
    raise RequestError(400, f"stop must be {allowed}", "stop")
  return tuple(stops)
