"""The families of checkpoints in Hugging Face's layout that the one model can be: what each calls things.

A family is a description alone; `convert` reads it in both directions.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dmpo_jax.models.lora import TARGETS


@dataclasses.dataclass(frozen=True)
class Family:
  """What one family of checkpoints calls things: of the whole model, and of a layer by our names."""

  model_type: str  # by which a config.json is known, in whatever case
  architecture: str  # the class that a config.json names
  embedding: str
  final_norm: str
  head: str
  block: str  # {} stands for the layer's number
  modules: Mapping[str, str]  # ours -> theirs
  sizes: Mapping[str, str]  # our fields -> keys of config.json
  num_kv_heads: str  # key of config.json; null: as many as heads
  qkv_bias: str  # key
  has_qkv_bias: bool  # where that key is absent
  vocab_size: str  # key of the ids that may be drawn; where it is absent, `vocab_size` of config.json
  embedding_size: str  # key of the table's rows; likewise
  code: Mapping[str, str]  # `auto_map` of its config.json: the classes in Python files beside the published weights
  published_at: str  # a repository of the hub that has these files
  fixed: Mapping[str, Any]  # options of which the model has one value only
  stated: tuple[str, ...] = ()  # those of them that a config.json must state: the family's default is another value
  written: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # likewise, but read by its training alone
  code_needs: tuple[str, ...] = ()  # further files there that this code reads
  mlp_ratio: str | None = None  # key of the FFN's width over the model's, for a width that is null
  shift_logits: bool = False


FAMILIES = {
  "llada": Family(  # arXiv 2502.09992
    model_type="llada",
    architecture="LLaDAModelLM",
    embedding="model.transformer.wte",
    final_norm="model.transformer.ln_f",
    head="model.transformer.ff_out",
    block="model.transformer.blocks.{}.",
    modules={name: name for name in ("attn_norm", "ff_norm", *TARGETS)},
    sizes=dict(
      d_model="d_model",
      num_layers="n_layers",
      num_heads="n_heads",
      mlp_hidden_size="mlp_hidden_size",
      weight_tying="weight_tying",
    ),
    num_kv_heads="n_kv_heads",
    qkv_bias="include_qkv_bias",
    has_qkv_bias=False,
    vocab_size="vocab_size",
    embedding_size="embedding_size",
    code={
      "AutoConfig": "configuration_llada.LLaDAConfig",
      "AutoModel": "modeling_llada.LLaDAModelLM",
      "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    published_at="GSAI-ML/LLaDA-8B-Instruct",
    fixed=dict(
      activation_type="silu",
      alibi=False,
      attention_layer_norm=False,
      bias_for_layer_norm=False,
      block_group_size=1,
      block_type="llama",
      include_bias=False,
      input_emb_norm=False,
      layer_norm_type="rms",
      layer_norm_with_affine=True,
      rope=True,
      rope_scaling=None,
      scale_logits=False,
    ),
    stated=("activation_type", "block_type", "layer_norm_type", "rope"),
    written=dict(attention_dropout=0.0, embedding_dropout=0.0, residual_dropout=0.0),
    mlp_ratio="mlp_ratio",
  ),
  "dream": Family(  # arXiv 2508.15487; the architecture of Qwen2.5
    model_type="Dream",
    architecture="DreamModel",
    embedding="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    block="model.layers.{}.",
    modules=dict(
      attn_norm="input_layernorm",
      ff_norm="post_attention_layernorm",
      q_proj="self_attn.q_proj",
      k_proj="self_attn.k_proj",
      v_proj="self_attn.v_proj",
      attn_out="self_attn.o_proj",
      ff_proj="mlp.gate_proj",
      up_proj="mlp.up_proj",
      ff_out="mlp.down_proj",
    ),
    sizes=dict(
      d_model="hidden_size",
      num_layers="num_hidden_layers",
      num_heads="num_attention_heads",
      mlp_hidden_size="intermediate_size",
      weight_tying="tie_word_embeddings",
    ),
    num_kv_heads="num_key_value_heads",
    qkv_bias="attention_bias",
    has_qkv_bias=True,
    vocab_size="used_vocab_size",  # ours: Dream gives its tables `vocab_size` rows and knows no padded ids
    embedding_size="vocab_size",
    code={"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    code_needs=("generation_config.json", "generation_utils.py"),
    published_at="Dream-org/Dream-v0-Instruct-7B",
    fixed=dict(hidden_act="silu", rope_scaling=None, use_mrope=False, use_sliding_window=False),
    shift_logits=True,
  ),
}
