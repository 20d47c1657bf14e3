"""Rewards that are awaited: a judge behind an OpenAI-compatible server on loopback that is slow, busy or silent."""

import http.server
import json
import pathlib
import re
import textwrap
import threading
import time

import pytest

from dmpo_jax.grading import Grading
from dmpo_jax.tasks import make_task
from dmpo_jax.tasks.judge import judge

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "tasks.md"
SECONDS = 0.15  # that the server takes for an answer


class Judge(http.server.BaseHTTPRequestHandler):
  """Says 7; refuses what is `busy` once and what is `down` always, and is silent on what is `silent`."""

  calls: list[str]
  under_way: set[int]
  most: int

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    answer = re.search(r"Answer: (.*)", body["messages"][0]["content"])[1]
    own = type(self)
    own.calls.append(answer)
    own.under_way.add(id(self))
    own.most = max(own.most, len(own.under_way))
    time.sleep(2.0 if answer == "silent" else SECONDS)
    own.under_way.discard(id(self))
    is_refused = answer == "down" or (answer == "busy" and own.calls.count("busy") == 1)
    text = json.dumps({"choices": [{"message": {"role": "assistant", "content": "7 points"}}]}).encode()
    try:
      self.send_response(503 if is_refused else 200)
      self.send_header("Content-Length", str(len(text)))
      self.end_headers()
      self.wfile.write(text)
    except OSError:  # nobody waits any more
      pass

  def log_message(self, *_):
    pass


@pytest.fixture
def server():
  class Own(Judge):
    calls, under_way, most = [], set(), 0

  class Server(http.server.ThreadingHTTPServer):
    request_queue_size, daemon_threads = 64, True

  with Server(("127.0.0.1", 0), Own) as listening:
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield Own, f"127.0.0.1:{listening.server_port}"
    listening.shutdown()
    thread.join()


@pytest.fixture
def spec(tmp_path, server):
  """The task that the page shows, asking this server."""
  example = re.search(r"^(    import asyncio.*?)^\S", PAGE.read_text(), re.M | re.S)[1]
  text = textwrap.dedent(example).replace("127.0.0.1:8000", server[1])
  stuck = '  if completion == "stuck":\n    import time; time.sleep(60)\n'
  path = tmp_path / "judge.py"
  path.write_text(
    text.replace("async def reward(record, completion):\n", "async def reward(record, completion):\n" + stuck)
  )
  return dict(name=str(path), options={"grader": "exact"}, prompt="default", rewards="default", grader="default")


def test_many_calls_are_under_way_and_each_is_tried_again(spec, server):
  texts = [f"a line with {number}" for number in range(1, 19)] + ["busy", "down", "silent"]
  pool = Grading(spec, workers=1, seconds=0.6, concurrency=12, retries=1)
  records = pool.task.records("train")[: len(texts)]
  try:
    pool.submit(records[:1], texts[:1], [True]).result()  # the worker starts
    start = time.monotonic()
    verdicts = pool.submit(records, texts, [True] * len(texts)).result()
    seconds = time.monotonic() - start
  finally:
    pool.close()
  assert [verdict.reward for verdict in verdicts] == [0.7] * 19 + [0.0] * 2
  assert [verdict.kind for verdict in verdicts] == ["graded"] * 19 + ["failed"] * 2
  assert [verdict.grade.is_correct for verdict in verdicts[16:20]] == [True, True, False, False]
  assert "503" in verdicts[-2].problem
  assert verdicts[-1].problem == "no answer within 0.6 seconds, at 2 attempts"
  assert [server[0].calls.count(text) for text in ("busy", "down", "silent", texts[5])] == [2, 2, 2, 1]
  assert 4 < server[0].most <= 12
  assert seconds < 18 * SECONDS  # one after the other they would take longer


@pytest.mark.slow
def test_a_reward_that_blocks_the_loop_costs_itself_alone(spec):
  pool = Grading(spec, workers=1, seconds=0.5, concurrency=4, retries=0)
  records = pool.task.records("test")[:3]
  try:
    verdicts = pool.submit(records, ["a", "stuck", "b"], [True] * 3).result()
  finally:
    pool.close()
  assert [verdict.kind for verdict in verdicts] == ["graded", "timeout", "graded"]


def test_only_the_call_itself_is_tried_again_and_an_exit_ends_no_worker(tmp_path):
  path, calls = tmp_path / "own.py", tmp_path / "calls"
  path.write_text(
    "def records(split): return [{'n': 1}]\ndef prompt(record): return 'x'\n"
    f"async def reward(record, completion):\n  open({str(calls)!r}, 'a').write(completion + ' ')\n"
    "  if completion == 'leave': raise SystemExit(3)\n  return {'a': 1} if completion == 'parts' else 2.0\n"
    "def is_correct(record, completion): return 1 / (completion != 'odd') > 0\n"
  )
  spec = dict(name=str(path), options={"grader": "exact"}, prompt="default", rewards="default", grader="default")
  pool = Grading(spec, workers=1, seconds=5.0, retries=1)
  try:
    verdicts = pool.submit([{"n": 1}] * 4, ["leave", "odd", "parts", "fine"], [True] * 4).result()
  finally:
    pool.close()
  assert [verdict.kind for verdict in verdicts] == ["failed", "failed", "failed", "graded"]
  assert ["SystemExit" in verdicts[0].problem, "ZeroDivisionError" in verdicts[1].problem] == [True, True]
  assert sorted(calls.read_text().split()) == ["fine", "leave", "odd", "parts"]


def test_it_is_a_reward_like_any_other(spec, tmp_path):
  task = make_task(**spec)
  verdict = judge(task, task.records("test")[0], "it has 90", True)
  assert (verdict.kind, verdict.reward, verdict.grade.is_correct) == ("graded", 0.7, True)
  path = tmp_path / "wrong.py"
  path.write_text(pathlib.Path(spec["name"]).read_text().replace("def is_correct", "async def is_correct"))
  with pytest.raises(ValueError, match="is_correct must not be async; only reward may be"):
    make_task(**spec | {"name": str(path)})
