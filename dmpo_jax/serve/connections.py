"""Limits on connections: how many may be open, and how long a request's header may take."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dmpo_jax.serve.requests import RequestError

HEADER_SECONDS = 10.0  # from the connection or the last response to the end of a request's header


def bounded_protocol(max_connections: int, header_seconds: float = HEADER_SECONDS) -> type[H11Protocol]:
  """Make uvicorn's HTTP protocol with a limit on connections and a time-out on headers, which uvicorn lacks.

  A connection above the limit gets 503 and is closed; one whose header is late is closed.
  """

  class Bounded(H11Protocol):
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
      super().connection_made(transport)
      if len(self.connections) > max_connections:
        transport.write(_too_many(max_connections))
        transport.close()
      else:
        self._watch_header()

    def data_received(self, data: bytes) -> None:
      super().data_received(data)
      self._watch_header()

    def on_response_complete(self) -> None:
      super().on_response_complete()
      self._watch_header()

    def connection_lost(self, exc: Exception | None) -> None:
      self._forget_deadline()
      super().connection_lost(exc)

    def _watch_header(self) -> None:
      # The rest of a body is not read once its request has a response; it has as long as a header to end.
      is_answered = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
      if self.conn.their_state is not h11.IDLE and not is_answered:
        self._forget_deadline()
      elif self._deadline is None:
        self._deadline = self.loop.call_later(header_seconds, self.transport.close)

    def _forget_deadline(self) -> None:
      if self._deadline is not None:
        self._deadline.cancel()
        self._deadline = None

  return Bounded


def _too_many(max_connections: int) -> bytes:
  body = RequestError(503, f"{max_connections} connections are open: try again later").response().body
  head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
  return f"{head}Connection: close\r\n\r\n".encode() + bytes(body)
