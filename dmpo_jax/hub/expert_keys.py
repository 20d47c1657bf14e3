"""What families with experts say of them in several keys of a config.json, where a key for a field is not enough."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dmpo_jax.hub.entries import FLAG, IDS, SIZE, WHOLE, Kind
from dmpo_jax.models.config import ModelConfig

SOFTMAX = ("softmax", "softmax_normalised")  # Qwen3-MoE's routers


@dataclasses.dataclass(frozen=True)
class Derived:
  """Fields of ModelConfig that several keys give together."""

  fields: tuple[str, ...]
  keys: Mapping[str, Kind]  # what they must be, where they are given
  read: Callable[[Mapping[str, Any]], dict[str, Any]]  # a checked config.json -> the fields
  write: Callable[[ModelConfig], dict[str, Any]]  # the keys of a model


def _read_sdar(config: Mapping[str, Any]) -> dict[str, Any]:
  """Qwen3-MoE's: every n-th layer has experts, but some."""
  every, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or []
  kinds = [layer not in dense and (layer + 1) % every == 0 for layer in range(config["num_hidden_layers"])]
  return {
    "expert_layers": _as_layers(kinds),
    "router": "softmax_normalised" if config.get("norm_topk_prob") else "softmax",
  }


def _write_sdar(config: ModelConfig) -> dict[str, Any]:
  if config.router not in SOFTMAX:
    raise ValueError(
      f"model.router={config.router!r}: checkpoints of the family sdar_moe have {' or '.join(SOFTMAX)}; a model with "
      "another router stays a checkpoint of ours"
    )
  return {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [layer for layer, has_experts in enumerate(config.expert_layers) if not has_experts],
    "norm_topk_prob": config.router == "softmax_normalised",
  }


def _read_llada2(config: Mapping[str, Any]) -> dict[str, Any]:
  """The first layers have none; shared experts are one of their whole width."""
  first = config.get("first_k_dense_replace") or 0
  return {
    "expert_layers": _as_layers([layer >= first for layer in range(config["num_hidden_layers"])]),
    "shared_expert_size": (config.get("num_shared_experts") or 0) * config["moe_intermediate_size"],
  }


def _write_llada2(config: ModelConfig) -> dict[str, Any]:
  first = config.expert_layers.index(1) if 1 in config.expert_layers else len(config.expert_layers)
  if 0 in config.expert_layers[first:] or config.shared_expert_size % config.expert_size:
    raise ValueError(
      f"model.expert_layers={config.expert_layers}, model.shared_expert_size={config.shared_expert_size}: in "
      "checkpoints of the family llada2_moe only first layers have no experts, and shared ones are as wide as others; "
      "such a model stays a checkpoint of ours"
    )
  return {
    "first_k_dense_replace": first,
    "num_shared_experts": config.shared_expert_size // config.expert_size or None,
  }


def _as_layers(kinds: Sequence[bool]) -> tuple[float, ...]:
  return () if all(kinds) else tuple(map(float, kinds))


SDAR_MOE = Derived(
  fields=("expert_layers", "router"),
  keys={"decoder_sparse_step": SIZE, "mlp_only_layers": IDS, "norm_topk_prob": FLAG},
  read=_read_sdar,
  write=_write_sdar,
)
LLADA2_MOE = Derived(
  fields=("expert_layers", "shared_expert_size"),
  keys={"first_k_dense_replace": WHOLE, "num_shared_experts": WHOLE},
  read=_read_llada2,
  write=_write_llada2,
)
