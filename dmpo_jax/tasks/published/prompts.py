"""The prompts of the published code, character for character, as its results depend on them.

From DMPO/data_utils.py (training) and eval/*.py (evaluation) of github.com/yuchen-zhu-zyc/DMPO, Apache-2.0. In the
evaluation, every answer starts with <reasoning>.
"""

from dmpo_jax.tasks.base import PromptTemplate

_TAGS = """
Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>
"""

_BOXED_TAGS = """Respond in the following format:
<reasoning>
Your reasoning here
</reasoning>
<answer>
\\boxed{...}
</answer>"""

_SUDOKU = """
Please solve the following 4x4 Sudoku puzzle. The puzzle is provided as a 16-character string reading left-to-right, \
top-to-bottom, where '0' represents empty cells.

Rules:
- Fill empty cells with digits 1-4
- Each row must contain digits 1-4 exactly once
- Each column must contain digits 1-4 exactly once
- Each 2x2 box must contain digits 1-4 exactly once

Important: Your solution must be a COMPLETE 16-character string with only the digits 1-4, representing your final \
solved grid.

Respond in this exact format:
<reasoning>
Your step-by-step solving process
</reasoning>
<answer>
[16-character solution string with no spaces or separators]
</answer>


Solve the following Sudoku puzzle: $puzzle
"""

_MATH_EXPERT = (
  "You are a math expert. You will be given a question to solve. Solve it step by step. Wrap the final answer"
)

_COUNTDOWN_TRAIN = (
  _TAGS + "\nUsing only the numbers [$numbers], create an arithmetic expression that evaluates to exactly $target. You "
  "must use all numbers from the list, and each number must be used exactly once. You may use the operations +, -, *, "
  "and / as needed. After reasoning, provide only your final expression inside <answer></answer> tags without "
  "including an equals sign or the target number. For example, if the numbers are [2, 3, 4] and the target is 5, a "
  "valid answer is: <answer>\n2*4-3\n</answer>"
)

_COUNTDOWN_EVAL = (
  "Using only the provided numbers, create an arithmetic expression that evaluates to exactly the provided target "
  "number. You may use the operations +, -, *, and / as needed, but each number must be used exactly once. Think "
  "step-by-step. After reasoning, provide only your final expression inside \\boxed{} tags without including an equals "
  "sign or the target number. For example: \\boxed{a + b * c}"
  + _BOXED_TAGS
  + "\n\nNumbers: [$numbers]\nTarget: $target"
)


def _pair(train: str, evaluation: str, train_answer: str, evaluation_answer: str) -> dict[str, PromptTemplate]:
  return {
    "published_train": PromptTemplate(train, answer=train_answer),
    "published_eval": PromptTemplate(evaluation, prefill="<reasoning>", answer=evaluation_answer),
  }


GSM8K = _pair(
  _TAGS + "\n\n$question",
  f"{_MATH_EXPERT} in a \\boxed{{}}. \n{_BOXED_TAGS}\n\n$question",
  "$answer",
  "\\boxed{$answer}",
)
MATH = _pair(
  f"{_TAGS}\n\n{_MATH_EXPERT} in a \\boxed{{}}. \n\n$problem",
  f'{_MATH_EXPERT} in a \\boxed{{}}.\n{_BOXED_TAGS}" \n\n\n$problem',
  "\\boxed{$answer}",
  "\\boxed{$answer}",
)
COUNTDOWN = _pair(_COUNTDOWN_TRAIN, _COUNTDOWN_EVAL, "$answer", "\\boxed{$answer}")
SUDOKU = _pair(_SUDOKU, _SUDOKU, "$answer", "$answer")
