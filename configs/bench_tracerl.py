"""TraceRL without its value model (arXiv 2509.06949) on the bench: chunks of 4 model calls.

Published is one pass over a buffer's chunks in several batches; 4 updates on all of them stand in for it.
"""

from configs import bench


def get_config(task: str = "sudoku"):
  c = bench.get_config(task)
  c.objective.name = "tracerl"
  c.objective.likelihood = "trajectory"
  c.objective.num_replicates = c.sampler.steps // 4
  c.objective.clip = 0.2
  c.objective.kl_weight = 0.01
  c.train.updates_per_buffer = 4
  return c
