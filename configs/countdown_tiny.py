"""3-number Countdown on a laptop: a small model learns the form of an answer, then to hit the target by DMPO."""

from configs import sudoku_tiny


def get_config():
  c = sudoku_tiny.get_config()
  with c.unlocked():
    c.task.name = "countdown"
    c.task.max_prompt_length = 11
    c.sampler.completion_length = 12
    c.sampler.block_length = 12
    c.sampler.steps = 12
  return c
