"""The HTTP side of serving: OpenAI's requests -> jobs -> answers, whole or as the decided prefix grows."""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import hmac
import ipaddress
import json
import pathlib
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dmpo_jax import files
from dmpo_jax.hub.chat import Turn
from dmpo_jax.hub.tokenizer import Tokenizer
from dmpo_jax.serve.answers import Form, Reader, Text
from dmpo_jax.serve.asked import Asked, Limits, Refused, read_asked, read_messages, read_prompts
from dmpo_jax.serve.engine import Engine, Job

MAX_BODY = 2**20  # bytes
MAX_DRAINED = 8 * MAX_BODY  # read to its end although it is too long, as clients listen once they have sent all
PAGE = pathlib.Path(__file__).parent / "page.html"
POLICY = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

Event = tuple[int, str, Any]  # number of the choice; state, done; what the engine delivers with it


def make_app(
  engine: Engine,
  tokenizer: Tokenizer,
  limits: Limits,
  *,
  model: str,
  api_key: str = "",
  is_local: bool = True,
  say: Callable[[str], None] = lambda line: None,
) -> Starlette:
  """Build the application.

  Args:
    model: its name in answers.
    api_key: what requests must bring as `Authorization: Bearer ...`; "": nothing.
    is_local: the address is this machine's own: requests in the name of another host, by which a web page could get
      here, are refused.
    say: gets a line for every request that has been answered.
  """
  service = Service(engine, tokenizer, limits, model, api_key)
  routes = [
    Route("/", service.page),
    Route("/health", service.health),
    Route("/v1/models", service.models),
    Route("/v1/models/{name:path}", service.one_model),
    Route("/v1/completions", service.complete, methods=["POST"]),
    Route("/v1/chat/completions", service.chat, methods=["POST"]),
    Route("/watch", service.watch, methods=["POST"]),
  ]
  return Starlette(
    routes=routes,
    middleware=[Middleware(RequestLog, say=say), *([Middleware(OwnHostOnly)] if is_local else [])],
    exception_handlers={Refused: _answer_refused, HTTPException: _answer_http, Exception: _answer_unexpected},
  )


def is_loopback(host: str) -> bool:
  """Whether a name or an address is this machine's own, whoever resolves it."""
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"


class RequestLog:
  """Says a line of every request: time, client, what was asked, status, seconds, and what the endpoint adds."""

  def __init__(self, app: ASGIApp, say: Callable[[str], None]):
    self.app, self.say = app, say

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      await self.app(scope, receive, send)
      return
    start, status = time.monotonic(), 500
    scope.setdefault("state", {})["tokens"] = ""

    async def note(message: Message) -> None:
      nonlocal status
      status = message.get("status", status)
      await send(message)

    try:
      await self.app(scope, receive, note)
    finally:
      client = (scope.get("client") or ("?",))[0]
      seconds = time.monotonic() - start
      path = scope["path"].encode("unicode_escape").decode()
      line = f"{time.strftime('%H:%M:%S')} {client} {scope['method']} {path} {status} {seconds:.2f} s"
      self.say(line + scope["state"]["tokens"])


class OwnHostOnly:
  """Refuses requests in the name of a host that is not this machine: a name may lead a browser here all the same."""

  def __init__(self, app: ASGIApp):
    self.app = app

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    host = Headers(scope=scope).get("host", "") if scope["type"] == "http" else "localhost"
    is_own = is_loopback(_without_port(host))
    answer = self.app if is_own else Refused(400, f"Host: {host} is not served here: ask localhost").response()
    await answer(scope, receive, send)


def _without_port(host: str) -> str:
  try:
    return urllib.parse.urlsplit(f"//{host}").hostname or ""
  except ValueError:  # brackets of an IPv6 address that are none
    return ""


def _answer_refused(request: Request, error: Exception) -> Response:
  assert isinstance(error, Refused)
  return error.response()


def _answer_http(request: Request, error: Exception) -> Response:
  """An address or a method that there is none of."""
  assert isinstance(error, HTTPException)
  answer = Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()
  answer.headers.update(error.headers or {})
  return answer


def _answer_unexpected(request: Request, error: Exception) -> Response:
  """A mistake of this program, of which the server's log has the traceback."""
  return Refused(500, f"unexpected: {type(error).__name__}").response()


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
    return JSONResponse({"object": "list", "data": [self._describe_model()]})

  def _describe_model(self) -> dict[str, Any]:
    return {"id": self.model, "object": "model", "created": 0, "owned_by": "dmpo_jax"}

  async def one_model(self, request: Request) -> Response:
    """The model by its name."""
    self._check_key(request)
    if request.path_params["name"] != self.model:
      raise Refused(404, f"there is no model {request.path_params['name']!r:.100} here: {self.model!r} is served")
    return JSONResponse(self._describe_model())

  async def health(self, request: Request) -> Response:
    """Whether requests are answered; asked by load balancers, who have no key."""
    return JSONResponse({"status": "ok"})

  async def complete(self, request: Request) -> Response:
    """`/v1/completions`: texts go on; no chat template."""
    fields = await self._read(request)
    given = fields.pop("prompt", None)
    prompts = read_prompts(given, self.tokenizer)
    self._note_lacking(request, [one for one in ([given] if isinstance(given, str) else given) if isinstance(one, str)])
    return await self._answer(request, prompts, fields, is_chat=False)

  async def chat(self, request: Request) -> Response:
    """`/v1/chat/completions`: a conversation goes on, by the chat template if there is one."""
    asked = await self._read(request)
    turns = read_messages(asked.pop("messages", None))
    prompt = self._encode_chat(turns)
    self._note_lacking(request, [text for _, text in turns])
    return await self._answer(request, [prompt], asked, is_chat=True)

  async def watch(self, request: Request) -> Response:
    """What the page listens to: the pieces after each model call, null where a position is not decided."""
    asked = await self._read(request)
    if not isinstance(asked.get("prompt"), str):
      raise Refused(400, "prompt must be one string", "prompt")
    if len(asked) > 1:
      raise Refused(400, f"only a prompt is read here, not {', '.join(sorted(asked.keys() - {'prompt'}))}")
    prompt = self._encode_chat([("user", asked["prompt"])])
    events = self._events(request, [prompt], read_asked({}, self.limits, is_chat=True))
    first = await anext(events)

    async def lines() -> AsyncIterator[str]:
      try:
        async for _, kind, value in _with_first(first, events):
          number, ids = value if kind == "state" else (None, value[0])
          yield json.dumps({"call": number, "pieces": self._pieces(ids), "text": self.tokenizer.decode(ids.tolist())})
          yield "\n"
      except Refused as error:
        yield json.dumps({"error": error.body()}) + "\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")

  def _pieces(self, ids: np.ndarray) -> list[str | None]:
    mask = self.tokenizer.mask_token_id
    return [None if token == mask else self.tokenizer.piece(int(token)) for token in ids]

  def _check_key(self, request: Request) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    is_right = scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.api_key.encode())
    if self.api_key and not is_right:
      raise Refused(401, "the API key is missing or wrong: send Authorization: Bearer KEY")

  async def _read(self, request: Request) -> dict[str, Any]:
    """Read the body, an object of JSON that is not too long."""
    self._check_key(request)
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
      raise Refused(415, "the body must be JSON, with Content-Type: application/json")
    too_long = Refused(413, f"the body has more than {MAX_BODY} bytes")
    if int(request.headers.get("content-length", 0)) > MAX_DRAINED:  # h11 has seen that it is a number
      raise too_long
    body, size = bytearray(), 0
    try:
      async with asyncio.timeout(self.limits.max_seconds):
        async for part in request.stream():
          size += len(part)
          body += part if size <= MAX_BODY else b""
          if size > MAX_DRAINED:
            raise too_long
      if size > MAX_BODY:
        raise too_long
      asked = json.loads(body)
      json.dumps(asked, ensure_ascii=False).encode()  # JSON can write half a character, which is no text
    except TimeoutError as error:
      raise Refused(408, f"the body did not come within {self.limits.max_seconds:g} seconds") from error
    except (ClientDisconnect, ValueError, RecursionError) as error:
      raise Refused(400, f"the body is not JSON ({error})") from error
    if not isinstance(asked, dict):
      raise Refused(400, "the body must be a JSON object")
    return asked

  def _encode_chat(self, turns: list[Turn]) -> list[int]:
    try:
      return self.tokenizer.encode_chat(turns)
    except ValueError as error:
      raise Refused(400, str(error), "messages") from error

  def _note_lacking(self, request: Request, texts: list[str]) -> None:
    """Let the log say which letters of a request the model does not see."""
    if lacking := self.tokenizer.lacking("".join(texts)):
      request.state.tokens = f", the tokenizer lacks {' '.join(lacking)}"

  async def _answer(
    self, request: Request, prompts: list[list[int]], fields: dict[str, Any], *, is_chat: bool
  ) -> Response:
    asked = read_asked(fields, self.limits, is_chat=is_chat)
    form, reader = Form(self.model, is_chat), Reader(self.tokenizer, self.limits, asked)
    num_prompt, num_choices = sum(map(len, prompts)), len(prompts) * asked.num_choices
    request.state.tokens += f", {num_prompt} prompt tokens, {num_choices} choices"
    events = self._events(request, prompts, asked)
    if not asked.is_streamed:
      texts = {number: reader.finish(*value) async for number, kind, value in events if kind == "done"}
      request.state.tokens += f", {sum(text.num_tokens for text in texts.values())} tokens"
      return JSONResponse(files.finite(form.whole([texts[number] for number in sorted(texts)], num_prompt, asked)))
    first = await anext(events)  # an error before the first byte is still an error's status
    stream = self._stream(request, _with_first(first, events), form, reader, num_prompt)
    return StreamingResponse(stream, media_type="text/event-stream")

  async def _stream(
    self, request: Request, events: AsyncIterator[Event], form: Form, reader: Reader, num_prompt: int
  ) -> AsyncIterator[str]:
    sent: collections.defaultdict[int, str] = collections.defaultdict(str)
    num_tokens = 0
    if form.is_chat:
      for index in range(reader.asked.num_choices):
        yield form.event(index, "", role="assistant")
    try:
      async for index, kind, value in events:
        end = reader.finish(*value) if kind == "done" else Text(reader.decided(value[1]), "", 0)
        if end.text.startswith(sent[index]) and end.text != sent[index]:
          yield form.event(index, end.text[len(sent[index]) :])
          sent[index] = end.text
        if kind == "done":
          num_tokens += end.num_tokens
          yield form.event(index, "", reason=end.reason)
      request.state.tokens += f", {num_tokens} tokens"
      if reader.asked.with_usage:
        yield form.last_event(num_prompt, num_tokens)
    except Refused as error:
      yield f"data: {json.dumps({'error': error.body()})}\n\n"
    yield "data: [DONE]\n\n"

  async def _events(self, request: Request, prompts: list[list[int]], asked: Asked) -> AsyncIterator[Event]:
    """Queue the prompts' choices and yield what becomes of them; a client who leaves gives the places up."""
    for prompt in prompts:
      if not prompt or len(prompt) > self.limits.max_prompt_length:
        allowed = f"from 1 to {self.limits.max_prompt_length} are allowed"
        raise Refused(400, f"the prompt has {len(prompt)} tokens: {allowed}", "prompt")
    if len(prompts) * asked.num_choices > self.limits.max_jobs:
      raise Refused(400, f"at most {self.limits.max_jobs} completions may be asked for at one time", "prompt")
    loop, events = asyncio.get_running_loop(), asyncio.Queue()

    def deliver(*event: Any) -> None:
      with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever listened
        loop.call_soon_threadsafe(events.put_nowait, event)

    jobs = [
      Job(prompt, functools.partial(deliver, first + choice), asked.seed, asked.temperature, choice)
      for first, prompt in zip(range(0, len(prompts) * asked.num_choices, asked.num_choices), prompts, strict=True)
      for choice in range(asked.num_choices)
    ]

    async def watch_client() -> None:
      while (await request.receive())["type"] != "http.disconnect":
        pass
      self.engine.withdraw(jobs)
      events.put_nowait((0, "left", None))

    deadline, num_done = loop.time() + self.limits.max_seconds, 0
    watching = asyncio.create_task(watch_client())
    try:
      if not self.engine.submit(jobs):
        raise Refused(429, "too many requests are waiting: try again later")
      while num_done < len(jobs):
        number, kind, value = await asyncio.wait_for(events.get(), deadline - loop.time())
        if kind == "failed":
          raise Refused(500, f"decoding failed: {value}")
        if kind == "left":
          raise Refused(499, "the client has left")  # which nobody reads
        num_done += kind == "done"
        yield number, kind, value
    except TimeoutError as error:
      raise Refused(504, f"no answer within {self.limits.max_seconds:g} seconds") from error
    finally:
      watching.cancel()
      self.engine.withdraw(jobs)


async def _with_first(first: Event, rest: AsyncIterator[Event]) -> AsyncIterator[Event]:
  yield first
  async for event in rest:
    yield event
