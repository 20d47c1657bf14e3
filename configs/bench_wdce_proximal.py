"""DMPO with the policy that drew a buffer for its reference: no log-ratio, so no forward passes on the rollouts.

A buffer's updates are one step of mirror descent towards p_old * exp(reward / alpha); the target p_ref * exp(reward /
alpha) of the published entry is given up. A few updates on masks along the sampler's own trajectory, from rollouts at a
temperature that tells those of a group apart.
"""

from configs import bench_wdce


def get_config(task: str = "sudoku"):
  c = bench_wdce.get_config(task)
  c.sampler.temperature = 1.5
  c.objective.masks = "trajectory"
  c.objective.antithetic = False
  c.objective.num_mask_samples = 2
  c.train.updates_per_buffer = 2
  c.objective.sync_reference_every = 2
  c.optim.learning_rate = 2e-4
  return c
