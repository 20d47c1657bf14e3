"""GGUF files, llama.cpp's format, as checkpoints in Hugging Face's layout: weights, config.json, tokenizer, template.

`unpack` writes them to a folder that `convert` then reads like any other. The package `gguf` reads the format and
dequantises; it is needed for nothing else.
"""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Float32
from tokenizers import decoders, models, pre_tokenizers

from dmpo_jax.hub.shards import write_shards
from dmpo_jax.hub.tokenizer import CONFIG_FILE, TOKENIZER_FILE

SUFFIX = ".gguf"
SHARD_BYTES = 2**30

# llama.cpp's name of an architecture, and of a tensor in it -> that of Hugging Face's Llama. {} is the layer's number.
ARCHITECTURE = "llama"
WHOLE = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",  # absent where the head is the embedding
}
OF_LAYER = {
  "blk.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
  "blk.{}.attn_q.weight": "model.layers.{}.self_attn.q_proj.weight",
  "blk.{}.attn_k.weight": "model.layers.{}.self_attn.k_proj.weight",
  "blk.{}.attn_v.weight": "model.layers.{}.self_attn.v_proj.weight",
  "blk.{}.attn_output.weight": "model.layers.{}.self_attn.o_proj.weight",
  "blk.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
  "blk.{}.ffn_gate.weight": "model.layers.{}.mlp.gate_proj.weight",
  "blk.{}.ffn_up.weight": "model.layers.{}.mlp.up_proj.weight",
  "blk.{}.ffn_down.weight": "model.layers.{}.mlp.down_proj.weight",
}
# The settings `llama.*`: those that config.json has too, those that are implied, and the only value of others.
SIZES = {
  "embedding_length": "hidden_size",
  "block_count": "num_hidden_layers",
  "feed_forward_length": "intermediate_size",
  "attention.head_count": "num_attention_heads",
}
IMPLIED = ("vocab_size", "context_length", "attention.head_count_kv", "attention.layer_norm_rms_epsilon")
IMPLIED += ("rope.freq_base", "rope.dimension_count", "attention.key_length", "attention.value_length")
FIXED = {"rope.scaling.type": "none", "expert_count": 0, "expert_used_count": 0}

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # llama.cpp's types of tokens that are not ordinary
# How text is split before the merges of a byte-level BPE, by the name in `tokenizer.ggml.pre`.
PIECES = {
  "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
  "smollm": lambda: pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
  ),
}


def unpack(path: epath.Path, folder: epath.Path) -> None:
  """Write the model of a GGUF file to an existing folder, its weights dequantised to float32, one tensor at a time.

  Raises:
    ValueError: the file is damaged, or of an architecture, a quantisation or a tokenizer that is not supported; then
      nothing has been written. Or `gguf` is not installed.
  """
  where, reader = f"--hf={os.fspath(path)}", _open(path)
  settings = {name: field.contents() for name, field in reader.fields.items()}
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  config = _config(settings, where)
  names = _names(tensors, config["num_hidden_layers"], where)
  config["tie_word_embeddings"] = "output.weight" not in tensors
  _check_types(tensors, where)
  tokenizer, about = _tokenizer(settings, where)
  (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
  (folder / TOKENIZER_FILE).write_text(tokenizer.to_str())
  (folder / CONFIG_FILE).write_text(json.dumps(about, indent=2) + "\n")

  def read() -> Iterator[tuple[str, np.ndarray]]:
    for name, theirs in names.items():
      yield theirs, _in_their_order(name, _dequantise(tensors[name].data, tensors[name]), config)

  sizes = {theirs: 4 * int(tensors[name].n_elements) for name, theirs in names.items()}
  write_shards(folder, sizes, read(), SHARD_BYTES)


def _open(path: epath.Path) -> Any:
  """Open a file with `gguf.GGUFReader`, which maps it into memory."""
  try:
    from gguf import GGUFReader
  except ImportError as error:
    raise ValueError(f"--hf={path}: reading GGUF needs the package gguf: pip install 'dmpo-jax[gguf]'") from error
  if not path.is_file() or "://" in os.fspath(path):
    raise ValueError(f"--hf={path}: no such file on this machine")
  try:
    return GGUFReader(os.fspath(path))
  except Exception as error:  # whatever a damaged file makes it raise
    raise ValueError(f"--hf={path}: cannot be read as GGUF: cut off, damaged or too new ({error})") from error


def _config(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Translate the settings of the architecture to a config.json of Llama, all but `tie_word_embeddings`."""
  architecture = settings.get("general.architecture")
  if architecture != ARCHITECTURE:
    raise ValueError(f"{where}: its architecture {architecture!r} is not supported; it must be {ARCHITECTURE!r}")
  prefix = f"{ARCHITECTURE}."
  own = {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}
  other = {name: value for name, value in own.items() if name not in (*SIZES, *IMPLIED) and FIXED.get(name) != value}
  if other:
    raise ValueError(f"{where}: its settings {other} are not supported")
  missing = [name for name in (*SIZES, "attention.layer_norm_rms_epsilon") if name not in own]
  if missing:
    raise ValueError(f"{where}: it has no {prefix}{missing[0]}")
  if wrong := [name for name, value in own.items() if isinstance(value, list)]:
    raise ValueError(f"{where}: its {prefix}{wrong[0]} differs from layer to layer, which is not supported")
  head_dim = own.get("attention.key_length", own["embedding_length"] // own["attention.head_count"])
  for name in ("attention.value_length", "rope.dimension_count"):
    if own.get(name, head_dim) != head_dim:
      raise ValueError(f"{where}: its {prefix}{name}={own[name]} is not supported; it must be {head_dim}")
  return {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    **{theirs: own[name] for name, theirs in SIZES.items()},
    "num_key_value_heads": own.get("attention.head_count_kv", own["attention.head_count"]),
    "head_dim": head_dim,
    "rms_norm_eps": _shortest(own["attention.layer_norm_rms_epsilon"]),
    "rope_theta": _shortest(own.get("rope.freq_base", 10_000.0)),
    "rope_scaling": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": own.get("context_length", 2048),
    "vocab_size": len(settings.get("tokenizer.ggml.tokens", ())),
    **{f"{kind}_token_id": number for kind, number in _special_ids(settings).items() if kind != "unk"},
    "torch_dtype": "float32",
  }


def _shortest(value: float) -> float:
  """Return the shortest decimal of a float32, which is what the original config.json said."""
  return float(str(np.float32(value)))


def _names(tensors: Mapping[str, Any], num_layers: int, where: str) -> dict[str, str]:
  """Return the name in Hugging Face's layout of each tensor; the conversion finds what is missing."""
  names = dict(WHOLE)
  for layer in range(num_layers):
    names |= {ours.format(layer): theirs.format(layer) for ours, theirs in OF_LAYER.items()}
  if unknown := sorted(tensors.keys() - names.keys()):
    raise ValueError(f"{where}: {len(unknown)} tensors that Llama does not have, such as {unknown[0]}")
  return {name: names[name] for name in tensors}


def _check_types(tensors: Mapping[str, Any], where: str) -> None:
  """Dequantise a row of each type, before anything is written."""
  for kind, tensor in {tensor.tensor_type: tensor for tensor in tensors.values()}.items():
    try:
      _dequantise(tensor.data[:1], tensor)
    except NotImplementedError as error:
      raise ValueError(
        f"{where}: {tensor.name} has the quantisation {kind.name}, which the package gguf cannot undo; "
        "take a file of another one, such as Q8_0 or Q4_K_M"
      ) from error


def _dequantise(data: np.ndarray, tensor: Any) -> Float32[np.ndarray, "..."]:
  from gguf import quants

  return quants.dequantize(data, tensor.tensor_type).astype(np.float32, copy=False)


def _in_their_order(name: str, array: Float32[np.ndarray, "..."], config: Mapping[str, Any]) -> np.ndarray:
  """Return a tensor with Hugging Face's order of rows.

  Rotary pairs are neighbouring rows of a head of queries and keys in llama.cpp, and half a head apart there.
  """
  heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
  if heads is None:
    return array
  pairs = array.reshape(config[heads], -1, 2, *array.shape[1:])
  return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(array.shape))


def _special_ids(settings: Mapping[str, Any]) -> dict[str, int]:
  kinds = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
  ids = {kind: settings.get(f"tokenizer.ggml.{theirs}_token_id") for kind, theirs in kinds.items()}
  return {kind: number for kind, number in ids.items() if number is not None}


def _tokenizer(settings: Mapping[str, Any], where: str) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
  """Build the tokenizer, a byte-level BPE, and its tokenizer_config.json."""
  own = {name.removeprefix("tokenizer.ggml."): value for name, value in settings.items()}
  if own.get("model") != "gpt2" or own.get("pre") not in PIECES:
    raise ValueError(
      f"{where}: its tokenizer, model {own.get('model')!r} with pre {own.get('pre')!r}, is not supported; it must be "
      f"'gpt2' with {' or '.join(map(repr, PIECES))}"
    )
  if missing := [name for name in ("tokens", "token_type", "merges") if name not in own]:
    raise ValueError(f"{where}: it has no tokenizer.ggml.{missing[0]}")
  if len(own["tokens"]) != len(own["token_type"]):
    raise ValueError(f"{where}: {len(own['tokens'])} tokens with {len(own['token_type'])} types")
  vocabulary = {text: number for number, text in enumerate(own["tokens"])}
  tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [tuple(pair.split(" ")) for pair in own["merges"]]))
  tokenizer.pre_tokenizer = PIECES[own["pre"]]()
  tokenizer.decoder = decoders.ByteLevel()
  for text, kind in zip(own["tokens"], own["token_type"], strict=True):
    if kind in (UNKNOWN, CONTROL):
      tokenizer.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True)])
    elif kind == USER_DEFINED:
      tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False)])
  about = {f"{kind}_token": own["tokens"][number] for kind, number in _special_ids(settings).items()}
  about |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": settings.get("llama.context_length")}
  if "tokenizer.chat_template" in settings:
    about["chat_template"] = settings["tokenizer.chat_template"]
  return tokenizer, about
