"""The tasks by name: one file each, with its data, its prompt, its reward and its grading."""

from dmpo_jax.tasks import countdown, sudoku
from dmpo_jax.tasks.base import Grade, Record, Split, Task

__all__ = ["TASKS", "Grade", "Record", "Split", "Task"]

TASKS: dict[str, type[Task]] = {
  "sudoku": sudoku.Sudoku,
  "countdown": countdown.Countdown,
}
