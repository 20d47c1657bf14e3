"""The benchmark: every section on a tiny workload, what it counts, and what it refuses. No test depends on a time."""

import json
import types

import bench_tiny
import jax
import numpy as np
import programs
import pytest

from configs import throughput
from dmpo_jax.structs import Rollouts
from launch.bench import cache as bench_cache
from launch.bench import compile as bench_compile
from launch.bench import convert as bench_convert
from launch.bench import costs, main, results, timing, workload
from launch.bench import grade as bench_grade
from launch.bench import growth as bench_growth
from launch.bench import iteration as bench_iteration
from launch.bench import sample as bench_sample
from launch.bench import score as bench_score
from launch.bench import slots as bench_slots
from launch.bench import update as bench_update


@pytest.fixture(autouse=True)
def _one_device(use_devices):
  use_devices(1)


def options(**fields):
  return results.Options(repeats=1, say=lambda what: None, **fields)


@pytest.mark.slow
def test_a_section_as_a_command(tmp_path):
  """It measures in processes of its own, prints a table, and writes everything to a file."""
  path = tmp_path / "score.json"
  done = programs.start("score", "--repeats=2", f"--json={path}", *bench_tiny.FLAGS, module="launch.benchmark")
  assert done.returncode == 0, done.stderr[-3000:]
  assert "tokens/s" in done.stdout
  (section,) = json.loads(path.read_text())["sections"]
  (row,) = section["rows"]
  assert len(row["seconds"]) == 2
  assert all(seconds > 0 for seconds in row["seconds"])
  config = bench_tiny.config()
  assert row["amount"] == 2 * 2 * 2 * 4 * (6 + 8)  # policies, prompts, rollouts, masks, positions
  assert row["rate"] == pytest.approx(row["amount"] / row["median"])
  traced = workload.trace_on("score", config, jax.devices())
  assert row["flops"] == costs.count_flops(traced.jaxpr)
  peak = section["peak_flops_per_second"]
  assert row["utilisation"] == pytest.approx(row["flops"] / row["median"] / peak)
  assert row["planned_bytes"] > 0
  assert section["ratios"] == section["agreements"] == []


@pytest.mark.slow
def test_the_gradient_step():
  config = bench_tiny.config()
  contender = bench_update.make_ours(config)
  contender.run()
  contender.run()  # with the state that the first turn left
  assert contender.facts["planned_bytes"] > 0
  numbers = contender.check()
  assert numbers["gradient"].size == sum(
    leaf.size for leaf in jax.tree.leaves(workload.make(config).policies.trainable)
  )
  assert np.isclose(
    np.linalg.norm(numbers["gradient"]), min(numbers["gradient norm"], config.optim.clip_norm), rtol=1e-4
  )


@pytest.mark.slow
def test_rollouts_of_block_models_are_the_same_without_a_cache_with_it_and_in_slots():
  keys = bench_tiny.TINY | {"model.lora.rank": 0, "sampler.completion_length": 16, "sampler.steps": 16}
  ending = workload.changed(throughput.get_config("blocks"), keys | {"sampler.slots": 3})
  whole = workload.changed(ending, {"rollout.early_exit": False})
  makers = (bench_cache.make_uncached, bench_cache.make_fixed, bench_cache.make_slots)
  plain, *others = (make(whole).check()["tokens"] for make in makers)
  assert len(np.unique(plain)) > 2
  for other in others:
    np.testing.assert_array_equal(other, plain)
  tokens, in_slots = (make(ending).run()["tokens"] for make in makers[1:])
  assert in_slots == tokens
  assert 4 < tokens < 4 * 16


def test_a_model_without_blocks_is_refused():
  for section in (bench_cache, bench_slots):
    with pytest.raises(ValueError, match=r"block_length = None.*need a model that attends by blocks, without adapters"):
      section.run(bench_tiny.config(), options())


def test_recomputing_is_no_work():
  """Utilisation is of the work: a step that computes its layers twice has the same operations to its name."""
  counted = {
    remat: workload.count_flops("accumulate", bench_tiny.config(model__remat=remat)) for remat in ("none", "full")
  }
  assert counted["none"] == counted["full"]
  recomputing = workload.trace_on("accumulate", bench_tiny.config(model__remat="full"), jax.devices())
  assert costs.count_flops(recomputing.jaxpr) > counted["none"]


def test_scores_are_the_workloads():
  config = bench_tiny.config()
  work = workload.make(config)
  assert bench_score.masks(work).shape == (2, 2, 4, 8)
  assert (bench_score.masks(work).sum(2) == 2).all()  # two pairs
  assert not (bench_score.masks(work) == bench_update.masks_of_step(work, 0)).all()


def test_samplers_and_their_calls():
  contender = bench_sample.make_ours(bench_tiny.config())
  found = contender.run()
  assert found["calls"] == 4
  assert found["flops"] == pytest.approx(workload.count_flops("sample", bench_tiny.config()))
  committed_at = np.array([[0, 1, 2, 3], [0, 0, 1, 1]])  # blocks of two: 2 + 2 calls, and 1 + 1
  rollouts = Rollouts(committed_at, committed_at, committed_at, 0, 0, 0)
  assert bench_sample.count_calls(rollouts, 2) == 4
  slow_in_turns = np.array([[0, 1, 2, 2], [0, 0, 1, 2]])
  assert bench_sample.count_calls(rollouts.replace(committed_at=slow_in_turns), 2) == 4


@pytest.mark.slow
def test_a_whole_iteration():
  contender = bench_iteration.make_ours(bench_tiny.config())
  contender.run()
  parts = {name: workload.count_flops(name, bench_tiny.config()) for name in ("sample", "score", "accumulate")}
  assert contender.facts["flops"] == parts["sample"] + parts["score"] + 2 * parts["accumulate"]


def test_conversion(tmp_path):
  source = tmp_path / "source"
  size = bench_convert.write_checkpoint(bench_tiny.config(), str(source)).facts["bytes"]
  assert size == sum(array.nbytes for array in jax.tree.leaves(workload.make(bench_tiny.config()).policies.frozen))
  bench_convert.make_conversion(str(source), str(tmp_path)).run()
  assert (tmp_path / "out0").is_dir()


def test_grading(monkeypatch):
  monkeypatch.setattr(bench_grade, "NUM", 32)
  row = bench_grade.measure("sudoku", "default", bench_tiny.config(), options())
  assert (row.amount, len(row.seconds)) == (32, 1)


def test_time_that_is_reported_twice_counts_once():
  assert bench_compile.covered([(0.0, 4.0), (1.0, 2.0), (3.0, 5.0), (7.0, 8.0)]) == 6.0
  seen = []
  jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: seen.append(event))
  jax.jit(lambda x: x * 3.25)(1.0)
  assert all(any(event.endswith(name) for event in seen) for name in bench_compile.EVENTS)


def point(axis, program, value, seconds, flops, working):
  return bench_growth.Point(axis, program, value, 1000, working, flops, seconds)


def test_growth_is_fitted_and_drawn(tmp_path):
  points = []
  for axis in bench_growth.AXES:
    for program in axis.programs:
      points += [point(axis.name, program, n, 0.1 * n**2, 10.0 * n, 100 * n) for n in axis.values]
  for program in bench_growth.DEVICES.programs:
    for n in bench_growth.DEVICES.values:
      own = point("devices", program, n, None, 80.0 / n, 800 // n)
      points.append(own._replace(collectives=n, collective_bytes=1000 * n))
  growth = bench_growth.Growth("as made up", points)
  fits = {(fit.axis, fit.program): fit for fit in growth.fits()}
  completion, devices = fits["completion", "update"], fits["devices", "update"]
  assert np.allclose([completion.time, completion.flops, completion.memory], [2, 1, 1])
  assert devices.time is None
  assert np.allclose([devices.flops, devices.memory], -1)
  bench_growth.draw(growth, tmp_path / "growth.svg")
  assert "<svg" in (tmp_path / "growth.svg").read_text()
  assert len(growth.tables()[0].rows) == len(growth.as_json()["points"]) == len(points)


def timed(seconds, peak):
  return timing.Timing(tuple(seconds), peak, {"flops": 12.0})


def test_ratios_are_of_neighbouring_turns(monkeypatch):
  measured = {"ours": timed((1, 2, 4), 50), "PyTorch": timed((3, 3, 8), 200)}
  numbers = {"ours": {"x": np.array([1.0, 2.0])}, "PyTorch": {"x": np.array([1.0, 2.0001])}}

  def take_turns(makers, repeats, *, say, checked, judge):
    assert list(makers) == ["ours", "PyTorch"]
    assert set(checked) == {"ours", "PyTorch"}
    judge(numbers)
    return measured

  monkeypatch.setattr(timing, "run_in_turns", take_turns)
  result = results.compare(
    "score",
    bench_tiny.config(),
    options(peer="torch", peak_flops=6.0),
    {"ours": None},
    {"PyTorch": None},
    amount=8,
    tolerances={"x": 1e-3},
  )
  (ratio,) = result.ratios
  assert (ratio.speeds, ratio.speed, ratio.memory) == ((3, 1.5, 2), 2, 0.25)
  (agreement,) = result.agreements
  assert agreement.error == pytest.approx(5e-5, rel=1e-3)
  assert result.utilisation(result.rows[0]) == 1.0
  assert len(result.tables()) == 2


def test_other_numbers_stop_the_benchmark():
  numbers = {"ours": {"x": np.array([1.0, 2.0])}, "PyTorch": {"x": np.array([1.0, 2.1])}}
  with pytest.raises(results.Disagreement, match=r"x: ours and PyTorch differ by 4.8e-02, more than 1e-03"):
    results.agree("ours", "PyTorch", numbers, {"x": 1e-3})
  assert timing.relative_error(np.array([1, 2, 3, 5]), np.array([1, 2, 3, 4])) == 0.25  # of tokens, the share
  assert timing.relative_error(np.array([np.nan]), np.array([1.0])) != 0


@pytest.mark.parametrize(
  ("given", "keys", "message"),
  [
    (dict(official="x"), {}, "--official: only together with --peer=torch"),
    (dict(checkpointing=True), {}, "--checkpointing: only together with --peer=torch"),
    ({}, {"rollout.group_size": 0}, "rollout.group_size"),
    ({}, {"sampler.name": "win"}, "did you mean 'wino'"),
  ],
)
def test_mistakes_are_refused_before_anything_runs(given, keys, message):
  flags = types.SimpleNamespace(**(dict(peer="none", official="", checkpointing=False) | given))
  with pytest.raises(ValueError, match=message):
    main.check(workload.changed(bench_tiny.config(), keys), flags)


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (("nothing",), f"sections: all, {', '.join(main.SECTIONS)}"),
    (("score", "--remat=none,full"), "--remat=none,full has no effect on score: it belongs to update"),
    (("sample", "--checkpointing"), "--checkpointing has no effect on sample"),
    (("update", "--picture=x.svg"), "--picture=x.svg has no effect on update: it belongs to growth"),
    (("grade", "--peer=torch"), "--peer=torch has no effect on grade: it belongs to sample, score, update"),
    (("compile", "--config.model.d_model=8"), "--config.model.d_model=8 has no effect on compile"),
    (("all", "--config=configs/smoke.py"), "--config belongs to one section"),
    (("all", "--peer", "torch"), "flags in one piece"),
    (("all", "--picture=x.svg"), "--picture belongs to growth"),
  ],
)
def test_a_command_that_would_do_nothing_is_refused(capsys, args, message):
  with pytest.raises(SystemExit, match="2"):
    main.start(*args)
  assert message in capsys.readouterr().err


def test_each_of_all_sections_gets_the_flags_that_it_reads(monkeypatch):
  given = ("--peer=none", "--nocheckpointing", "--remat=dots", "--repeats=2", "--quiet")
  commands = {}

  def run(command):
    commands[command[3]] = tuple(command[4:-1])
    return types.SimpleNamespace(returncode=1)

  monkeypatch.setattr(main.subprocess, "run", run)
  assert main.run_all(given) == 1
  peer, repeats = "--peer=none", ("--repeats=2", "--quiet")
  assert commands == {
    "sample": (peer, *repeats),
    "score": (peer, *repeats),
    "update": (peer, "--nocheckpointing", "--remat=dots", *repeats),
    "iteration": (peer, *repeats),
    "convert": repeats,
    "grade": repeats,
    "compile": ("--quiet",),
  }


def test_options_name_the_peers():
  assert options().peers(print, 1) == {}
  assert options(peer="torch").peers(print, 1) == {"PyTorch": (print, (1, ""))}
  assert options(peer="torch", official="x").peers(print, 1) == {"official": (print, (1, "x"))}
