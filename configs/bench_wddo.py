"""DMPO's discriminative loss on the bench (arXiv 2510.08233)."""

from configs import bench_wdce


def get_config(task: str = "sudoku"):
  c = bench_wdce.get_config(task)
  c.objective.name = "wddo"
  return c
