"""The HTTP side of serving: OpenAI requests -> jobs -> responses, whole or streamed as the decided prefix grows."""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import hmac
import ipaddress
import json
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
from dmpo_jax.hub.tokenizer import Tokenizer
from dmpo_jax.messages import Turn
from dmpo_jax.serve.engine import Job, JobQueue
from dmpo_jax.serve.page import POLICY, About, render
from dmpo_jax.serve.requests import Limits, Options, RequestError, read_options, read_prompts, read_turns
from dmpo_jax.serve.responses import Reader, ResponseFormat, Text

MAX_BODY = 2**20  # bytes
MAX_DRAINED = 8 * MAX_BODY  # a longer body is read up to here, as clients read the response only after sending

Event = tuple[int, str, Any]  # index of the choice; state or done; the engine's value


def make_app(
  engine: JobQueue,
  tokenizer: Tokenizer,
  limits: Limits,
  *,
  model: str,
  about: About,
  api_key: str = "",
  is_local: bool = True,
  log: Callable[[str], None] = lambda line: None,
) -> Starlette:
  """Build the application.

  Args:
    model: its name in responses.
    about: what the page says of it.
    api_key: the key that requests must send as `Authorization: Bearer ...`; "": none.
    is_local: the address is this machine's own: requests with another Host header, by which a web page could reach the
      server, are refused.
    log: is called with one line for every finished request.
  """
  service = Service(engine, tokenizer, limits, model, about, api_key)
  routes = [
    Route("/", service.page),
    Route("/about", service.describe),
    Route("/health", service.health),
    Route("/v1/models", service.models),
    Route("/v1/models/{name:path}", service.one_model),
    Route("/v1/completions", service.complete, methods=["POST"]),
    Route("/v1/chat/completions", service.chat, methods=["POST"]),
    Route("/watch", service.watch, methods=["POST"]),
  ]
  return Starlette(
    routes=routes,
    middleware=[Middleware(RequestLog, log=log), *([Middleware(OwnHostOnly)] if is_local else [])],
    exception_handlers={RequestError: _request_error, HTTPException: _http_error, Exception: _unexpected_error},
  )


def is_loopback(host: str) -> bool:
  """Whether a host name or address can only be this machine."""
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"


class RequestLog:
  """Logs one line a request: time, client, method, path, status, seconds, and what the endpoint adds."""

  def __init__(self, app: ASGIApp, log: Callable[[str], None]):
    self.app, self.log = app, log

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
      self.log(line + scope["state"]["tokens"])


class OwnHostOnly:
  """Refuses requests whose Host header names another machine: DNS may lead a browser here under any name."""

  def __init__(self, app: ASGIApp):
    self.app = app

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    host = Headers(scope=scope).get("host", "") if scope["type"] == "http" else "localhost"
    is_own = is_loopback(_without_port(host))
    respond = self.app if is_own else RequestError(400, f"Host: {host} is not served here: use localhost").response()
    await respond(scope, receive, send)


def _without_port(host: str) -> str:
  try:
    return urllib.parse.urlsplit(f"//{host}").hostname or ""
  except ValueError:  # unmatched brackets of an IPv6 address
    return ""


def _request_error(request: Request, error: Exception) -> Response:
  assert isinstance(error, RequestError)
  return error.response()


def _http_error(request: Request, error: Exception) -> Response:
  """Respond to an unknown path or method."""
  assert isinstance(error, HTTPException)
  response = RequestError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()
  response.headers.update(error.headers or {})
  return response


def _unexpected_error(request: Request, error: Exception) -> Response:
  """Respond to a bug of the server, whose log has the traceback."""
  return RequestError(500, f"unexpected: {type(error).__name__}").response()


@dataclasses.dataclass(frozen=True)
class Service:
  """The endpoints."""

  engine: JobQueue
  tokenizer: Tokenizer
  limits: Limits
  model: str
  about: About
  api_key: str

  async def page(self, request: Request) -> Response:
    """Serve the page on which a prompt is typed and its denoising shown."""
    return HTMLResponse(render(), headers={"Content-Security-Policy": POLICY})

  async def describe(self, request: Request) -> Response:
    """Tell the page what is served."""
    self._check_key(request)
    limits = self.limits
    return JSONResponse(self.about.as_json(self.model, limits.completion_length, limits.block_length))

  async def models(self, request: Request) -> Response:
    """List the one model."""
    self._check_key(request)
    return JSONResponse({"object": "list", "data": [self._describe_model()]})

  def _describe_model(self) -> dict[str, Any]:
    return {"id": self.model, "object": "model", "created": 0, "owned_by": "dmpo_jax"}

  async def one_model(self, request: Request) -> Response:
    """Describe the model of this name."""
    self._check_key(request)
    if request.path_params["name"] != self.model:
      raise RequestError(404, f"there is no model {request.path_params['name']!r:.100} here: {self.model!r} is served")
    return JSONResponse(self._describe_model())

  async def health(self, request: Request) -> Response:
    """Say that the server responds; load balancers call this without a key."""
    return JSONResponse({"status": "ok"})

  async def complete(self, request: Request) -> Response:
    """`/v1/completions`: continue texts, without a chat template."""
    fields = await self._read(request)
    given = fields.pop("prompt", None)
    prompts = read_prompts(given, self.tokenizer)
    self._note_lacking(request, [one for one in ([given] if isinstance(given, str) else given) if isinstance(one, str)])
    return await self._respond(request, prompts, fields, is_chat=False)

  async def chat(self, request: Request) -> Response:
    """`/v1/chat/completions`: continue a conversation, rendered by the chat template if there is one."""
    fields = await self._read(request)
    turns = read_turns(fields.pop("messages", None))
    prompt = self._encode_chat(turns)
    self._note_lacking(request, [text for _, text in turns])
    return await self._respond(request, [prompt], fields, is_chat=True)

  async def watch(self, request: Request) -> Response:
    """Stream to the page what its prompt lacks, and the pieces after each model call; null is a masked position."""
    fields = await self._read(request)
    if not isinstance(fields.get("prompt"), str):
      raise RequestError(400, "prompt must be one string", "prompt")
    if len(fields) > 1:
      raise RequestError(400, f"only prompt is read here, not {', '.join(sorted(fields.keys() - {'prompt'}))}")
    prompt, grid = self._encode_chat(fields["prompt"]), self.about.grid_of(fields["prompt"])
    self._note_lacking(request, [fields["prompt"]])
    lacking, given = self.tokenizer.lacking(fields["prompt"]), self._num_given(prompt)
    head = {"lacking": lacking, "grid": grid and grid.drawn, "given": given}
    events = self._events(request, [prompt], read_options({}, self.limits, is_chat=True))
    first = await anext(events)

    async def lines() -> AsyncIterator[str]:
      yield json.dumps(head) + "\n"
      try:
        async for _, kind, value in _with_first(first, events):
          number, ids = value if kind == "state" else (None, value[0])
          pieces, text = self._pieces(ids), self.tokenizer.decode(ids.tolist())
          wrong = grid.find_wrong(pieces) if grid else []
          yield json.dumps({"call": number, "pieces": pieces, "text": text, "wrong": wrong}) + "\n"
      except RequestError as error:
        yield json.dumps({"error": error.body()}) + "\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")

  def _pieces(self, ids: np.ndarray) -> list[str | None]:
    mask = self.tokenizer.mask_token_id
    return [None if token == mask else self.tokenizer.piece(int(token)) for token in ids]

  def _check_key(self, request: Request) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    is_right = scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.api_key.encode())
    if self.api_key and not is_right:
      raise RequestError(401, "the API key is missing or wrong: send Authorization: Bearer KEY")

  async def _read(self, request: Request) -> dict[str, Any]:
    """Read the body: a JSON object of limited size."""
    self._check_key(request)
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
      raise RequestError(415, "the body must be JSON, with Content-Type: application/json")
    too_long = RequestError(413, f"the body has more than {MAX_BODY} bytes")
    if int(request.headers.get("content-length", 0)) > MAX_DRAINED:  # h11 has checked that it is a number
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
      fields = json.loads(body)
      json.dumps(fields, ensure_ascii=False).encode()  # fails for half a character, which JSON can hold
    except TimeoutError as error:
      raise RequestError(408, f"the body did not arrive within {self.limits.max_seconds:g} seconds") from error
    except (ClientDisconnect, ValueError, RecursionError) as error:
      raise RequestError(400, f"the body is not JSON ({error})") from error
    if not isinstance(fields, dict):
      raise RequestError(400, "the body must be a JSON object")
    return fields

  def _num_given(self, prompt: list[int]) -> int:
    """Count the prompt's tokens in the completion's first block."""
    return len(prompt) % self.limits.block_length if self.about.blocks_have_prompt else 0

  def _encode_chat(self, prompt: str | list[Turn]) -> list[int]:
    try:
      return self.tokenizer.encode_prompt(prompt)
    except ValueError as error:
      raise RequestError(400, str(error), "messages") from error

  def _note_lacking(self, request: Request, texts: list[str]) -> None:
    """Note in the request log which characters of a request have no token."""
    if lacking := self.tokenizer.lacking("".join(texts)):
      request.state.tokens = f", the tokenizer lacks {' '.join(lacking)}"

  async def _respond(
    self, request: Request, prompts: list[list[int]], fields: dict[str, Any], *, is_chat: bool
  ) -> Response:
    options = read_options(fields, self.limits, is_chat=is_chat)
    form, reader = ResponseFormat(self.model, is_chat), Reader(self.tokenizer, self.limits, options)
    num_prompt, num_choices = sum(map(len, prompts)), len(prompts) * options.num_choices
    request.state.tokens += f", {num_prompt} prompt tokens, {num_choices} choices"
    events = self._events(request, prompts, options)
    if not options.is_streamed:
      texts = {number: reader.finish(*value) async for number, kind, value in events if kind == "done"}
      request.state.tokens += f", {sum(text.num_tokens for text in texts.values())} tokens"
      return JSONResponse(files.finite(form.whole([texts[number] for number in sorted(texts)], num_prompt, options)))
    first = await anext(events)  # an error before the first event still sets the status
    stream = self._stream(request, _with_first(first, events), form, reader, prompts)
    return StreamingResponse(stream, media_type="text/event-stream")

  async def _stream(
    self, request: Request, events: AsyncIterator[Event], form: ResponseFormat, reader: Reader, prompts: list[list[int]]
  ) -> AsyncIterator[str]:
    sent: collections.defaultdict[int, str] = collections.defaultdict(str)
    given = [self._num_given(prompt) for prompt in prompts for _ in range(reader.options.num_choices)]
    num_tokens = 0
    if form.is_chat:
      for index in range(reader.options.num_choices):
        yield form.event(index, "", role="assistant")
    try:
      async for index, kind, value in events:
        end = reader.finish(*value) if kind == "done" else Text(reader.decided(value[1], given[index]), "", 0)
        if end.text.startswith(sent[index]) and end.text != sent[index]:
          yield form.event(index, end.text[len(sent[index]) :])
          sent[index] = end.text
        if kind == "done":
          num_tokens += end.num_tokens
          yield form.event(index, "", reason=end.reason)
      request.state.tokens += f", {num_tokens} tokens"
      if reader.options.with_usage:
        yield form.last_event(sum(map(len, prompts)), num_tokens)
    except RequestError as error:
      yield f"data: {json.dumps({'error': error.body()})}\n\n"
    yield "data: [DONE]\n\n"

  async def _events(self, request: Request, prompts: list[list[int]], options: Options) -> AsyncIterator[Event]:
    """Queue a job for each choice of each prompt and yield their events; a client that disconnects withdraws them."""
    for prompt in prompts:
      if not prompt or len(prompt) > self.limits.max_prompt_length:
        allowed = f"from 1 to {self.limits.max_prompt_length} are allowed"
        raise RequestError(400, f"the prompt has {len(prompt)} tokens: {allowed}", "prompt")
    if len(prompts) * options.num_choices > self.limits.max_jobs:
      raise RequestError(400, f"at most {self.limits.max_jobs} completions are allowed in one request", "prompt")
    loop, events = asyncio.get_running_loop(), asyncio.Queue()

    def deliver(*event: Any) -> None:
      with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(events.put_nowait, event)

    own = options.seed, options.temperature
    jobs = [
      Job(prompt, functools.partial(deliver, first + choice), *own, choice, options.max_tokens)
      for first, prompt in zip(range(0, len(prompts) * options.num_choices, options.num_choices), prompts, strict=True)
      for choice in range(options.num_choices)
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
        raise RequestError(429, "the queue is full: try again later")
      while num_done < len(jobs):
        number, kind, value = await asyncio.wait_for(events.get(), deadline - loop.time())
        if kind == "failed":
          raise RequestError(500, f"decoding failed: {value}")
        if kind == "left":
          raise RequestError(499, "the client has left")  # nobody reads this
        num_done += kind == "done"
        yield number, kind, value
    except TimeoutError as error:
      raise RequestError(504, f"no response within {self.limits.max_seconds:g} seconds") from error
    finally:
      watching.cancel()
      self.engine.withdraw(jobs)


async def _with_first(first: Event, rest: AsyncIterator[Event]) -> AsyncIterator[Event]:
  yield first
  async for event in rest:
    yield event
