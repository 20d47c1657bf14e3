"""The description of a model, which makes the one transformer that of any family."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax

from dmpo_jax.models.attention import ATTENTIONS, MIXED
from dmpo_jax.models.layers import ADAPTED, PROJECTION
from dmpo_jax.models.lora import SHARED_TARGETS, TARGETS, LoraConfig
from dmpo_jax.models.router import ROUTERS, Share

DTYPES = ("float32", "bfloat16")
QUANTIZATIONS = ("none", "int8")
# values, as JSON has them, of fields that older descriptions of a model lack
OLDER = {
  "quantization": "none",
  "head_dim": 0,
  "qk_norm": False,
  "rotary_fraction": 1.0,
  "rope_scaling": [],
  "block_length": 0,
  "out_bias": False,
  "clip_qkv": 0.0,
  "num_experts": 0,
  "experts_per_token": 0,
  "expert_size": 0,
  "shared_expert_size": 0,
  "expert_layers": [],
  "expert_bias": False,
  "expert_groups": 1,
  "expert_groups_per_token": 1,
  "expert_scale": 1.0,
  "router": "none",
}
_OF_ATTENTION = ("q_proj", "k_proj", "v_proj", "attn_out")
_OF_FEED_FORWARD = ("ff_proj", "up_proj", "ff_out", *SHARED_TARGETS, PROJECTION)
# What the backward pass finds kept of a layer, by name; it computes the rest again, but not what nothing depends on.
_KEPT = {
  "products": (*_OF_ATTENTION, *_OF_FEED_FORWARD, MIXED, ADAPTED),
  "dots": (*_OF_ATTENTION, *_OF_FEED_FORWARD),
  "attention": (*_OF_ATTENTION, MIXED),
  "full": (),
}
REMAT_POLICIES = {name: jax.checkpoint_policies.save_only_these_names(*kept) for name, kept in _KEPT.items()}
ROPE_SCALING = "(), or (factor, low frequency factor, a larger high frequency factor, original length), all above 0"


class Run(NamedTuple):
  """Neighbouring layers of one kind, whose parameters are stacked."""

  name: str  # of their variables
  first: int  # layer
  length: int
  has_experts: bool


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes and choices of the model; `configs/base.py` explains each in its section `model`.

  `embedding_size` may exceed `vocab_size`; no token uses the rows beyond it. With `shift_logits` a position's logits
  predict the next position, as in the autoregressive model that Dream started from; `denoiser.py` takes care of it.
  With `qk_norm` every head of the queries and keys is normed before the rotary positions. These rotate the first
  `rotary_fraction` of a head; `rope_scaling` is () or Llama 3's (factor, low frequency factor, high frequency factor,
  original length), see `layers.rotary_frequencies`.
  With a `block_length` tokens attend by blocks of so many, counted from the row's first token: to their own and earlier
  ones; 0: to all.
  With a `router`, layers have `num_experts` experts of width `expert_size` instead of one feed-forward, and every token
  takes `experts_per_token` of them (`experts.py`); in `expert_layers` a 0 stands for each layer that has none, () for
  no such layer. A shared expert is for all tokens. The router `sigmoid` chooses among `expert_groups_per_token` of
  `expert_groups` groups, and multiplies the experts' weights by `expert_scale`. `clip_qkv` bounds queries, keys and
  values; 0: not at all.
  With `quantization` int8 the layers' projections are quantized (`layers.quantize`), those of experts too and routers
  not, and cannot be trained; adapters on them can. A `head_dim` of 0 becomes d_model // num_heads. Without
  `end_token_ids` a completion ends with EOS alone.

  Raises:
    ValueError: sizes do not fit together, or a choice is unknown.
  """

  vocab_size: int
  embedding_size: int
  d_model: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  mlp_hidden_size: int
  mask_token_id: int
  eos_token_id: int
  pad_token_id: int
  rope_theta: float = 500_000.0
  rms_norm_eps: float = 1e-5
  weight_tying: bool = False
  qkv_bias: bool = False
  shift_logits: bool = False
  quantization: str = "none"
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: str = "none"
  attention: str = "xla"
  layer_rows: int = 0
  lora: LoraConfig | None = None
  end_token_ids: tuple[int, ...] = ()
  head_dim: int = 0
  qk_norm: bool = False
  rotary_fraction: float = 1.0
  rope_scaling: tuple[float, ...] = ()
  block_length: int = 0
  out_bias: bool = False
  clip_qkv: float = 0.0
  num_experts: int = 0
  experts_per_token: int = 0
  expert_size: int = 0
  shared_expert_size: int = 0
  expert_layers: tuple[float, ...] = ()
  expert_bias: bool = False
  expert_groups: int = 1
  expert_groups_per_token: int = 1
  expert_scale: float = 1.0
  router: str = "none"

  def __post_init__(self) -> None:
    if not self.head_dim:
      if self.d_model % (2 * self.num_heads):
        raise ValueError(
          f"model.d_model={self.d_model}: must be a multiple of 2 * model.num_heads={2 * self.num_heads} without a "
          "model.head_dim"
        )
      object.__setattr__(self, "head_dim", self.d_model // self.num_heads)
    if self.head_dim < 0 or self.head_dim % 2:
      raise ValueError(f"model.head_dim={self.head_dim}: must be even, for rotary pairs")
    if not 0 < self.rotary_width <= self.head_dim or self.rotary_width % 2:
      raise ValueError(
        f"model.rotary_fraction={self.rotary_fraction}: must be in (0, 1] and make an even part of "
        f"model.head_dim={self.head_dim}"
      )
    if not is_rope_scaling(self.rope_scaling):
      raise ValueError(f"model.rope_scaling={self.rope_scaling}: must be {ROPE_SCALING}")
    if self.block_length < 0 or (self.block_length and self.shift_logits):
      raise ValueError(
        f"model.block_length={self.block_length}: must be 0 or more, and 0 with model.shift_logits={self.shift_logits}"
      )
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f"model.num_kv_heads={self.num_kv_heads}: must divide model.num_heads={self.num_heads}")
    if self.embedding_size < self.vocab_size:
      raise ValueError(f"model.embedding_size={self.embedding_size}: must be at least vocab_size={self.vocab_size}")
    for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
      if not 0 <= getattr(self, name) < self.vocab_size:
        raise ValueError(f"model.{name}={getattr(self, name)}: must be in [0, vocab_size={self.vocab_size})")
    remats = ("none", *REMAT_POLICIES)
    choices = dict(
      dtype=DTYPES,
      param_dtype=DTYPES,
      quantization=QUANTIZATIONS,
      remat=remats,
      attention=ATTENTIONS,
      router=("none", *ROUTERS),
    )
    for name, known in choices.items():
      if getattr(self, name) not in known:
        raise ValueError(f"model.{name}={getattr(self, name)!r}: must be one of {', '.join(known)}")
    self._check_experts()

  def _check_experts(self) -> None:
    """Check what layers of experts need, and that adapters find their projections."""
    if self.router != "none":
      if not 0 < self.experts_per_token <= self.num_experts or self.expert_size < 1:
        raise ValueError(
          f"model.num_experts={self.num_experts}, model.experts_per_token={self.experts_per_token}, "
          f"model.expert_size={self.expert_size}: with model.router={self.router!r} all three must be at least 1, and "
          "experts_per_token at most num_experts"
        )
      if len(self.expert_layers) not in (0, self.num_layers):
        raise ValueError(
          f"model.expert_layers has {len(self.expert_layers)} entries: must have one, 0 or 1, for each of "
          f"model.num_layers={self.num_layers}, or none"
        )
      self._check_groups()
    if self.lora is not None:
      targets = set(self.lora.targets)
      excused = TARGETS if targets >= set(TARGETS) else ()  # "all" are those that there are
      missing = sorted(targets - {*self.adaptable, *excused})
      if missing:
        raise ValueError(
          f"model.lora.targets: the model has no {', '.join(missing)}; it has {', '.join(self.adaptable)}"
        )

  def _check_groups(self) -> None:
    groups, kept = self.expert_groups, self.expert_groups_per_token
    if self.router != "sigmoid" and (groups, kept, self.expert_scale) != (1, 1, 1.0):
      raise ValueError(
        f"model.router={self.router!r}: must be 'sigmoid' with model.expert_groups={groups}, "
        f"model.expert_groups_per_token={kept} and model.expert_scale={self.expert_scale}: the others have no groups "
        "and no scale"
      )
    is_split = 0 < kept <= groups and self.num_experts % groups == 0
    if not is_split or self.experts_per_token > kept * self.num_experts // groups:
      raise ValueError(
        f"model.expert_groups={groups}, model.expert_groups_per_token={kept}: the first must divide "
        f"model.num_experts={self.num_experts}, and the second be from 1 up to it, with model.experts_per_token="
        f"{self.experts_per_token} experts or more"
      )

  @property
  def expert_share(self) -> Share:
    """What a token takes of a layer's experts."""
    return Share(self.experts_per_token, self.expert_groups, self.expert_groups_per_token, self.expert_scale)

  @property
  def adaptable(self) -> tuple[str, ...]:
    """The projections that can have adapters: those of attention, of dense layers and of shared experts."""
    kinds = {run.has_experts for run in self.runs}
    dense = TARGETS if False in kinds else tuple(name for name in TARGETS if not name.startswith(("ff_", "up_")))
    return dense + (SHARED_TARGETS if True in kinds and self.shared_expert_size else ())

  @property
  def runs(self) -> tuple[Run, ...]:
    """The layers as runs of one kind; a model of one kind has one run, `blocks`."""
    if self.router == "none":
      return (Run("blocks", 0, self.num_layers, False),)
    kinds = [bool(kind) for kind in self.expert_layers] or [True] * self.num_layers
    starts = [layer for layer in range(self.num_layers) if layer == 0 or kinds[layer] != kinds[layer - 1]]
    ends = [*starts[1:], self.num_layers]
    names = ["blocks"] if len(starts) == 1 else [f"blocks_{number}" for number in range(len(starts))]
    return tuple(
      Run(name, first, end - first, kinds[first]) for name, first, end in zip(names, starts, ends, strict=True)
    )

  @property
  def rotary_width(self) -> int:
    """The entries of a head that are rotated."""
    return int(self.head_dim * self.rotary_fraction)


def is_rope_scaling(values: Sequence[float]) -> bool:
  """Whether `values` can be a model's `rope_scaling`."""
  return not values or (len(values) == 4 and min(values) > 0 and values[1] < values[2])
