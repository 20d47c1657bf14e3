"""The section `grade`: completions graded per second, for each published task and set of rewards.

The completions are synthetic, like a buffer of rollouts: about 256 tokens each, 16 per prompt, with a few answers.
"""

import time
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dmpo_jax.grading import Grading
from dmpo_jax.tasks import answers
from dmpo_jax.tasks.builtin import CHOICES
from dmpo_jax.tasks.published import GRADERS
from launch.bench.results import Options, Result, Row
from launch.grade import spec

NUM = 2048  # completions of each task
GROUP = 16  # completions of one prompt
WORDS = 190  # of reasoning, about 240 tokens


def run(config: ConfigDict, options: Options) -> Result:
  """Grade a batch of every task by every set of rewards."""
  rows = [measure(name, choice, config, options) for name in GRADERS for choice in CHOICES]
  settings = f"{NUM} completions of each task, {config.grading.workers} worker processes where a task needs them"
  return Result("grade", settings, rows)


def measure(name: str, choice: str, config: ConfigDict, options: Options) -> Row:
  """Grade the batch of one task several times, after the workers have started."""
  records, completions = make_batch(name, NUM)
  grading = Grading(spec(name, choice), **config.grading)
  try:
    for _ in range(2 * config.grading.workers):  # a prompt goes to one worker
      grading.submit([{**records[0]} for _ in range(8)], completions[:8], [True] * 8).result()
    seconds = []
    for turn in range(options.repeats):
      options.say(f"{name}, {choice}: turn {turn + 1} of {options.repeats}")
      start = time.perf_counter()
      grading.submit(records, completions, [True] * len(completions)).result()
      seconds.append(time.perf_counter() - start)
  finally:
    grading.close()
  return Row(f"{name}, {choice}", tuple(seconds), len(completions), "completions")


def make_batch(name: str, num: int) -> tuple[list[dict[str, Any]], list[str]]:
  """Make synthetic records and completions: for every prompt correct, wrong and odd answers."""
  rng = np.random.default_rng(0)
  words = ["so", "the", "sum", "of", "both", "is", "12", "+", "7", "=", "19", "and", "then", "$x$", "we", "get"]
  records, completions = [], []
  for prompt in range(-(-num // GROUP)):
    record, right = _puzzle(name, prompt)
    odd = [
      "",
      "none",
      f"{right} {right}",
      f"x={right}",
      f"{prompt}",
      f"{right}+1",
      f"\\frac{{{prompt}}}{{7}}",
      f"{right}.",
    ]
    for rollout in range(GROUP):
      answer = right if rollout % 2 else odd[int(rng.integers(len(odd)))]
      boxed = f"\\boxed{{{answer}}}" if name == "math" else answer
      records.append(record)
      completions.append(answers.wrap(" ".join(rng.choice(words, WORDS)), boxed))
  return records[:num], completions[:num]


def _puzzle(name: str, prompt: int) -> tuple[dict[str, Any], str]:
  if name == "gsm8k":
    return {"question": "?", "solution": "", "answer": f"{1000 + prompt:,}"}, f"{1000 + prompt}"
  if name == "math":
    right = (f"\\frac{{{prompt + 1}}}{{\\sqrt{{3}}}}", f"({prompt}, \\pi]", f"{prompt}x^2+x", f"{prompt}")[prompt % 4]
    return {"problem": "?", "answer": right}, right
  if name == "countdown":
    numbers = [prompt % 50 + 1, 30, 4]
    return {"numbers": ",".join(map(str, numbers)), "target": numbers[0] + 120}, f"{numbers[0]}+30*4"
  solution = "3142243142131324"
  return {"puzzle": "3102200002100320", "solution": solution}, solution
