"""A policy's accuracy on held-out prompts: sample, grade, count, and keep every generation.

During training the current policy is evaluated now and then, as it samples in training but greedily (`make_evaluate`).
`--mode=eval` evaluates the last and the best policy of a workdir on all of `eval.tasks`, `lengths` and `samplers`.
"""

import contextlib
import copy
import functools
import hashlib
import itertools
import json
import logging
import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from rich.console import Console

from dmpo_jax import files, grading, noise, sharding, tasks
from dmpo_jax.build import Parts, build_parts
from dmpo_jax.config import NOT_OF_EVALUATION, ConfigError, deciding, validate
from dmpo_jax.hub.tokenizer import Tokenizer
from dmpo_jax.policy import Compiled, Policies, base_name, check_confidence, load_policies, make_sample
from dmpo_jax.processes import HostShare, gather_texts
from dmpo_jax.run import progress
from dmpo_jax.run.metrics import read_result
from dmpo_jax.run.params import identity, read_metadata
from dmpo_jax.run.preemption import Preempted, check_preemption
from dmpo_jax.run.report import tables
from dmpo_jax.structs import Prompts, Rollouts

logger = logging.getLogger(__name__)

RESULT = "result.json"
POLICIES = {"last": "policy", "best": "best"}  # folders of the workdir
SHORTEST = 64  # tokens that the shortest prompts are padded to
_Z = 1.959964  # of a 95 % interval


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
  names = (own.tasks or (config.task.name,), own.samplers or (sampler.name,))
  for task, name, length in itertools.product(*names, own.lengths or (sampler.completion_length,)):
    varied = config_of_task(config, task)
    with varied.unlocked():
      varied.sampler.name, varied.sampler.completion_length = name, length
      varied.sampler.block_length = min(sampler.block_length, length)
      varied.sampler.steps = max(round(sampler.steps * length / sampler.completion_length), 1)
    yield varied


def config_of_task(config: ConfigDict, name: str) -> ConfigDict:
  """Return a copy of the configuration for another task; a test file that is named belongs to the configured one."""
  varied = copy.deepcopy(config)
  if name != config.task.name:
    with varied.unlocked():
      varied.task.name, varied.task.eval_path = name, ""
  return varied


def describe(setting: ConfigDict, config: ConfigDict) -> dict[str, Any]:
  """Return what an evaluation depends on besides policy and prompts, and whether it samples as training does.

  `settings` has every key of the configuration that decides its result; the others are those that tables show.
  """
  sampler, trained_with = setting.sampler, config.sampler
  return {
    "task": setting.task.name,
    "sampler": sampler.name,
    "completion_length": sampler.completion_length,
    "steps": sampler.steps,
    "is_as_in_training": sampler.to_dict() == trained_with.to_dict() and setting.task.name == config.task.name,
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
  if tasks.section(setting.task.name) == "user":
    digest.update(epath.Path(setting.task.name).read_bytes())
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
  config: ConfigDict, workdir: epath.Path, parts: Parts, base: Any
) -> Callable[[Any, int], dict[str, float]]:
  """Close over a run's own evaluation: `evaluate(trainable, after so many buffers) -> figures`."""
  evaluate_policy = make_evaluate(config, parts, base)
  about = describe(config, config) | _prompts_identity(config, parts) | {"base_identity": base_name(config, workdir)}

  def evaluate_after(trainable: Any, buffers: int) -> dict[str, float]:
    path = workdir / "generations" / f"{buffers:06d}.jsonl"
    return evaluate_policy(trainable, path, about | {"buffers": buffers})

  return evaluate_after


def make_evaluate(
  config: ConfigDict, parts: Parts, base: Any
) -> Callable[[Any, epath.Path, Mapping[str, Any]], dict[str, float]]:
  """Close over the configuration's evaluation: `evaluate(trainable, path, about) -> figures`."""
  own = config.eval
  settings = dict(group_size=own.num_samples, temperature=own.temperature, early_exit=own.early_exit)
  program = Compiled(make_sample(config, parts.model, parts.mesh, **settings))
  sample = sharding.within(parts.rollout_mesh, program)
  prompts, records = parts.held_out

  def evaluate_policy(trainable: Any, path: epath.Path, about: Mapping[str, Any]) -> dict[str, float]:
    return evaluate(
      functools.partial(sample, sharding.move(Policies(trainable, base), parts.rollout_mesh)),
      prompts,
      records,
      grading=parts.grading,
      tokenizer=parts.tokenizer,
      seed=config.seed,
      batch_size=own.batch_size,
      path=path,
      about=about,
      seconds_compiling=lambda: program.seconds,
    )

  return evaluate_policy


def evaluate(
  sample: Callable[[Prompts, jax.Array], Rollouts],
  prompts: Prompts,
  records: Sequence[dict],
  *,
  grading: grading.Grading,
  tokenizer: Tokenizer,
  seed: int,
  batch_size: int,
  path: epath.Path,
  about: Mapping[str, Any],
  seconds_compiling: Callable[[], float] = lambda: 0.0,
) -> dict[str, float]:
  """Decode completions of every prompt, grade them, and save the generations as JSON lines.

  Prompts are decoded the longest first, and each batch is padded to one of few lengths (`cut_padding`). An evaluation
  that was cut off goes on after its last whole batch. Every prompt's rows are a function of the seed and the prompt, so
  neither order, batches, padding nor hosts change them; each host grades and writes down its share of a batch.

  Args:
    sample: from `policy.make_sample`, closed over the policy; fields [p, g, ...].
    batch_size: prompts decoded at one time; the last batch is filled up with copies of the last prompt, dropped again.
    path: one line a completion, see `_line`. Written by process 0.
    about: what the evaluation depends on; an unfinished file of another one is begun anew.
    seconds_compiling: seconds that `sample` has spent on compiling so far.

  Returns:
    See `summarize`; `seconds` of this start and, of these, `seconds_compiling`; and the effective tokens a second of
    the others, `tokens_per_second`.

  Raises:
    Preempted: between two batches, those before it kept.
    NotFinite: see `policy.check_confidence`.
  """
  start, compiled_before, num = time.monotonic(), seconds_compiling(), len(records)
  key, batch_size = noise.step_key(seed, "evaluate", 0), min(batch_size, max(num, 1))
  unfinished = Unfinished(path, about)
  lines = unfinished.read()
  is_done = np.isin(np.arange(num), [line["index"] for line in lines])
  longest_first = np.argsort(-prompts.is_valid.sum(1), kind="stable")
  left = longest_first[~is_done[longest_first]].tolist()
  batches = [left[first : first + batch_size] for first in range(0, len(left), batch_size)]

  def dispatch(batch: Sequence[int]) -> Rollouts:
    check_preemption()
    index = np.array([*batch, *batch[-1:] * (batch_size - len(batch))])
    return sample(cut_padding(jax.tree.map(lambda array: array[index], prompts)), key)

  ahead = dispatch(batches[0]) if batches else None
  for batch, following in itertools.zip_longest(batches, batches[1:]):
    progress.part("evaluating prompts", len({line["index"] for line in lines}), num)
    rollouts = jax.device_get(ahead)
    check_confidence(rollouts)
    finish = _grade_batch(grading, tokenizer, records, rollouts, batch)
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
  lines.sort(key=operator.itemgetter("index", "sample"))
  unfinished.finish(lines)
  seconds, compiling = time.monotonic() - start, seconds_compiling() - compiled_before
  tokens = sum(line["num_tokens"] for line in lines if not is_done[line["index"]])
  times = {"seconds": seconds, "seconds_compiling": compiling, "tokens_per_second": tokens / (seconds - compiling)}
  return summarize(lines) | times


def cut_padding(prompts: Prompts) -> Prompts:
  """Drop padding that all prompts have, so that `SHORTEST` tokens are left, or twice as many, or four times.

  So a sampler is compiled a few times at most. Prompts that were no longer padded than this stay as they are.
  """
  longest, length = prompts.is_valid.sum(1).max(), SHORTEST
  while length < longest:
    length *= 2
  return prompts.replace(tokens=prompts.tokens[:, -length:], is_valid=prompts.is_valid[:, -length:])


def _grade_batch(
  grader: grading.Grading, tokenizer: Tokenizer, records: Sequence[dict], rollouts: Rollouts, rows: Sequence[int]
) -> Callable[[], list[dict[str, Any]]]:
  """Begin to grade a batch, each process its share of prompts; return a function that waits for everyone's lines."""
  share = HostShare(len(rows))
  mine, group_size = rows[share.mine], rollouts.completion.shape[1]
  here = jax.tree.map(lambda array: array[share.mine], rollouts)
  texts, is_ended = grading.decode(tokenizer, here.completion)
  record_of = [records[index] for index in mine for _ in range(group_size)]
  pending = grader.submit(record_of, texts, is_ended)

  def finish() -> list[dict[str, Any]]:
    verdicts = pending.result()
    grading.log_problems(grader.task, verdicts, texts)
    lines = []
    for row, (verdict, text) in enumerate(zip(verdicts, texts, strict=True)):
      p, g = divmod(row, group_size)
      ids = here.completion[p, g]
      ends = np.flatnonzero(np.isin(ids, [tokenizer.eos_token_id, tokenizer.eot_token_id]))
      lines.append(
        {
          "index": mine[p],
          "sample": g,
          "record": record_of[row],
          "prompt": grader.task.prompt(record_of[row]),
          "prompt_name": getattr(grader.task, "prompt_name", "default"),
          "completion": text,
          "extracted": verdict.grade.extracted,
          "reward": verdict.reward,
          "reward_parts": dict(verdict.parts) or None,
          "is_solved": verdict.grade.is_correct,
          "is_formatted": verdict.grade.is_formatted,
          "cells": verdict.grade.cells,
          "is_ended": bool(is_ended[row]),
          "grading": verdict.kind,
          "num_tokens": int(ends[0]) if len(ends) else len(ids),
          "num_calls": int(here.num_calls[p, g]),
          "num_saved": int(here.num_saved[p, g]),
          "denoising": _denoising(tokenizer, ids, here.committed_at[p, g], here.confidence[p, g], here.num_calls[p, g]),
        }
      )
    texts_of_lines = [json.dumps(line, default=str) for line in lines]
    gathered = gather_texts(texts_of_lines, "completions are graded", grader.patience(len(rows) * group_size))
    return [json.loads(text) for text in gathered]

  return finish


def _denoising(
  tokenizer: Tokenizer, ids: np.ndarray, committed_at: np.ndarray, confidence: np.ndarray, num_calls: np.integer
) -> dict[str, list[Any]]:
  """Say of each position that the model decided what it holds, at which call, and how probable that was."""
  is_decided = committed_at < num_calls
  return {
    "pieces": [tokenizer.piece(int(token)) for token in ids[is_decided]],
    "committed_at": committed_at[is_decided].tolist(),
    "confidence": [round(float(value), 4) for value in confidence[is_decided]],
  }


class Unfinished:
  """The file of an evaluation that is under way: a line about it, then the lines of whole batches."""

  def __init__(self, path: epath.Path, about: Mapping[str, Any]):
    self._path = path
    self._file = path.parent / f".{path.name}.unfinished"
    self._head = json.dumps(dict(about), sort_keys=True)
    self._texts: list[str] = []

  def read(self) -> list[dict[str, Any]]:
    """Return the lines that an earlier start has left for this very evaluation, on every process."""
    texts = []
    if jax.process_index() == 0 and self._file.exists():
      lines = files.read_lines(self._file)
      if lines.rows and json.dumps(lines.rows[0], sort_keys=True) == self._head:
        texts = [json.dumps(row, ensure_ascii=False) for row in lines.rows[1:]]
        if lines.problem:
          logger.warning("%s: %s; these completions are drawn again", self._file, lines.problem)
    self._texts = gather_texts(texts, "an unfinished evaluation is read")
    return [json.loads(text) for text in self._texts]

  def add(self, lines: Sequence[dict[str, Any]]) -> None:
    """Keep the lines of a further batch."""
    self._texts += [files.to_json(line, ensure_ascii=False) for line in lines]
    if jax.process_index() == 0:
      files.write_whole(self._file, "\n".join([self._head, *self._texts]) + "\n")

  def finish(self, lines: Sequence[dict[str, Any]]) -> None:
    """Write the generations and drop the unfinished file."""
    if jax.process_index() == 0:
      files.write_whole(self._path, "".join(files.to_json(line, ensure_ascii=False) + "\n" for line in lines))
      self._file.unlink(missing_ok=True)


def summarize(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Count an evaluation's lines; of no lines, rates are NaN.

  Returns:
    `solve_rate` in [0, 1] (with several samples their mean) with its 95 % Wilson interval over the prompts
    (`solve_rate_low`, `solve_rate_high`); `pass_at_<k>` for k = 1, 2, 4, ... up to the samples of a prompt, unbiased
    (Chen et al., arXiv 2107.03374, eq. 1); `cell_rate` where the grader counts cells (the published one of Sudoku);
    `reward_mean`, `reward_<part>` where rewards have parts, `format_rate`, `eos_rate`, `effective_tokens` before the
    first end token, `model_calls`, `calls_saved`, `num_prompts`, and how many completions were not graded and why.
  """
  solved: dict[int, list[bool]] = {}
  for line in lines:
    solved.setdefault(line["index"], []).append(line["is_solved"])
  num_prompts, group_size = len(solved), len(lines) // max(len(solved), 1)
  rate = _mean(lines, "is_solved")
  low, high = wilson(rate, num_prompts)
  figures = {"solve_rate": rate, "solve_rate_low": low, "solve_rate_high": high}
  if group_size > 1:
    for k in (2**i for i in range(group_size.bit_length())):
      figures[f"pass_at_{k}"] = float(np.mean([pass_at_k(len(group), sum(group), k) for group in solved.values()]))
  cells = [line["cells"] for line in lines if line.get("cells")]
  if cells:
    figures["cell_rate"] = sum(right for right, _ in cells) / max(sum(blank for _, blank in cells), 1)
  parts = [line.get("reward_parts") or {} for line in lines]
  for name in dict.fromkeys(name for part in parts for name in part):  # a completion that was not graded has 0 of each
    figures[f"reward_{name}"] = float(np.mean([part.get(name, 0.0) for part in parts]))
  return figures | {
    "reward_mean": _mean(lines, "reward"),
    "format_rate": _mean(lines, "is_formatted"),
    "eos_rate": _mean(lines, "is_ended"),
    "effective_tokens": _mean(lines, "num_tokens"),
    "model_calls": _mean(lines, "num_calls"),
    "calls_saved": _mean(lines, "num_saved"),
    "num_prompts": num_prompts,
    "rewards_failed": sum(line["grading"] == "failed" for line in lines),
    "grading_timeouts": sum(line["grading"] == "timeout" for line in lines),
    "grading_crashes": sum(line["grading"] == "crash" for line in lines),
  }


def wilson(rate: float, num: int) -> tuple[float, float]:
  """Return the 95 % Wilson score interval of a rate among `num` independent trials (Wilson, 1927)."""
  if num == 0:
    return 0.0, 1.0
  z2 = _Z**2 / num
  centre, width = rate + z2 / 2, _Z * math.sqrt((rate * (1 - rate) + z2 / 4) / num)
  return max((centre - width) / (1 + z2), 0.0), min((centre + width) / (1 + z2), 1.0)


def pass_at_k(num: int, num_right: int, k: int) -> float:
  """Return the probability that one of k completions, drawn from `num` of which `num_right` are right, is right."""
  return 1.0 - math.comb(num - num_right, k) / math.comb(num, k)


def best_buffer(evaluations: Mapping[str, Mapping[str, float]]) -> str:
  """Return the number of finished buffers, above 0, after which most was solved; ties: higher reward, then earlier."""
  trained = {buffer: row for buffer, row in evaluations.items() if int(buffer)} or evaluations
  return max(trained, key=lambda buffer: (trained[buffer]["solve_rate"], trained[buffer]["reward_mean"], -int(buffer)))


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


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float:
  return float(np.mean([line[name] for line in lines])) if lines else math.nan
