"""The study: its statistics, costs and plan, runs that share programs, and what its page says of made-up rows."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.stats
from absl import app
from etils import epath

from dmpo_jax import build, policy, train
from dmpo_jax.config import validate
from dmpo_jax.hub.pretrained import filled
from dmpo_jax.run.params import save_params
from launch.measure import changed
from launch.study import __main__ as study
from launch.study import costs, design, lab, page, rows, statistics
from tests import tiny


def test_holm_by_hand():
  assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
  assert statistics.holm([0.5, 0.9, 0.02]) == pytest.approx([1.0, 1.0, 0.06])
  assert statistics.holm([]) == []


def test_sign_flips_by_hand():
  assert statistics.sign_flip([1.0, 2.0, 3.0]) == 2 / 8  # only all signs as they are, or all turned
  assert statistics.sign_flip([1.0, -1.0]) == 1.0
  assert statistics.sign_flip([3.0, 1.0, -1.0]) == 6 / 8  # the sums are 5, 3, 3, 1 and their opposites
  with pytest.raises(ValueError, match="0 values"):
    statistics.sign_flip([])


def test_an_interval_is_that_of_the_bootstrap():
  values = np.array([0.1, 0.4, 0.35, 0.8, 0.2, 0.6, 0.55, 0.3])
  other = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, random_state=1)
  assert statistics.interval(values) == pytest.approx(tuple(other.confidence_interval), abs=0.01)
  assert statistics.interval([0.25, 0.25]) == (0.25, 0.25)


def cost_of(name, step=100, **changes):
  return costs.of_buffer(changed(design.bench_config(name, "countdown"), changes), step)


def test_model_calls_of_a_buffer_count_a_backward_pass_as_two():
  assert cost_of("wdce") == costs.Cost(12, 2 * 8, 8 * 4 * 3)
  assert cost_of("wdce", step=0).scoring == 0  # the policy is its own reference
  assert cost_of("wdce_proximal") == costs.Cost(12, 0, 2 * 2 * 3)
  assert cost_of("wd1") == costs.Cost(12, 0, 12 * 1 * 3)
  assert cost_of("diffu_grpo") == costs.Cost(12, 8 * 2, 8 * 3)
  assert cost_of("tracerl") == costs.Cost(12, 3, 4 * 3 * 3)
  assert cost_of("gdpo") == costs.Cost(12, 12 * 2, 12 * 2 * 3)  # without a KL nothing is asked of a reference
  assert cost_of("dtm") == costs.Cost(12, 0, 8 * 2 * (3 + 1))
  assert cost_of("wddo", **{"objective.wddo.sets": "independent"}) == costs.Cost(12, 2 * 8, 8 * 8 * 3)
  assert cost_of("wd1", **{"rollout.num_prompts": 4}) == costs.Cost(6, 0, 18)  # half of the rollouts


def test_costs_on_both_axes():
  cost = costs.Cost(16, 16, 96)
  assert cost.on("calls") == 128
  assert cost.on("drawing_x8") == 8 * 16 + 16 + 96
  assert cost.on("calls", informative=0.25) == 16 + 16 + 24  # groups that are dropped cost no update


@pytest.mark.parametrize("task", design.TASKS)
def test_candidates_are_valid(task):
  for objective in design.OBJECTIVES:
    for candidate in design.candidates(objective, task, 2):
      validate(changed(design.bench_config(objective, task), candidate.changes))


def test_a_random_candidate_is_the_same_draw_for_all_objectives():
  for index in (0, 7, 23):
    drawn = design.draw(index)
    for objective in design.OBJECTIVES:
      changes = design.searched(objective, "sudoku", index).changes
      assert changes["sampler.temperature"] == drawn["temperature"]
      assert changes["train.updates_per_buffer"] == drawn["updates"]
      assert changes["objective.num_mask_samples"] in range(drawn["masks"], drawn["masks"] + 3)
      assert changes[design.RATE] == drawn["rate"]
  drawn = [design.draw(index) for index in range(design.SEARCHED)]
  assert {one["updates"] for one in drawn} == {1, 2, 4, 8}
  assert {one["temperature"] for one in drawn} == {1.0, 1.5, 2.0}


def test_tuning_tries_a_candidate_with_all_objectives_before_the_next():
  runs = list(design.tuning(["sudoku"], ["wdce", "wd1"], 1))
  assert len(runs) == (len(design.PUBLISHED_RATES) + 1) * 2 * 6
  assert {(run.candidate.objective, run.candidate.name) for run in runs[:12]} == {
    ("wdce", "published 0.0001"),
    ("wd1", "published 0.0001"),
  }
  assert {run.base for run in runs} == set(design.TUNING_BASES)
  assert not set(design.TUNING_BASES) & set(design.TEST_BASES)


def test_a_run_is_known_by_its_content():
  def run(changes, base=0, seed=0, budget=1.0):
    return design.Run("tune", "sudoku", design.Candidate("wdce", "any name", changes), base, seed, budget)

  first = run({design.RATE: 2e-4})
  same = run({design.RATE: 2e-4, "train.updates_per_buffer": 8})  # as in configs/bench_wdce.py
  assert first.digest() == same.digest()
  others = [run({design.RATE: 4e-4}), run({design.RATE: 2e-4}, base=1), run({design.RATE: 2e-4}, seed=1)]
  assert len({one.digest() for one in [first, *others, run({design.RATE: 2e-4}, budget=3.0)]}) == 5
  assert first.configuration() == others[1].configuration() == others[2].configuration() != others[0].configuration()
  assert "task.name" not in first.settings()  # as in configs/base.py


def test_runs_with_other_settings_are_other_runs():
  drops = {flag: {design.RATE: 2e-4, design.DROP: flag} for flag in (False, True)}
  kept, dropped = (
    design.Run("tune", "sudoku", design.Candidate("wdce", "", changes), 0, 0, 1.0) for changes in drops.values()
  )
  assert kept.digest() != dropped.digest()
  entry = {"candidate": "published 0.0002", "changes": {design.RATE: 2e-4}}
  runs = list(design.questions({"sudoku": {"wdce": {"published": entry}}}, ["sudoku"]))
  arms = {run.candidate.name: run.digest() for run in runs if (run.base, run.seed) == (3, 0)}
  as_published = {name for name, digest in arms.items() if digest == dataclasses.replace(kept, base=3).digest()}
  assert as_published == {  # these share their runs with the test; all others differ
    "reference and reuse: fixed, 8 updates, 4 masks",
    "baselines and dropping: negative, g = 8, keeping equal groups",
    "unlearning: unbounded",
    "shrinkage: none",
  }
  assert len(set(arms.values())) == len(arms) - 3


def made_up(objective, candidate, base, reward, stage_changes=None, seed=0, budget=1.0):
  """A run's row that reached `reward` at 1x on both axes, and half of it at a third."""
  return {
    "run": f"{objective} {candidate} {base} {seed}",
    "task": "sudoku",
    "objective": objective,
    "candidate": candidate,
    "changes": stage_changes or {design.RATE: 1e-4},
    "base": base,
    "seed": seed,
    "budget": budget,
    "evaluations": [
      {"calls": 1000.0 * part, "drawing_x8": 2000.0 * part, "reward": part * reward, "solved": part * reward / 2}
      | {"rollouts": 512 * part, "updates": 64 * part}
      for part in (0.5, 1.0)
    ],
  }


def test_selection_takes_the_best_of_the_candidates_that_are_whole():
  def of(candidate, rewards):
    runs = [design.Run("tune", "sudoku", candidate, b, s, 1.0) for b in design.TUNING_BASES for s in design.SEEDS]
    return [
      made_up("wdce", candidate.name, run.base, reward, candidate.changes, seed=run.seed) | {"run": run.digest()}
      for run, reward in zip(runs, rewards, strict=False)
    ]

  low, high = (design.published("wdce", rate) for rate in (1e-4, 2e-4))
  first, second, third = (design.searched("wdce", "sudoku", index) for index in (0, 1, 2))
  found = [
    *of(low, [0.2] * 6),
    *of(high, [0.3] * 6),
    *of(first, [0.4] * 6),
    *of(second, [0.5] * 5),  # one run is missing
    *of(third, [0.39] * 2),  # given up: less than 0.8 of 0.5
  ]
  chosen = design.choose(found, ["sudoku", "countdown"], ["wdce", "wd1"])
  assert list(chosen) == ["sudoku"]
  assert list(chosen["sudoku"]) == ["wdce"]
  assert chosen["sudoku"]["wdce"]["published"]["candidate"] == "published 0.0002"
  tuned = chosen["sudoku"]["wdce"]["tuned"]
  assert (tuned["candidate"], tuned["reward"], tuned["tried"]) == ("random 0", 0.4, 4)
  runs = {run.candidate.name: run for run in design.tuning(["sudoku"], ["wdce"], 4)}  # the last one of each
  decided = {name for name, run in runs.items() if design.is_decided(run, found)}
  assert decided == {low.name, high.name, first.name, third.name}
  runs = list(design.tests(chosen, ["sudoku", "countdown"], ["wdce"], 1.0))
  assert len(runs) == 2 * len(design.TEST_BASES) * len(design.SEEDS)


def test_rows_are_read_back_the_last_of_each_run(tmp_path):
  for reward in (0.123456789, 0.5):
    rows.append(tmp_path / "study", "tune", {"run": "a", "reward": reward, "list": [1.0000001]})
  rows.append(tmp_path / "study", "tune", {"run": "b"})
  assert rows.read(tmp_path / "study", "tune") == [{"run": "a", "reward": 0.5, "list": [1.0]}, {"run": "b"}]
  assert rows.read(tmp_path / "study", "test") == []
  with (tmp_path / "study" / "tune.jsonl").open("a") as file:
    file.write("{")
  with pytest.raises(ValueError, match=r"tune.jsonl: the last line cannot be read"):
    rows.read(tmp_path / "study", "tune")


def test_the_page_is_drawn_from_the_rows(tmp_path):
  folder = tmp_path / "study"
  entry = {"candidate": "published 0.0001", "changes": {design.RATE: 1e-4}, "reward": 0.5, "tried": 3}
  selection = {"sudoku": {name: {"published": entry, "tuned": entry} for name in ("wdce", "wd1")}}
  folder.mkdir()
  (folder / rows.SELECTION).write_text(rows.files.to_json(selection))
  for name, reward in (("wdce", 0.6), ("wd1", 0.4)):
    for base in design.TEST_BASES[:4]:
      for seed in design.SEEDS:
        rows.append(folder, "test", made_up(name, "published 0.0001", base, reward + 0.02 * base, seed=seed))
  rows.append(folder, "test", made_up("wd1", "published 0.0001", 9, 0.9))  # the other seed is missing: not counted
  larger = made_up("wd1", "published 0.0001", 3, 0.46, budget=3.0)  # a run again, with a larger budget: counted once
  rows.append(folder, "test", larger | {"run": "larger"})
  page.write(tmp_path)
  text = (tmp_path / "study.md").read_text()
  assert "| sudoku | wd1 | 0 of 6 | 0 of 24 | 9 of 16 |" in text
  section = text.split("### sudoku, 1x, every model call counts once")[1]
  assert "| wdce | published = tuned | 4 | 0.690 (0.670 to 0.710) | 34.5 % |  |  |  |" in section
  behind = "+0.200 (+0.200 to +0.200)"  # the best, which is published `wdce`
  assert f"| wd1 | published = tuned | 4 | 0.490 (0.470 to 0.510) | 24.5 % | {behind} | {behind} |" in section
  assert "sudoku, 3x" not in text  # no run has gone so far
  assert (tmp_path / "study.svg").read_text().lstrip().startswith(("<!DOCTYPE svg", "<svg"))


ONES = """
def records(split): return [{"n": n} for n in range(64 if split == "train" else 16)]
def prompt(record): return f"({record['n']}="
def reward(record, completion): return completion.count("1") + 0.01 * len(completion)
"""  # what a model with random weights can learn


@pytest.mark.slow
def test_runs_that_share_programs_equal_runs_of_their_own(tmp_path):
  (tmp_path / "ones.py").write_text(ONES)
  own = dict(task__name=str(tmp_path / "ones.py"), optim__learning_rate=0.03, rollout__drop_equal_groups=False)
  config = filled(tiny.config(warm_start__updates=0, grading__workers=1, **own))
  parts = build.build_parts(config, epath.Path(tmp_path / "work"))
  params = jax.device_get(policy.initial_params(config, parts, are_trained=True))
  programs = lab.Programs(config, parts, params, tmp_path / "work")
  budget = 2 * costs.of_buffer(config, 1).on("calls") / costs.ONE["calls"]
  found = [
    programs.run(build.build_parts(config_of, epath.Path(tmp_path / "work")), params, config_of.seed, budget)
    for config_of in (config, changed(config, {"seed": config.seed + 5}))
  ]
  first, second = (run["evaluations"][-1] for run in found)
  save_params(tmp_path / "base", params)
  from_base = {"model.init_from": str(tmp_path / "base"), "train.num_buffers": second["buffers"]}
  alone = train.train(changed(config, {"seed": config.seed + 5, **from_base}), epath.Path(tmp_path / "alone"))
  assert second["reward"] == pytest.approx(alone[str(second["buffers"])]["reward_mean"])
  assert second["reward"] != first["reward"]


def test_a_base_is_read_back_in_half_precision(tmp_path):
  params = {"layer": {"kernel": np.linspace(-1, 1, 7, dtype=np.float32)}}
  lab.save_base(tmp_path / "bases" / "a_0.npz", params)
  base = lab.load_base(tmp_path / "bases" / "a_0.npz")
  assert base.params["layer"]["kernel"].dtype == np.float32
  np.testing.assert_array_equal(base.params["layer"]["kernel"], params["layer"]["kernel"].astype(np.float16))
  lab.save_base(tmp_path / "b.npz", {"layer": {"kernel": params["layer"]["kernel"] + 1}})
  assert lab.load_base(tmp_path / "b.npz").identity != base.identity


@pytest.mark.parametrize("given", ["1", "2/2", "a/b", "1/0"])
def test_shares_that_do_not_exist(given):
  with pytest.raises(app.UsageError, match=f"--share={given}: must be k/n"):
    study.read_share(given)
