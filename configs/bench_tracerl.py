"""TraceRL without its value model (arXiv 2509.06949) on the bench: chunks of 4 model calls.

The paper makes one pass over the chunks of a buffer in several batches; here, 4 updates on all of them.
"""

from configs import bench


def get_config(task: str = "sudoku"):
  c = bench.get_config(task)
  c.objective.name = "tracerl"
  c.objective.likelihood = "trajectory"
  c.objective.num_mask_samples = c.sampler.steps // 4
  c.objective.tracerl.clip = 0.2
  c.objective.tracerl.kl_weight = 0.01
  c.train.updates_per_buffer = 4
  return c
