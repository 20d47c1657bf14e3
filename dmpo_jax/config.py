"""The configuration, checked whole before any device work, and compared with the one a workdir was begun with.

`configs/base.py` says what each key means, `rules.py` which values it may have, `relations.py` what keys must be to
each other.
"""

import difflib
import hashlib
import inspect
import json
import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from dmpo_jax import files, tasks
from dmpo_jax.models.llada import OLDER as OLDER_MODEL
from dmpo_jax.pretrained import filled
from dmpo_jax.relations import RELATIONS
from dmpo_jax.rules import RULES
from dmpo_jax.samplers import SAMPLERS

Config = Mapping[str, Any] | ConfigDict

KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
CHOICES = ("task", "sampler", "objective")  # sections with a name, and a section of own keywords under each name
FILE = "config.json"  # the configuration that a workdir was begun with
OUTCOMES = ("base", "policy", "best", "result.json", "evaluation")  # what a workdir keeps besides checkpoints
_CHECKPOINT = re.compile(r"\d+(\.\d+)?(\.damaged.*)?")  # a name; unfinished ones have another


class ConfigError(ValueError):
  """A configuration that cannot run; the message lists every problem, one a line."""


# What may differ when a run goes on: how long, how often, where, how much at one time, in which precision; and the path
# of the base, whose identity is in every checkpoint. The rest decides results.
MAY_CHANGE = (
  "checkpoint.*",
  "eval.batch_size",
  "eval.every_buffers",
  "model.attention",
  "model.dtype",
  "model.init_from",
  "model.layer_rows",
  "grading.workers",
  "log.*",
  "model.param_dtype",
  "model.remat",
  "optim.max_skips_in_a_row",
  "rollout.chunk_prompts",
  "serve.*",
  "sharding.*",
  "task.data_dir",
  "task.records_dir",
  "train.microbatch_prompts",
  "train.num_buffers",
)

# What an evaluation does not depend on, beside the policy and its base, which have an identity.
NOT_OF_EVALUATION = (
  *("checkpoint.*", "log.*", "objective.*", "optim.*", "rollout.*", "serve.*", "sharding.*", "train.*", "warm_start.*"),
  *("eval.batch_size", "eval.every_buffers", "eval.lengths", "eval.samplers", "eval.tasks", "grading.workers"),
  *("model.init_from", "model.layer_rows", "model.lora.dropout", "model.lora.init_from", "model.remat"),
  *("task.data_dir", "task.records_dir"),
)

# What the lack of a key means, in runs of before there was one.
OLDER = {f"model.{field}": value for field, value in OLDER_MODEL.items()}

# What may differ where a finished run is used. A sample needs only the model and how its base was made.
_OF_EVALUATION = ("eval.*", "task.eval_path", "task.grader", "task.num_test")
_OF_SAMPLING = ("eval.*", "grading.*", "objective.*", "optim.*", "rollout.*", "sampler.*", "seed", "task.*", "train.*")
MAY_DIFFER = {"train": (), "eval": _OF_EVALUATION, "sample": _OF_SAMPLING, "serve": _OF_SAMPLING}  # by mode


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
  if rule is None:
    is_own = path.count(".") == 2 and path.split(".")[0] in CHOICES
    return "" if is_own else _line(path, value, "no such key" + did_you_mean(path, RULES))
  if rule.holds(value):
    return ""
  unknown = [name for name in (value if isinstance(value, tuple | list) else [value]) if name not in rule.names]
  return _line(path, value, rule.allowed + "".join(did_you_mean(name, rule.names) for name in unknown))


def _has_default(path: str) -> bool:
  """Whether a key is a keyword of a sampler's own, whose signature says what its lack means."""
  section, *rest = path.split(".")
  if section != "sampler" or len(rest) < 2:
    return False
  return inspect.signature(SAMPLERS[rest[0]]).parameters[rest[1]].default is not inspect.Parameter.empty


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
  """Check the names in the section of the chosen sampler against the sampler's own keywords."""
  prefix, parameters = f"sampler.{name}.", inspect.signature(SAMPLERS[name]).parameters
  known = {key: parameter.default for key, parameter in parameters.items() if parameter.kind is KEYWORD_ONLY}
  own = {path.removeprefix(prefix) for path in values if path.startswith(prefix)}
  problems = {
    prefix + key: _line(prefix + key, values[prefix + key], f"no such key{did_you_mean(key, known)}")
    for key in own - known.keys()
  }
  needed = {key for key, default in known.items() if default is inspect.Parameter.empty}
  return problems | {prefix + key: f"config.{prefix}{key} is missing" for key in needed - own}


def fingerprint(config: Config) -> str:
  """Hash what decides a run's results: the same for equal configurations on every machine and Python."""
  leaves = {path: float(value) if type(value) is int else value for path, value in deciding(config).items()}
  return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Config, new: Config) -> list[str]:
  """List the keys by which two configurations decide different results, as `config.path: old -> new`."""
  before, after = deciding(old), deciding(new)
  return [
    f"config.{path}: {before.get(path, 'absent')!r} -> {after.get(path, 'absent')!r}"
    for path in sorted(before.keys() | after.keys())
    if before.get(path) != after.get(path)
  ]


def deciding(config: Config, may_change: Sequence[str] = MAY_CHANGE) -> dict[str, Any]:
  """List the leaves that decide results: not those of `may_change`, nor of choices that were not made, nor OLDER."""
  leaves = flatten(config)
  chosen = {(section, leaves.get(f"{section}.name")) for section in CHOICES}
  chosen.add(("objective", leaves.get("objective.likelihood")))
  chosen.add(("task", tasks.section(str(leaves.get("task.name")))))
  found = {}
  for path, value in leaves.items():
    section, *rest = path.split(".")
    is_of_another = section in CHOICES and len(rest) > 1 and (section, rest[0]) not in chosen
    is_as_before = path in OLDER and value == OLDER[path]
    if value is None or is_of_another or is_as_before or any(fnmatch(path, key) for key in may_change):
      continue
    found[path] = list(value) if isinstance(value, tuple) else value
  if isinstance(found.get("tokenizer.path"), str):  # a checkout may move; its file is the same one
    found["tokenizer.path"] = epath.Path(found["tokenizer.path"]).name
  return found


UNREADABLE = "if this is the run's own configuration, remove the file: the training's command writes it again"


def save(workdir: epath.PathLike, config: ConfigDict) -> None:
  """Write the configuration to the workdir's config.json (process 0)."""
  if jax.process_index() == 0:
    files.write_whole(epath.Path(workdir) / FILE, json.dumps(config.to_dict(), indent=2) + "\n")


def has_finished_a_step(workdir: epath.PathLike) -> bool:
  """Whether a run has left something in the workdir to go on from or to keep: a base, a checkpoint or a result."""
  folder, saved = epath.Path(workdir), epath.Path(workdir) / "checkpoints"
  phases = [phase for phase in saved.iterdir() if phase.is_dir()] if saved.exists() else []
  names = [path.name for phase in phases for path in phase.iterdir()]
  return any((folder / name).exists() for name in OUTCOMES) or any(_CHECKPOINT.fullmatch(name) for name in names)


def check_workdir(workdir: epath.PathLike, config: ConfigDict, *, mode: str = "train") -> None:
  """Refuse a workdir that holds a run of a configuration of other results.

  A new workdir passes, and for training one where no step was finished, as a start that failed leaves it.

  Args:
    mode: what the workdir is for; what the mode has no need of may differ (MAY_DIFFER).

  Raises:
    ConfigError: naming the keys that differ and what would do.
  """
  path = epath.Path(workdir) / FILE
  if not path.exists() or (mode == "train" and not has_finished_a_step(workdir)):
    return
  differing = [
    line
    for line in differences(files.read_object(path, UNREADABLE), config)
    if not any(fnmatch(line.partition(":")[0], f"config.{key}") for key in MAY_DIFFER[mode])
  ]
  if differing:
    listed = "\n  ".join(differing)
    raise ConfigError(
      f"{workdir} holds a run of another configuration ({path}):\n  {listed}\n"
      "Give --workdir a new folder, or set these keys back to go on with that run."
    )
