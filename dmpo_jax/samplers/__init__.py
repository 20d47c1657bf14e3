"""Decoding rules by name: one file each, on the loop of `loop.py`.

Each is `sample(denoiser, keys, plan, **own) -> structs.Rollouts`.
"""

from dmpo_jax.samplers import dual_cache, entropy_bound, freedave, llada, parallel, prefix_cache, random_order, wino
from dmpo_jax.samplers.loop import Plan

__all__ = ["SAMPLERS", "Plan"]

SAMPLERS = {
  "random_order": random_order.sample,
  "llada": llada.sample,
  "parallel": parallel.sample,
  "prefix_cache": prefix_cache.sample,
  "dual_cache": dual_cache.sample,
  "wino": wino.sample,
  "freedave": freedave.sample,
  "entropy_bound": entropy_bound.sample,
}
