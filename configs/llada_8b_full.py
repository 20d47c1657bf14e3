"""LLaDA-8B with every parameter trained, against a frozen bfloat16 reference: on TPU slices from v5p-16 and v6e-64.

    python -m dmpo_jax.main --config=configs/llada_8b_full.py --config.model.init_from=CHECKPOINT --workdir=RUN

The rest is as in `configs/llada_8b.py`; its learning rate is common for this, too. Trained parameters and their two
moments are float32 (96 GB in all, and so is a checkpoint). Rollouts, scores and the gradient step compute in bfloat16.
Another slice than v5p-16: --config=configs/llada_8b_full.py:256,v6e-64.
"""

from configs import llada_8b


def get_config(settings="256"):
  """Build it for a completion length and a slice: `256`, or `256,v5p-16`."""
  c = llada_8b.get_config(settings if "," in settings else f"{settings},v5p-16")
  with c.unlocked():
    c.model.lora.rank = 0
    c.model.param_dtype = "bfloat16"  # of p_ref only
    c.sharding.data, c.sharding.fsdp = 1, -1  # trained parameters are split over all chips of a slice
    c.checkpoint.every_updates = 40  # every five buffers, because a checkpoint has 96 GB
  return c
