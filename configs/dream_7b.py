"""Dream-7B (arXiv 2508.15487) on a TPU slice, with the settings published for LLaDA-8B.

python -m launch.convert_hf --hf=Dream-org/Dream-v0-Instruct-7B --out=CHECKPOINT
python -m dmpo_jax.main --config=configs/dream_7b.py --config.model.init_from=CHECKPOINT --workdir=RUN
"""

from configs import llada_8b

ROW = {128: (85, 49), 256: (288, 70), 512: (1057, 111)}  # as in llada_8b.py


def get_config(settings="256"):
  """Build it for a completion length and a slice: `256`, or `256,v5e-16`."""
  c = llada_8b.get_config(settings)
  with c.unlocked():
    m = c.model
    m.vocab_size = m.embedding_size = 152064
    m.d_model = 3584
    m.num_layers = 28
    m.num_heads = 28
    m.num_kv_heads = 4
    m.mlp_hidden_size = 18944
    m.rope_theta = 1_000_000.0
    m.rms_norm_eps = 1e-6
    m.qkv_bias = True
    m.shift_logits = True
    c.sampler.prefix_cache.rule = "entropy"  # Dream's own, as in the official code
    llada_8b.listen_often(c, settings.partition(",")[2], ROW)
  return c
