"""The README's picture: drawn from what a run has left, the same every time; what cannot be drawn is named."""

import json
import re

import pytest

from dmpo_jax.run.report.runs import read_runs
from launch import picture

SOLUTION = "1234341221434321"


def generation(pieces, calls):
  return {
    "index": 0,
    "record": {"puzzle": "1234" + 12 * "0", "solution": SOLUTION},
    "completion": "".join(pieces),
    "num_calls": 16,
    "denoising": {"pieces": list(pieces), "committed_at": calls, "confidence": [1.0] * len(pieces)},
  }


@pytest.fixture
def workdir(tmp_path):
  folder = tmp_path / "run"
  (folder / "generations").mkdir(parents=True)
  rate = {"solve_rate": 0.5, "solve_rate_low": 0.4, "solve_rate_high": 0.6, "reward_mean": 0.5}
  result = {"buffers": 2, "evaluations": {"0": rate, "2": rate}}
  (folder / "result.json").write_text(json.dumps(result))
  rows = [{"phase": "train", "step": step, "time": 0.0, "solve_rate": step / 4} for step in (1, 2)]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  lines = {0: generation("1234" + 12 * "0", list(range(16))), 2: generation(SOLUTION, list(range(16)))}
  for buffer, line in lines.items():
    (folder / "generations" / f"{buffer:06d}.jsonl").write_text(json.dumps(line) + "\n")
  return folder


def test_a_run_is_drawn_the_same_every_time(workdir, tmp_path):
  picture.draw(workdir, tmp_path / "a.svg")
  picture.draw(workdir, tmp_path / "docs" / "b.svg")
  text = (tmp_path / "a.svg").read_text()
  assert text == (tmp_path / "docs" / "b.svg").read_text()
  said = re.findall(r"<!-- (.*?) -->", text, re.S)  # matplotlib notes what each outlined text says
  assert [text for text in said if text.startswith("call")] == ["call 0", "call 4", "call 8", "call 12", "call 16"]
  assert said.count("\u00b7") == 2 * (16 + 12 + 8 + 4)
  assert said.count("0") == 4 + 8 + 12  # what the base has left blank after 8, 12 and 16 calls


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda folder: (folder / "result.json").unlink(), "needs a finished run"),
    (lambda folder: (folder / "generations" / "000002.jsonl").unlink(), "after 2 buffers has no generations"),
    (lambda folder: (folder / "generations" / "000000.jsonl").write_text(""), "no such generation"),
    (lambda folder: (folder / "generations" / "000000.jsonl").write_text('{"prompt": "4"}\n{'), "the last line cannot"),
    (lambda folder: rewrite(folder, record={"n": 1}), "only 4x4 Sudoku"),
    (lambda folder: rewrite(folder, record=None), "000000.jsonl belongs to another task"),
    (lambda folder: rewrite(folder, denoising=None), "000000.jsonl does not record when"),
    (lambda folder: rewrite(folder, num_calls=None), "000000.jsonl does not record when"),
  ],
)
def test_what_cannot_be_drawn_is_named(workdir, tmp_path, damage, message):
  damage(workdir)
  with pytest.raises(ValueError, match=message):
    picture.draw(workdir, tmp_path / "a.svg")


def rewrite(folder, **keys):
  line = generation(SOLUTION, list(range(16))) | keys
  (folder / "generations" / "000000.jsonl").write_text(json.dumps(line) + "\n")


def test_a_curve_without_intervals_is_drawn(workdir):
  rate = {"solve_rate": 0.5, "solve_rate_low": 0.4}
  (workdir / "result.json").write_text(json.dumps({"evaluations": {"0": rate, "2": rate}}))
  figure, axes = picture.plt.subplots()
  picture._draw_curve(axes, *read_runs([workdir]))
  picture.plt.close(figure)
  assert len(axes.containers) == 1
