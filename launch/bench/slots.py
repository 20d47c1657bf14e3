"""The section `slots`: continuous batching beside fixed batches, on completions of widely differing length."""

from ml_collections import ConfigDict

from launch.bench import cache, timing
from launch.bench.results import Options, Result, compare


def run(config: ConfigDict, options: Options) -> Result:
  """Measure rollouts of a buffer in slots, and in fixed batches of as many rows.

  Raises:
    ValueError: there are no slots; or see `cache.check`.
  """
  cache.check(config)
  if not config.sampler.slots:
    raise ValueError("config.sampler.slots = 0: give the number of rows that are decoded at a time")
  ours: dict[str, timing.Maker] = {
    "in slots": (cache.make_slots, (config,)),
    "fixed batches": (cache.make_fixed, (config,)),
  }
  tokens = cache.count_tokens(config, options)
  return compare(
    "slots", config, options, ours, {}, amount=tokens, tolerances={}, pairs=[("in slots", "fixed batches")]
  )
