"""What is minimised: masks, likelihood estimators, importance weights, and one file for each objective."""

from dmpo_jax.objectives.bgpo import Bgpo
from dmpo_jax.objectives.coupled_grpo import CoupledGrpo
from dmpo_jax.objectives.denoise import Denoise
from dmpo_jax.objectives.diffu_grpo import DiffuGrpo
from dmpo_jax.objectives.dtm import Dtm
from dmpo_jax.objectives.ebpo import Ebpo
from dmpo_jax.objectives.espo import Espo
from dmpo_jax.objectives.gdpo import Gdpo
from dmpo_jax.objectives.gdsd import Gdsd
from dmpo_jax.objectives.objective import Objective
from dmpo_jax.objectives.spg import Spg
from dmpo_jax.objectives.tracerl import TraceRl
from dmpo_jax.objectives.wd1 import Wd1
from dmpo_jax.objectives.wdce import Wdce
from dmpo_jax.objectives.wddo import Wddo

OBJECTIVES: dict[str, type[Objective]] = {
  "denoise": Denoise,
  "wdce": Wdce,
  "wddo": Wddo,
  "diffu_grpo": DiffuGrpo,
  "coupled_grpo": CoupledGrpo,
  "gdpo": Gdpo,
  "espo": Espo,
  "gdsd": Gdsd,
  "tracerl": TraceRl,
  "wd1": Wd1,
  "spg": Spg,
  "dtm": Dtm,
  "ebpo": Ebpo,
  "bgpo": Bgpo,
}
