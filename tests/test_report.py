"""The report: what a workdir holds is shown, what it lacks is said, and hostile text stays text."""

import dataclasses
import html
import io
import itertools
import json
import re
import shutil
import subprocess

import pytest
import vl_convert
from etils import epath
from rich.console import Console

from configs import base
from dmpo_jax import train
from dmpo_jax.run import report
from dmpo_jax.run.report import charts, page, tables
from dmpo_jax.run.report.denoising import animations, choose, grid_of
from dmpo_jax.run.report.runs import read_prompts, read_runs
from dmpo_jax.run.report.shown import show_code, show_grid
from dmpo_jax.run.report.summary import tell

HOSTILE = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def figures(rate):
  return {
    "solve_rate": rate,
    "solve_rate_low": rate - 0.05,
    "solve_rate_high": rate + 0.05,
    "reward_mean": rate + 0.1,
    "num_prompts": 64.0,
    "model_calls": 16.0,
  }


def generation(number, buffer):
  return {
    "index": number,
    "prompt": f"{HOSTILE} question {number}",
    "completion": f"{HOSTILE} answer {number} after {buffer}",
    "reward": 0.25,
    "is_solved": number % 2 == 0,
    "denoising": {"pieces": [HOSTILE, "b", "</s>"], "committed_at": [2, 0, 1], "confidence": [0.5, 0.9, 1.0]},
  }


def write_run(folder, *, num_buffers=8, rate=0.5):
  """Write what a finished run leaves."""
  folder.mkdir(parents=True)
  rows = [{"phase": "warm_start", "step": i, "time": i, "loss": 2 / i, "seconds_update": 0.5} for i in range(1, 1001)]
  for step in range(num_buffers + 1):
    row = {"phase": "train", "step": step, "time": 2000.0 + step}
    if step:
      row |= {
        "reward_mean": step / 10,
        "reward_std": 0.1,
        "log_ratio_mean": -step,
        "log_ratio_error": None,
        "grad_norm": 1.5,
      }
      row |= {"seconds_sample": 2.0, "seconds_update": 1.0, "loss": 0.1}
    if step % 4 == 0:
      row |= {f"eval_{name}": value for name, value in figures(rate * step / num_buffers).items()}
      (folder / "generations").mkdir(exist_ok=True)
      lines = "".join(json.dumps(generation(number, step)) + "\n" for number in range(12))
      (folder / "generations" / f"{step:06d}.jsonl").write_text(lines)
    rows.append(row)
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  evaluations = {str(step): figures(rate * step / num_buffers) for step in range(0, num_buffers + 1, 4)}
  result = {"objective": "wdce", "buffers": num_buffers, "evaluations": evaluations, "seconds": 600.0}
  (folder / "result.json").write_text(json.dumps(result))
  config = base.get_config()
  config.objective.alpha, config.train.num_buffers = 0.025, num_buffers
  config.sampler.wino.threshold = 0.7  # of a sampler that is not chosen
  (folder / "config.json").write_text(config.to_json())
  start = {
    "version": "0.2.0",
    "arguments": "--config=configs/one.py",
    "devices": "4 x tpu",
    "processes": 1,
    "revision": "abc1234",
    "versions": {"jax": "0.10.2"},
  }
  (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
  return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return write_run(tmp_path_factory.mktemp("report") / "one")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
  return write_run(tmp_path_factory.mktemp("report") / "two", num_buffers=4, rate=0.75)


def specs_of(text):
  return json.loads(re.search(r'<script type="application/json" id="specs">(.*?)</script>', text, re.S)[1])


def test_a_finished_run_is_shown(workdir, tmp_path):
  text = report.write([workdir], tmp_path / "page.html").read_text()
  for shown in (
    "50.0%",
    "45.0% to 55.0%",
    "4 x tpu",
    "abc1234",
    "8 of 8",
    "objective.alpha",
    "0.025",
    "0.2.0",
    "--config=configs/one.py",
  ):
    assert shown in text
  assert "sampler.wino.threshold" not in text
  assert "answer 7 after 8" in text
  assert "answer 7 after 4" in text
  assert "answer 8 after" not in text
  assert len(specs_of(text)) == text.count('<div class="chart"')


def test_parts_of_the_reward_have_a_curve_a_column_and_stand_by_their_completion(workdir, tmp_path):
  assert "Reward by part" not in report.write([workdir], tmp_path / "plain.html").read_text()
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
  for line in lines:
    if line["phase"] == "train" and line["step"]:
      line |= {"reward_correct": line["step"] / 100, "reward_form": 0.5}
  (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  result = json.loads((copy / "result.json").read_text())
  for row in result["evaluations"].values():
    row |= {"reward_correct": 0.125, "reward_form": 0.875}
  (copy / "result.json").write_text(json.dumps(result))
  path = copy / "generations" / "000008.jsonl"
  path.write_text(json.dumps(generation(0, 8) | {"reward_parts": {"correct": 0.2, "form": 0.05}}) + "\n")
  text = report.write([copy]).read_text()
  (spec,) = [spec for spec in specs_of(text).values() if any("correct" in v.values() for v in spec["data"]["values"])]
  assert {value["figure"] for value in spec["data"]["values"]} == {"correct", "form"}
  assert [v["y"] for v in spec["data"]["values"] if v["figure"] == "correct"] == [step / 100 for step in range(1, 9)]
  assert '<th scope="col">correct</th><th scope="col">form</th>' in text
  assert "<td>0.125</td><td>0.875</td>" in text
  assert "reward 0.250 (correct 0.200, form 0.050)" in text
  console = Console(file=io.StringIO(), width=120)
  console.print(tables.outcome({"base": result["evaluations"]["0"]}))
  assert re.search(r"reward.*correct.*form", console.file.getvalue())
  assert re.search(r"0.125.*0.875", console.file.getvalue())


def test_what_was_evaluated_later_is_a_table(workdir, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  (copy / "evaluation").mkdir()
  rows = [
    {"policy": "best", "buffers": 22, "sampler": "wino", "solve_rate": 0.6125, "solve_rate_low": 0.6},
    {"x": 1},
  ]
  (copy / "evaluation" / "result.json").write_text(json.dumps(rows))
  (run,) = read_runs([copy])
  assert run.grid == rows[:1]
  assert '<td class="number">61.3%</td><td class="number">60.0% to unknown</td>' in page.render([run])
  assert "<td>best (22 buffers)</td>" in page.render([run])
  assert "evaluation/result.json is of another version" in page.render([run])
  (copy / "evaluation" / "result.json").write_text('{"solve_rate": 0.5}')  # as an earlier version had it
  text = report.write([copy]).read_text()
  assert "Evaluated by" not in text
  assert "evaluation/result.json is of another version" in text


def test_evaluations_are_sorted_best_first_within_a_task(workdir, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  (copy / "evaluation").mkdir()
  rates = {"llada": (0.5, 16.0), "wino": (0.75, 4.0), "parallel": (0.75, 2.0)}
  rows = [
    {"policy": "last", "task": task, "sampler": name, "solve_rate": rate, "model_calls": calls}
    for task in ("sudoku", "countdown")
    for name, (rate, calls) in rates.items()
  ]
  (copy / "evaluation" / "result.json").write_text(json.dumps(rows))
  table = re.search(r'<section id="evaluations">.*?</section>', report.write([copy]).read_text(), re.S)[0]
  shown = re.findall(r"<td>(\w+),  ?steps.*?<td>(countdown|sudoku)</td>", table)
  order = ["parallel", "wino", "llada"]
  assert shown == [(name, task) for task in ("countdown", "sudoku") for name in order]


def test_the_page_opens_with_what_matters(workdir, tmp_path):
  (copy := tmp_path / "copy").mkdir()
  shutil.copytree(workdir, copy, dirs_exist_ok=True)
  (copy / "generations" / "000008.jsonl").write_text("{")  # so something is missing
  text = report.write([copy]).read_text()
  parts = re.findall(r'<section (?:id|class)="(\w+)"', text)
  assert parts == ["outcome", "missing", "denoising", "curves", "completions", "run", "configuration"]
  assert re.search(r'<p class="story">(.*?)</p>', text)[1] == (
    "A model with random weights is the base; its task is sudoku. Then DMPO&#39;s wdce taught it from rewards for its "
    "own answers, 256 in each of 8 buffers. It now solves 50.0% of 64 held-out prompts; the base solved 0.0%."
  )


def test_a_run_is_told_by_what_it_learned_from(workdir):
  (run,) = read_runs([workdir])

  def told(**own):
    return tell(dataclasses.replace(run, config=run.config | {key.replace("__", "."): own[key] for key in own}))

  assert told(task__name="mixture", warm_start__updates=1500).startswith(
    "A model with random weights first learned from demonstrations of a mixture of tasks, in 1,500 updates: this is the"
  )
  assert "The model llada_8b is the base; its task is mine." in told(
    model__init_from="/x/llada_8b", task__name="a/mine.py"
  )
  assert "Then it learned from demonstrations, 32 in each of 8 buffers." in told(objective__name="denoise")
  assert told(objective__name=3, task__name=None) == "It now solves 50.0% of 64 held-out prompts; the base solved 0.0%."
  assert tell(dataclasses.replace(run, evaluations={})) == ""


def test_the_page_names_no_address_to_load_from(workdir, tmp_path):
  text = report.write([workdir], tmp_path / "page.html").read_text()
  assert "default-src 'none'" in text
  assert not re.search(
    r"<(script|img|link|iframe)[^>]+(src|href)\s*=", re.sub(r"<script>.*?</script>", "", text, flags=re.S)
  )


def test_hostile_text_stays_text(workdir, tmp_path):
  text = report.write([workdir], tmp_path / "page.html").read_text()
  assert "<img src=x" not in text
  assert text.count("<script") == text.count("</script>") == 4


def test_runs_of_different_tasks_are_not_to_be_compared(workdir, other):
  runs = read_runs([workdir, other])
  assert "The tasks differ" not in page.render(runs)
  runs[1] = dataclasses.replace(runs[1], config=runs[1].config | {"task.name": "mine/chess.py"})
  assert "The tasks differ (chess, sudoku): compare figures only" in page.render(runs)


def test_curves_hold_the_figures(workdir, other):
  runs = read_runs([workdir, other])
  by_title = {figure["title"]: figure["spec"]["data"]["values"] for figure in page.draw(runs)[0]}
  kl = [(value["run"], value["x"], value["y"]) for value in by_title["KL to the reference"]]
  assert kl == [("one", step, step) for step in range(1, 9)] + [("two", step, step) for step in range(1, 5)]
  assert by_title["Held-out solve rate"][-1] == {
    "run": "two",
    "figure": "held-out prompts",
    "x": 4,
    "y": 0.75,
    "low": 0.7,
    "high": 0.8,
  }
  assert "Log-ratio noise" not in by_title  # null where it was not finite


def test_what_never_changes_is_folded(workdir, other):
  titles = [figure["title"] for figure in page.draw(read_runs([workdir]))[0]]
  constant = {title: values for title, _, values in page.draw(read_runs([workdir]))[1]}
  assert constant == {"Model calls a prompt": ["16.0"], "Gradient norm": ["1.5"], "Loss": ["0.1"]}
  assert not constant.keys() & set(titles)
  assert "Reward of the rollouts" in titles  # its spread never changes, but its mean does
  both = {title: values for title, _, values in page.draw(read_runs([workdir, other]))[1]}
  assert both["Gradient norm"] == ["one 1.5", "two 1.5"]


def test_the_jump_of_the_warm_start_is_explained(workdir, tmp_path):
  loss = next(curves for curves in charts.CURVES if curves.title == "Warm start: loss")
  assert charts.caption_of(loss, read_runs([workdir])) == "On demonstrations."
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  config = json.loads((copy / "config.json").read_text())
  config["warm_start"] |= {"updates": 1000, "correct_share": 0.7}
  (copy / "config.json").write_text(json.dumps(config))
  assert "Up to update 700 these are correct and complete" in charts.caption_of(loss, read_runs([copy]))
  assert "700" not in charts.caption_of(charts.CURVES[0], read_runs([copy]))


@pytest.mark.parametrize("last", [22, 140, 1500])
def test_labels_of_an_axis_keep_apart(workdir, last):
  """As Vega places them on a chart of a phone's width, one of the 12 pixels of a label being 7 wide."""
  (run,) = read_runs([workdir])
  rows = [{"step": step, "reward_mean": step} for step in range(1, last + 1)]
  spec = charts.draw_curves(charts.CURVES[0], [dataclasses.replace(run, rows={"train": rows})])
  svg = vl_convert.vegalite_to_svg(spec | {"width": 250, "height": 200, "config": {"axis": {"labelFontSize": 12}}})
  axis = re.search(r'role-axis"[^>]*X-axis.*?role-axis-label"(.*?)</g>', svg, re.S)[1]
  label = r'<text text-anchor="(\w+)" transform="translate\(([\d.]+),[^>]*?(opacity="0")?[^>]*>([\d,]+)<'
  shift = {"start": 0.0, "middle": 0.5, "end": 1.0}
  spans = [
    (float(x) - shift[anchor] * 7 * len(text), float(x) + (1 - shift[anchor]) * 7 * len(text))
    for anchor, x, hidden, text in re.findall(label, axis)
    if not hidden
  ]
  assert len(spans) >= 3
  assert all(right[0] - left[1] >= 6 for left, right in itertools.pairwise(spans))


def test_long_curves_are_means_of_neighbours(workdir):
  (run,) = read_runs([workdir])
  spec = charts.draw_curves(next(c for c in charts.CURVES if c.title == "Warm start: loss"), [run])
  values = spec["data"]["values"]
  assert len(values) == 250
  assert values[0]["x"] == 4
  assert values[0]["y"] == pytest.approx((2 + 1 + 2 / 3 + 1 / 2) / 4)
  assert values[-1]["x"] == 1000


def test_seconds_add_up_to_the_whole(workdir):
  (run,) = read_runs([workdir])
  assert charts.times(run) == {"warm start": 500.0, "sampling": 16.0, "updates": 8.0, "other": 76.0}


def test_a_run_that_is_damaged_or_not_finished_is_shown_as_far_as_it_goes(workdir, tmp_path):
  broken = tmp_path / "broken"
  shutil.copytree(workdir, broken)
  (broken / "result.json").unlink()
  (broken / "config.json").write_text('{"seed": 1')
  shutil.rmtree(broken / "generations")
  with (broken / "metrics.jsonl").open("a") as file:
    file.write('{"epoch": 3, "loss": 1.0}\n{"phase": "train", "step": 9, "rew')
  text = report.write([broken]).read_text()
  assert "50.0%" in text  # from the rows
  for said in (
    "there is no result.json: the run has not finished",
    "config.json cannot be read",
    "metrics.jsonl: the last line cannot be read; the rest is shown",
    "1 row(s) without phase and step",
    "there are no generations",
  ):
    assert said in text


def test_a_workdir_without_metrics(tmp_path):
  folder = tmp_path / "run"
  folder.mkdir()
  (folder / "config.json").write_text("{}")
  text = report.write([folder]).read_text()
  assert "there is no metrics.jsonl" in text
  assert specs_of(text) == {}
  (folder / "config.json").unlink()
  with pytest.raises(ValueError, match="it holds no files of a run"):
    report.write([folder])
  with pytest.raises(ValueError, match="no such folder"):
    report.write([tmp_path / "absent"])


def test_a_run_of_another_version_is_shown_with_what_it_has(workdir, tmp_path):
  """Keys that are gone or new, a result without evaluations, generations without what is written today, no starts."""
  old = tmp_path / "old"
  shutil.copytree(workdir, old)
  config = json.loads((old / "config.json").read_text())
  del config["objective"]["wdce"], config["sampler"], config["model"]
  config["objective"]["kl_beta"] = 0.25
  (old / "config.json").write_text(json.dumps(config))
  (old / "result.json").write_text('{"buffers": 8, "accuracy": 0.5}')
  (old / "generations" / "000008.jsonl").write_text('{"prompt": "2 + 2", "completion": "4"}\n{"text": "5"}\n')
  (old / "starts.jsonl").unlink()
  text = report.write([old]).read_text()
  assert "50.0%" in text  # the solve rate, from the rows
  assert "unknown" in text
  assert "<code>objective.kl_beta</code></th><td>0.25</td>" in text
  assert '<pre tabindex="0">4</pre>' in text
  assert len(specs_of(text)) == 6


@pytest.mark.parametrize(
  ("line", "said"),
  [(1, "1 line(s) cannot be read, first line 2"), (11, "the last line cannot be read")],
)
def test_damaged_generations_are_named(workdir, tmp_path, line, said):
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  path = copy / "generations" / "000008.jsonl"
  lines = path.read_bytes().splitlines(keepends=True)
  lines[line] = lines[line][:40] + b"\xff\n"
  path.write_bytes(b"".join(lines))
  (run,) = read_runs([copy])
  assert run.missing == [f"generations/000008.jsonl: {said}; the rest is shown"]
  assert [row["index"] for row in run.generations[8]] == [i for i in range(9) if i != line][:8]


@pytest.mark.parametrize(
  ("name", "changed", "said"),
  [
    ("evaluation/result.json", None, "evaluation/result.json is of another version"),
    ("evaluation/result.json", 3, "evaluation/result.json is of another version"),
    ("result.json", {"seconds": None}, "result.json: seconds = None is no number"),
    ("result.json", {"seconds": "12"}, "is no number"),
    ("result.json", {"evaluations": {"8": {"solve_rate": 0.5, "solve_rate_low": 0.4}}}, ""),
    ("result.json", {"evaluations": {"8": figures(0.5), "\u00b2": figures(0.5)}}, ""),
    ("config.json", {"rollout": {"num_prompts": 4, "group_size": None}}, ""),
    ("config.json", {"objective": {"name": ["wdce"], "wddo": {"beta": 2.0}}}, ""),
  ],
)
def test_values_of_another_type_do_not_end_the_report(workdir, tmp_path, monkeypatch, name, changed, said):
  monkeypatch.setattr(page, "_vega", lambda: "")  # which takes long to write
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  (copy / name).parent.mkdir(exist_ok=True)
  old = json.loads((copy / name).read_text()) if (copy / name).exists() else None
  (copy / name).write_text(json.dumps({**old, **changed} if isinstance(changed, dict) else changed))
  text = report.write([copy]).read_text()
  assert "50.0%" in text
  assert said in text.replace("&#39;", "'")
  assert report.summarize(copy)[-1].startswith("rollouts, first buffer to last")


def test_settings_that_differ_come_before_all_settings(workdir, other):
  runs = read_runs([workdir, other])
  assert page.differing(page.settings(runs)) == [("train.num_buffers", ["8", "4"])]
  text = page.render(runs)
  assert text.count("<code>train.num_buffers</code>") == 2
  assert text.count("<code>objective.alpha</code>") == 1
  assert "Settings that differ" not in page.render(runs[:1])


def test_whatever_a_loss_says_of_itself_is_drawn():
  sources = (page.HERE.parents[1] / "objectives").glob("*.py")
  said = {name for path in sources for name in re.findall(r'"(loss_\w+)"', path.read_text())}
  assert "loss_kl" in said
  assert said <= {name for curves in charts.CURVES for name in curves.figures}


def test_what_only_some_objectives_have_is_not_missed_in_others(workdir):
  *_, absent = page.draw(read_runs([workdir]))
  assert "Entropy" in absent
  assert "KL in the updates" not in absent


def test_the_table_of_evaluations_fits_a_narrow_terminal():
  row = dict.fromkeys(tables.NEEDED, 0.5) | {"policy": "last", "buffers": 20, "task": "sudoku", "sampler": "llada"}
  row |= {
    "completion_length": 16,
    "steps": 16,
    "num_prompts": 256,
    "is_as_in_training": True,
    "tokens_per_second": 1500.0,
    "settings": {},
  }
  rows = [row, row | {"sampler": "wino", "is_as_in_training": False, "solve_rate": 0.9375, "model_calls": 2.0}]
  console = Console(width=80, file=io.StringIO())
  console.print(tables.evaluations(rows))
  text = console.file.getvalue()
  assert "wino/16*" in text
  assert "93.8%" in text
  assert "last (20)" in text
  assert "\u2026" not in text  # nothing is cut
  said = " ".join(text.split())
  assert "in all rows: task sudoku, tokens 16, prompts 256, form 50.0%" in said


def test_rows_that_differ_in_their_settings_alone_say_so():
  row = dict.fromkeys(tables.NAMED, "x") | {"settings": {"sampler.wino.threshold": 0.6, "eval.early_exit": True}}
  rows = [row, row | {"settings": row["settings"] | {"sampler.wino.threshold": 0.05}}, row | {"buffers": 22}]
  assert tables.settings_apart(rows) == ["wino.threshold=0.6", "wino.threshold=0.05", ""]
  assert tables.settings_apart([row | {"settings": 3}, {}]) == ["", ""], "whatever stands in the file"


@pytest.mark.parametrize(
  "denoising",
  [None, {}, {"pieces": ["a"], "committed_at": [0]}, {"pieces": ["a"], "committed_at": [-1], "confidence": [0.5]}],
)
def test_generations_without_times_are_not_animated(workdir, tmp_path, denoising):
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  line = generation(0, 8) | {"denoising": denoising}
  for path in (copy / "generations").iterdir():
    path.write_text(json.dumps(line) + "\n")
  (run,) = read_runs([copy])
  assert animations(run) == []
  text = page.render([run])
  assert 'class="animation"' not in text
  assert "not recorded, so not drawn:" in text
  assert "Denoising</li>" in text


PUZZLE, SOLUTION = "1234" + 12 * "0", "1234341221434321"


def sudoku(answer, *, is_solved, **keys):
  """A generation whose tokens are the cells of a Sudoku, decided from the last to the first."""
  own = {"record": {"puzzle": PUZZLE, "solution": SOLUTION}, "prompt": f"({PUZZLE}=", "prompt_name": "bare"}
  record = {"pieces": list(answer), "committed_at": list(range(16))[::-1], "confidence": [0.5] * 16}
  return generation(0, 0) | own | {"extracted": answer, "is_solved": is_solved, "denoising": record} | keys


def test_a_sudoku_is_played_and_shown_as_a_grid(workdir, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  lines = {0: sudoku(SOLUTION[:15] + "0", is_solved=False), 8: sudoku(SOLUTION, is_solved=True)}
  for buffer, line in lines.items():
    (copy / "generations" / f"{buffer:06d}.jsonl").write_text(json.dumps(generation(1, 0)) + "\n" + json.dumps(line))
  (run,) = read_runs([copy])
  plain, played = animations(run)
  assert [pane["grid"] for pane in plain["panes"]] == [None, None]
  assert played["verdict"] == "only the trained policy solves it"
  assert choose([plain, played]) == 1
  assert [pane["wrong"] for pane in played["panes"]] == [[15], []]
  assert played["panes"][0]["grid"] == {"puzzle": PUZZLE, "box": 2}
  grid = show_grid(lines[0])
  assert re.sub("<.*?>", "", grid) == SOLUTION[:15] + "0"
  assert grid.count('"token given') == 4
  assert grid.count("wrong") == 2  # the cell, and the label
  assert page.render([run]).count('class="grid small"') == 2
  for other in ({"extracted": "12"}, {"record": {"n": 3}}, {"record": {"puzzle": "12", "solution": "12"}}):
    assert show_grid(lines[0] | other) is None
  assert grid_of(lines[0] | {"prompt_name": "default"}) is None  # an answer in tags is no row of cells


def test_code_is_coloured_and_escaped():
  coloured = show_code('def f():\n  return "</pre>"\n', is_code=True)
  assert '<span class="code-k">def</span>' in coloured
  assert "</pre>" not in coloured
  fenced = show_code("so:\n```python\nreturn 1\n```\n<b>")
  assert fenced.startswith('so:\n```python\n<span class="code-k">return</span>')
  assert fenced.endswith('<span class="code-mi">1</span>\n```\n&lt;b&gt;')
  assert show_code("return 1 < 2") == "return 1 &lt; 2"
  for text in ("```python\nreturn 1", "```\n```", "a\n```py\nx = '<'\n\n\n```  \n```\nb\n```\n```python\n\"", "```x"):
    assert html.unescape(re.sub("<[^>]*>", "", show_code(text))) == text  # with an end or, cut off, without
  assert show_code("```nonsense\na < b\n```") == "```nonsense\na &lt; b\n```"


def test_example_prompts_are_the_first_of_the_last_evaluation(tmp_path):
  assert read_prompts(epath.Path(tmp_path), 4) == []
  (tmp_path / "generations").mkdir()
  for buffer in (0, 20):
    lines = [{"prompt": f"{buffer} + {number // 2}"} for number in range(20)] + [{"prompt": [{"role": "user"}]}]
    (tmp_path / "generations" / f"{buffer:06d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  assert read_prompts(epath.Path(tmp_path), 4) == ["20 + 0", "20 + 1", "20 + 2", "20 + 3"]


def test_runs_get_names_that_tell_them_apart(workdir, tmp_path):
  twin = tmp_path / "one"
  shutil.copytree(workdir, twin)
  names = [run.name for run in read_runs([workdir, twin, twin])]
  assert names == [f"{workdir.parent.name}/one", f"{tmp_path.name}/one"]


def test_a_report_that_fails_does_not_fail_the_run(workdir, monkeypatch):
  assert train.write_page(epath.Path(workdir)) == "report.html"

  def fail(workdirs, path):
    raise RuntimeError("no room")

  monkeypatch.setattr(train, "write_report", fail)
  assert "no room" in train.write_page(epath.Path(workdir))
  assert "launch.report" in train.write_page(epath.Path(workdir))


def test_the_summary_is_short_and_says_what_is_worth_a_look(workdir, tmp_path):
  assert report.summarize(workdir) == [
    "8 buffers of 256 rollouts, 16 updates",
    "time, compilation included: warm start 500 s, sampling 16 s, updates 8.0 s, other 76 s (start, data, saving)",
    "rollouts, first buffer to last: reward 0.100 to 0.800",
  ]
  bad = {"updates_skipped": 3.0, "rewards_failed": 2.0, "log_ratio_error": 2.0, "tilt_std": 1.0}
  assert [line.partition(": weights")[0] for line in summary_with(workdir, tmp_path, bad)[2:]] == [
    "warning: the log-ratio's noise exceeded the spread of reward / alpha in 8 of 8 buffers",
    "warning: 3 updates skipped: loss or gradient not finite",
    "warning: 16 rollouts dropped: their reward failed",
  ]


def test_the_summary_of_supervised_training_counts_demonstrations(workdir, tmp_path):
  supervised = tmp_path / "supervised"
  shutil.copytree(workdir, supervised)
  config = json.loads((supervised / "config.json").read_text())
  config["objective"]["name"] = "denoise"
  (supervised / "config.json").write_text(json.dumps(config))
  assert report.summarize(supervised)[0] == "8 buffers of 32 demonstrations, 16 updates"


def summary_with(workdir, folder, figures):
  """The summary of the same run with these figures in every buffer."""
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  rows = [row | figures if row["phase"] == "train" and row["step"] else row for row in rows]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return report.summarize(folder)


@pytest.mark.parametrize(
  ("figures", "remedy"),
  [
    ({"signal_kept": 0.03, "log_ratio_std": 3.0, "log_ratio_error": 0.5, "tilt_std": 1.0}, "let the reference follow"),
    ({"signal_kept": 0.03, "log_ratio_std": 0.1, "tilt_std": 0.2}, "lower objective.alpha, or raise objective.kappa"),
  ],
)
def test_weights_that_cancel_are_reported_with_what_would_help(workdir, tmp_path, figures, remedy):
  (line,) = [line for line in summary_with(workdir, tmp_path, figures) if line.startswith("warning")]
  assert line.startswith("warning: next to nothing was learned in 8 of 8 buffers: weights and those of")
  assert remedy in line
  assert "Next to nothing was learned in 8 of 8 buffers" in report.write([tmp_path]).read_text()
  kept = summary_with(workdir, tmp_path, figures | {"signal_kept": 0.3})
  assert not [line for line in kept if line.startswith("warning")]
  assert any("signal kept 0.30 to 0.30" in line for line in kept)


def browse(path, folder):
  """The page as Chromium has it after ten seconds of its own time, without a word on its console."""
  command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
  command += ["--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom", f"file://{path}"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0
  assert "CONSOLE" not in done.stderr
  return done


HAND = """
const drawn = setInterval(() => {
  if (!document.documentElement.dataset.drawn) return;
  clearInterval(drawn);
  const cell = document.querySelectorAll("#chart-0 .mark-path path")[1];  // what the nearest point is looked for in
  cell.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, clientX: 9, clientY: 9 }));
  const slider = document.querySelector(".animation input");
  slider.value = 1;
  slider.dispatchEvent(new Event("input"));
  document.querySelector("details summary").click();
}, 20);
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH, which draws the page")
def test_a_hand_finds_values_under_the_pointer_and_the_slider(workdir, other, tmp_path, monkeypatch):
  for path in page.HERE.iterdir():
    if path.is_file():
      (tmp_path / path.name).write_text(path.read_text() + (HAND if path.name == "page.js" else ""))
  monkeypatch.setattr(page, "HERE", tmp_path)
  done = browse(report.write([workdir, other], tmp_path / "out.html"), tmp_path)
  shown = re.search(r'<div id="vg-tooltip-element".*?</div>', done.stdout, re.S)[0]
  found = re.findall(r'class="value">(.*?)</td>', shown, re.S)
  assert found == ["one", "held-out prompts", "4", "25.0%", "20.0%", "30.0%"]
  assert 'Call 1 of 3: decided, with confidence, "b" (0.900)' in done.stdout
  assert done.stdout.count("<tr><td>one</td>") >= 3  # the first chart's values as a table


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH, which draws the page")
def test_a_browser_draws_every_chart_without_a_word(workdir, other, tmp_path):
  path = report.write([workdir, other], tmp_path / "page.html")
  done = browse(path, tmp_path)
  number = len(specs_of(path.read_text()))
  assert number >= 6
  assert f'data-drawn="{number}"' in done.stdout
  assert len(re.findall(r'<svg[^>]+class="marks"', done.stdout)) == number
  symbols = re.findall(r'role-legend-symbol"[^>]*><path ([^>]*)>', done.stdout)
  assert {opacity for symbol in symbols for opacity in re.findall(r'(?:fill-|stroke-)?opacity="(.*?)"', symbol)} == {
    "1"
  }
  dashes = [symbol for symbol in symbols if 'd="M-' in symbol and "L" in symbol]
  assert dashes
  assert not any('stroke="transparent"' in dash for dash in dashes)
  assert "Call 3 of 3" in done.stdout  # the slider has its first completion
  assert "<title>one and two - dmpo_jax</title>" in done.stdout
