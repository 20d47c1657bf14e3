"""lm-evaluation-harness, as it is, asks `--mode=serve`: the commands of docs/serving.md."""

import json
import os
import subprocess
import sys

import pytest
import standin_tokenizer
from test_serve import serving

from configs import base
from dmpo_jax.hub.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

TASK = """
task: reversed
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["4", "n1", "n2", "n3", "n4"]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


def lm_eval(folder, *arguments):
  """Run it without a network; return the share of exact matches."""
  environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "PYTHONPATH": ""}
  command = [sys.executable, "-m", "lm_eval", *arguments, "--tasks", "reversed", "--include_path", str(folder)]
  command += ["--output_path", str(folder / "out.json")]
  done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
  (found,) = folder.glob("**/out*.json")
  results = json.loads(found.read_text())["results"]["reversed"]
  found.unlink()
  return results["exact_match,none"]


@pytest.fixture
def folder(tmp_path):
  # The stand-in for the model answers a prompt with its first tokens, reversed: bytes, which are characters here.
  rows = [("1234567", "765"), ("123", "321"), ("9" * 1200 + "12", "21999999")]  # one as long as several examples
  texts = [json.dumps({"question": question, "answer": answer}) for question, answer in rows]
  (tmp_path / "rows.jsonl").write_text("\n".join(texts))
  (tmp_path / "reversed.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
  standin_tokenizer.write(tmp_path / "checkpoint", model_config={"mask_token_id": 126336})
  return tmp_path


def test_lm_eval_completes(folder):
  tokenizer = load_tokenizer("huggingface", folder / "checkpoint", is_chat=True)
  with serving(tokenizer, max_prompt_length=base.get_config().serve.max_prompt_length, batch_size=2) as decode:
    at = f"base_url={decode.address}/v1/completions,tokenizer={folder / 'checkpoint'}"
    one = lm_eval(folder, "--model", "local-completions", "--model_args", f"model=tiny,{at}")
    assert decode.said[-1].count(", 1 choices")
    several = lm_eval(
      folder, "--model", "local-completions", "--model_args", f"model=tiny,{at},num_concurrent=2", "--batch_size", "3"
    )
  assert one == several == 1.0


def test_lm_eval_chats(folder):
  tokenizer = load_tokenizer("huggingface", folder / "checkpoint", is_chat=True)
  with serving(tokenizer, max_prompt_length=2048) as decode:
    at = f"base_url={decode.address}/v1/chat/completions"
    lm_eval(folder, "--model", "local-chat-completions", "--apply_chat_template", "--model_args", f"model=tiny,{at}")
    prompts = {tokenizer.decode(job.prompt) for job in decode.jobs}
  assert {
    tokenizer.decode(tokenizer.encode_chat([("user", text)])) for text in ("1234567", "123", "9" * 1200 + "12")
  } == prompts
