"""The settings of adapters: PEFT's adapter_config.json and our LoraConfig, in both directions."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dmpo_jax.hub.entries import POSITIVE, SHARE, SIZE, check_entries
from dmpo_jax.hub.families import FAMILIES
from dmpo_jax.hub.layout import PART, part_of
from dmpo_jax.models.lora import ALL_TARGETS, LoraConfig

# PEFT's initialisations that leave the model's own weights alone. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)
# change them when the adapter is loaded, so the adapter belongs to that changed model.
INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", "mica")
OTHER_ADAPTERS = (  # options under which PEFT's adapter is not plain LoRA, or is on other modules
  "alora_invocation_tokens",
  "alpha_pattern",
  "arrow_config",
  "fan_in_fan_out",
  "kasa_config",
  "layer_replication",
  "lora_bias",
  "modules_to_save",
  "monteclora_config",
  "rank_pattern",
  "target_parameters",
  "trainable_token_indices",
  "use_bdlora",
  "use_dora",
  "use_qalora",
  "use_rslora",
)


def lora_config_from_peft(config: Mapping[str, Any], names: Iterable[str], family: str = "llada") -> LoraConfig:
  """Translate an adapter_config.json.

  The targets are read from the adapter's tensor `names`: PEFT ignores targets that match no module, and published
  configs list modules that LLaDA lacks.

  Raises:
    ValueError: the adapters are not plain LoRA, or are on modules that the model does not have.
  """
  check_entries(
    config,
    "adapter_config.json",
    needed={"r": SIZE, "lora_alpha": POSITIVE},
    optional={"lora_dropout": SHARE},
  )
  plain = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": INITIALISATIONS}
  other = {key: config[key] for key, known in plain.items() if config.get(key) not in (None, *known)}
  other |= {key: config[key] for key in OTHER_ADAPTERS if config.get(key)}
  if other:
    raise ValueError(f"adapter_config.json: {other} is not supported; adapters must be plain LoRA")
  own = FAMILIES[family]
  ours = {_module_name(theirs) + part_of(own, name): name for name, theirs in own.modules.items()}
  modules = {match[1] + match[2] for name in names if (match := re.search(_ADAPTED, name))}
  unknown = sorted(modules - ours.keys())
  if unknown or not modules:
    raise ValueError(f"the adapter is on {unknown or 'nothing'}; the model has {', '.join(ours)}")
  targets = tuple(name for name in ALL_TARGETS if name in {ours[module] for module in modules})
  return LoraConfig(config["r"], float(config["lora_alpha"]), float(config.get("lora_dropout") or 0), targets)


_ADAPTED = rf"\.((?:shared_experts?\.)?\w+)\.lora_[AB]\.weight((?:{PART}\w+)?)$"


def _module_name(theirs: str) -> str:
  """Return the end of a module's name that tells it from the others of its layer."""
  *parents, last = theirs.split(".")
  return f"{parents[-1]}.{last}" if parents and parents[-1].startswith("shared_expert") else last


def lora_config_to_peft(lora: LoraConfig, family: str, base: str) -> dict[str, Any]:
  """Write the adapter_config.json that PEFT reads; `base` names the model that the adapters are for."""
  names = FAMILIES[family]
  own = list(dict.fromkeys(names.modules[name] for name in lora.targets if name in names.modules))
  modules: list[str] | str = [_module_name(theirs) for theirs in own]
  # PEFT takes names for ends of names: it would adapt LLaDA's head too, and the projections of experts
  if names.head.split(".")[-1] in modules or names.router:
    layers = re.escape(names.block).replace(re.escape("{}"), r"\d+")
    modules = rf".*{layers}({'|'.join(map(re.escape, own))})"
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": lora.rank,
    "lora_alpha": lora.alpha,
    "lora_dropout": lora.dropout,
    "target_modules": modules,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
  }
