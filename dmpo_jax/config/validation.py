"""The configuration, checked whole before any device work, and compared with the one a workdir was begun with.

`configs/base.py` says what each key means, `rules.py` which values it may have, `relations.py` what keys must be to
each other.
"""

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from typing import Any

from ml_collections import ConfigDict

from dmpo_jax import tasks
from dmpo_jax.config.relations import RELATIONS
from dmpo_jax.config.renamed import RENAMED, new_name
from dmpo_jax.config.rules import RULES
from dmpo_jax.hub.pretrained import filled
from dmpo_jax.samplers import SAMPLERS

Config = Mapping[str, Any] | ConfigDict

CHOICES = ("task", "sampler", "objective")  # sections with a name, and a section of own keywords under each name


class ConfigError(ValueError):
  """A configuration that cannot run; the message lists every problem, one a line."""


# Keys that say nothing where nothing is trained, or nothing is evaluated: what they must be to others is not asked.
_OF_TRAINING = ("objective.*", "optim.*", "rollout.*", "train.*", "warm_start.*")
NOT_ASKED = {"train": (), "eval": _OF_TRAINING, "sample": (*_OF_TRAINING, "eval.*"), "serve": (*_OF_TRAINING, "eval.*")}


def validate(config: ConfigDict, mode: str = "train") -> None:
  """Check every key of a configuration, and what the keys must be to each other.

  Args:
    mode: what it is for: keys that the mode does not read need not fit together.

  Raises:
    ConfigError: listing every problem as `config.path = value: what is allowed`.
  """
  try:
    config = filled(config)
  except ValueError as error:
    raise ConfigError(f"config.model.init_from: {error}") from error
  values = flatten(config)
  problems = {path: _problem(path, values) for path in dict.fromkeys([*RULES, *values])}
  for relation in RELATIONS:
    paths = (relation.path, *relation.others)
    if any(problems.get(path) for path in paths) or any(fnmatch(relation.path, key) for key in NOT_ASKED[mode]):
      continue
    value, *others = (values[path] for path in paths)
    if not relation.holds(value, *others):
      named = (f"{path} = {other!r}" for path, other in zip(relation.others, others, strict=True))
      problems[relation.path] = _line(relation.path, value, relation.allowed.format(*named))
  if not any(problems[f"task.{key}"] for key in ("name", "prompt", "rewards", "grader")):
    problems |= _task_problems(config.task.name, values)
  if not problems["sampler.name"]:
    problems |= _sampler_problems(config.sampler.name, values)
  found = [problem for problem in problems.values() if problem]
  if found:
    count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
    raise ConfigError(f"{count} in the configuration:\n  " + "\n  ".join(found))


def flatten(config: Config, prefix: str = "") -> dict[str, Any]:
  """List a nested configuration's leaves by their dotted paths."""
  leaves = {}
  for key, value in config.items():
    if isinstance(value, Mapping | ConfigDict):
      leaves |= flatten(value, f"{prefix}{key}.")
    else:
      leaves[prefix + key] = value
  return leaves


def _problem(path: str, values: Mapping[str, Any]) -> str:
  rule = RULES.get(path)
  if path not in values:
    return "" if _has_default(path) else f"config.{path} is missing: {rule.allowed}"
  value = values[path]
  if path in RENAMED:
    return _line(path, value, new_name(path))
  if rule is None:
    is_own = path.count(".") == 2 and path.split(".")[0] in CHOICES
    return "" if is_own else _line(path, value, "no such key" + did_you_mean(path, RULES))
  if rule.holds(value):
    return ""
  unknown = [name for name in (value if isinstance(value, tuple | list) else [value]) if name not in rule.names]
  return _line(path, value, rule.allowed + "".join(did_you_mean(name, rule.names) for name in unknown))


def _has_default(path: str) -> bool:
  """Whether a key is an option of a sampler that has a default."""
  section, *rest = path.split(".")
  if section != "sampler" or len(rest) < 2:
    return False
  return any(field.name == rest[1] and _is_optional(field) for field in _option_fields(rest[0]))


def _option_fields(sampler: str) -> tuple[dataclasses.Field, ...]:
  return dataclasses.fields(SAMPLERS[sampler].options)


def _is_optional(field: dataclasses.Field) -> bool:
  return field.default is not dataclasses.MISSING


def _line(path: str, value: Any, allowed: str) -> str:
  return f"config.{path} = {value!r}: {allowed}"


def did_you_mean(name: Any, names: Collection[str]) -> str:
  close = difflib.get_close_matches(str(name), names, n=1)
  return f"; did you mean {close[0]!r}?" if close else ""


def _task_problems(name: str, values: Mapping[str, Any]) -> dict[str, str]:
  """Check the section of the chosen task against the task's own options, then by making the task."""
  section = tasks.section(name)
  prefix = f"task.{section}."
  own = {path.removeprefix(prefix): value for path, value in values.items() if path.startswith(prefix)}
  types = tasks.option_types(name)
  problems = {}
  for key, value in own.items():
    if key not in types:
      problems[prefix + key] = _line(prefix + key, value, f"no such key{did_you_mean(key, types)}")
    elif types[key] in (int, float, str, bool) and type(value) not in (types[key], {float: int}.get(types[key])):
      problems[prefix + key] = _line(prefix + key, value, f"a value of type {types[key].__name__}")
  if not problems:
    common = {key: values[f"task.{key}"] for key in ("name", "prompt", "rewards", "grader")}
    try:
      tasks.make_task(**common, options=own)
    except (TypeError, ValueError) as error:  # which names its keys, as `task.sudoku.min_blanks=...`, one a line
      message = str(error)
      problems[prefix] = (
        message.replace("task.", "config.task.", 1).replace("\ntask.", "\n  config.task.")
        if message.startswith("task.")
        else _line(prefix[:-1], own, message)
      )
  return problems


def _sampler_problems(name: str, values: Mapping[str, Any]) -> dict[str, str]:
  """Check the names in the section of the chosen sampler against its options."""
  prefix, known = f"sampler.{name}.", {field.name: _is_optional(field) for field in _option_fields(name)}
  own = {path.removeprefix(prefix) for path in values if path.startswith(prefix)}
  problems = {
    prefix + key: _line(prefix + key, values[prefix + key], f"no such key{did_you_mean(key, known)}")
    for key in own - known.keys()
  }
  needed = {key for key, is_optional in known.items() if not is_optional}
  return problems | {prefix + key: f"config.{prefix}{key} is missing" for key in needed - own}
