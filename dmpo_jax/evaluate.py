"""A policy's accuracy on held-out prompts: sample, grade, count, and keep every generation."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table
from scipy import stats

from dmpo_jax import files, noise, rollout
from dmpo_jax.build import Parts, abstract_collection, base_params, build_parts, make_sample
from dmpo_jax.checkpoints import load_params
from dmpo_jax.config import ConfigError
from dmpo_jax.grading import Grades, Grading, grade
from dmpo_jax.measure import Policies
from dmpo_jax.structs import Prompts
from dmpo_jax.tasks.base import Task
from dmpo_jax.tokenizer import Tokenizer


def main(config: ConfigDict, workdir: epath.Path) -> None:
  """Evaluate the policy that training left in `workdir`, and print and save the figures."""
  parts = build_parts(config, workdir)
  if not (workdir / "policy").exists():
    raise ConfigError(
      f"{workdir} holds no finished policy to evaluate: train first, with the same command without --mode"
    )
  with jax.set_mesh(parts.mesh):
    collection = "lora" if parts.model.config.lora else "params"
    policy = load_params(workdir / "policy", abstract_collection(parts.model, parts.mesh, collection))
    base = base_params(config, workdir, parts)
    scalars = make_evaluate(config, workdir / "evaluation", parts, base)(policy, config.train.num_buffers)
  if jax.process_index() == 0:
    files.write_whole(workdir / "evaluation" / "result.json", json.dumps(scalars, indent=2))
    Console().print(table({"policy": scalars}))
    print(f"generations  {workdir / 'evaluation'}")


def table(rows: Mapping[str, Mapping[str, float]]) -> Table:
  """Lay out the figures of evaluations by name."""
  num_prompts = int(next(iter(rows.values()))["num_prompts"])
  layout = Table(title=f"{num_prompts} held-out prompts")
  for column in ("", "solved", "95 % interval", "reward"):
    layout.add_column(column, justify="right" if column else "left")
  for name, row in rows.items():
    low, high = row["solve_rate_low"], row["solve_rate_high"]
    layout.add_row(name, f"{row['solve_rate']:.1%}", f"{low:.1%} to {high:.1%}", f"{row['reward_mean']:.3f}")
  return layout


def make_evaluate(
  config: ConfigDict, folder: epath.Path, parts: Parts, base: Any
) -> Callable[[Any, int], dict[str, float]]:
  """Close over the configuration's evaluation: `evaluate(trainable, after so many buffers) -> figures`."""
  own = config.eval
  sample = make_sample(config, parts, group_size=1, temperature=own.temperature, early_exit=own.early_exit)
  prompts, records = parts.held_out

  def evaluate_after(trainable: Any, buffer: int) -> dict[str, float]:
    return evaluate(
      trainable,
      base,
      prompts,
      records,
      sample=sample,
      grading=parts.grading,
      tokenizer=parts.tokenizer,
      seed=config.seed,
      batch_size=config.eval.batch_size,
      generations_path=folder / f"{buffer:06d}.jsonl",
    )

  return evaluate_after


def evaluate(
  trainable: Any,
  frozen: Any,
  prompts: Prompts,
  records: Sequence[dict],
  *,
  sample: Callable,
  grading: Grading,
  tokenizer: Tokenizer,
  seed: int,
  batch_size: int,
  generations_path: epath.Path,
) -> dict[str, float]:
  """Decode one completion for each prompt, grade it, and save the generations as JSON lines.

  Args:
    sample: from `rollout.make_sample` with group size 1.
    batch_size: prompts decoded at one time; the last batch is filled up with copies of the last prompt, dropped again.
    generations_path: one line a prompt: record, prompt, completion, reward, verdict. Written by process 0.

  Returns:
    `solve_rate` in [0, 1] with its 95 % Wilson interval (`solve_rate_low`, `solve_rate_high`), `reward_mean`,
    `num_prompts`, `model_calls` a prompt and `calls_saved` by early exit, and `seconds`.
  """
  start = time.monotonic()
  num_prompts = len(records)
  batch_size = min(batch_size, num_prompts)
  filled = -(-num_prompts // batch_size) * batch_size
  index = np.minimum(np.arange(filled), num_prompts - 1)
  key = noise.step_key(seed, "evaluate", 0)
  rollouts = rollout.in_chunks(
    lambda part: sample(Policies(trainable, frozen), part, key),
    batch_size,
    jax.tree.map(lambda array: array[index], prompts),
  )
  rollouts = jax.tree.map(lambda array: array[:num_prompts], rollouts)
  grades = grade(grading, tokenizer, records, rollouts.completion)()
  if jax.process_index() == 0:
    _save_generations(generations_path, records, rollouts.completion, grades, grading.task, tokenizer)
  num_solved = int(grades.is_solved.sum())
  interval = stats.binomtest(num_solved, num_prompts).proportion_ci(method="wilson")
  return {
    "solve_rate": num_solved / num_prompts,
    "solve_rate_low": float(interval.low),
    "solve_rate_high": float(interval.high),
    "reward_mean": float(grades.reward.mean()),
    "num_prompts": num_prompts,
    "model_calls": float(rollouts.num_calls.mean()),
    "calls_saved": float(rollouts.num_saved.mean()),
    "seconds": time.monotonic() - start,
  }


def _save_generations(
  path: epath.Path,
  records: Sequence[dict],
  completion: np.ndarray,
  grades: Grades,
  task: Task,
  tokenizer: Tokenizer,
) -> None:
  lines = []
  for p, record in enumerate(records):
    line: dict[str, Any] = {
      "record": record,
      "prompt": task.prompt(record),
      "completion": tokenizer.decode(completion[p, 0].tolist()),
      "reward": float(grades.reward[p, 0]),
      "is_solved": bool(grades.is_solved[p, 0]),
    }
    lines.append(json.dumps(line, ensure_ascii=False))
  files.write_whole(path, "\n".join(lines) + "\n")
