"""Between LLaDA checkpoints in Hugging Face's layout, PEFT adapters too, and our variables: names, axes, stacking.

Pure mappings of names to arrays, on the host; reading and writing files is the caller's. Torch keeps a projection as
[out, in] for each layer, we keep [layers, in, out].
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dmpo_jax.models.llada import ModelConfig
from dmpo_jax.models.lora import TARGETS, LoraConfig

ROOT = "model.transformer."
PEFT_ROOT = "base_model.model."
NORMS = ("attn_norm", "ff_norm")

# Hugging Face's options of which we implement one value only.
_FIXED = {
  "activation_type": "silu",
  "alibi": False,
  "attention_layer_norm": False,
  "bias_for_layer_norm": False,
  "block_group_size": 1,
  "block_type": "llama",
  "include_bias": False,
  "include_qkv_bias": False,
  "input_emb_norm": False,
  "layer_norm_type": "rms",
  "layer_norm_with_affine": True,
  "rope": True,
  "scale_logits": False,
}


def model_config_from_hf(config: Mapping[str, Any], **own: Any) -> ModelConfig:
  """Translate a checkpoint's config.json; `own` are our fields that it does not have (dtype, remat, lora, ...).

  Raises:
    ValueError: the checkpoint uses options that the model does not have.
  """
  other = {name: config[name] for name, value in _FIXED.items() if config.get(name, value) not in (value, None)}
  if other:
    wanted = {name: _FIXED[name] for name in other}
    raise ValueError(f"config.json of the checkpoint: {other} is not supported; this model has {wanted}")
  num_heads = config["n_heads"]
  num_kv_heads = config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else num_heads)
  return ModelConfig(
    vocab_size=config["vocab_size"],
    embedding_size=config.get("embedding_size") or config["vocab_size"],
    d_model=config["d_model"],
    num_layers=config["n_layers"],
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    mlp_hidden_size=config.get("mlp_hidden_size") or config["mlp_ratio"] * config["d_model"],
    mask_token_id=config["mask_token_id"],
    eos_token_id=config["eos_token_id"],
    pad_token_id=config["pad_token_id"],
    rope_theta=config["rope_theta"],
    rms_norm_eps=config["rms_norm_eps"],
    weight_tying=config["weight_tying"],
    **own,
  )


def params_from_hf(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, Any]:
  """Build the "params" collection, in `config.param_dtype`, from a checkpoint's tensors.

  Tensors are taken one at a time, so that `tensors` may read them from disk.

  Raises:
    ValueError: tensors are missing, left over or of another shape than the config's.
  """
  names = {ROOT + name for name in ("wte.weight", "ln_f.weight")}
  names |= set() if config.weight_tying else {ROOT + "ff_out.weight"}
  names |= {_block(i, name) for i in range(config.num_layers) for name in (*NORMS, *TARGETS)}
  _check_names(tensors, names, "the checkpoint")
  width, dtype = config.d_model, config.param_dtype
  shapes = projection_shapes(config)

  def stack(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return _stack(tensors, [_block(i, name) for i in range(config.num_layers)], shape, dtype)

  params = {
    "embedding": _take(tensors, ROOT + "wte.weight", (config.embedding_size, width), dtype),
    "blocks": {name: {"scale": stack(name, (width,))} for name in NORMS}
    | {name: {"kernel": stack(name, shapes[name])} for name in TARGETS},
    "final_norm": {"scale": _take(tensors, ROOT + "ln_f.weight", (width,), dtype)},
  }
  if not config.weight_tying:
    params["head"] = _take(tensors, ROOT + "ff_out.weight", (width, config.embedding_size), dtype, transposed=True)
  return params


def params_to_hf(params: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
  """Give the tensors of a checkpoint in Hugging Face's layout; the inverse of `params_from_hf`."""
  tensors = {
    ROOT + "wte.weight": np.asarray(params["embedding"]),
    ROOT + "ln_f.weight": np.asarray(params["final_norm"]["scale"]),
  }
  if not config.weight_tying:
    tensors[ROOT + "ff_out.weight"] = np.asarray(params["head"]).T
  for name, leaf in params["blocks"].items():
    for i, array in enumerate(np.asarray(next(iter(leaf.values())))):
      tensors[_block(i, name)] = array.T
  return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def lora_config_from_peft(config: Mapping[str, Any], names: Iterable[str]) -> LoraConfig:
  """Translate an adapter_config.json; the targets are those that the adapter's tensor `names` have.

  (PEFT ignores target names that match nothing, and published configs do name modules that LLaDA lacks.)

  Raises:
    ValueError: the adapters are of a kind that the model does not have.
  """
  fixed = {"use_dora": False, "use_rslora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}}
  other = {name: config[name] for name, value in fixed.items() if config.get(name, value) not in (value, None)}
  if other:
    raise ValueError(f"adapter_config.json: {other} is not supported; adapters here are plain LoRA")
  targets = {match[1] for name in names if (match := re.search(r"\.(\w+)\.lora_[AB]\.weight$", name))}
  return LoraConfig(config["r"], float(config["lora_alpha"]), config["lora_dropout"], tuple(sorted(targets)))


def adapters_from_peft(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, Any]:
  """Build the "lora" collection, float32, from the tensors of a PEFT adapter for `config.lora`.

  Raises:
    ValueError: tensors are missing, left over or of another shape than the config's.
  """
  layers, targets, rank = range(config.num_layers), config.lora.targets, config.lora.rank
  _check_names(tensors, {_peft(i, name, part) for i in layers for name in targets for part in "AB"}, "the adapter")

  def stack(name: str, part: str, shape: tuple[int, int]) -> np.ndarray:
    return _stack(tensors, [_peft(i, name, part) for i in layers], shape, "float32")

  shapes = projection_shapes(config)
  blocks = {
    name: {"A": stack(name, "A", (shapes[name][0], rank)), "B": stack(name, "B", (rank, shapes[name][1]))}
    for name in targets
  }
  return {"blocks": blocks}


def adapters_to_peft(adapters: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Give the tensors of a PEFT adapter; the inverse of `adapters_from_peft`."""
  return {
    _peft(i, name, part): np.ascontiguousarray(array.T)
    for name, leaf in adapters["blocks"].items()
    for part, stacked in leaf.items()
    for i, array in enumerate(np.asarray(stacked))
  }


def projection_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
  """Give [in, out] of every projection of a block."""
  width, ffn, kv = config.d_model, config.mlp_hidden_size, config.num_kv_heads * config.head_dim
  inner = {"k_proj": (width, kv), "v_proj": (width, kv), "ff_proj": (width, ffn), "up_proj": (width, ffn)}
  return {name: inner.get(name, (ffn, width) if name == "ff_out" else (width, width)) for name in TARGETS}


def _block(layer: int, name: str) -> str:
  return f"{ROOT}blocks.{layer}.{name}.weight"


def _peft(layer: int, name: str, part: str) -> str:
  return f"{PEFT_ROOT}{ROOT}blocks.{layer}.{name}.lora_{part}.weight"


def _check_names(tensors: Mapping[str, Any], wanted: set[str], where: str) -> None:
  missing, extra = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
  problems = [
    f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    for what, names in (("missing", missing), ("unknown", extra))
    if names
  ]
  if problems:
    raise ValueError(f"tensors of {where} do not fit the model's config: {'; '.join(problems)}")


def _take(
  tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], dtype: str, transposed: bool = False
) -> np.ndarray:
  array = np.asarray(tensors[name])
  array = array.T if transposed else array
  if array.shape != shape:
    raise ValueError(f"{name} has the shape {array.shape} (input first), the model's config asks for {shape}")
  return array.astype(jnp.dtype(dtype))


def _stack(tensors: Mapping[str, np.ndarray], names: list[str], shape: tuple[int, ...], dtype: str) -> np.ndarray:
  stacked = np.empty((len(names), *shape), jnp.dtype(dtype))
  for row, name in zip(stacked, names, strict=True):
    row[...] = _take(tensors, name, shape, dtype, transposed=len(shape) == 2)
  return stacked
