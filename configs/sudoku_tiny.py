"""4x4 Sudoku on a laptop: a small model learns the rules from half-finished solutions, then to finish them by DMPO."""

from configs import base


def get_config():
  c = base.get_config()
  c.warm_start.updates = 400
  return c.lock()
