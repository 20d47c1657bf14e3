"""LLaDA-MoE-7B-A1B (64 experts, of which a token takes 8) on a TPU slice, with the settings published for LLaDA-8B.

python -m launch.convert_hf --hf=inclusionAI/LLaDA-MoE-7B-A1B-Instruct --out=CHECKPOINT
python -m dmpo_jax.main --config=configs/llada_moe_7b.py --config.model.init_from=CHECKPOINT --workdir=RUN

Adapters are on attention: those of llada_8b.py are on the feed-forward too, which here is the experts'.
"""

from configs import llada_8b

ROW = {128: (15, 10), 256: (51, 14), 512: (184, 22)}  # as in llada_8b.py


def get_config(settings="256"):
  """Build it for a completion length and a slice: `256`, or `256,v5e-16`."""
  c = llada_8b.get_config(settings)
  with c.unlocked():
    m = c.model
    m.vocab_size = m.embedding_size = 157184
    m.d_model = 2048
    m.num_layers = 16
    m.num_heads = m.num_kv_heads = 16
    m.mlp_hidden_size = 8192  # of dense layers, of which it has none
    m.rope_theta = 50_000.0
    m.qk_norm = True
    m.router = "softmax"
    m.num_experts = 64
    m.experts_per_token = 8
    m.expert_size = 1024
    m.lora.targets = ("q_proj", "k_proj", "v_proj", "attn_out")
    llada_8b.listen_often(c, settings.partition(",")[2], ROW)
  return c
