"""The HTTP side of serving: OpenAI's requests -> jobs -> answers, whole or as the decided prefix grows.

What would change the result and is not supported is refused by name rather than left out.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import pathlib
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dmpo_jax.serve.engine import Engine, Job
from dmpo_jax.tokenizer import Tokenizer

MAX_BODY = 2**20  # bytes
PAGE = pathlib.Path(__file__).parent / "page.html"
POLICY = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
LENGTHS = ("max_tokens", "max_completion_tokens")
IGNORED = {"user", "metadata", "store", "stream_options"}  # say nothing of the result
FIXED = {"n": 1, "top_p": 1, "best_of": 1, "frequency_penalty": 0, "presence_penalty": 0, "echo": False}


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a request may ask for."""

  completion_length: int  # tokens
  block_length: int
  can_revoke: bool  # the sampler may take tokens of its current block back
  temperature: float  # of the server: the sampler is compiled with it
  max_prompt_length: int  # tokens
  max_seconds: float  # from its arrival to its answer


class Refused(Exception):
  """A request that is answered with an error of OpenAI's form."""

  def __init__(self, status: int, message: str, param: str | None = None):
    super().__init__(message)
    self.status, self.param = status, param

  def response(self) -> JSONResponse:
    return JSONResponse({"error": self.body()}, self.status, {"Retry-After": "1"} if self.status == 429 else None)

  def body(self) -> dict[str, Any]:
    kind = "invalid_request_error" if self.status < 500 else "server_error"
    return {"message": str(self), "type": kind, "param": self.param, "code": None}


def make_app(
  engine: Engine, tokenizer: Tokenizer, limits: Limits, *, model: str, api_key: str = "", is_local: bool = True
) -> Starlette:
  """Build the application.

  Args:
    model: its name in answers.
    api_key: what requests must bring as `Authorization: Bearer ...`; "": nothing.
    is_local: the address is this machine's own: requests in the name of another host, by which a web page could get
      here, are refused.
  """
  service = Service(engine, tokenizer, limits, model, api_key)
  routes = [
    Route("/", service.page),
    Route("/v1/models", service.models),
    Route("/v1/completions", service.complete, methods=["POST"]),
    Route("/v1/chat/completions", service.chat, methods=["POST"]),
    Route("/watch", service.watch, methods=["POST"]),
  ]
  hosts = ["localhost", "127.0.0.1"]
  middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)] if is_local else []
  return Starlette(
    routes=routes, middleware=middleware, exception_handlers={Refused: _answer_refused, HTTPException: _answer_http}
  )


def _answer_refused(request: Request, error: Exception) -> Response:
  assert isinstance(error, Refused)
  return error.response()


def _answer_http(request: Request, error: Exception) -> Response:
  """An address or a method that there is none of."""
  assert isinstance(error, HTTPException)
  return Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()


@dataclasses.dataclass(frozen=True)
class Service:
  """The endpoints."""

  engine: Engine
  tokenizer: Tokenizer
  limits: Limits
  model: str
  api_key: str

  async def page(self, request: Request) -> Response:
    """The page to type a prompt and watch it denoise."""
    return HTMLResponse(PAGE.read_text(), headers={"Content-Security-Policy": POLICY})

  async def models(self, request: Request) -> Response:
    """The one model there is."""
    self._check_key(request)
    one = {"id": self.model, "object": "model", "created": 0, "owned_by": "dmpo_jax"}
    return JSONResponse({"object": "list", "data": [one]})

  async def complete(self, request: Request) -> Response:
    """`/v1/completions`: a text goes on; no chat template."""
    asked = await self._read(request)
    prompt = asked.pop("prompt", None)
    if not isinstance(prompt, str):
      raise Refused(400, "prompt must be one string", "prompt")
    return await self._answer(self.tokenizer.encode(prompt), asked, is_chat=False)

  async def chat(self, request: Request) -> Response:
    """`/v1/chat/completions`: one user's message by the chat template, if there is one."""
    asked = await self._read(request)
    return await self._answer(self._encode_chat(asked.pop("messages", None)), asked, is_chat=True)

  async def watch(self, request: Request) -> Response:
    """What the page listens to: the pieces after each model call, null where a position is not decided."""
    asked = await self._read(request)
    if not isinstance(asked.get("prompt"), str):
      raise Refused(400, "prompt must be one string", "prompt")
    events = self._events(self._encode_chat([{"role": "user", "content": asked["prompt"]}]), None)
    first = await anext(events)

    async def lines() -> AsyncIterator[str]:
      try:
        async for kind, value in _with_first(first, events):
          number, ids = value if kind == "state" else (None, value)
          yield json.dumps({"call": number, "pieces": self._pieces(ids), "text": self.tokenizer.decode(ids.tolist())})
          yield "\n"
      except Refused as error:
        yield json.dumps({"error": error.body()}) + "\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")

  def _pieces(self, ids: np.ndarray) -> list[str | None]:
    mask = self.tokenizer.mask_token_id
    return [None if token == mask else self.tokenizer.piece(int(token)) for token in ids]

  def _check_key(self, request: Request) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if self.api_key and not hmac.compare_digest(given.encode(), self.api_key.encode()):
      raise Refused(401, "the API key is missing or wrong: send Authorization: Bearer KEY")

  async def _read(self, request: Request) -> dict[str, Any]:
    """Read the body, an object of JSON that is not too long."""
    self._check_key(request)
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
      raise Refused(415, "the body must be JSON, with Content-Type: application/json")
    body = bytearray()
    try:
      async with asyncio.timeout(self.limits.max_seconds):
        async for part in request.stream():
          body += part
          if len(body) > MAX_BODY:
            raise Refused(413, f"the body has more than {MAX_BODY} bytes")
      asked = json.loads(body)
    except TimeoutError as error:
      raise Refused(408, f"the body did not come within {self.limits.max_seconds:g} seconds") from error
    except (ClientDisconnect, ValueError, RecursionError) as error:
      raise Refused(400, f"the body is not JSON ({error})") from error
    if not isinstance(asked, dict):
      raise Refused(400, "the body must be a JSON object")
    return asked

  def _encode_chat(self, messages: Any) -> list[int]:
    fits = isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], Mapping)
    if not fits or messages[0].get("role") != "user" or not isinstance(messages[0].get("content"), str):
      raise Refused(400, "messages must be one message of the user, its content a string", "messages")
    try:
      return self.tokenizer.encode_prompt(messages[0]["content"])
    except ValueError as error:
      raise Refused(400, str(error), "messages") from error

  def _check(self, asked: dict[str, Any]) -> tuple[int, int | None, bool]:
    """Return the most tokens of the answer, the seed, and whether to stream."""
    own = self.limits
    most, seed, stream = own.completion_length, asked.pop("seed", None), asked.pop("stream", None) or False
    asked.pop("model", None)
    for name in LENGTHS:
      value = asked.pop(name, None)
      if value is not None and (type(value) is not int or not 1 <= value <= own.completion_length):
        raise Refused(400, f"{name} must be a whole number from 1 to {own.completion_length}", name)
      most = most if value is None else value
    if seed is not None and type(seed) is not int:
      raise Refused(400, "seed must be a whole number", "seed")
    if type(stream) is not bool:
      raise Refused(400, "stream must be true or false", "stream")
    for name, value in (FIXED | {"temperature": own.temperature}).items():
      if asked.pop(name, None) not in (None, value):
        raise Refused(400, f"{name} is {value} on this server: leave it out", name)
    for name, value in asked.items():
      if name not in IGNORED and value is not None:
        raise Refused(400, f"{name} is not supported", name)
    return most, seed, stream

  async def _answer(self, prompt: list[int], asked: dict[str, Any], *, is_chat: bool) -> Response:
    most, seed, stream = self._check(asked)
    form = Form(self.model, is_chat)
    events = self._events(prompt, seed)
    if not stream:
      async for kind, ids in events:
        if kind == "done":
          text, reason, count = self._finish(ids, most)
          return JSONResponse(form.whole(text, reason, len(prompt), count))
    first = await anext(events)  # an error before the first byte is still an error's status
    return StreamingResponse(self._stream(_with_first(first, events), form, most), media_type="text/event-stream")

  async def _stream(self, events: AsyncIterator[tuple[str, Any]], form: "Form", most: int) -> AsyncIterator[str]:
    sent = ""
    if form.is_chat:
      yield form.event("", role="assistant")
    try:
      async for kind, value in events:
        if kind == "state":
          text = self._decided(value[1], most)
        else:
          text, reason, _ = self._finish(value, most)
        if text.startswith(sent) and text != sent:
          yield form.event(text[len(sent) :])
          sent = text
      yield form.event("", reason=reason)
    except Refused as error:
      yield f"data: {json.dumps({'error': error.body()})}\n\n"
    yield "data: [DONE]\n\n"

  def _decided(self, ids: np.ndarray, most: int) -> str:
    """The text that nothing will change any more: before the first MASK, less a character that is not whole."""
    is_masked = ids == self.tokenizer.mask_token_id
    end = int(np.argmax(is_masked)) if is_masked.any() else len(ids)
    if self.limits.can_revoke:
      end -= end % self.limits.block_length
    return self.tokenizer.decode(ids[: min(end, most)].tolist()).rstrip("\ufffd")

  def _finish(self, ids: np.ndarray, most: int) -> tuple[str, str, int]:
    """Return the text, why it ends, and its number of tokens."""
    kept = ids[:most].tolist()
    ends = [i for i, token in enumerate(kept) if token in (self.tokenizer.eos_token_id, self.tokenizer.eot_token_id)]
    return self.tokenizer.decode(kept), "stop" if ends else "length", ends[0] if ends else len(kept)

  async def _events(self, prompt: list[int], seed: int | None) -> AsyncIterator[tuple[str, Any]]:
    """Queue a prompt and yield what becomes of it, to its end; who stops listening gives its place up."""
    if not prompt or len(prompt) > self.limits.max_prompt_length:
      raise Refused(400, f"the prompt has {len(prompt)} tokens: from 1 to {self.limits.max_prompt_length} are allowed")
    loop, events = asyncio.get_running_loop(), asyncio.Queue()

    def deliver(*event: Any) -> None:
      with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever listened
        loop.call_soon_threadsafe(events.put_nowait, event)

    job = Job(prompt, deliver, seed)
    if not self.engine.submit(job):
      raise Refused(429, "too many requests are waiting: try again later")
    deadline, kind = loop.time() + self.limits.max_seconds, ""
    try:
      while kind != "done":
        kind, value = await asyncio.wait_for(events.get(), deadline - loop.time())
        if kind == "failed":
          raise Refused(500, f"decoding failed: {value}")
        yield kind, value
    except TimeoutError as error:
      raise Refused(504, f"no answer within {self.limits.max_seconds:g} seconds") from error
    finally:
      job.is_cancelled = True


async def _with_first(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
  yield first
  async for event in rest:
    yield event


@dataclasses.dataclass(frozen=True)
class Form:
  """The shape of answers: of `/v1/chat/completions`, or of `/v1/completions`."""

  model: str
  is_chat: bool
  number: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
  created: int = dataclasses.field(default_factory=lambda: int(time.time()))

  def whole(self, text: str, reason: str, num_prompt: int, num_tokens: int) -> dict[str, Any]:
    """An answer in one piece."""
    said = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
    usage = {
      "prompt_tokens": num_prompt,
      "completion_tokens": num_tokens,
      "total_tokens": num_prompt + num_tokens,
    }
    return self._envelope(said, reason, "") | {"usage": usage}

  def event(self, text: str, *, role: str = "", reason: str | None = None) -> str:
    """A further piece of a streamed answer."""
    delta = ({"role": role} if role else {}) | ({"content": text} if text or role else {})
    said = {"delta": delta} if self.is_chat else {"text": text}
    return f"data: {json.dumps(self._envelope(said, reason, '.chunk'))}\n\n"

  def _envelope(self, said: dict[str, Any], reason: str | None, chunk: str) -> dict[str, Any]:
    return {
      "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.number}",
      "object": f"chat.completion{chunk}" if self.is_chat else "text_completion",
      "created": self.created,
      "model": self.model,
      "choices": [{"index": 0, **said, "finish_reason": reason, "logprobs": None}],
    }
