"""LLaDA-8B with every choice as the official DMPO code effectively makes it, on top of `llada_8b.py`.

Choices only: its mistakes are not imitated (docs/official.md lists the differences). An NF4 base, which a TPU
cannot have, stays as in `llada_8b.py`.
"""

from configs import llada_8b


def get_config(settings="256"):
  """Build it for a completion length and a slice: `256`, or `256,v5e-16`."""
  c = llada_8b.get_config(settings)
  with c.unlocked():
    c.task.prompt = "published_train"  # and published_eval to repeat its evaluation
    c.task.rewards = "published"
    c.task.grader = "published"
    c.task.overlong_prompts = "cut_user"  # it cuts the row on the left and loses the header, which this keeps
    c.objective.name = "wdce"
    c.objective.likelihood = "elbo"
    c.objective.antithetic = True
    c.objective.min_mask_ratio = 0.1  # documented as [0.1, 0.9], drawn from [0.1, 1]; complements have [0, 0.9]
    c.objective.max_mask_ratio = 1.0
    c.objective.counted = "all"  # what follows the first EOS counts
    c.objective.weighting = "tilt"
    c.objective.proximal = "fixed"
    c.objective.kappa = 1.0
    c.objective.wdce.baseline = "negative"
    c.objective.wdce.baseline_strength = 1.0
    c.rollout.drop_equal_groups = False  # under this baseline they have no gradient, but the moments decay
    c.objective.sync_reference_every = 0  # its key has no effect with adapters
  return c
