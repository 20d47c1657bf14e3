"""Serving a stand-in for the model, asked by the official client: answers, streams, batches, limits, named mistakes."""

import contextlib
import http.client
import json
import math
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import openai
import pytest
import standin_tokenizer
import uvicorn

from configs import base
from dmpo_jax import serve
from dmpo_jax.hub.tokenizer import load_tokenizer
from dmpo_jax.serve import api, page
from dmpo_jax.serve.api import MAX_BODY, make_app
from dmpo_jax.serve.connections import bounded_protocol
from dmpo_jax.serve.engine import Decoded, Engine, Job
from dmpo_jax.serve.page import About
from dmpo_jax.serve.requests import Limits, read_options
from dmpo_jax.serve.responses import Reader

LENGTH = 8
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def tokenizer():
  return load_tokenizer("sentencepiece", base.get_config().tokenizer.path)


class Reverser:
  """Stands in for the model: completes a prompt with its reverse, two tokens a call from the left, and EOS."""

  def __init__(self, tokenizer):
    self.tokenizer, self.batches, self.jobs = tokenizer, [], []
    self.may_go_on = threading.Event()
    self.may_go_on.set()

  def __call__(self, jobs, publish):
    self.batches.append(len(jobs))
    self.jobs += jobs
    assert self.may_go_on.wait(timeout=30)
    if any(job.prompt == self.tokenizer.encode("666") for job in jobs):
      raise RuntimeError("out of memory")
    whole = np.full((len(jobs), LENGTH), self.tokenizer.eos_token_id, np.int32)
    for row, job in zip(whole, jobs, strict=True):
      ids = job.prompt[::-1][:LENGTH]
      row[: len(ids)] = ids
    state = np.full_like(whole, self.tokenizer.mask_token_id)
    for number in (1, 0, 2, 3):  # late news too
      state = np.where(np.arange(LENGTH) < 2 * number + 2, whole, self.tokenizer.mask_token_id)
      publish(number, state)
    return Decoded(whole, np.full(whole.shape, 0.5, np.float32))


@contextlib.contextmanager
def serving(
  tokenizer, *, api_key="", can_revoke=False, max_seconds=20.0, batch_size=4, max_queue=4, max_prompt_length=10
):
  decode = Reverser(tokenizer)
  engine = Engine(decode, batch_size=batch_size, max_queue=max_queue)
  limits = Limits(
    completion_length=LENGTH,
    block_length=4,
    can_revoke=can_revoke,
    temperature=0.0,
    max_choices=4,
    max_jobs=max_queue,
    max_prompt_length=max_prompt_length,
    max_seconds=max_seconds,
  )
  said = []
  about = About("sudoku", "llada", ["(12="], cells_are_tokens=True)
  app = make_app(engine, tokenizer, limits, model="tiny", about=about, api_key=api_key, log=said.append)
  http = bounded_protocol(20, header_seconds=1.0)
  server = uvicorn.Server(uvicorn.Config(app, port=0, http=http, log_level="error", timeout_graceful_shutdown=10))
  thread = threading.Thread(target=server.run)
  thread.start()
  try:
    while not server.started:
      assert thread.is_alive()
      time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    decode.server, decode.engine, decode.port, decode.said = server, engine, port, said
    decode.address = f"http://127.0.0.1:{port}"
    decode.client = openai.OpenAI(base_url=f"{decode.address}/v1", api_key=api_key or "none", max_retries=0)
    yield decode
  finally:
    decode.may_go_on.set()
    server.should_exit = True
    thread.join(timeout=30)
    engine.close()


@pytest.fixture(scope="module")
def decode(tokenizer):
  with serving(tokenizer) as decode:
    yield decode


def ask(client, text, **options):
  return client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], **options)


def post(address, body, **headers):
  """Post as no well-behaved client would; return the status and the error."""
  request = urllib.request.Request(address, data=body, headers={"Content-Type": "application/json", **headers})
  try:
    with urllib.request.urlopen(request, timeout=20) as answer:
      return answer.status, answer.read().decode()
  except urllib.error.HTTPError as error:
    return error.code, error.read().decode()


def test_chat(decode):
  answer = ask(decode.client, "123")
  assert answer.choices[0].message.content == "321"
  assert answer.choices[0].finish_reason == "stop"
  assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 3)
  assert [model.id for model in decode.client.models.list()] == ["tiny"]


def test_completions_and_their_length(decode):
  answer = decode.client.completions.create(model="tiny", prompt="12345", max_tokens=2)
  assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("54", "length")
  assert answer.usage.completion_tokens == 2


def test_prompts_may_be_several_and_ids(decode, tokenizer):
  prompts = ["12", "345"]
  ids = [tokenizer.encode(text) for text in prompts]
  for prompt in (prompts, ids, [prompts[0], ids[1]]):
    answer = decode.client.completions.create(model="tiny", prompt=prompt, n=2)
    assert [(x.index, x.text) for x in answer.choices] == [(0, "21"), (1, "21"), (2, "543"), (3, "543")]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 10)
  assert decode.client.completions.create(model="tiny", prompt=ids[1]).choices[0].text == "543"
  chunks = list(decode.client.completions.create(model="tiny", prompt=ids, stream=True))
  texts = ["".join(x.choices[0].text for x in chunks if x.choices[0].index == index) for index in (0, 1)]
  assert texts == ["21", "543"]
  with pytest.raises(openai.BadRequestError, match="at most 4 completions"):
    decode.client.completions.create(model="tiny", prompt=["1"] * 5)
  with pytest.raises(openai.BadRequestError, match="from 1 to 10 are allowed"):
    decode.client.completions.create(model="tiny", prompt=["1", "1" * 11])


def test_more_tokens_than_there_are_is_a_cap(decode):
  answer = ask(decode.client, "1234567890", max_tokens=1000, stop=list("abcdef"))
  assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("09876543", "length")
  assert ask(decode.client, "12", max_tokens=1000).choices[0].finish_reason == "stop"


def test_log_probs_are_of_the_calls_that_decided(decode):
  chat = ask(decode.client, "123", logprobs=True, top_logprobs=1).choices[0].logprobs.content
  assert [(x.token, x.bytes) for x in chat] == [("3", [51]), ("2", [50]), ("1", [49])]
  assert [x.logprob for x in chat] == pytest.approx([math.log(0.5)] * 3)
  assert [[(y.token, y.logprob) for y in x.top_logprobs] for x in chat] == [[(x.token, x.logprob)] for x in chat]
  assert ask(decode.client, "123", logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
  assert ask(decode.client, "123").choices[0].logprobs is None
  text = decode.client.completions.create(model="tiny", prompt="12345", max_tokens=2, logprobs=1).choices[0].logprobs
  assert (text.tokens, text.text_offset) == (["5", "4"], [0, 1])
  assert text.token_logprobs == pytest.approx([math.log(0.5)] * 2)
  assert text.top_logprobs == [{"5": text.token_logprobs[0]}, {"4": text.token_logprobs[1]}]
  sampled = decode.client.completions.create(model="tiny", prompt="12", logprobs=0, temperature=0.5).choices[0]
  assert (sampled.logprobs.tokens, sampled.logprobs.top_logprobs) == (["2", "1"], [{}, {}])
  with pytest.raises(openai.BadRequestError, match="sampled tokens are known"):
    decode.client.completions.create(model="tiny", prompt="12", logprobs=1, temperature=0.5)


def test_a_character_of_several_tokens_is_one_piece(tmp_path):
  tokenizer = load_tokenizer("huggingface", standin_tokenizer.write(tmp_path, model_config={"mask_token_id": 126336}))
  limits = Limits(LENGTH, 4, False, 0.0, 4, 4, 10, 20.0)
  ids = np.array(tokenizer.encode("aé!€"))
  text = Reader(tokenizer, limits, read_options({"logprobs": True}, limits, is_chat=True)).finish(
    ids, np.ones(len(ids))
  )
  assert text.pieces == ["a", "", "é", "!", "", "", "€"]


def test_letters_that_the_model_does_not_see_are_logged(decode):
  decode.said.clear()
  ask(decode.client, "12\N{SNOWMAN}")
  deadline = time.monotonic() + 10
  while not decode.said and time.monotonic() < deadline:
    time.sleep(0.01)
  assert ", the tokenizer lacks \N{SNOWMAN}, " in decode.said[0]


def test_the_model_is_found_by_its_name_and_the_server_says_that_it_lives(decode):
  assert decode.client.models.retrieve("tiny").id == "tiny"
  with pytest.raises(openai.NotFoundError, match="'tiny' is served"):
    decode.client.models.retrieve("other/model")
  with urllib.request.urlopen(f"{decode.address}/health", timeout=20) as answer:
    assert json.load(answer) == {"status": "ok"}


def test_requests_are_logged(decode):
  decode.said.clear()
  ask(decode.client, "123", n=2)
  list(ask(decode.client, "123", n=2, stream=True))
  post(f"{decode.address}/v1/completions", b"{")
  deadline = time.monotonic() + 10
  while len(decode.said) < 3 and time.monotonic() < deadline:
    time.sleep(0.01)
  *answered, second = (line.split(" ", 1)[1] for line in decode.said)
  for line in answered:
    about = "3 prompt tokens, 2 choices, 6 tokens"
    assert re.fullmatch(rf"127\.0\.0\.1 POST /v1/chat/completions 200 \d+\.\d\d s, {about}", line)
  assert re.fullmatch(r"127\.0\.0\.1 POST /v1/completions 400 \d+\.\d\d s", second)


def test_half_open_connections_are_closed(tokenizer):
  with serving(tokenizer) as decode:
    silent = [socket.create_connection(("127.0.0.1", decode.port)) for _ in range(10)]
    for client in silent[5:]:
      client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
    many = [socket.create_connection(("127.0.0.1", decode.port)) for _ in range(15)]
    refused = many[-1].recv(10_000)
    assert refused.startswith(b"HTTP/1.1 503 ")
    assert b"20 connections are open" in refused
    for client in [*silent, *many]:
      client.settimeout(5)
      while client.recv(10_000):
        pass  # to its end
      client.close()
    assert ask(decode.client, "12").choices[0].message.content == "21"
    time.sleep(1.2)  # an answered connection that is kept is no half-open one: a slow client may go on within its time
    assert ask(decode.client, "12").choices[0].message.content == "21"


def test_a_request_may_take_longer_than_its_header(tokenizer):
  with serving(tokenizer) as decode:
    decode.may_go_on.clear()
    threading.Timer(1.5, decode.may_go_on.set).start()
    assert ask(decode.client, "12").choices[0].message.content == "21"


def test_a_length_that_is_too_much_is_refused_before_its_body(decode):
  with socket.create_connection(("127.0.0.1", decode.port), timeout=5) as client:
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: 99000000000\r\n\r\n".encode())
    assert client.recv(10_000).startswith(b"HTTP/1.1 413 ")
    client.sendall(b"x")  # of the body, which nobody reads: it does not keep the connection open
    while client.recv(10_000):
      pass  # to its end


def test_a_conversation_goes_through_the_chat_template(tmp_path):
  tokenizer = load_tokenizer(
    "huggingface", standin_tokenizer.write(tmp_path, model_config={"mask_token_id": 126336}), is_chat=True
  )
  turns = [("system", "be brief"), ("user", "12"), ("assistant", "21"), ("user", "34")]
  with serving(tokenizer, max_prompt_length=200) as decode:
    messages = [{"role": role, "content": content} for role, content in turns]
    messages[0]["role"] = "developer"  # OpenAI's newer name for it
    messages[3]["content"] = [{"type": "text", "text": "3"}, {"type": "text", "text": "4"}]
    answer = decode.client.chat.completions.create(model="tiny", messages=messages)
  whole = "".join(
    f"{'<|startoftext|>' if i == 0 else ''}<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
    for i, (role, content) in enumerate(turns)
  )
  (job,) = decode.jobs
  assert job.prompt == tokenizer.encode(whole + "<|start_header_id|>assistant<|end_header_id|>\n\n")
  assert answer.usage.prompt_tokens == len(job.prompt)


def test_stop_strings_end_an_answer_before_them(decode):
  answer = ask(decode.client, "12345", stop=["9", "32"])
  assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("54", "stop")
  assert answer.usage.completion_tokens == 2
  chunks = list(ask(decode.client, "12345", stop="21", stream=True))
  pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
  assert "".join(pieces) == "543"
  assert chunks[-1].choices[0].finish_reason == "stop"


def test_what_may_become_a_stop_string_is_not_streamed(tokenizer):
  limits = Limits(LENGTH, 4, False, 0.0, 4, 4, 10, 20.0)
  ids = np.array([*tokenizer.encode("4321"), *[tokenizer.mask_token_id] * 4])
  for stops, shown in (([], "4321"), (["19"], "432"), (["215", "x"], "43"), (["321"], "4"), (["3", "4321"], "")):
    reader = Reader(tokenizer, limits, read_options({"stop": stops}, limits, is_chat=True))
    assert reader.decided(ids) == shown, stops


def test_choices_temperature_and_seed(decode):
  decode.jobs.clear()
  answer = ask(decode.client, "12", n=3, temperature=0.75, seed=5)
  assert [(choice.index, choice.message.content) for choice in answer.choices] == [(i, "21") for i in range(3)]
  assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 6)
  assert {(job.temperature, job.seed) for job in decode.jobs} == {(0.75, 5)}
  assert len({job.prompt_id for job in decode.jobs}) == 3
  ask(decode.client, "12")
  assert (decode.jobs[-1].temperature, decode.jobs[-1].seed) == (0.0, None)
  chunks = list(ask(decode.client, "12345", n=2, stream=True, stream_options={"include_usage": True}))
  texts = {0: "", 1: ""}
  for chunk in chunks[:-1]:
    (choice,) = chunk.choices
    texts[choice.index] += choice.delta.content or ""
  assert texts == {0: "54321", 1: "54321"}
  assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 15)


def test_a_stream_grows_with_the_decided_prefix(decode):
  chunks = list(ask(decode.client, "12345", stream=True))
  assert chunks[0].choices[0].delta.role == "assistant"
  assert [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content] == ["5432", "1"]
  assert chunks[-1].choices[0].finish_reason == "stop"
  pieces = [chunk.choices[0].text for chunk in decode.client.completions.create(model="t", prompt="12", stream=True)]
  assert "".join(pieces) == "21"


def test_tokens_that_may_be_taken_back_are_not_streamed(tokenizer):
  with serving(tokenizer, can_revoke=True) as decode:
    pieces = [chunk.choices[0].delta.content for chunk in ask(decode.client, "1234567", stream=True)]
  assert [piece for piece in pieces if piece] == ["7654", "321"]


def test_tokens_that_may_be_taken_back_are_those_of_the_models_block(tokenizer):
  """Two tokens of the prompt are in the first block of four, so six decided tokens are two blocks."""
  limits = Limits(LENGTH, 4, True, 0.0, 4, 4, 10, 20.0)
  reader = Reader(tokenizer, limits, read_options({}, limits, is_chat=True))
  ids = np.full(LENGTH, tokenizer.mask_token_id)
  ids[:7] = tokenizer.encode("1234567")
  assert reader.decided(ids, given=2) == "123456"
  assert reader.decided(ids) == "1234"


def test_requests_that_wait_together_are_decoded_together(decode):
  decode.batches.clear()
  decode.may_go_on.clear()
  answers = {}

  def fetch(text):
    answers[text] = ask(decode.client, text).choices[0].message.content

  threads = [threading.Thread(target=fetch, args=(text,)) for text in ("12", "34", "56", "78")]
  threads[0].start()
  deadline = time.monotonic() + 20
  while not decode.batches and time.monotonic() < deadline:
    time.sleep(0.01)
  for thread in threads[1:]:
    thread.start()
  time.sleep(0.5)
  decode.may_go_on.set()
  for thread in threads:
    thread.join(timeout=20)
  assert answers == {"12": "21", "34": "43", "56": "65", "78": "87"}
  assert decode.batches == [1, 3]


@pytest.mark.parametrize(
  ("options", "param"),
  [
    ({"n": 5}, "n"),
    ({"n": 0}, "n"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 0.5}, "top_p"),
    ({"top_p": True}, "top_p"),
    ({"frequency_penalty": False}, "frequency_penalty"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usages": True}}, "stream_options"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"stop": ["x"] * 65}, "stop"),
    ({"stop": ""}, "stop"),
    ({"seed": 2**64}, "seed"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"logprobs": 1}, "logprobs"),
    ({"logprobs": True, "stream": True}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 1, "temperature": 0.5}, "top_logprobs"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "1"}]}, "messages"),
    ({"messages": [{"role": ["user"], "content": "1"}]}, "messages"),
    ({"messages": [{"role": {"user": 1}, "content": "1"}]}, "messages"),
    ({"messages": [{"role": "user", "content": None}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}]}, "messages"),
    ({"messages": [{"role": "system", "content": "2"}, {"role": "user", "content": "1"}]}, "messages"),  # no template
  ],
)
def test_what_is_not_supported_is_named(decode, options, param):
  asked = {"model": "tiny", "messages": [{"role": "user", "content": "1"}], **options}
  with pytest.raises(openai.BadRequestError) as caught:
    decode.client.chat.completions.create(**asked)
  assert caught.value.param == param


def test_what_is_so_anyway_may_be_said(decode):
  said = {"logprobs": False, "tools": [], "response_format": {"type": "text"}, "top_p": 1.0, "logit_bias": {}, "n": 1}
  assert ask(decode.client, "12", stream_options=None, **said).choices[0].message.content == "21"


def test_prompts_have_a_longest_length(decode):
  for text in ("1" * 11, ""):
    with pytest.raises(openai.BadRequestError, match="from 1 to 10 are allowed"):
      ask(decode.client, text)
    with pytest.raises(openai.BadRequestError, match="from 1 to 10 are allowed"):
      ask(decode.client, text, stream=True)


@pytest.mark.parametrize("path", ["v1/completions", "v1/chat/completions", "watch"])
@pytest.mark.parametrize(
  ("body", "headers", "status"),
  [
    (b"{", {}, 400),
    (rb'{"prompt": "\ud800"}', {}, 400),
    (rb'{"messages": [{"role": "user", "content": "\ud800"}]}', {}, 400),
    (b'{"prompt": "1", "unknown": 1}', {}, 400),
    (b'{"prompt": "1", "temperature": 1' + b"0" * 400 + b"}", {}, 400),
    (b"[]", {}, 400),
    (b"\xff", {}, 400),
    (b'{"prompt": ["a", 1]}', {}, 400),
    (b'{"prompt": [99999]}', {}, 400),
    (b'{"prompt": [-1]}', {}, 400),
    (b'{"prompt": [true]}', {}, 400),
    (b'{"prompt": []}', {}, 400),
    (b'{"prompt": [[]]}', {}, 400),
    (b'{"prompt": "1"}', {"Content-Type": "text/plain"}, 415),
    (b" " * (MAX_BODY + 1), {}, 413),
    (b'{"prompt": "1"}', {"Host": "evil.example"}, 400),
    (b'{"prompt": "1"}', {"Host": "[::1"}, 400),
  ],
)
def test_bad_bodies_are_client_errors(decode, path, body, headers, status):
  found, text = post(f"{decode.address}/{path}", body, **headers)
  assert found == status
  assert json.loads(text)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2:80", "[::1]:8000", "LOCALHOST:1"])
def test_a_host_is_this_machine_by_any_of_its_names(decode, host):
  body, headers = b'{"prompt": "12"}', {"Host": host, "Content-Type": "Application/JSON; charset=utf-8"}
  assert post(f"{decode.address}/v1/completions", body, **headers)[0] == 200


def test_what_is_not_there_is_answered_in_the_same_form(decode):
  status, text = post(f"{decode.address}/v1/embeddings", b"{}")
  assert status == 404
  assert "error" in json.loads(text)
  connection = http.client.HTTPConnection("127.0.0.1", decode.port, timeout=20)
  connection.request("GET", "/v1/completions")
  answer = connection.getresponse()
  assert (answer.status, answer.headers["Allow"]) == (405, "POST")
  assert "error" in json.load(answer)


def test_a_mistake_of_the_server_is_answered_in_the_same_form(decode, monkeypatch):
  monkeypatch.setattr(api, "read_turns", lambda messages: 1 / 0)
  status, text = post(f"{decode.address}/v1/chat/completions", b"{}")
  assert (status, json.loads(text)["error"]["type"]) == (500, "server_error")


def test_a_batch_that_fails_is_an_error_and_the_server_goes_on(decode):
  with pytest.raises(openai.InternalServerError, match="out of memory"):
    ask(decode.client, "666")
  assert ask(decode.client, "12").choices[0].message.content == "21"


def test_a_key_is_asked_for(tokenizer):
  with serving(tokenizer, api_key="secret") as decode:
    assert ask(decode.client, "12").choices[0].message.content == "21"
    with pytest.raises(openai.AuthenticationError):
      ask(decode.client.with_options(api_key="wrong"), "12")
    for given, status in (("", 401), ("secret", 401), ("Basic secret", 401), ("bearer  secret", 200)):
      assert post(f"{decode.address}/watch", b'{"prompt": "1"}', Authorization=given)[0] == status, given


def test_clients_who_leave_give_their_places_up(tokenizer):
  with serving(tokenizer) as decode:
    decode.may_go_on.clear()
    threading.Thread(target=post, args=(f"{decode.address}/v1/completions", b'{"prompt": "1"}')).start()
    while not decode.batches:
      time.sleep(0.01)
    clients = []
    for path, body in (
      *[("v1/completions", b'{"prompt": "2"}'), ("v1/completions", b'{"prompt": "2", "stream": true}')],
      *[("v1/completions", b'{"prompt": "2", "n": 1}'), ("watch", b'{"prompt": "2"}')],
    ):
      clients.append(socket.create_connection(("127.0.0.1", decode.port)))
      head = f"POST /{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
      clients[-1].sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    deadline = time.monotonic() + 20
    while len(decode.engine._waiting) < 4:
      assert time.monotonic() < deadline
      time.sleep(0.01)
    assert post(f"{decode.address}/v1/completions", b'{"prompt": "3"}')[0] == 429
    for client in clients:
      client.close()
    others = [Job(tokenizer.encode("4"), print) for _ in range(4)]
    while not decode.engine.submit(others):  # which takes the whole queue
      assert time.monotonic() < deadline
      time.sleep(0.01)
    decode.may_go_on.set()
  assert [job.prompt for job in decode.jobs] == [tokenizer.encode(text) for text in "14444"]


def test_time_and_queue_are_limited(tokenizer):
  with serving(tokenizer, max_seconds=0.5, batch_size=1, max_queue=1) as decode:
    decode.may_go_on.clear()
    outcomes = []

    def fetch():
      try:
        outcomes.append(ask(decode.client, "12").choices[0].message.content)
      except openai.APIStatusError as error:
        outcomes.append(error.status_code)

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
      thread.start()
      time.sleep(0.05)
    for thread in threads:
      thread.join(timeout=20)
    assert sorted(outcomes) == [429, 429, 504, 504]
    decode.may_go_on.set()


def test_what_has_begun_is_finished_before_the_server_stops(tokenizer):
  with serving(tokenizer) as decode:
    decode.may_go_on.clear()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(ask(decode.client, "12").choices[0].message.content))
    thread.start()
    while not decode.batches:
      time.sleep(0.01)
    decode.server.should_exit = True
    time.sleep(0.2)
    decode.may_go_on.set()
    thread.join(timeout=20)
  assert answers == ["21"]


def test_the_page_watches(decode):
  with urllib.request.urlopen(f"{decode.address}/", timeout=20) as answer:
    assert "Watch it denoise" in answer.read().decode()
  status, text = post(f"{decode.address}/watch", '{"prompt": "12\u00e9"}'.encode())
  head, *events = [json.loads(line) for line in text.splitlines()]
  assert status == 200
  assert head == {"lacking": "\u00e9", "grid": None, "given": 0}
  assert [event["call"] for event in events] == [1, 2, 3, None]  # call 0 came late
  assert events[0]["pieces"][1:] == ["2", "1", "</s>", None, None, None, None]
  assert events[-1]["text"].endswith("21")


def test_the_page_knows_what_is_served(decode):
  with urllib.request.urlopen(f"{decode.address}/about", timeout=20) as answer:
    about = json.loads(answer.read())
  assert about == {
    "model": "tiny",
    "task": "sudoku",
    "sampler": "llada",
    "examples": ["(12="],
    "completion_length": LENGTH,
    "block_length": 4,
  }
  blocks = [page.About().as_json("tiny", 16, block_length)["block_length"] for block_length in (4, 16)]
  assert blocks == [4, 0]  # one block has no boundaries


def test_a_watched_sudoku_is_a_grid_with_its_wrong_cells(tokenizer):
  puzzle = "1430000041203004"
  with serving(tokenizer, max_prompt_length=40) as decode:
    _, text = post(f"{decode.address}/watch", json.dumps({"prompt": puzzle}).encode())
  head, first, *_ = [json.loads(line) for line in text.splitlines()]
  assert head["grid"] == {"puzzle": puzzle, "box": 2}
  assert first["pieces"][:4] == ["4", "0", "0", "3"]  # the stand-in's answer: the prompt from behind
  assert first["wrong"] == [0, 1, 2]  # given digits that it changed
  assert page.About().grid_of(puzzle) is None  # of another task


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH, which opens the page")
def test_a_browser_watches_without_a_word(decode, tokenizer, tmp_path, monkeypatch):
  """What the page shows at the end, the text and the number of decided tokens, it sends as its next prompt."""
  typed = """<script>prompt.value = "123"; form.requestSubmit();
const wait = setInterval(() => { if (state.textContent === "Done.") { clearInterval(wait);
  prompt.value = text.textContent + tokens.querySelectorAll(".token:not(.masked)").length;
  form.requestSubmit(); } }, 50);
</script>"""
  (tmp_path / "watch.html").write_text((page.HERE / "watch.html").read_text().replace("</body>", f"{typed}</body>"))
  monkeypatch.setattr(page, "HERE", tmp_path)
  command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
  command += ["--enable-logging=stderr", "--remote-debugging-port=0", f"{decode.address}/"]
  with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as browser:
    try:
      deadline = time.monotonic() + 60
      while tokenizer.encode(f"321{LENGTH}") not in [job.prompt for job in decode.jobs]:
        assert time.monotonic() < deadline, decode.jobs
        time.sleep(0.05)
    finally:
      browser.terminate()
  assert "CONSOLE" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
  ("host", "is_own", "url"),
  [
    ("127.0.0.2", True, "http://127.0.0.2:80"),
    ("::1", True, "http://[::1]:80"),
    ("localhost", True, "http://localhost:80"),
    ("0.0.0.0", False, "http://0.0.0.0:80"),
    ("evil.example", False, "http://evil.example:80"),
  ],
)
def test_addresses_of_this_machine(host, is_own, url):
  assert api.is_loopback(host) == is_own
  assert serve._url(host, 80) == url


def test_seed_and_choice_are_part_of_the_noise():
  jobs = [Job([5, 6], print, seed, choice=choice) for seed, choice in ((None, 0), (1, 0), (2, 0), (1, 1), (1, 0))]
  assert jobs[1].prompt_id == jobs[4].prompt_id
  assert len({job.prompt_id for job in jobs}) == 4
  assert [Job([1] * length, print).bucket for length in (1, 64, 65)] == [1, 1, 2]
