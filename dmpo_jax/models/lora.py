"""Low-rank adapters: their rank, scale, dropout and targets.

Adapters are a Flax collection ("lora") beside "params". The model applied without it is the reference policy.
"""

import dataclasses

from dmpo_jax.spelling import did_you_mean

# Projections that can have an adapter. A projection's index also seeds its dropout.
TARGETS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
SHARED_TARGETS = ("shared_ff_proj", "shared_up_proj", "shared_ff_out")  # of shared experts; not among "all"
ALL_TARGETS = (*TARGETS, *SHARED_TARGETS)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Adapters W x + (alpha / rank) B A dropout(x) (Hu et al., arXiv 2106.09685).

  Args:
    rank: at least 1.
    alpha: adapters are scaled by alpha / rank.
    dropout: rate in [0, 1) on the adapters' inputs, if dropout keys are given.
    targets: names from `ALL_TARGETS`, or ("all",) for `TARGETS`.

  Raises:
    ValueError: a value is out of range, or a target is no projection of the model.
  """

  rank: int
  alpha: float
  dropout: float = 0.0
  targets: tuple[str, ...] = ("all",)

  def __post_init__(self) -> None:
    if self.rank < 1:
      raise ValueError(f"model.lora.rank={self.rank}: adapters need a rank of at least 1")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"model.lora.dropout={self.dropout}: must be in [0, 1)")
    object.__setattr__(self, "targets", expand_targets(self.targets))

  @property
  def scale(self) -> float:
    """The factor on an adapter's output."""
    return self.alpha / self.rank


def expand_targets(targets: tuple[str, ...]) -> tuple[str, ...]:
  """Check the names of projections and return them in the order of `ALL_TARGETS`; "all" stands for `TARGETS`.

  Raises:
    ValueError: a name is unknown, or there is none.
  """
  if not targets:
    raise ValueError(f"model.lora.targets is empty: name some of {', '.join(ALL_TARGETS)}, or all")
  for name in targets:
    if name not in (*ALL_TARGETS, "all"):
      known = f"there are {', '.join(ALL_TARGETS)}, or all"
      near = did_you_mean(name, ALL_TARGETS)
      raise ValueError(f"model.lora.targets: the model has no projection {name!r}{near} ({known})")
  named = {*targets, *(TARGETS if "all" in targets else ())}
  return tuple(name for name in ALL_TARGETS if name in named)
