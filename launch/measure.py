"""What there is to find from a base: its rollouts of held-out prompts, drawn as training draws them."""

import collections
import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree
from ml_collections import ConfigDict

from dmpo_jax import files
from dmpo_jax.build import Parts
from dmpo_jax.evaluate import make_evaluate


def changed(config: ConfigDict, changes: Mapping[str, object]) -> ConfigDict:
  """Return a copy of a configuration with some keys, given by dotted paths, changed."""
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(dict(changes))
  return config


@dataclasses.dataclass(frozen=True)
class Diversity:
  """Figures of groups of rollouts, and of greedy decoding."""

  group_size: int
  reward: float  # greedy
  solved: float  # greedy
  pass_at_1: float
  pass_at_all: float  # of a group
  different: float  # rollouts of a group
  without_variance: float  # share of the groups whose rewards are equal


def measure_diversity(
  config: ConfigDict, parts: Parts, trained: PyTree, frozen: PyTree, work: epath.Path, group_size: int
) -> Diversity:
  """Decode groups of rollouts of the held-out prompts as training does, and each prompt once as evaluation does."""
  own = {"eval.num_samples": group_size, "eval.temperature": config.sampler.temperature, "eval.early_exit": False}
  path = work / "rollouts.jsonl"
  with jax.set_mesh(parts.mesh):
    found = make_evaluate(changed(config, own), parts, frozen)(trained, path, {})
    greedy = make_evaluate(config, parts, frozen)(trained, work / "greedy.jsonl", {})
  groups = collections.defaultdict(list)
  for line in files.read_lines(path).rows:
    groups[line["index"]].append((line["completion"], line["reward"], line["is_solved"]))
  texts, rewards, solved = ([{line[field] for line in group} for group in groups.values()] for field in range(3))
  return Diversity(
    group_size=group_size,
    reward=greedy["reward_mean"],
    solved=greedy["solve_rate"],
    pass_at_1=found["solve_rate"],
    pass_at_all=float(np.mean([True in verdicts for verdicts in solved])),
    different=float(np.mean([len(different) for different in texts])),
    without_variance=float(np.mean([len(different) == 1 for different in rewards])),
  )
