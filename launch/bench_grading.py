"""Measure how fast completions are graded: seconds and rate of each task and set of rewards.

    python -m launch.bench_grading [--num=2048] [--workers=2]

The completions are made up: about 256 tokens each, 16 to a prompt, of a few different answers each, as a buffer of
rollouts has them.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags

from dmpo_jax.grading import Grading
from dmpo_jax.tasks import TASKS, answers
from dmpo_jax.tasks.worded import CHOICES
from launch.grading_cases import RECORDS, spec

GROUP = 16  # completions of one prompt
WORDS = 190  # of reasoning, about 240 tokens

_NUM = flags.DEFINE_integer("num", 2048, "Completions of each task.", lower_bound=1)
_WORKERS = flags.DEFINE_integer("workers", 2, "Worker processes.", lower_bound=1)


def make_batch(name: str, num: int) -> tuple[list[dict[str, Any]], list[str]]:
  """Make up records and completions: a right, some wrong and some odd answers for every prompt."""
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
  return RECORDS[name], RECORDS[name]["solution"]


def main(argv: Sequence[str]) -> None:
  """Print one line a task and set."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  for name in TASKS:
    records, completions = make_batch(name, _NUM.value)
    for choice in CHOICES:
      grading = Grading(spec(name, choice), workers=_WORKERS.value)
      starting = time.monotonic()
      ready = [grading.submit([{**records[0]} for _ in range(8)], completions[:8], [True] * 8)]
      ready[0].result()
      start = time.monotonic()
      verdicts = grading.submit(records, completions, [True] * len(completions)).result()
      seconds = time.monotonic() - start
      grading.close()
      right = sum(verdict.grade.is_correct for verdict in verdicts)
      print(
        f"{name:10} {choice:10} {len(verdicts)} completions in {seconds:6.3f} s, "
        f"{len(verdicts) / seconds:8,.0f} a second, {right} right; {start - starting:.2f} s to start",
        flush=True,
      )


if __name__ == "__main__":
  app.run(main)
