"""The same 4x4 Sudoku as `sudoku_tiny.py` with a block-diffusion model: blocks of four cells, an exact cache."""

from configs import sudoku_tiny


def get_config():
  c = sudoku_tiny.get_config()
  with c.unlocked():
    c.model.block_length = 4
    c.model.qk_norm = True  # as in SDAR, so that exports are its checkpoints
    c.sampler.block_length = 4
  return c
