"""A policy's accuracy on held-out prompts: sample, grade, count, and keep every generation.

During training the current policy is evaluated now and then, as it samples in training but greedily (`make_evaluate`).
`--mode=eval` evaluates the last and the best policy of a workdir on all of `eval.tasks`, `lengths` and `samplers`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree
from ml_collections import ConfigDict
from rich.console import Console

from dmpo_jax import continuous, files, lengths, noise, sharding, tasks
from dmpo_jax.build import Parts, build_parts, config_of_task
from dmpo_jax.config import NOT_OF_EVALUATION, ConfigError, deciding, validate
from dmpo_jax.generations import Unfinished, grade_batch, summarize
from dmpo_jax.grading import Grading
from dmpo_jax.hub.tokenizer import Tokenizer
from dmpo_jax.policy import Compiled, Policies, base_name, check_confidence, load_policies, make_sample
from dmpo_jax.processes import gather_texts
from dmpo_jax.run import progress
from dmpo_jax.run.metrics import read_result
from dmpo_jax.run.params import identity, read_metadata
from dmpo_jax.run.preemption import Preempted, check_preemption
from dmpo_jax.run.report import tables
from dmpo_jax.structs import Prompts, Rollouts
from dmpo_jax.tasks import mixture

logger = logging.getLogger(__name__)

RESULT = "result.json"
POLICIES = {"last": "policy", "best": "best"}  # folders of the workdir
SHORTEST = 64  # tokens that the shortest prompts are padded to


def main(config: ConfigDict, workdir: epath.Path) -> None:
  """Evaluate the policies that training left in `workdir`, and print and save the figures; done parts are kept."""
  policies = [name for name, folder in POLICIES.items() if (workdir / folder).exists()]
  if "last" not in policies:
    raise ConfigError(f"{workdir} holds no finished policy: train first, with the same command without --mode")
  settings = list(vary(config))
  for setting in settings:
    validate(setting, mode="eval")
  folder = workdir / "evaluation"
  rows = _read_rows(folder / RESULT)
  with progress.Progress("evaluation", len(settings) * len(policies), unit="settings") as shown:
    for task_name, group in itertools.groupby(settings, key=lambda setting: setting.task.name):
      parts = build_parts(config_of_task(config, task_name), workdir, is_training=False)
      with contextlib.closing(parts.grading), jax.set_mesh(parts.mesh):
        trained, base = load_policies(config, workdir, parts, [POLICIES[name] for name in policies])
        for setting in group:
          evaluate_policy = make_evaluate(setting, parts, base)
          for name, policy in zip(policies, trained, strict=True):
            about = describe(setting, config) | _prompts_identity(setting, parts)
            about |= _describe_policy(config, workdir, name)
            if not any(row.items() >= about.items() for row in rows):  # else an earlier start has done it
              path = folder / _file_name(about)
              row = about | evaluate_policy(policy, path, about) | {"generations": path.name}
              rows = [other for other in rows if other["generations"] != path.name] + [row]
              if jax.process_index() == 0:
                files.write_whole(folder / RESULT, files.to_json(rows, indent=2) + "\n")
            shown.advance()
  if jax.process_index() == 0:
    Console().print(tables.evaluations(rows))
    print(f"generations  {folder}")


def vary(config: ConfigDict) -> Iterator[ConfigDict]:
  """Yield the configuration with every task, sampler and length of `config.eval`, as many steps a token as it has."""
  own, sampler = config.eval, config.sampler
  names = (own.tasks or task_names(config), own.samplers or (sampler.name,))
  for task, name, length in itertools.product(*names, own.lengths or (sampler.completion_length,)):
    varied = config_of_task(config, task)
    with varied.unlocked():
      varied.sampler.name, varied.sampler.completion_length = name, length
      varied.sampler.block_length = min(sampler.block_length, length)
      varied.sampler.steps = max(round(sampler.steps * length / sampler.completion_length), 1)
    yield varied


def task_names(config: ConfigDict) -> tuple[str, ...]:
  """Return the names of the tasks that a configuration trains on."""
  return tuple(mixture.read(config.task.mixture)) if config.task.name == mixture.NAME else (config.task.name,)


def describe(setting: ConfigDict, config: ConfigDict) -> dict[str, Any]:
  """Return what an evaluation depends on besides policy and prompts, and whether it samples as training does.

  `settings` has every key of the configuration that decides its result; the others are those that tables show.
  """
  sampler, trained_with = setting.sampler, config.sampler
  trained_on = (config.task.name, *task_names(config))
  return {
    "task": setting.task.name,
    "sampler": sampler.name,
    "completion_length": sampler.completion_length,
    "steps": sampler.steps,
    "is_as_in_training": sampler.to_dict() == trained_with.to_dict() and setting.task.name in trained_on,
    "settings": deciding(setting, NOT_OF_EVALUATION),
  }


def _describe_policy(config: ConfigDict, workdir: epath.Path, name: str) -> dict[str, Any]:
  """Say which policy an evaluation is of, and how many buffers it has learned from."""
  return {
    "policy": name,
    "buffers": _num_buffers(workdir, name),
    "policy_identity": identity(workdir / POLICIES[name]),
    "base_identity": base_name(config, workdir) if config.model.lora.rank else "",
  }


def _prompts_identity(setting: ConfigDict, parts: Parts) -> dict[str, str]:
  """Hash the held-out prompts, as the model sees them, with their records, and the file of a user's own task."""
  prompts, records = parts.held_out
  digest = hashlib.sha256(json.dumps(records, sort_keys=True, default=str).encode())
  for array in (prompts.tokens, prompts.is_valid):
    digest.update(np.ascontiguousarray(array).tobytes())
  for name in task_names(setting):
    if tasks.section(name) == "user":
      digest.update(epath.Path(name).read_bytes())
  return {"prompts_identity": digest.hexdigest()[:16]}


def _num_buffers(workdir: epath.Path, name: str) -> int:
  """Say how many buffers a saved policy has learned from; in runs of before it said so, the result does."""
  about = read_metadata(workdir / POLICIES[name])
  if "buffers" in about:
    return about["buffers"]
  result = read_result(workdir)
  if result is None:
    raise ConfigError(
      f"{workdir} does not say how many buffers its policy has learned from: run the training once more"
    )
  return result["buffers"] if name == "last" else int(best_buffer(result["evaluations"]))


def make_evaluate_training(
  config: ConfigDict, workdir: epath.Path, parts: Parts, base: PyTree
) -> Callable[[Any, int], dict[str, float]]:
  """Close over a run's own evaluation: `evaluate(trainable, after so many buffers) -> figures`."""
  evaluate_policy = make_evaluate(config, parts, base)
  about = describe(config, config) | _prompts_identity(config, parts) | {"base_identity": base_name(config, workdir)}

  def evaluate_after(trainable: PyTree, buffers: int) -> dict[str, float]:
    path = workdir / "generations" / f"{buffers:06d}.jsonl"
    return evaluate_policy(trainable, path, about | {"buffers": buffers})

  return evaluate_after


def make_evaluate(
  config: ConfigDict, parts: Parts, base: PyTree
) -> Callable[[Any, epath.Path, Mapping[str, Any]], dict[str, float]]:
  """Close over the configuration's evaluation: `evaluate(trainable, path, metadata) -> figures`."""
  own = config.eval
  settings = dict(temperature=own.temperature, early_exit=own.early_exit)
  if config.sampler.slots:
    num_slots = config.sampler.slots
    program = continuous.Programs(config, parts.model, parts.rollout_mesh, num_slots=num_slots, **settings)
    sample = continuous.Sample(program, own.num_samples, check_preemption)
  else:
    program = Compiled(make_sample(config, parts.model, parts.mesh, group_size=own.num_samples, **settings))
    sample = sharding.within(parts.rollout_mesh, program)
  evaluation = Evaluation(*parts.held_out, parts.grading, parts.tokenizer, config.seed, own.batch_size)

  def evaluate_policy(trainable: PyTree, path: epath.Path, metadata: Mapping[str, Any]) -> dict[str, float]:
    of_policy = functools.partial(sample, sharding.move(Policies(trainable, base), parts.rollout_mesh))
    return evaluation.run(of_policy, Unfinished(path, metadata), seconds_compiling=lambda: program.seconds)

  return evaluate_policy


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Held-out prompts, and how their completions are decoded and graded.

  Args:
    records: the task's records of the prompts.
    batch_size: prompts decoded at one time; the last batch is filled up with copies of the last prompt, dropped again.
  """

  prompts: Prompts
  records: Sequence[tasks.Record]
  grading: Grading
  tokenizer: Tokenizer
  seed: int
  batch_size: int

  def run(
    self,
    sample: Callable[[Prompts, jax.Array], Rollouts],
    unfinished: Unfinished,
    seconds_compiling: Callable[[], float] = lambda: 0.0,
  ) -> dict[str, float]:
    """Decode completions of every prompt, grade them, and save the generations as JSON lines.

    Prompts are decoded the longest first, and each batch is padded to one of few lengths (`cut_padding`). An evaluation
    that was cut off resumes after its last whole batch. Every prompt's rows are a function of the seed and the prompt,
    so neither order, batches, padding nor hosts change them; each host grades and writes its share of a batch.

    Args:
      sample: from `policy.make_sample`, closed over the policy; fields [p, g, ...].
      unfinished: the generations' file.
      seconds_compiling: seconds that `sample` has spent on compiling so far.

    Returns:
      See `generations.summarize`; `seconds` of this start and, of these, `seconds_compiling`; and the effective tokens
      a second of the others, `tokens_per_second`.

    Raises:
      Preempted: between two batches, those before it kept.
      NotFinite: see `policy.check_confidence`.
    """
    start, compiled_before = time.monotonic(), seconds_compiling()
    lines = unfinished.read()
    num_read = len(lines)
    self._decode(sample, lines, unfinished)
    seconds, compiling = time.monotonic() - start, seconds_compiling() - compiled_before
    tokens = sum(line["num_tokens"] for line in lines[num_read:])
    lines.sort(key=operator.itemgetter("index", "sample"))
    unfinished.finish(lines)
    times = {"seconds": seconds, "seconds_compiling": compiling, "tokens_per_second": tokens / (seconds - compiling)}
    return summarize(lines) | times

  def _decode(
    self, sample: Callable[[Prompts, jax.Array], Rollouts], lines: list[dict[str, Any]], unfinished: Unfinished
  ) -> None:
    """Append the lines of the prompts that have none; the accelerator samples a batch while the last one is graded."""
    key, num = noise.step_key(self.seed, "evaluate", 0), len(self.records)
    size = min(self.batch_size, max(num, 1))
    is_done = np.isin(np.arange(num), [line["index"] for line in lines])
    longest_first = np.argsort(-self.prompts.is_valid.sum(1), kind="stable")
    left = longest_first[~is_done[longest_first]].tolist()
    batches = [left[first : first + size] for first in range(0, len(left), size)]

    def dispatch(batch: Sequence[int]) -> Rollouts:
      check_preemption()
      index = np.array([*batch, *list(batch[-1:]) * (size - len(batch))])
      return sample(cut_padding(jax.tree.map(lambda array: array[index], self.prompts)), key)

    ahead = dispatch(batches[0]) if batches else None
    for batch, following in itertools.zip_longest(batches, batches[1:]):
      progress.part("evaluating prompts", len({line["index"] for line in lines}), num)
      rollouts = jax.device_get(ahead)
      check_confidence(rollouts)
      finish = grade_batch(self.grading, self.tokenizer, self.records, rollouts, batch)
      notice = None
      try:
        ahead = dispatch(following) if following else None  # while the accelerator does this, workers grade
      except Preempted as error:
        notice = error
      found = finish()
      lines += found
      unfinished.add(found)
      if notice is not None:
        raise notice


def cut_padding(prompts: Prompts) -> Prompts:
  """Drop padding that all prompts have, so that `SHORTEST` tokens are left, or twice as many, or four times.

  So a sampler is compiled a few times at most. Prompts that were no longer padded than this stay as they are.
  """
  return lengths.cut(prompts, (SHORTEST * 2**doublings for doublings in itertools.count()))


def best_buffer(evaluations: Mapping[str, Mapping[str, float]]) -> str:
  """Return the number of finished buffers, above 0, after which most was solved.

  Ties: higher reward, then a smaller held-out loss where there is one, then earlier.
  """
  trained = {buffer: row for buffer, row in evaluations.items() if int(buffer)} or evaluations

  def rank(buffer: str) -> tuple[float, ...]:
    row = trained[buffer]
    return row["solve_rate"], row["reward_mean"], -row.get("loss", 0.0), -int(buffer)

  return max(trained, key=rank)


def _file_name(about: Mapping[str, Any]) -> str:
  """Name the file of an evaluation's generations: another evaluation has another name."""
  digest = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode()).hexdigest()[:8]
  task = epath.Path(about["task"]).stem
  parts = (about["policy"], about["buffers"], task, about["sampler"], about["completion_length"], digest)
  return "_".join(map(str, parts)) + ".jsonl"


def _read_rows(path: epath.Path) -> list[dict[str, Any]]:
  """Read what earlier starts have evaluated, in process 0 for all: it sets a file of another version aside."""
  rows = _read_own_rows(path) if jax.process_index() == 0 else []
  return [json.loads(row) for row in gather_texts(list(map(json.dumps, rows)), "earlier evaluations are read")]


def _read_own_rows(path: epath.Path) -> list[dict[str, Any]]:
  if not path.exists():
    return []
  try:
    rows = files.read_json(path)
  except files.Unreadable as error:
    aside = path.rename(files.name_aside(path))
    print(f"{error}: set aside as {aside.name}, and evaluated again")
    return []
  if isinstance(rows, list) and all(isinstance(row, dict) and row.keys() >= tables.NEEDED for row in rows):
    return rows
  aside = path.with_name(f"{path.stem}.old{path.suffix}")
  path.rename(aside)
  print(f"{path} is of another version: set aside as {aside.name}")
  return []
