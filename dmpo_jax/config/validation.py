"""The check of a whole configuration, before any device work: every problem is listed, one a line."""

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

from ml_collections import ConfigDict

from dmpo_jax import tasks
from dmpo_jax.config.keys import KEYS
from dmpo_jax.config.renamed import RENAMED, new_name
from dmpo_jax.hub.pretrained import filled
from dmpo_jax.samplers import SAMPLERS, make_options
from dmpo_jax.spelling import did_you_mean
from dmpo_jax.tasks import mixture

Config = Mapping[str, Any] | ConfigDict

CHOICES = ("task", "sampler", "objective")  # sections with a name, and a section of own keys under each name


class ConfigError(ValueError):
  """A configuration that cannot run; the message lists every problem, one a line."""


# Keys that mean nothing if nothing is trained, or nothing evaluated: their relations to others are not checked.
_OF_TRAINING = ("objective.*", "optim.*", "rollout.*", "train.*", "warm_start.*")
NOT_READ = {"train": (), "eval": _OF_TRAINING, "sample": (*_OF_TRAINING, "eval.*"), "serve": (*_OF_TRAINING, "eval.*")}


def validate(config: ConfigDict, mode: str = "train") -> None:
  """Check every key of a configuration, and the keys against each other.

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
  problems = {path: _key_problem(path, values) for path in dict.fromkeys([*KEYS, *values])}
  for path, rule in KEYS.items():
    if not any(fnmatch(path, key) for key in NOT_READ[mode]):
      for relation in rule.relations:
        paths = (path, *relation.others)
        if not any(problems[each] for each in paths):
          wrong = relation.problem(*(values[each] for each in paths))
          problems[path] = _line(path, values[path], wrong) if wrong else ""
  if not any(problems[f"task.{key}"] for key in ("name", "prompt", "rewards", "grader")):
    for name, own in _tasks(values, problems).items():
      problems |= _task_problems(name, values | own)
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


def _key_problem(path: str, values: Mapping[str, Any]) -> str:
  if path not in values:
    return f"config.{path} is missing: {KEYS[path].allowed}"
  value, rule = values[path], KEYS.get(path)
  if path in RENAMED:
    return _line(path, value, new_name(path))
  if rule is None:
    section, *own = path.split(".")  # options of tasks and samplers: see below
    is_option = len(own) == 2 and (section == "task" or (section == "sampler" and own[0] in SAMPLERS))
    return "" if is_option else _line(path, value, "no such key" + did_you_mean(path, KEYS))
  problem = rule.problem(value)
  return _line(path, value, problem) if problem else ""


def _line(path: str, value: object, allowed: str) -> str:
  return f"config.{path} = {value!r}: {allowed}"


def _section(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
  return {path.removeprefix(prefix): value for path, value in values.items() if path.startswith(prefix)}


def _tasks(values: Mapping[str, Any], problems: Mapping[str, str]) -> dict[str, dict[str, Any]]:
  """Return the names of the tasks, each with the values that it has for itself."""
  if values["task.name"] != mixture.NAME:
    return {values["task.name"]: {}}
  if problems["task.mixture"]:
    return {}
  parts = mixture.read(values["task.mixture"])
  return {name: {f"task.{key}": value for key, value in part.keys.items()} for name, part in parts.items()}


def _task_problems(name: str, values: Mapping[str, Any]) -> dict[str, str]:
  """Check the section of the chosen task against the task's own options, then by making the task."""
  prefix = f"task.{tasks.section(name)}."
  own, types = _section(prefix, values), tasks.option_types(name)
  problems = {}
  for key, value in own.items():
    if key not in types:
      problems[prefix + key] = _line(prefix + key, value, f"no such key{did_you_mean(key, types)}")
    elif types[key] in (int, float, str, bool) and type(value) not in (types[key], {float: int}.get(types[key])):
      problems[prefix + key] = _line(prefix + key, value, f"a value of type {types[key].__name__}")
  if not problems:
    common: dict[str, Any] = {"name": name} | {key: values[f"task.{key}"] for key in ("prompt", "rewards", "grader")}
    try:
      tasks.make_task(**common, options=own)
    except (TypeError, ValueError) as error:  # it names its keys, as `task.sudoku.min_blanks=...`, one a line
      message = str(error)
      problems[prefix] = (
        message.replace("task.", "config.task.", 1).replace("\ntask.", "\n  config.task.")
        if message.startswith("task.")
        else _line(prefix[:-1], own, message)
      )
  return problems


def _sampler_problems(chosen: str, values: Mapping[str, Any]) -> dict[str, str]:
  """Check the section of every sampler that has one, and the chosen sampler."""
  problems = {}
  for name in SAMPLERS:
    own = _section(f"sampler.{name}.", values)
    if own or name == chosen:
      try:
        make_options(name, own)
      except ValueError as error:  # a line for each option, as `sampler.wino.threshold=...`
        problems |= {line: "config." + line.replace("=", " = ", 1) for line in str(error).splitlines()}
  return problems
