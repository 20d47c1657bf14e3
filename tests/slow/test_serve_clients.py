"""A converted checkpoint behind `--mode=serve`, a process of its own, asked by lm-evaluation-harness as it is."""

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request

import pytest
import tiny
from programs import begin, start

from launch.rehearse import checkpoint

pytestmark = pytest.mark.slow

TASK = """
task: copied
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: {stops}}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
QUESTIONS = [
  "1234567",
  "123",
  "(1430000041203004=",
  "".join(map(str, range(450))),
]  # the last as long as several examples
LAST = "".join(
  map(str, range(300, 500))
)  # of a length for which nothing is compiled: still at work when the server is told to stop
TEMPLATED = ("/v1/chat/completions", lambda text: {"messages": [{"role": "user", "content": text}]})
PLAIN = ("/v1/completions", lambda text: {"prompt": text})


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  """The converted checkpoint, with weights large enough for its answers to differ."""
  folder = tmp_path_factory.mktemp("served")
  config = tiny.config(tokenizer__name="huggingface", tokenizer__path="", model__init_from=str(folder / "converted"))
  checkpoint.write(folder / "hf", config, scale=0.4)
  done = start(f"--hf={folder / 'hf'}", f"--out={folder / 'converted'}", module="launch.convert_hf")
  assert done.returncode == 0, done.stderr
  return folder / "converted"


def options(converted, is_chat):
  return (
    "--config=configs/base.py",
    f"--config.model.init_from={converted}",
    "--config.tokenizer.name=huggingface",
    "--config.tokenizer.path=",
    f"--config.tokenizer.is_chat={is_chat}",
  )


def sampled(converted, is_chat, folder):
  """What `--mode=sample` answers to the questions and to the last one."""
  prompts = folder / "prompts.jsonl"
  prompts.write_text("\n".join(json.dumps({"prompt": text}) for text in [*QUESTIONS, LAST]))
  done = start("--mode=sample", *options(converted, is_chat), "--json", f"--prompts={prompts}")
  assert done.returncode == 0, done.stderr
  return [json.loads(line)["text"] for line in done.stdout.splitlines()]


@contextlib.contextmanager
def served(converted):
  """Start the server; give its process, the leader of a group of its own, and the address that it announces."""
  process = begin("--mode=serve", *options(converted, True), "--config.serve.port=0", start_new_session=True)
  limit = threading.Timer(300, process.kill)
  limit.start()
  try:
    line = process.stdout.readline()
    announced = re.fullmatch(r"serving converted on (http://127\.0\.0\.1:\d+)/ and \1/v1\n", line)
    assert announced, line + process.stderr.read()
    yield process, announced[1]
  finally:
    limit.cancel()
    process.kill()


def lm_eval(folder, *arguments):
  """Run it without a network; return its results for the task."""
  environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "PYTHONPATH": ""}
  command = [sys.executable, "-m", "lm_eval", *arguments, "--tasks", "copied", "--include_path", str(folder)]
  command += ["--output_path", str(folder / "out.json")]
  done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
  (found,) = folder.glob("**/out*.json")
  written = json.loads(found.read_text())
  found.unlink()
  assert written["n-samples"]["copied"] == {"original": len(QUESTIONS), "effective": len(QUESTIONS)}
  return written["results"]["copied"]["exact_match,none"]


def write_task(folder, answers):
  """Ask for the answers up to a stop string, which at least the first of them has."""
  stop = next(letter for letter in answers[0][1:] if letter.isascii() and letter.isprintable())
  stops = [stop, "n1", "n2", "n3", "n4"]  # more than OpenAI's four
  cut = [text.partition(stop)[0] for text in answers]
  rows = [{"question": question, "answer": answer} for question, answer in zip(QUESTIONS, cut, strict=True)]
  (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
  (folder / "copied.yaml").write_text(TASK.format(rows=folder / "rows.jsonl", stops=json.dumps(stops)))


def answer(url, form, text):
  path, fields = form
  body = json.dumps({"model": "any", **fields(text)}).encode()
  request = urllib.request.Request(url + path, data=body, headers={"Content-Type": "application/json"})
  with urllib.request.urlopen(request, timeout=120) as reply:
    choice = json.loads(reply.read())["choices"][0]
  return choice["text"] if form is PLAIN else choice["message"]["content"]


def stop_at_work(process, url, form, ending):
  """Send a signal, as a terminal does, while a request is decoded; return its answer and the log's rest."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    waiting, log = pool.submit(answer, url, form, LAST), []
    for line in process.stderr:
      log.append(line)
      if "compiling for prompts of up to 6" in line:
        break
    os.killpg(process.pid, ending)
    text, log = waiting.result(), "".join([*log, *process.stderr])
  assert process.wait(timeout=60) == 0, log
  assert log.splitlines()[-1] == "stopped serving"
  with pytest.raises(ProcessLookupError):
    os.killpg(process.pid, 0)
  return text, log


def test_lm_eval_completes(converted, tmp_path):
  *answers, last = sampled(converted, False, tmp_path)
  assert len({*answers, last}) == len(QUESTIONS) + 1
  write_task(tmp_path, answers)
  with served(converted) as (process, url):
    at = f"model=any,base_url={url}/v1/completions,tokenizer={converted}"
    one = lm_eval(tmp_path, "--model", "local-completions", "--model_args", at)
    several = lm_eval(
      tmp_path, "--model", "local-completions", "--model_args", f"{at},num_concurrent=2", "--batch_size", "3"
    )
    text, log = stop_at_work(process, url, PLAIN, signal.SIGTERM)
  assert one == several == 1.0
  assert text == last
  assert sorted(re.findall(r"POST /v1/completions 200 .*, (\d) choices", log)) == list("1111113")


def test_lm_eval_chats(converted, tmp_path):
  *answers, last = sampled(converted, True, tmp_path)
  assert len({*answers, last}) == len(QUESTIONS) + 1
  write_task(tmp_path, answers)
  with served(converted) as (process, url):
    at = f"model=any,base_url={url}/v1/chat/completions"
    exact = lm_eval(tmp_path, "--model", "local-chat-completions", "--apply_chat_template", "--model_args", at)
    text, log = stop_at_work(process, url, TEMPLATED, signal.SIGINT)
  assert exact == 1.0
  assert text == last
  assert len(re.findall(r"POST /v1/chat/completions 200 .*, 1 choices", log)) == len(QUESTIONS) + 1
