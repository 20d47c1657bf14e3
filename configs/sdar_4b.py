"""SDAR-4B-Chat (arXiv 2510.06303), a block-diffusion model, on a TPU slice, with the settings published for LLaDA-8B.

python -m launch.convert_hf --hf=JetLM/SDAR-4B-Chat --out=CHECKPOINT
python -m dmpo_jax.main --config=configs/sdar_4b.py --config.model.init_from=CHECKPOINT --workdir=RUN
"""

from configs import llada_8b

# As in llada_8b.py, but estimated, not counted: 8 GFLOP a token of a forward pass. A rollout runs each block of 4 up to
# five times. An update runs the prompt, and each completion clean and with 4 masks, forwards, again and backwards.
ROW = {128: (6, 30), 256: (11, 50), 512: (21, 90)}


def get_config(settings="256"):
  """Build it for a completion length and a slice: `256`, or `256,v5e-16`."""
  c = llada_8b.get_config(settings)
  with c.unlocked():
    m = c.model
    m.vocab_size = m.embedding_size = 151936
    m.d_model = 2560
    m.num_layers = 36
    m.num_heads = 32
    m.num_kv_heads = 8
    m.head_dim = 128
    m.mlp_hidden_size = 9728
    m.rope_theta = 1_000_000.0
    m.rms_norm_eps = 1e-6
    m.qk_norm = True
    m.block_length = 4
    c.sampler.name = "parallel"
    c.sampler.parallel.rule = "dynamic"  # the official code's, with its threshold
    c.sampler.parallel.threshold = 0.85
    c.sampler.block_length = 4
    c.sampler.steps = c.sampler.completion_length
    llada_8b.listen_often(c, settings.partition(",")[2], ROW)
  return c
