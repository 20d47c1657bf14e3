"""The study: which runs it takes, how a learning rate is chosen, and what its pages say of made-up results."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from absl import app

from dmpo_jax.config import validate
from launch.study import __main__ as study
from launch.study import arms, page, runs
from launch.study.arms import ARMS, CONFIGS, GROUPS, RATES, TASKS, TUNING_SEED

OUT = pathlib.Path("runs/study")


def made_up(solved, reward=0.5, nll=0.3, unique=4.0, rate=1e-4):
  """A run's figures: from none solved to `solved` in 4 buffers."""
  rows = [(0, 0.0), (2, solved / 2), (4, solved)]
  return {
    "learning_rate": rate,
    "calls_a_buffer": 10.0,
    "updates_a_buffer": 8,
    "num_buffers": 4,
    "seconds": 12.0,
    "evaluations": [{"buffer": b, "calls": 10.0 * b, "solve_rate": s, "reward_mean": reward} for b, s in rows],
    "buffers": [{"calls": 10.0 * b, "reward_mean": 0.1, "sampled_nll": nll, "unique_rollouts": unique} for b in (1, 4)],
  }


@pytest.fixture(scope="module")
def all_runs():
  rates = dict.fromkeys(arms.needed_rates(GROUPS, TASKS), 3e-4)
  return list(arms.plan(rates, GROUPS, TASKS, (0, 1, 2)))


def test_every_arm_is_a_valid_configuration_of_one_budget(all_runs):
  of_seed_0 = [run for run in all_runs if run.seed == 0]
  assert len(of_seed_0) == len(ARMS) * len(TASKS)
  for run in of_seed_0:
    config = arms.with_changes(arms.bench_config(run.arm.config, run.task), run.changes)
    validate(config)
    assert config.optim.learning_rate == 3e-4
    assert config.rollout.num_prompts * config.rollout.group_size == arms.ROLLOUTS
    assert arms.get(config, "model.d_model") == config.model.d_model


def test_runs_that_are_the_same_are_one_file(all_runs):
  def path(group, name):
    (run,) = [r for r in all_runs if (r.arm.group, r.arm.name, r.task, r.seed) == (group, name, "sudoku", 0)]
    return run.path(OUT)

  same = {("objectives", "wdce"), ("baselines", "negative, g = 8"), ("reuse", "8 updates"), ("alpha", "alpha = 0.05")}
  assert len({path(*who) for who in same | {("mask samples", "4 mask samples")}}) == 1
  paths = {run.path(OUT) for run in all_runs}
  assert len(paths) == (len(ARMS) - 4) * len(TASKS) * 3


def test_objectives_come_first_of_all_seeds(all_runs):
  groups = [run.arm.group for run in all_runs]
  assert set(groups[: len(CONFIGS) * len(TASKS) * 3]) == {"objectives"}
  assert [run.seed for run in all_runs[:: len(CONFIGS) * len(TASKS)]][:3] == [0, 1, 2]


def test_what_several_questions_ask_for_is_run_for_the_first(all_runs, tmp_path):
  missing = runs.missing_runs(all_runs, tmp_path)
  assert len(missing) == (len(ARMS) - 4) * len(TASKS) * 3
  first = list(missing.values())[: len(CONFIGS) * len(TASKS) : len(TASKS)]
  assert [run.arm.name for run in first] == list(CONFIGS)
  done = next(iter(missing))
  done.parent.mkdir(parents=True)
  done.write_text("{}")
  assert list(runs.missing_runs(all_runs, tmp_path)) == list(missing)[1:]


def test_an_objective_whose_rate_is_not_chosen_is_left_out():
  runs = list(arms.plan({("sudoku", "wd1"): 1e-4}, GROUPS, TASKS, (0,)))
  assert [(run.arm.name, run.task, run.changes) for run in runs] == [("wd1", "sudoku", {})]


@pytest.mark.parametrize(
  ("rewards", "tried", "best"),
  [
    ((0.1, 0.2, 0.3, 0.4), (1e-4, 3e-4, 1e-3), 1e-3),
    ((0.1, 0.2, 0.3, 0.2), (1e-4, 3e-4, 1e-3), 3e-4),
    ((0.4, 0.3, 0.2, 0.9), (1e-4, 3e-4, 3e-5), 3e-5),
    ((0.1, 0.3, 0.3, 0.9), (1e-4, 3e-4, 3e-5), 1e-4),
  ],
)
def test_every_objective_has_three_learning_rates_to_choose_from(rewards, tried, best):
  of, scores = dict(zip(RATES, rewards, strict=True)), {}
  while (rate := arms.next_rate(scores)) is not None:
    scores[rate] = of[rate]
  assert tuple(scores) == tried
  assert arms.best_rate(scores) == best


def test_learning_rates_are_read_from_the_runs_of_their_seed(tmp_path):
  who = ("countdown", "spg")
  for rate, reward in ((1e-4, 0.2), (3e-4, 0.4), (1e-3, 0.1)):
    assert runs.chosen_rates([who], tmp_path) == {}
    path = arms.tuning_run(*who, rate).path(tmp_path)
    assert path.parent == tmp_path / "countdown" / f"seed{TUNING_SEED}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made_up(0.5, reward)))
  assert runs.chosen_rates([who], tmp_path) == {who: 3e-4}


def test_model_calls_of_a_buffer_count_a_backward_pass_as_two():
  def calls(name, **changes):
    config = arms.bench_config(name, "countdown")
    return arms.calls_a_buffer(arms.with_changes(config, changes))

  assert calls("wdce") == 12 + 2 * 8 + 8 * 4 * 3
  assert calls("wd1") == 12 + 12 * 1 * 3
  assert calls("diffu_grpo") == 12 + 8 * (2 + 3)
  assert calls("tracerl") == 12 + 3 + 4 * 3 * 3
  assert calls("gdpo") == 12 + 12 * 2 * (1 + 3)  # without a KL nothing is asked of a reference
  assert calls("dtm") == 12 + 8 * 2 * (3 + 1)
  assert calls("wddo", **{"objective.wddo.sets": "independent"}) == 12 + 2 * 8 + 8 * 8 * 3


def test_the_time_left_is_told_by_the_median_of_the_last_runs():
  clock = runs.Clock(minutes=1)
  assert clock.has_time()  # of a run's length nothing is known yet
  for seconds in (500, 20, 20, 20, 20, 30, 30, 30):
    clock.add(seconds)
  assert clock.pace() == 20
  assert clock.has_time()
  assert not runs.Clock(minutes=0).has_time()


def test_differences_are_paired_by_seed():
  def result(name, seed, solved, **others):
    return page.Result("objectives", name, "sudoku", seed, made_up(solved, **others))

  better = [result("wdce", seed, 0.5 + 0.1 * seed, reward=0.6) for seed in range(3)]
  worse = [result("wd1", seed, 0.4 + 0.1 * seed, reward=0.6) for seed in range(4)]  # a seed more, which has no partner
  (row,) = page.claim_rows([*better, *worse])["DMPO (wdce) against its rivals"]
  assert row[:4] == ["wdce", "wd1", "sudoku", "3"]
  assert row[4] == "+10.0 ± 0.0 % *"
  assert row[5] == "0.000 ± 0.000"


@pytest.mark.parametrize("given", [["a"], ["0", "1.5"], ["-1"], ["0", str(TUNING_SEED)], [""]])
def test_seeds_that_cannot_be_used(given):
  with pytest.raises(app.UsageError, match=rf"--seeds={','.join(given)}: '{given[-1]}' cannot be used"):
    study.read_seeds(given)


def test_runs_of_another_budget_do_not_pass_for_these(tmp_path):
  study = runs.Study(tmp_path / "study", calls=1024, changes={"warm_start.updates": 600})
  for _ in range(2):
    study.check_folder()
  for other in ({"calls": 512}, {"changes": {}}):
    with pytest.raises(app.UsageError, match=r"holds runs with --calls=1024 and --set {'warm_start.updates': 600}"):
      dataclasses.replace(study, **other).check_folder()


def test_a_change_that_is_not_json_is_refused():
  assert study.read_change("model.d_model=7") == ("model.d_model", 7)
  with pytest.raises(app.UsageError, match="--set=a: must be key=value"):
    study.read_change("a")


def test_an_interval_is_students():
  values = np.array([0.1, 0.2, 0.6])
  assert page.half_width(values) == pytest.approx(4.302653 * values.std(ddof=1) / np.sqrt(3), rel=1e-6)


def test_pages_show_every_question(tmp_path):
  results = [
    page.Result(group, name, task, seed, made_up(0.1 * index + 0.05 * seed))
    for group, names in (("objectives", ("wdce", "<b>")), ("rates", ("one", "other")), ("reuse", ("alone",)))
    for index, name in enumerate(names)
    for task in TASKS
    for seed in (0, 1, 2)
  ]
  page.write(tmp_path, results, tmp_path / "docs")
  html, text = (tmp_path / "study.html").read_text(), (tmp_path / "docs" / "study.md").read_text()
  assert html.count("<svg") == 4
  assert "&lt;b&gt;" in html
  assert "<b>" not in html
  assert "\n## objectives, countdown\n" in text
  assert "reuse" not in text  # nothing to compare yet
  solved, same = "5.0 ± 12.4 %", "0.500 ± 0.000"
  assert f"| wdce | 3 | 0.0001 | 32 | {solved} | 0.0 5.0 10.0 | 5.0 % | {same} | 0.500 | 0.300 | 4.00 | 12 |" in text
  cells = f"15.0 ± 12.4 % | {same} | 0.0001, 32"
  assert f"| <b> | {cells} | {cells} |" in text
  assert text.index("## objectives, sudoku") < text.index("## rates, sudoku")
  assert (tmp_path / "docs" / "study.svg").read_text().lstrip().startswith(("<!DOCTYPE svg", "<svg"))
