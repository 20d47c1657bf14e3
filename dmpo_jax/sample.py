"""Completions of a person's own prompts, from a finished run's policy or a converted model: `--mode=sample`.

Prompts of neighbouring lengths share one compiled program. Settings are those of the evaluation.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import operator
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dmpo_jax import continuous, files, noise
from dmpo_jax.build import build_model_parts
from dmpo_jax.config import ConfigError
from dmpo_jax.data import prompt_ids
from dmpo_jax.hub.tokenizer import Tokenizer
from dmpo_jax.messages import Prompt, Turn, as_text, turns_of
from dmpo_jax.policy import Compiled, ModelParts, Policies, check_confidence, load_policy, make_sample
from dmpo_jax.processes import meet
from dmpo_jax.run import grids
from dmpo_jax.run.progress import Progress
from dmpo_jax.run.watch import Watcher
from dmpo_jax.structs import Prompts, Rollouts

logger = logging.getLogger(__name__)

BUCKET = 64  # prompts are padded to multiples of so many tokens


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt, and what its answer is to begin with."""

  prompt: Prompt
  prefill: str = ""

  @property
  def turns(self) -> list[Turn]:
    """The conversation that the assistant is to answer."""
    return turns_of(self.prompt)

  @property
  def given(self) -> dict[str, Prompt]:
    """The prompt under the key that it has in a file of prompts."""
    return {"prompt" if isinstance(self.prompt, str) else "messages": self.prompt}


def main(
  config: ConfigDict, workdir: epath.Path | None, requests: Sequence[Request], *, as_json: bool, watch: bool
) -> None:
  """Decode the requests and print the completions, in their order.

  Args:
    workdir: of a finished run; None: the model that `model.init_from` names.
    as_json: one JSON object a line: prompt or messages, ids, text, calls, tokens_per_call, tokens_per_second,
      confidence.
    watch: show the denoising while it happens.

  Raises:
    ConfigError: there is no policy, a prompt is too long, or a watched job has several processes.
  """
  parts = build_model_parts(config)
  check_prompts(requests, parts.tokenizer, config.serve.max_prompt_length)
  if watch and jax.process_count() > 1:
    raise ConfigError("--watch needs a job of one process")
  with jax.set_mesh(parts.mesh):
    policies = load_policy(config, workdir, parts)
    found = decode(config, parts, policies, requests, watch=watch)
    with contextlib.nullcontext() if watch else Progress("completions", len(requests)) as shown:
      for index, (request, about) in enumerate(found):
        if shown is not None:
          shown.advance()
        if jax.process_index() > 0:
          continue
        if as_json:
          print(files.to_json({**request.given, **about}, ensure_ascii=False), flush=True)
        else:
          print(f"---\n{about['text']}" if index else about["text"], flush=True)


def check_prompts(requests: Sequence[Request], tokenizer: Tokenizer, max_prompt_length: int) -> None:
  """Refuse prompts that are too long, before the model is loaded, and warn of letters that the model will not see.

  Raises:
    ConfigError: a prompt has more tokens than `max_prompt_length`.
  """
  for number, request in enumerate(requests, start=1):
    try:
      length = len(tokenizer.encode_prompt(request.turns, request.prefill))
    except ValueError as error:
      raise ConfigError(f"prompt {number} of {len(requests)}: {error}") from error
    if length > max_prompt_length:
      raise ConfigError(
        f"prompt {number} of {len(requests)} has {length} tokens, more than config.serve.max_prompt_length = "
        f"{max_prompt_length}: shorten it, or raise that key"
      )
  texts = [text for request in requests for text in (*(turn.text for turn in request.turns), request.prefill)]
  lacking = tokenizer.lacking("".join(texts))
  if lacking:
    logger.warning("the tokenizer lacks %s: the model sees an unknown token in their place", " ".join(lacking))


def decode(
  config: ConfigDict, parts: ModelParts, policies: Policies, requests: Sequence[Request], *, watch: bool = False
) -> Iterator[tuple[Request, dict[str, Any]]]:
  """Decode the requests batch by batch, and give each with what was found.

  `tokens_per_second` is of the row's batch, compilation not counted: tokens up to the first EOS over seconds.
  """
  watcher = Watcher(parts.tokenizer) if watch else None
  own, sample = config.eval, _make_sample(config, parts, watcher)
  key = noise.step_key(config.seed, "sample", 0)
  numbers = prompt_ids([as_text(request.turns) + request.prefill for request in requests])
  size = min(own.batch_size, len(requests))
  for start in range(0, len(requests), size):
    meet("the next prompts")
    batch = requests[start : start + size]
    prompts = encode(batch, numbers[start : start + size], parts.tokenizer, num_rows=size)
    if isinstance(sample, Compiled):
      waiting = Progress(f"compiling for prompts of up to {prompts.tokens.shape[1]} tokens", 1) if watcher else None
      with waiting or contextlib.nullcontext():  # unless watched, the progress of the completions says so
        sample.compile(policies, prompts, key)
        if waiting:
          waiting.advance()
    puzzles, compiled_before = [_puzzle_of(request, config) for request in batch], sample.seconds
    watching = watcher.watching(puzzles) if watcher else contextlib.nullcontext()
    rollouts, seconds = _run(functools.partial(sample, policies, prompts, key), watching)
    seconds -= sample.seconds - compiled_before
    check_confidence(rollouts)
    rollouts = jax.tree.map(operator.itemgetter((slice(len(batch)), 0)), rollouts)
    yield from zip(batch, describe(rollouts, parts.tokenizer, seconds), strict=True)


def _puzzle_of(request: Request, config: ConfigDict) -> grids.Grid | None:
  """Return the Sudoku that the completion of a request fills in; None for any other text."""
  is_whole = request.prefill == "" and grids.are_completed(config.task.name, config.task.prompt)
  return grids.in_prompt(as_text(request.turns)) if is_whole else None


def _make_sample(config: ConfigDict, parts: ModelParts, watcher: Watcher | None) -> Compiled | continuous.Sample:
  """Build the sampler of the settings of `eval`; what is watched is a fixed batch."""
  settings = dict(temperature=config.eval.temperature, early_exit=config.eval.early_exit)
  if config.sampler.slots and watcher is None:
    num_slots = config.sampler.slots
    programs = continuous.Programs(config, parts.model, parts.mesh, num_slots=num_slots, **settings)
    return continuous.Sample(programs, 1, lambda: meet("the next block"))
  return Compiled(make_sample(config, parts.model, parts.mesh, group_size=1, on_call=watcher, **settings))


def _run(program: Callable[[], Rollouts], shown: contextlib.AbstractContextManager) -> tuple[Rollouts, float]:
  """Run a compiled program while it is shown, and time it."""
  start = time.perf_counter()
  with shown:
    rollouts = jax.device_get(program())
    jax.effects_barrier()
    seconds = time.perf_counter() - start
  return rollouts, seconds


def encode(requests: Sequence[Request], numbers: np.ndarray, tokenizer: Tokenizer, *, num_rows: int) -> Prompts:
  """Encode prompts with their ids as one batch, padded on the left, and filled up to `num_rows` with the last."""
  ids = [tokenizer.encode_prompt(request.turns, request.prefill) for request in requests]
  return pad(ids, numbers, tokenizer, num_rows=num_rows)


def pad(ids: Sequence[list[int]], numbers: np.ndarray, tokenizer: Tokenizer, *, num_rows: int) -> Prompts:
  """Lay encoded prompts with their ids out as one batch, like `encode`."""
  length = max(-(-max(map(len, ids)) // BUCKET), 1) * BUCKET
  tokens = np.full((num_rows, length), tokenizer.pad_token_id, np.int32)
  is_valid = np.zeros((num_rows, length), bool)
  index = np.minimum(np.arange(num_rows), len(ids) - 1)
  for row, i in enumerate(index):
    tokens[row, length - len(ids[i]) :] = ids[i]
    is_valid[row, length - len(ids[i]) :] = True
  return Prompts(tokens=tokens, is_valid=is_valid, prompt_id=numbers[index])


def describe(rollouts: Rollouts, tokenizer: Tokenizer, seconds: float) -> list[dict[str, Any]]:
  """Say what each row of [b, c] rollouts holds; ids end with the first EOS, or another token that ends completions."""
  is_end = np.isin(rollouts.completion, tokenizer.end_token_ids)
  num_ids = (np.cumsum(is_end, axis=1) - is_end == 0).sum(1)
  return [
    {
      "ids": ids[: num_ids[row]].tolist(),
      "text": tokenizer.decode(ids.tolist()),
      "calls": int(rollouts.num_calls[row]),
      "tokens_per_call": round(float(rollouts.tokens_per_call[row]), 3),
      "tokens_per_second": round(float(num_ids.sum() / seconds), 1),
      "confidence": round(float(rollouts.mean_confidence[row]), 4),
    }
    for row, ids in enumerate(rollouts.completion)
  ]


def read_requests(prompt: str | None, path: str | None) -> list[Request]:
  """Return the requests of the command line: one prompt, a JSONL file, or standard input where neither is given.

  Lines of the file are objects {"prompt": ..., "prefill": ...}; the prefill is optional, and "messages", a conversation
  in OpenAI's format, may replace the prompt. Lines of standard input are prompts, or such objects.

  Raises:
    ConfigError: both are given, there is nothing to read, no prompt is in it, or a line has another form.
  """
  if prompt is not None and path is not None:
    raise ConfigError("give --prompt or --prompts, not both")
  if prompt is not None:
    if not prompt.strip():
      raise ConfigError(f"--prompt={prompt!r} is empty: give a text")
    return [Request(prompt)]
  if path is not None:
    if not epath.Path(path).is_file():
      raise ConfigError(f"--prompts={path}: no such file")
    where, content = f"--prompts={path}", epath.Path(path).read_bytes()
  elif sys.stdin.isatty():
    raise ConfigError("nothing to sample: give --prompt=TEXT, --prompts=FILE.jsonl, or prompts by a pipe")
  else:
    where, content = "standard input", sys.stdin.buffer.read()
  lines = _decode_text(content, where).split("\n")  # JSON may hold the other characters that end a line
  requests = [
    _read_request(line, f"{where}, line {number}", is_json=path is not None or line.lstrip().startswith("{"))
    for number, line in enumerate(lines, start=1)
    if line.strip()
  ]
  if not requests:
    raise ConfigError(f"{where}: holds no prompt")
  return requests


def _decode_text(content: bytes, where: str) -> str:
  try:
    return content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    line = content.count(b"\n", 0, error.start) + 1
    raise ConfigError(
      f"{where}, line {line}: not UTF-8 (byte {content[error.start]:#04x}); save it as UTF-8"
    ) from error


def _read_request(line: str, where: str, *, is_json: bool) -> Request:
  if not is_json:
    return Request(line)
  try:
    fields = json.loads(line)
  except ValueError as error:
    raise ConfigError(f"{where}: not JSON ({error})") from error
  has_messages = isinstance(fields, Mapping) and "messages" in fields and "prompt" not in fields
  if not has_messages and not (isinstance(fields, Mapping) and isinstance(fields.get("prompt"), str)):
    raise ConfigError(
      f'{where}: must be an object with a text "prompt", such as {{"prompt": "1 + 1 ="}}, or with "messages"'
    )
  if "messages" in fields and not has_messages:
    raise ConfigError(f'{where}: give "prompt" or "messages", not both')
  if not isinstance(fields.get("prefill", ""), str):
    raise ConfigError(f'{where}: "prefill" must be a text')
  request = Request(fields["messages" if has_messages else "prompt"], fields.get("prefill", ""))
  try:
    is_empty = not any(turn.text.strip() for turn in request.turns)
  except ValueError as error:
    raise ConfigError(f"{where}: {error}") from error
  if is_empty:
    raise ConfigError(f'{where}: the "prompt" is empty')
  return request
