"""Serve a policy over HTTP, `--mode=serve`: OpenAI's API with batched decoding, and a page that shows denoising.

`engine` owns the model and a bounded queue, `api` speaks HTTP; they share `engine.Job`. `requests` checks what a client
sends, `responses` formats what it gets, `connections` limits what clients can hold open.
"""

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator

import jax
import uvicorn
from etils import epath
from ml_collections import ConfigDict

from dmpo_jax.build import build_model_parts
from dmpo_jax.config import ConfigError
from dmpo_jax.policy import load_policy
from dmpo_jax.run import grids, progress
from dmpo_jax.run.report.runs import read_prompts
from dmpo_jax.samplers import SAMPLERS
from dmpo_jax.serve.api import is_loopback, make_app
from dmpo_jax.serve.connections import bounded_protocol
from dmpo_jax.serve.engine import Engine, make_decode
from dmpo_jax.serve.page import About
from dmpo_jax.serve.requests import Limits
from dmpo_jax.serve.slots import make_slot_engine

SPARE_CONNECTIONS = 64  # besides those of waiting or running requests: idle ones, pages, health checks
NUM_EXAMPLES = 4  # prompts that the page offers
API_KEY = "DMPO_JAX_API_KEY"  # environment variable, as everyone on a machine can read its command lines


def main(config: ConfigDict, workdir: epath.Path | None) -> None:
  """Serve the policy until SIGINT or SIGTERM, then finish the requests that have begun.

  Raises:
    ConfigError: there is no policy, the address is taken or open to other machines without a key, or the job has
      several processes.
  """
  serve, api_key = config.serve, os.environ.get(API_KEY, "")
  if jax.process_count() > 1:
    raise ConfigError("--mode=serve needs a job of one process")
  if not is_loopback(serve.host) and not api_key:
    raise ConfigError(f"config.serve.host = {serve.host!r} is open to other machines: set {API_KEY} in the environment")
  parts = build_model_parts(config)
  with _listening(serve.host, serve.port) as listener:
    has_blocks, policies = parts.model.config.block_length > 0, load_policy(config, workdir, parts)
    if has_blocks:
      engine = make_slot_engine(config, parts, policies)
    else:
      decode = make_decode(config, parts, policies)
      engine = Engine(decode, batch_size=serve.batch_size, max_queue=serve.max_queue)
    limits = Limits(
      completion_length=config.sampler.completion_length,
      block_length=config.sampler.block_length,
      can_revoke=SAMPLERS[config.sampler.name].can_revoke,
      temperature=config.eval.temperature,
      max_choices=serve.batch_size,
      max_jobs=serve.max_queue,
      max_prompt_length=serve.max_prompt_length,
      max_seconds=serve.max_seconds,
    )
    name = epath.Path(workdir or config.model.init_from).name
    app = make_app(
      engine,
      parts.tokenizer,
      limits,
      model=name,
      about=_about(config, workdir, blocks_have_prompt=has_blocks),
      api_key=api_key,
      is_local=is_loopback(serve.host),
      log=_log,
    )
    url = _url(serve.host, listener.getsockname()[1])
    print(f"serving {name} on {url}/ and {url}/v1", flush=True)
    settings = uvicorn.Config(
      app,
      http=bounded_protocol(serve.max_queue + serve.batch_size + SPARE_CONNECTIONS),
      log_level="warning",
      timeout_graceful_shutdown=int(serve.max_seconds) + 1,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, lambda *_: None)  # uvicorn handles them, and raises them again after it has stopped
    try:
      uvicorn.Server(settings).run(sockets=[listener])
    finally:
      engine.close()
  print("stopped serving", file=sys.stderr)


def _about(config: ConfigDict, workdir: epath.Path | None, *, blocks_have_prompt: bool) -> About:
  """Collect what the page says of the policy."""
  own, examples = config.task, read_prompts(workdir, NUM_EXAMPLES) if workdir else []
  task, has_cells = epath.Path(own.name).stem if workdir else "", grids.are_completed(own.name, own.prompt)
  return About(task, config.sampler.name, examples, blocks_have_prompt, cells_are_tokens=has_cells)


def _log(line: str) -> None:
  """Write a line of the request log to standard error, unless --quiet."""
  if not progress.wants_quiet():
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
  """Listen on the address before the model is loaded, so that a mistake shows at once."""
  try:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.create_server(address[:2], family=family)
  except OSError as error:
    raise ConfigError(f"config.serve.host = {host!r}, port {port}: cannot listen there ({error})") from error
  with listener:
    yield listener


def _url(host: str, port: int) -> str:
  return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
