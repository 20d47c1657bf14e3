"""Families of checkpoints in Hugging Face's layout: what each calls its tensors and its config keys.

A family is a description; `model_config`, `layout`, `peft` and `tokenizer` read it. A new family is one entry.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dmpo_jax.models.lora import TARGETS
from dmpo_jax.models.transformer import ModelConfig


@dataclasses.dataclass(frozen=True)
class Family:
  """What one family of checkpoints calls things."""

  model_type: str  # of its config.json, in any case
  architecture: str  # the class that its config.json names
  code: Mapping[str, str]  # `auto_map` of its config.json: classes in Python files beside the published weights
  published_at: str  # a repository of the hub that has these files
  # tensors, without .weight and .bias
  embedding: str
  final_norm: str
  head: str
  block: str  # prefix of a layer's tensors; {} is the layer's number
  modules: Mapping[str, str]  # our name of a layer's module -> theirs
  # config.json
  keys: Mapping[str, str]  # field of ModelConfig -> key
  model: Mapping[str, Any]  # fields of ModelConfig that are the same for the whole family
  defaults: Mapping[str, Any]  # fields of ModelConfig whose key may be absent or null, and their values then
  fixed: Mapping[str, Any]  # keys for which the model supports one value only
  stated: tuple[str, ...] = ()  # those of them that must be present, as the family's default is another value
  written: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further keys to write, for its training
  code_needs: tuple[str, ...] = ()  # further files beside the published weights that this code reads
  wrong_ids: tuple[str, ...] = ()  # special ids that its published config.json has wrong
  mlp_ratio: str = ""  # key that gives the FFN's width as a multiple of the model's; "": none
  is_multi_query: str = ""  # key that says that there is one kv head; "": none


_SAME_KEYS = {name: name for name in ("mask_token_id", "eos_token_id", "pad_token_id", "rope_theta", "rms_norm_eps")}

LLADA = Family(  # arXiv 2502.09992
  model_type="llada",
  architecture="LLaDAModelLM",
  code={
    "AutoConfig": "configuration_llada.LLaDAConfig",
    "AutoModel": "modeling_llada.LLaDAModelLM",
    "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
  },
  published_at="GSAI-ML/LLaDA-8B-Instruct",
  embedding="model.transformer.wte",
  final_norm="model.transformer.ln_f",
  head="model.transformer.ff_out",
  block="model.transformer.blocks.{}.",
  modules={name: name for name in ("attn_norm", "ff_norm", *TARGETS)},
  keys=dict(
    d_model="d_model",
    num_layers="n_layers",
    num_heads="n_heads",
    num_kv_heads="n_kv_heads",
    mlp_hidden_size="mlp_hidden_size",
    weight_tying="weight_tying",
    qkv_bias="include_qkv_bias",
    vocab_size="vocab_size",
    embedding_size="embedding_size",
    **_SAME_KEYS,
  ),
  model=dict(shift_logits=False),
  defaults=dict(qkv_bias=False),
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
  is_multi_query="multi_query_attention",
)

DREAM = Family(  # arXiv 2508.15487; the architecture of Qwen2.5
  model_type="Dream",
  architecture="DreamModel",
  code={"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
  published_at="Dream-org/Dream-v0-Instruct-7B",
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
  keys=dict(
    d_model="hidden_size",
    num_layers="num_hidden_layers",
    num_heads="num_attention_heads",
    num_kv_heads="num_key_value_heads",
    mlp_hidden_size="intermediate_size",
    weight_tying="tie_word_embeddings",
    qkv_bias="attention_bias",
    vocab_size="used_vocab_size",  # ours: Dream's `vocab_size` is the size of its tables, and no id is padding
    embedding_size="vocab_size",
    **_SAME_KEYS,
  ),
  model=dict(shift_logits=True),
  defaults=dict(qkv_bias=True),
  fixed=dict(hidden_act="silu", rope_scaling=None, use_mrope=False, use_sliding_window=False),
  code_needs=("generation_config.json", "generation_utils.py"),
  wrong_ids=("bos_token_id",),  # that of the Qwen model that it started from
)

FAMILIES = {"llada": LLADA, "dream": DREAM}


def family_of(config: Mapping[str, Any]) -> str:
  """Name the family of a checkpoint's config.json.

  Raises:
    ValueError: no known family has its model_type.
  """
  for name, family in FAMILIES.items():
    if is_of(family, config):
      return name
  known = " or ".join(family.model_type for family in FAMILIES.values())
  raise ValueError(
    f"config.json of the checkpoint: model_type={config.get('model_type')!r} is not supported; it must be {known}"
  )


def is_of(family: Family, config: Mapping[str, Any]) -> bool:
  """Whether a config.json is of this family."""
  return str(config.get("model_type")).lower() == family.model_type.lower()


def natural_family(config: ModelConfig) -> str:
  """Name the first family whose layout fits a model that did not come from a checkpoint."""
  for name, family in FAMILIES.items():
    if all(getattr(config, field) == value for field, value in family.model.items()):
      return name
  raise ValueError(f"no family of checkpoints has such models: {config}")
