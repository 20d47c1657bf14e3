"""What the grading is tried out and measured with: a record of each task, and how to make each task."""

from typing import Any

RECORDS = {
  "gsm8k": {"question": "How many?", "solution": "", "answer": "1,234"},
  "math": {"problem": "What?", "answer": "\\frac{x^2+1}{2}"},
  "countdown": {"numbers": "75,30,4", "target": 49},
  "sudoku": {"puzzle": "3102200002100320", "solution": "3142243142131324"},
}
OPTIONS = {
  "countdown": {"num_numbers": 3, "max_number": 99, "demo_wrong": 0.0},
  "sudoku": {"min_blanks": 1, "max_blanks": 2, "demo_patience": 9.0},
}


def spec(name: str, choice: str, prompt: str = "default") -> dict[str, Any]:
  """Return what makes a task with one set of rewards and graders."""
  return dict(name=name, options=OPTIONS.get(name, {}), prompt=prompt, rewards=choice, grader=choice)
