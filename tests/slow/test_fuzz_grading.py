"""The rewards and graders of the tasks on random and mutated completions: no exception, no reward out of range.

Hypothesis draws the completions: free text, or correct and half-correct answers cut up, repeated and joined. Each is
graded by the default and by the published set. `make fuzz` draws 100,000 of them.
"""

import os

import hypothesis
import pytest
from hypothesis import strategies as st

from dmpo_jax.grading import Grading
from dmpo_jax.tasks import TASKS
from dmpo_jax.tasks.code import Code
from dmpo_jax.tasks.published import RANGES
from launch.grade import spec

pytestmark = pytest.mark.slow
NUM = int(os.environ.get("FUZZ_COMPLETIONS", 2000)) // len(TASKS)  # of each task
SLOWER = {"code": 20}  # starts a process for each completion, so it gets fewer
SECONDS = 2.0  # in which one completion must be graded, or it counts as a timeout

RECORDS = {
  "gsm8k": {"question": "How many?", "solution": "", "answer": "1,234"},
  "math": {"problem": "What?", "answer": "\\frac{x^2+1}{2}"},
  "countdown": {"numbers": "75,30,4", "target": 49},
  "sudoku": {"puzzle": "3102200002100320", "solution": "3142243142131324"},
  "knights": {"statements": ["+1*-2", "-1/-2"], "solution": "01"},
  "code": Code.read_row({"text": "?", "code": "def f(x): return x", "test_list": ["assert f(1) == 1"]}),
}
WORDS = r"""
<reasoning> </reasoning> <answer> </answer> <|eot_id|> <|endoftext|> ``` #### $ = , { }
\boxed{ \fbox{ \frac \sqrt \left( \right) \infty \pi \times \int e^ x ^{9^{9^{9}}} !!!!
9**9**9**9 75-30+4 (75-30) -- //0 1/0 1,234 1234 -5.0 3142243142131324 31422431 nan inf 1e999
"""
PIECES = (
  *WORDS.split(),
  "```python\n",
  "def f(x): ",
  "return x",
  "Ann is a knight, ",
  "Bob: knave",
  "\n",
  " ",
  "\\boxed ",
  "\\text{ ",
  "\u00b2",
  "\u0663",
  "0" * 50,
  "9" * 400,
)

_piece = st.sampled_from(PIECES) | st.text(max_size=8)
_joined = st.lists(_piece, max_size=30).map("".join)
_repeated = st.builds(lambda piece, count: piece * count, _piece, st.integers(1, 400))
_answered = st.builds("<reasoning>\n{}\n</reasoning>\n<answer>\n{}\n</answer>{}".format, _joined, _joined, _piece)
_boxed = st.builds("\\boxed{{{}}}".format, _joined)
COMPLETIONS = st.one_of(st.text(max_size=200), _joined, _repeated, _answered, _boxed)


def draw(num, seed):
  """Let hypothesis draw `num` completions."""
  drawn = []

  @hypothesis.seed(seed)
  @hypothesis.settings(
    max_examples=num,
    database=None,
    deadline=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(COMPLETIONS)
  def collect(completion):
    drawn.append(completion)

  collect()
  return drawn


@pytest.mark.parametrize(("name", "choice"), [(name, choice) for name in TASKS for choice in TASKS[name].choices()])
def test_every_completion_gets_a_reward_in_range(name, choice):
  completions = draw(NUM // SLOWER.get(name, 1), seed=list(TASKS).index(name))
  grading = Grading(spec(name, choice), workers=2, seconds=SECONDS, sandbox="none")
  low, high = RANGES[name] if choice == "published" else grading.task.default_range
  try:
    verdicts = grading.submit([RECORDS[name]] * len(completions), completions, [True] * len(completions)).result()
  finally:
    grading.close()
  wrong = [
    f"{verdict.problem or verdict.reward} on {completion!r}"
    for verdict, completion in zip(verdicts, completions, strict=True)
    if verdict.kind == "failed" or (verdict.kind == "graded" and not low <= verdict.reward <= high)
  ]
  assert not wrong, "\n".join(line[:1000] for line in wrong[:20])
  assert sum(verdict.kind == "graded" for verdict in verdicts) > 0.99 * len(completions)
