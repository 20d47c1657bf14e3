"""Try the rewards and graders of the four tasks on random and mutated completions: no exception, no hang, no odd score.

    python -m launch.fuzz_grading [--num=100000] [--seed=0]

Hypothesis draws every completion: free text, or right and half-right answers cut up, repeated and joined. Each is
graded by the default and by the published set. Ends with exit code 1 and the completion where something is wrong.
"""

import sys
import time
from collections.abc import Sequence

import hypothesis
from absl import app, flags
from hypothesis import strategies as st

from dmpo_jax.config import command
from dmpo_jax.grading import Grading
from dmpo_jax.tasks import TASKS
from dmpo_jax.tasks.published import RANGES
from dmpo_jax.tasks.worded import CHOICES
from launch.grading_cases import RECORDS, spec

_NUM = flags.DEFINE_integer("num", 100_000, "Completions, a quarter for each task.", lower_bound=4)
_SEED = flags.DEFINE_integer("seed", 0, "Of hypothesis.")
_SECONDS = flags.DEFINE_float("seconds", 2.0, "That grading one completion may take.")

PIECES = (
  *(
    "<reasoning>",
    "</reasoning>",
    "<answer>",
    "</answer>",
    "\n",
    " ",
    "<|eot_id|>",
    "<|endoftext|>",
    "```",
    "####",
    "$",
  ),
  *(
    "\\boxed{",
    "\\boxed ",
    "\\fbox{",
    "{",
    "}",
    "\\frac",
    "\\sqrt",
    "\\text{ ",
    "\\left(",
    "\\right)",
    "\\infty",
    "=",
    ",",
  ),
  *(
    "9**9**9**9",
    "75-30+4",
    "(75-30)",
    "--",
    "//0",
    "1/0",
    "^{9^{9^{9}}}",
    "!!!!",
    "\\pi",
    "\\times",
    "e^",
    "\\int",
    "x",
  ),
  *(
    "1,234",
    "1234",
    "-5.0",
    "\u00b2",
    "\u0663",
    "3142243142131324",
    "31422431",
    "nan",
    "inf",
    "1e999",
    "0" * 50,
    "9" * 400,
  ),
)

_piece = st.sampled_from(PIECES) | st.text(max_size=8)
_joined = st.lists(_piece, max_size=30).map("".join)
_repeated = st.builds(lambda piece, count: piece * count, _piece, st.integers(1, 400))
_answered = st.builds("<reasoning>\n{}\n</reasoning>\n<answer>\n{}\n</answer>{}".format, _joined, _joined, _piece)
COMPLETIONS = st.one_of(
  st.text(max_size=200), _joined, _repeated, _answered, st.builds("\\boxed{{{}}}".format, _joined)
)


def draw(num: int, seed: int) -> list[str]:
  """Return `num` completions that hypothesis has drawn."""
  drawn: list[str] = []

  @hypothesis.seed(seed)
  @hypothesis.settings(
    max_examples=num,
    database=None,
    deadline=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(COMPLETIONS)
  def collect(completion: str) -> None:
    drawn.append(completion)

  collect()
  return drawn


def try_all(name: str, choice: str, completions: Sequence[str], seconds: float) -> tuple[list[str], dict[str, int]]:
  """Grade completions; return what is wrong, and how many came to which end."""
  grading = Grading(spec(name, choice), workers=2, seconds=seconds)
  low, high = RANGES[name] if choice == "published" else grading.task.own_range
  verdicts = grading.submit([RECORDS[name]] * len(completions), completions, [True] * len(completions)).result()
  grading.close()
  wrong, kinds = [], {}
  for verdict, completion in zip(verdicts, completions, strict=True):
    kinds[verdict.kind] = kinds.get(verdict.kind, 0) + 1
    if verdict.kind == "failed" or (verdict.kind == "graded" and not low <= verdict.reward <= high):
      wrong.append(f"{name}, {choice}: {verdict.problem or verdict.reward} on {completion!r}")
  return wrong, kinds


def main(argv: Sequence[str]) -> None:
  """Try everything and report."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  wrong = []
  for index, name in enumerate(TASKS):
    completions = draw(_NUM.value // len(TASKS), _SEED.value + index)
    for choice in CHOICES:
      start = time.monotonic()
      found, kinds = try_all(name, choice, completions, _SECONDS.value)
      wrong += found
      print(
        f"{name:10} {choice:10} {len(completions)} completions {kinds} {time.monotonic() - start:.1f} s", flush=True
      )
  for line in wrong[:20]:
    print(line[:1000], file=sys.stderr)
  print(f"{len(wrong)} wrong")
  sys.exit(bool(wrong))


if __name__ == "__main__":
  command.run(main)
