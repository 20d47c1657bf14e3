"""Decoding rules by name, each on the loop of `loop.py`: `sample(denoiser, keys, plan, options) -> Rollouts`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dmpo_jax.samplers import editing, entropy_bound, freedave, llada, parallel, random_order, wino
from dmpo_jax.samplers.loop import Plan, Rule
from dmpo_jax.spelling import did_you_mean
from dmpo_jax.structs import Rollouts

__all__ = ["SAMPLERS", "Plan", "Rule", "Sampler", "make_options"]


class Sampler(NamedTuple):
  """A decoding rule: a frozen dataclass of its options, the function that takes them, and what others ask of it."""

  options: type
  sample: Callable[..., Rollouts]  # (denoiser, keys [b], plan, options) -> Rollouts of b rows
  has_trajectory: bool = True  # each call decides one state from the one before, so that they can be replayed
  can_revoke: bool = False  # a token that was committed may change
  gives_log_probs: bool = False  # of the completions, under the policy and the reference
  # Builds the rule alone, from (denoiser, plan, options): it decodes models that attend by blocks too.
  make_rule: Callable[..., Rule] | None = None

  @property
  def has_blocks(self) -> bool:
    """Whether it decodes models that attend by blocks too, with their exact cache."""
    return self.make_rule is not None


SAMPLERS = {
  "random_order": Sampler(random_order.Options, random_order.sample, gives_log_probs=True),
  "llada": Sampler(llada.Options, llada.sample, make_rule=llada.make_rule),
  "parallel": Sampler(parallel.Options, parallel.sample, make_rule=parallel.make_rule),
  "prefix_cache": Sampler(parallel.Options, parallel.sample_with_prefix_cache),
  "dual_cache": Sampler(parallel.Options, parallel.sample_with_dual_cache),
  "wino": Sampler(wino.Options, wino.sample, has_trajectory=False, can_revoke=True),
  "freedave": Sampler(freedave.Options, freedave.sample, has_trajectory=False),
  "entropy_bound": Sampler(entropy_bound.Options, entropy_bound.sample, make_rule=entropy_bound.make_rule),
  "editing": Sampler(
    editing.Options, editing.sample, has_trajectory=False, can_revoke=True, make_rule=editing.make_rule
  ),
}

KINDS = {  # types that an option may be declared with: what its value may be
  bool: ((bool,), "True or False"),
  float: ((int, float), "a number"),
  int: ((int,), "a whole number"),
  str: ((str,), "a string"),
}


def make_options(name: str, section: Mapping[str, Any]) -> Any:
  """Build a sampler's options from the configuration's section `sampler.<name>`.

  Args:
    section: the options that differ from their defaults.

  Raises:
    ValueError: options are unknown, missing or have wrong values; a line for each, `sampler.<name>.option=value: ...`.
  """
  options = SAMPLERS[name].options
  fields = {field.name: field for field in dataclasses.fields(options)}
  problems = [problem for key, value in section.items() if (problem := _find_problem(key, value, fields))]
  problems += [
    f"{key} is missing" for key, field in fields.items() if field.default is dataclasses.MISSING and key not in section
  ]
  if not problems:
    try:
      return options(**section)
    except ValueError as error:
      problems = str(error).splitlines()
  raise ValueError("\n".join(f"sampler.{name}.{problem}" for problem in problems))


def _find_problem(key: str, value: object, fields: Mapping[str, dataclasses.Field]) -> str:
  if key not in fields:
    return f"{key}={value!r}: no such option{did_you_mean(key, fields)}"
  types, allowed = KINDS[fields[key].type]
  return "" if type(value) in types else f"{key}={value!r}: must be {allowed}"
