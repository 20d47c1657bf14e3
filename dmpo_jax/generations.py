"""What an evaluation keeps: a line for each completion, written batch by batch, and the figures of all lines."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from dmpo_jax import files, grading
from dmpo_jax.hub.tokenizer import Tokenizer
from dmpo_jax.processes import HostShare, gather_texts
from dmpo_jax.structs import Rollouts

logger = logging.getLogger(__name__)

_Z = 1.959964  # of a 95 % interval


def grade_batch(
  grader: grading.Grading, tokenizer: Tokenizer, records: Sequence[dict], rollouts: Rollouts, rows: Sequence[int]
) -> Callable[[], list[dict[str, Any]]]:
  """Begin to grade a batch, each process its share of prompts; return a function that waits for everyone's lines."""
  share = HostShare(len(rows))
  mine, group_size = rows[share.mine], rollouts.completion.shape[1]
  here = jax.tree.map(lambda array: array[share.mine], rollouts)
  texts, is_ended = grading.decode(tokenizer, here.completion)
  record_of = [records[index] for index in mine for _ in range(group_size)]
  pending = grader.submit(record_of, texts, is_ended)
  task_names, task = grader.tasks_of(record_of)

  def finish() -> list[dict[str, Any]]:
    verdicts = pending.result()
    grading.log_problems(grader.task, verdicts, texts)
    lines = []
    for row, (verdict, text) in enumerate(zip(verdicts, texts, strict=True)):
      p, g = divmod(row, group_size)
      ids = here.completion[p, g]
      ends = np.flatnonzero(np.isin(ids, [*tokenizer.end_token_ids, tokenizer.eot_token_id]))
      lines.append(
        {
          "index": mine[p],
          "sample": g,
          "record": record_of[row],
          **({} if task is None else {"task": task_names[task[row]]}),
          "prompt": grader.task.prompt(record_of[row]),
          "prompt_name": getattr(grader.task_of(record_of[row]), "prompt_name", "default"),
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
    `reward_mean`, `reward_<part>` where rewards have parts, `reward_<task>` and `solve_rate_<task>` of a mixture,
    `format_rate`, `eos_rate`, `effective_tokens` before the first end token, `model_calls`, `calls_saved`,
    `num_prompts`, and how many completions were not graded and why.
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
  for name in dict.fromkeys(line["task"] for line in lines if "task" in line):
    own = [line for line in lines if line["task"] == name]
    figures |= {f"reward_{name}": _mean(own, "reward"), f"solve_rate_{name}": _mean(own, "is_solved")}
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


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float:
  return float(np.mean([line[name] for line in lines])) if lines else math.nan
