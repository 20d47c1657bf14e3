"""Evaluation: counted right, the same whatever the batch, the hosts and where it was cut off."""

import itertools
import json

import jax
import numpy as np
import pytest
import tiny
from etils import epath
from hosts import run_hosts
from scipy import stats

from configs import base
from dmpo_jax import build, data, evaluate, generations, grading, policy, structs
from dmpo_jax import config as config_lib
from dmpo_jax.hub.tokenizer import load_tokenizer
from dmpo_jax.policy import Compiled
from dmpo_jax.run import params as params_lib
from dmpo_jax.run import workdir as workdir_lib
from dmpo_jax.run.preemption import Preempted
from dmpo_jax.tasks.sudoku import Sudoku

TASK = Sudoku(min_blanks=4, max_blanks=6, demo_patience=11.0)
NUM, LENGTH = 10, 18


@pytest.fixture(scope="module")
def tokenizer():
  return load_tokenizer("sentencepiece", base.get_config().tokenizer.path, is_chat=False)


@pytest.fixture(scope="module")
def held_out(tokenizer):
  records = list(TASK.generate("test", NUM, 0))
  return data.PromptStream(records, TASK, tokenizer, seed=None, max_prompt_length=18).batch(0, NUM)


@pytest.fixture
def run(tokenizer, held_out, tmp_path):
  """Evaluate a stand-in for a policy, which solves every puzzle whose id is even, in one of its samples."""
  prompts, records = held_out
  solutions = {int(p): record["solution"] for p, record in zip(prompts.prompt_id, records, strict=True)}

  def evaluate_with(batch_size=4, group_size=1, path=None, fail_at=None, about=("x", 1)):
    calls, path = [], path or epath.Path(tmp_path / "a.jsonl")

    def sample(part, key):
      calls.append(len(part.prompt_id))
      if len(calls) == fail_at:
        raise KeyboardInterrupt
      completion = np.full((len(part.prompt_id), group_size, LENGTH), tokenizer.eos_token_id, np.int32)
      for p, identity in enumerate(part.prompt_id.tolist()):
        for g in range(group_size):
          text = solutions[identity] if identity % 2 == 0 and g == identity % group_size else "0000"
          completion[p, g, : len(text)] = tokenizer.encode(text)
      shape = completion.shape
      count = np.full(shape[:2], 3)
      return structs.Rollouts(
        completion, np.zeros(shape, np.int32), np.ones(shape, np.float32), count, count, 0 * count
      )

    evaluation = evaluate.Evaluation(prompts, records, grading.Grading(task=TASK), tokenizer, 0, batch_size)
    figures = evaluation.run(sample, generations.Unfinished(path, dict([about])))
    return {name: x for name, x in figures.items() if "second" not in name}, calls, path.read_text()

  return evaluate_with


def test_what_is_counted(run, held_out):
  figures, _, text = run()
  num_even = int((held_out[0].prompt_id % 2 == 0).sum())
  assert 0 < num_even < NUM
  assert figures["solve_rate"] == num_even / NUM
  interval = stats.binomtest(num_even, NUM).proportion_ci(method="wilson")
  assert (figures["solve_rate_low"], figures["solve_rate_high"]) == pytest.approx(
    (interval.low, interval.high), rel=1e-6
  )
  assert figures["format_rate"] == num_even / NUM  # of four digits the form is wrong
  assert figures["eos_rate"] == 1
  assert figures["effective_tokens"] == pytest.approx((16 * num_even + 4 * (NUM - num_even)) / NUM)
  assert figures["model_calls"] == 3
  lines = [json.loads(line) for line in text.splitlines()]
  assert [line["index"] for line in lines] == list(range(NUM))
  assert lines[0]["prompt"] == TASK.prompt(held_out[1][0])
  assert {line["extracted"] for line in lines if not line["is_solved"]} == {"0000"}


def test_generations_say_when_each_token_was_decided(tokenizer):
  ids = np.array([*tokenizer.encode("12="), tokenizer.eos_token_id, tokenizer.eos_token_id])
  committed_at, confidence = np.array([1, 0, 2, 2, 3]), np.array([0.25, 0.5, 0.123456, 1, 0], np.float32)
  assert generations._denoising(tokenizer, ids, committed_at, confidence, np.int32(3)) == {  # the last was filled in
    "pieces": ["1", "2", "=", "</s>"],
    "committed_at": [1, 0, 2, 2],
    "confidence": [0.25, 0.5, 0.1235, 1.0],
  }


@pytest.mark.parametrize("batch_size", [1, 3, 10, 99])
def test_batches_change_nothing(run, batch_size, tmp_path):
  plain, again = run(4), run(batch_size, path=epath.Path(tmp_path / "b.jsonl"))
  assert plain[0] == again[0]
  assert plain[2] == again[2]


def test_the_longest_prompts_come_first_and_short_ones_are_padded_less(use_devices, tmp_path, monkeypatch):
  """A policy at random on prompts of 9 to 11 tokens: lengths 5, 10 and 12 give what one length gives."""
  use_devices(1)
  config, folder = (
    tiny.config(task__name="countdown", task__max_prompt_length=12, eval__batch_size=4),
    epath.Path(tmp_path),
  )
  parts = build.build_parts(config, folder / "run")
  lengths, texts = [], []

  class Recorded(Compiled):
    def __call__(self, policies, prompts, key):
      lengths.append(prompts.tokens.shape[1])
      return super().__call__(policies, prompts, key)

  monkeypatch.setattr(evaluate, "Compiled", Recorded)
  with jax.set_mesh(parts.mesh):
    params = policy.initial_params(config, parts)
    for shortest in (64, 5):
      monkeypatch.setattr(evaluate, "SHORTEST", shortest)
      figures = evaluate.make_evaluate(config, parts, {})(params, folder / "a.jsonl", {})
      texts.append((folder / "a.jsonl").read_text())
  seconds = figures["seconds"] - figures["seconds_compiling"]
  assert figures["seconds_compiling"] > 0.2 * figures["seconds"]
  assert figures["tokens_per_second"] * seconds == pytest.approx(
    sum(json.loads(line)["num_tokens"] for line in texts[1].splitlines())
  )
  assert lengths == [12, 12, 12, 12, 12, 12, 12, 10], "one program more"
  assert texts[0] == texts[1]
  assert [json.loads(line)["index"] for line in texts[1].splitlines()] == list(range(16))


def test_an_evaluation_that_was_cut_off_goes_on(run, tmp_path):
  whole = run(3)
  path = epath.Path(tmp_path / "b.jsonl")
  with pytest.raises(KeyboardInterrupt):
    run(3, path=path, fail_at=4)
  figures, calls, text = run(3, path=path)
  assert len(calls) < len(whole[1])
  assert (figures, text) == (whole[0], whole[2])
  assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_a_notice_of_preemption_is_heeded_between_two_batches(run, tmp_path, monkeypatch):
  """All batches that were drawn are kept: none is drawn twice."""
  whole, path, polls = run(3), epath.Path(tmp_path / "b.jsonl"), []

  def listen():
    polls.append(1)
    if len(polls) == 3:
      raise Preempted

  with monkeypatch.context() as patch:
    patch.setattr(evaluate, "check_preemption", listen)
    with pytest.raises(Preempted):
      run(3, path=path)
  kept = (tmp_path / ".b.jsonl.unfinished").read_text().splitlines()
  assert len(kept) == 1 + 2 * 3  # and what the evaluation is
  figures, calls, text = run(3, path=path)
  assert len(calls) == len(whole[1]) - 2
  assert (figures, text) == (whole[0], whole[2])


def test_what_another_evaluation_left_unfinished_is_not_taken(run, tmp_path):
  path = epath.Path(tmp_path / "b.jsonl")
  with pytest.raises(KeyboardInterrupt):
    run(3, path=path, fail_at=4)
  _, calls, _ = run(3, path=path, about=("x", 2))
  assert len(calls) == 4


def test_pass_at_k_is_what_drawing_gives(run, held_out):
  figures, _, _ = run(4, group_size=4)
  num_even = int((held_out[0].prompt_id % 2 == 0).sum())
  assert figures["pass_at_1"] == pytest.approx(num_even / NUM / 4)
  assert figures["pass_at_4"] == pytest.approx(num_even / NUM)
  for num_right in range(6):
    drawn = list(itertools.combinations([True] * num_right + [False] * (5 - num_right), 2))
    assert generations.pass_at_k(5, num_right, 2) == pytest.approx(np.mean([any(two) for two in drawn]))


@pytest.mark.parametrize("num_hosts", [1, 4, 32, 64])
@pytest.mark.parametrize("num", [0, 1, 5, 32, 100])
def test_hosts_lose_and_double_nothing(tokenizer, held_out, monkeypatch, num_hosts, num):
  records, shape = held_out[1] * 11, (num, 2, LENGTH)
  completion = np.arange(num * 2 * LENGTH, dtype=np.int32).reshape(shape) % 7 + 5
  count = np.ones(shape[:2], int)
  rollouts = structs.Rollouts(completion, completion, np.ones(shape, np.float32), count, count, count)
  pool, rows = grading.Grading(task=TASK), range(2, 2 + num)

  def grade_batch(_):
    lines = generations.grade_batch(pool, tokenizer, records, rollouts, rows)()
    return lines, generations.summarize(lines)

  plain, figures = grade_batch(0)
  assert [(line["index"], line["sample"]) for line in plain] == [(p, g) for p in rows for g in range(2)]
  for found in run_hosts(monkeypatch, num_hosts, grade_batch):
    assert found[0] == plain
    np.testing.assert_equal(found[1], figures)
  pool.close()


def test_parts_of_the_reward_are_averaged_and_a_completion_without_a_grade_has_none():
  def line(number, reward, parts):
    return dict.fromkeys(("is_formatted", "is_ended", "num_tokens", "num_calls", "num_saved"), 1) | {
      "index": number, "is_solved": True, "reward": reward, "reward_parts": parts, "cells": None, "grading": "graded",
    }  # fmt: skip

  lines = [line(0, 2.5, {"correct": 2.0, "form": 0.5}), line(1, 1, {"correct": 0, "form": 1}), line(2, 0, None)]
  figures = generations.summarize(lines)
  assert [figures[f"reward_{name}"] for name in ("mean", "correct", "form")] == pytest.approx([3.5 / 3, 2 / 3, 0.5])


def test_an_evaluation_of_nothing_knows_nothing():
  figures = generations.summarize([])
  assert (figures["num_prompts"], figures["solve_rate_low"], figures["solve_rate_high"]) == (0, 0, 1)
  assert np.isnan(figures["solve_rate"])


@pytest.mark.parametrize(
  ("path", "value"),
  [
    ("sampler.wino.threshold", 0.05),
    ("sampler.wino.threshold_back", 0.5),
    ("sampler.guidance", 0.5),
    ("eval.early_exit", False),
    ("eval.temperature", 0.5),
    ("eval.num_samples", 2),
    ("model.dtype", "bfloat16"),
    ("model.param_dtype", "bfloat16"),
    ("model.attention", "xla"),
    ("model.quantization", "int8"),
    ("task.sudoku.min_blanks", 5),
    ("task.grader", "published"),
    ("grading.seconds", 1.0),
    ("tokenizer.is_chat", True),
    ("seed", 1),
  ],
)
def test_what_decides_an_evaluation_is_part_of_it(path, value):
  config = tiny.config(sampler__name="wino", eval__batch_size=8)
  other = tiny.config(**{"sampler__name": "wino", "eval__batch_size": 16, path.replace(".", "__"): value})
  about, again = evaluate.describe(config, config), evaluate.describe(other, other)
  assert again["settings"] == about["settings"] | {path: value}, "the batch size decides nothing"


def finished(workdir, buffers, scale, **changes):
  """Put a policy that was not trained into a workdir, as training leaves it."""
  config = tiny.config(eval__samplers=("wino",), warm_start__updates=0, **changes)
  parts = build.build_parts(config, workdir, is_training=False)
  name, init = ("lora", policy.initial_adapters) if parts.model.config.lora else ("params", policy.initial_params)
  args = (config, workdir, parts) if name == "lora" else (config, parts)
  with jax.set_mesh(parts.mesh):
    params = jax.tree.map(lambda x: x * scale, init(*args))
  params_lib.save_params(
    workdir / "policy", params, policy.policy_metadata(config, workdir, buffers, parts.model.config)
  )
  workdir_lib.save_config(workdir, config)
  return config


def test_a_row_is_never_handed_back_for_another_evaluation(use_devices, tmp_path):
  use_devices(1)
  workdir = epath.Path(tmp_path / "run")
  config = finished(workdir, buffers=20, scale=1.0)

  def rows():
    evaluate.main(config, workdir)
    return json.loads((workdir / "evaluation" / "result.json").read_text())

  first = rows()
  assert [(row["policy"], row["buffers"]) for row in first] == [("last", 20)]
  assert rows() == first, "the same evaluation is not made again"
  config.sampler.wino.threshold = 0.05
  second = rows()
  assert second[:1] == first
  assert [row["settings"]["sampler.wino.threshold"] for row in second] == [0.6, 0.05]
  assert second[1]["model_calls"] != first[0]["model_calls"]
  finished(workdir, buffers=22, scale=1.5)
  config.train.num_buffers = 20  # as the command of before the run went on has it
  third = rows()
  assert third[:2] == second
  assert [row["buffers"] for row in third] == [20, 20, 22]
  assert all((workdir / "evaluation" / row["generations"]).exists() for row in third)
  assert len({row["generations"] for row in third}) == 3


def test_a_policy_of_before_it_said_its_buffers_has_those_of_the_result(tmp_path):
  workdir = epath.Path(tmp_path)
  for folder in ("policy", "best"):
    params_lib.save_params(workdir / folder, {"x": np.zeros(1)})
  with pytest.raises(config_lib.ConfigError, match="run the training once more"):
    evaluate._num_buffers(workdir, "last")
  evaluations = {str(b): {"solve_rate": s, "reward_mean": 0.0} for b, s in ((0, 0.1), (15, 0.9), (22, 0.8))}
  rows = {name: {"solve_rate": 0.0} for name in ("base", "last", "best")}
  (workdir / "result.json").write_text(json.dumps({"buffers": 22, "evaluations": evaluations} | rows))
  assert [evaluate._num_buffers(workdir, name) for name in ("last", "best")] == [22, 15]


def test_the_best_is_the_first_of_the_highest():
  rows = {"0": (0.9, 1.0), "5": (0.5, 0.5), "10": (0.6, 0.5), "15": (0.6, 0.5)}
  evaluations = {b: {"solve_rate": s, "reward_mean": r} for b, (s, r) in rows.items()}
  assert evaluate.best_buffer(evaluations) == "10"
  assert evaluate.best_buffer({"0": evaluations["0"]}) == "0"


def test_the_grid_keeps_the_steps_a_token():
  config = base.get_config()
  config.eval.lengths = (16, 64)
  config.eval.tasks = ("sudoku", "countdown")
  settings = list(evaluate.vary(config))
  assert [(c.task.name, c.sampler.completion_length, c.sampler.steps) for c in settings] == [
    ("sudoku", 16, 16), ("sudoku", 64, 64), ("countdown", 16, 16), ("countdown", 64, 64)
  ]  # fmt: skip
  flags = [evaluate.describe(setting, config)["is_as_in_training"] for setting in settings]
  assert flags == [True, False, False, False]


@pytest.mark.parametrize("text", ['{"solve_rate": 0.5}', '[{"policy": "last", "solve_rate": 0.5}]'])
def test_evaluations_of_another_version_are_set_aside(tmp_path, capsys, text):
  path = epath.Path(tmp_path / "result.json")
  path.write_text(text)
  assert evaluate._read_rows(path) == []
  assert (tmp_path / "result.old.json").read_text() == text
  assert "is of another version: set aside as result.old.json" in capsys.readouterr().out
  assert evaluate._read_rows(path) == []
