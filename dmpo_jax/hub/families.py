"""Families of checkpoints in Hugging Face's layout: what each calls its tensors and its config keys.

A family is a description; `model_config`, `layout`, `peft` and `tokenizer` read it. A new family is one entry.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dmpo_jax.hub import expert_keys
from dmpo_jax.models.config import ModelConfig
from dmpo_jax.models.lora import TARGETS


@dataclasses.dataclass(frozen=True)
class Family:
  """What one family of checkpoints calls things."""

  model_type: str  # of its config.json, in any case
  architecture: str  # the class that its config.json names
  # tensors, without .weight and .bias
  embedding: str
  final_norm: str
  head: str
  block: str  # prefix of a layer's tensors; {} is the layer's number
  modules: Mapping[str, str]  # our name of a layer's module -> theirs, the same for those that are one tensor there
  # config.json
  keys: Mapping[str, str]  # field of ModelConfig -> key
  model: Mapping[str, Any]  # fields of ModelConfig that are the same for the whole family
  defaults: Mapping[str, Any]  # fields of ModelConfig whose key may be absent or null, and their values then
  fixed: Mapping[str, Any]  # keys for which the model supports one value only
  code: Mapping[str, str] = dataclasses.field(default_factory=dict)  # see `published_at`
  # a repository of the hub whose Python files `code` names, as `auto_map` of its config.json: the model in PyTorch;
  # "": transformers has the model
  published_at: str = ""
  is_autoregressive: bool = False  # its model_type is, so that a checkpoint of it needs a mask token
  diffusion_types: tuple[str, ...] = ()  # further model types: dllm's diffusion models with the same tensors
  stated: tuple[str, ...] = ()  # keys of `fixed` that must be present, as the family's default is another value
  written: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further keys to write, for its training
  code_needs: tuple[str, ...] = ()  # further files beside the published weights that this code reads
  wrong_ids: tuple[str, ...] = ()  # special ids that its published config.json has wrong
  # of layers with experts; {expert} is the expert's number
  router: str = ""
  expert: str = ""
  expert_bias: str = ""  # of a tensor, not of a module
  derived: expert_keys.Derived | None = None  # fields that several keys give together; None: a key each
  mlp_ratio: str = ""  # key that gives the FFN's width as a multiple of the model's; "": none
  is_multi_query: str = ""  # key that says that there is one kv head; "": none

  @property
  def has_blocks(self) -> bool:
    """Whether all its models attend by blocks."""
    return self.keys.get("block_length") in self.stated or bool(self.defaults.get("block_length"))


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

_OF_ADAPTED = ("rope_scaling", "shift_logits", "block_length")  # fields that models for diffusion from the start lack

LLAMA = Family(  # arXiv 2407.21783
  model_type="llama",
  is_autoregressive=True,
  diffusion_types=("a2d-llama",),
  architecture="LlamaForCausalLM",
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
    head_dim="head_dim",
    mlp_hidden_size="intermediate_size",
    weight_tying="tie_word_embeddings",
    vocab_size="used_vocab_size",  # ours: their `vocab_size` is the size of the tables
    embedding_size="vocab_size",
    rope_scaling="rope_scaling",
    shift_logits="shift_logits",  # ours, for diffusion models
    block_length="block_size",  # the same
    **_SAME_KEYS,
  ),
  model={},
  defaults=dict(shift_logits=False, rope_theta=10_000.0, weight_tying=False, rope_scaling=()),
  fixed=dict(hidden_act="silu", attention_bias=False, mlp_bias=False),
)

QWEN3 = dataclasses.replace(  # arXiv 2505.09388
  LLAMA,
  model_type="qwen3",
  diffusion_types=("a2d-qwen3",),
  architecture="Qwen3ForCausalLM",
  modules={**LLAMA.modules, "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"},
  model=dict(qk_norm=True),
  defaults={**LLAMA.defaults, "head_dim": 128},
  fixed=dict(hidden_act="silu", attention_bias=False, use_sliding_window=False),
)

SDAR = dataclasses.replace(  # arXiv 2510.06303
  QWEN3,
  model_type="sdar",
  diffusion_types=(),
  architecture="SDARForCausalLM",
  code={
    "AutoConfig": "configuration_sdar.SDARConfig",
    "AutoModel": "modeling_sdar.SDARModel",
    "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
  },
  published_at="JetLM/SDAR-4B-Chat",
  keys={field: key for field, key in QWEN3.keys.items() if field != "shift_logits"},
  model=dict(qk_norm=True, shift_logits=False),
  defaults={field: value for field, value in QWEN3.defaults.items() if field != "shift_logits"},
  stated=("block_size",),
)

_QWEN_EXPERTS = dict(
  num_experts="num_experts", experts_per_token="num_experts_per_tok", expert_size="moe_intermediate_size"
)

SDAR_MOE = dataclasses.replace(
  SDAR,
  model_type="sdar_moe",
  is_autoregressive=False,
  architecture="SDARMoeForCausalLM",
  code={
    "AutoConfig": "configuration_sdar_moe.SDARMoeConfig",
    "AutoModel": "modeling_sdar_moe.SDARMoeModel",
    "AutoModelForCausalLM": "modeling_sdar_moe.SDARMoeForCausalLM",
  },
  published_at="JetLM/SDAR-30B-A3B-Chat",
  router="mlp.gate",
  expert="mlp.experts.{expert}",
  derived=expert_keys.SDAR_MOE,
  keys={**SDAR.keys, **_QWEN_EXPERTS},
  defaults={**SDAR.defaults, "block_length": 4},  # its config.json has no block_size
  stated=(),
)

LLADA2_MOE = dataclasses.replace(
  SDAR_MOE,
  model_type="llada2_moe",
  architecture="LLaDA2MoeModelLM",
  code={
    "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
    "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
    "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
  },
  published_at="inclusionAI/LLaDA2.0-mini",
  embedding="model.word_embeddings",
  modules=dict(
    attn_norm="input_layernorm",
    ff_norm="post_attention_layernorm",
    q_proj="attention.query_key_value",
    k_proj="attention.query_key_value",
    v_proj="attention.query_key_value",
    attn_out="attention.dense",
    q_norm="attention.query_layernorm",
    k_norm="attention.key_layernorm",
    ff_proj="mlp.gate_proj",
    up_proj="mlp.up_proj",
    ff_out="mlp.down_proj",
    shared_ff_proj="mlp.shared_experts.gate_proj",
    shared_up_proj="mlp.shared_experts.up_proj",
    shared_ff_out="mlp.shared_experts.down_proj",
  ),
  expert_bias="mlp.gate.expert_bias",
  derived=expert_keys.LLADA2_MOE,
  keys={field: key for field, key in SDAR_MOE.keys.items() if field != "rope_scaling"}
  | dict(
    qkv_bias="use_qkv_bias",
    out_bias="use_bias",
    qk_norm="use_qk_norm",
    rotary_fraction="partial_rotary_factor",
    expert_groups="n_group",
    expert_groups_per_token="topk_group",
    expert_scale="routed_scaling_factor",
  ),
  model=dict(router="sigmoid", expert_bias=True),
  defaults=dict(  # those of its code
    mask_token_id=156895,
    eos_token_id=156892,
    block_length=32,
    head_dim=0,
    rope_theta=10_000.0,
    rms_norm_eps=1e-5,
    weight_tying=False,
    qkv_bias=False,
    out_bias=True,
    qk_norm=True,
    rotary_fraction=0.5,
    expert_groups=8,
    expert_groups_per_token=4,
    expert_scale=2.5,
  ),
  fixed=dict(hidden_act="silu", rope_scaling=None, use_sliding_window=False),
  # which its code does not read, but says
  written=dict(
    attention_dropout=0.0,
    embedding_dropout=0.0,
    output_dropout=0.0,
    moe_router_enable_expert_bias=True,
    norm_topk_prob=True,
    router_dtype="fp32",
    score_function="sigmoid",
  ),
)

QWEN2 = dataclasses.replace(  # arXiv 2412.15115
  LLAMA,
  model_type="qwen2",
  diffusion_types=("a2d-qwen2",),
  architecture="Qwen2ForCausalLM",
  keys={field: key for field, key in LLAMA.keys.items() if field != "head_dim"},
  model=dict(qkv_bias=True),
  fixed=dict(hidden_act="silu", use_sliding_window=False),
)

DREAM = dataclasses.replace(  # arXiv 2508.15487
  QWEN2,
  model_type="Dream",
  is_autoregressive=False,
  diffusion_types=(),
  architecture="DreamModel",
  code={"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
  published_at="Dream-org/Dream-v0-Instruct-7B",
  keys={field: key for field, key in QWEN2.keys.items() if field not in _OF_ADAPTED} | {"qkv_bias": "attention_bias"},
  model=dict(shift_logits=True),
  defaults=dict(qkv_bias=True),
  fixed=dict(hidden_act="silu", rope_scaling=None, use_mrope=False, use_sliding_window=False),
  code_needs=("generation_config.json", "generation_utils.py"),
  wrong_ids=("bos_token_id",),  # that of the Qwen model that it started from
)

LLADA_MOE = dataclasses.replace(
  LLAMA,
  model_type="lladamoe",
  is_autoregressive=False,
  diffusion_types=(),
  architecture="LLaDAMoEModelLM",
  code={
    "AutoConfig": "configuration_lladamoe.LLaDAConfig",
    "AutoModel": "modeling_lladamoe.LLaDAMoEModelLM",
    "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
  },
  published_at="inclusionAI/LLaDA-MoE-7B-A1B-Instruct",
  modules={
    **QWEN3.modules,
    "shared_ff_proj": "shared_expert.gate_proj",
    "shared_up_proj": "shared_expert.up_proj",
    "shared_ff_out": "shared_expert.down_proj",
  },
  router="mlp.gate",
  expert="mlp.experts.{expert}",
  expert_bias="mlp.expert_bias",
  keys={field: key for field, key in QWEN2.keys.items() if field not in _OF_ADAPTED}
  | dict(
    mlp_hidden_size="dense_intermediate_size",
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    qk_norm="qk_layernorm",
    clip_qkv="clip_qkv",
    rotary_fraction="partial_rotary_factor",
    num_experts="num_experts",
    experts_per_token="num_experts_per_tok",
    expert_size="expert_intermediate_size",
    shared_expert_size="shared_expert_intermediate_size",
    expert_layers="moe_layer_freq",
    expert_bias="moe_router_enable_expert_bias",
  ),
  model=dict(router="softmax"),
  defaults=dict(
    mask_token_id=156895,  # its code has it, config.json does not
    weight_tying=False,
    qkv_bias=False,
    out_bias=False,
    qk_norm=False,
    clip_qkv=0.0,
    rotary_fraction=1.0,
    shared_expert_size=0,
    expert_layers=(),
    expert_bias=False,
  ),
  fixed=dict(hidden_act="silu", rope_scaling=None),
)

FAMILIES = {
  "llada": LLADA,
  "dream": DREAM,
  "sdar": SDAR,  # before Qwen3, whose layers it has, so that models of blocks are written as its own
  "qwen3": QWEN3,
  "qwen2": QWEN2,
  "llama": LLAMA,
  "sdar_moe": SDAR_MOE,
  "llada2_moe": LLADA2_MOE,
  "lladamoe": LLADA_MOE,
}

# Keys with which `transformers` changes what some models compute, and the values that change nothing. They are refused
# with other values where the family does not read them.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
  "attention_multiplier": (None,),
  "attn_logit_softcapping": (None,),
  "block_size": (None,),
  "clip_qkv": (None,),
  "embedding_multiplier": (None, 1),
  "final_logit_softcap": (None,),
  "final_logit_softcapping": (None,),
  "logit_scale": (None, 1),
  "logits_scaling": (None, 1),
  "no_rope_layers": (None,),
  "num_experts": (None, 0),
  "num_local_experts": (None, 0),
  "partial_rotary_factor": (None, 1),
  "qk_layernorm": (None, False),
  "quantization_config": (None,),
  "residual_multiplier": (None, 1),
  "use_qk_norm": (None, False),
}

# Fields of ModelConfig that no layout of tensors depends on.
_OF_ANY = (
  *("quantization", "dtype", "param_dtype", "remat", "attention", "layer_rows", "lora", "head_dim"),
  "end_token_ids",
)
_DEFAULTS = {
  field.name: field.default
  for field in dataclasses.fields(ModelConfig)
  if field.default is not dataclasses.MISSING and field.name not in _OF_ANY
}


def family_of(config: Mapping[str, Any]) -> str:
  """Name the family of a checkpoint's config.json.

  Raises:
    ValueError: no known family has its model_type.
  """
  if is_of(LLADA, config) and LLADA_MOE.keys["expert_size"] in config:
    return "lladamoe"  # published with LLaDA's model_type
  for name, family in FAMILIES.items():
    if is_of(family, config):
      return name
  known = (kind for family in FAMILIES.values() for kind in (family.model_type, *family.diffusion_types))
  raise ValueError(
    f"config.json of the checkpoint: model_type={config.get('model_type')!r} is not supported; it must be one of "
    f"{', '.join(known)} (docs/extending.md shows how to add one)"
  )


def is_of(family: Family, config: Mapping[str, Any]) -> bool:
  """Whether a config.json is of this family."""
  known = (family.model_type, *family.diffusion_types)
  return str(config.get("model_type")).lower() in (kind.lower() for kind in known)


def natural_family(config: ModelConfig) -> str:
  """Name the first family whose layout fits a model that did not come from a checkpoint.

  Raises:
    ValueError: none does.
  """
  for name, family in FAMILIES.items():
    fixed = {**_DEFAULTS, **family.model}
    free = (*family.keys, *(family.derived.fields if family.derived else ()))
    if family.has_blocks and not config.block_length:
      continue
    if all(getattr(config, field) == value for field, value in fixed.items() if field not in free):
      return name
  raise ValueError(f"no family of checkpoints has such models, so it stays a checkpoint of ours: {config}")
