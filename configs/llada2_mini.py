"""LLaDA2.0-mini (16B, 256 experts, of which a token takes 8 and a shared one), with what was published for LLaDA-8B.

python -m launch.convert_hf --hf=inclusionAI/LLaDA2.0-mini --out=CHECKPOINT
python -m dmpo_jax.main --config=configs/llada2_mini.py --config.model.init_from=CHECKPOINT --workdir=RUN

LLaDA2.1-mini is the same model; --config.sampler.name=editing decodes as it was published. Adapters are on attention:
those of llada_8b.py are on the feed-forward too, which here is the experts'.
"""

from configs import llada_8b

# As in llada_8b.py, but estimated, not counted: 2.2 GFLOP a token of a forward pass. A rollout runs each block of 32 up
# to 33 times. An update runs prompt, completion and noised completion for 4 masks, forwards, again and backwards.
ROW = {128: (11, 17), 256: (21, 25), 512: (42, 42)}


def get_config(settings="256"):
  """Build it for a completion length and a slice: `256`, or `256,v5e-16`."""
  c = llada_8b.get_config(settings)
  with c.unlocked():
    m = c.model
    m.vocab_size = m.embedding_size = 157184
    m.d_model = 2048
    m.num_layers = 20
    m.num_heads = 16
    m.num_kv_heads = 4
    m.head_dim = 128
    m.mlp_hidden_size = 5120  # of the first layer, which has no experts
    m.rope_theta = 600_000.0
    m.rotary_fraction = 0.5
    m.rms_norm_eps = 1e-6
    m.qk_norm = True
    m.block_length = 32
    m.router = "sigmoid"
    m.num_experts = 256
    m.experts_per_token = 8
    m.expert_size = 512
    m.shared_expert_size = 512
    m.expert_layers = (0.0,) + (1.0,) * 19
    m.expert_bias = True
    m.expert_groups = 8
    m.expert_groups_per_token = 4
    m.expert_scale = 2.5
    m.lora.targets = ("q_proj", "k_proj", "v_proj", "attn_out")
    c.sampler.name = "parallel"
    c.sampler.parallel.rule = "dynamic"  # the official code's, with its threshold
    c.sampler.parallel.threshold = 0.95
    c.sampler.steps = c.sampler.completion_length
    llada_8b.listen_often(c, settings.partition(",")[2], ROW)
  return c
