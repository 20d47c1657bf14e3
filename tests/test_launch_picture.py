"""The README's film: made from what a run has left, the same every time; what cannot be drawn is named."""

import itertools
import json
import re
import xml.etree.ElementTree

import pytest
from etils import epath

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
  return epath.Path(folder)


def groups(text):
  """What each call decides, grid by grid: (call, colour of the digit, digit)."""
  found = re.findall(r'<g class="c(\d+)"><rect[^>]*/><text[^>]*fill="(#\w+)"[^>]*>(.)</text></g>', text)
  return [(int(call), colour, digit) for call, colour, digit in found]


def test_a_film_shows_what_each_call_decided_and_how_it_ended(workdir, tmp_path):
  picture.draw(workdir, tmp_path / "a.svg")
  picture.draw(workdir, tmp_path / "docs" / "b.svg")
  text = (tmp_path / "a.svg").read_text()
  assert text == (tmp_path / "docs" / "b.svg").read_text()
  assert len(text) < 300_000
  base, trained = groups(text)[:16], groups(text)[16:]
  assert base == [(index, picture.INK if index < 4 else picture.WRONG, d) for index, d in enumerate("1234" + 12 * "0")]
  assert trained == [(index, picture.INK, digit) for index, digit in enumerate(SOLUTION)]
  assert re.findall("[\u2717\u2713][^<]*", text) == ["\u2717 12 cells left blank", "\u2713 solved"]
  assert "model call 16 of 16" in text
  xml.etree.ElementTree.fromstring(text)


def test_calls_appear_one_after_the_other_and_the_verdict_last(workdir, tmp_path):
  picture.draw(workdir, tmp_path / "a.svg")
  text = (tmp_path / "a.svg").read_text()
  names = [*(f"c{call}" for call in range(16)), "end"]
  begin = [float(re.search(rf"@keyframes {name} {{ 0%, ([\d.]+)% {{ opacity: 0; }}", text)[1]) for name in names]
  whole = picture.BEFORE + 16 * picture.CALL + picture.AFTER
  assert begin[0] == pytest.approx(100 * picture.BEFORE / whole, abs=0.01)
  steps = [after - before for before, after in itertools.pairwise(begin[:16])]
  assert steps == pytest.approx([100 * picture.CALL / whole] * 15, abs=0.02)
  assert begin[16] == begin[15]


def test_the_puzzle_is_the_first_that_only_the_trained_policy_solves(workdir, tmp_path):
  """Unless another is asked for."""
  for buffer, solved in ((0, (True, False, False)), (2, (True, False, True))):
    path = workdir / "generations" / f"{buffer:06d}.jsonl"
    line = json.loads(path.read_text())
    lines = [line | {"index": index, "is_solved": is_solved} for index, is_solved in enumerate(solved)]
    lines[2]["record"] = {"puzzle": "0" * 15 + "1", "solution": SOLUTION}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  for index, num_given in ((None, 1), (0, 4)):
    picture.draw(workdir, tmp_path / "a.svg", index)
    text = (tmp_path / "a.svg").read_text()
    assert text.count(">\u00b7</text>") == 2 * (16 - num_given)


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda folder: (folder / "result.json").unlink(), "needs a finished run"),
    (lambda folder: (folder / "generations" / "000002.jsonl").unlink(), "after 2 buffers has no generations"),
    (lambda folder: (folder / "generations" / "000000.jsonl").write_text(""), "no such generation"),
    (lambda folder: (folder / "generations" / "000000.jsonl").write_text('{"prompt": "4"}\n{'), "the last line cannot"),
    (lambda folder: rewrite(folder, record={"n": 1}), "only a Sudoku"),
    (lambda folder: rewrite(folder, record=None), "000000.jsonl is none"),
    (
      lambda folder: rewrite(folder, denoising=None),
      "calls that decided them; prompt 0 of generations",
    ),
  ],
)
def test_what_cannot_be_drawn_is_named(workdir, tmp_path, damage, message):
  damage(workdir)
  with pytest.raises(ValueError, match=message):
    picture.draw(workdir, tmp_path / "a.svg")


def rewrite(folder, **keys):
  line = generation(SOLUTION, list(range(16))) | keys
  (folder / "generations" / "000000.jsonl").write_text(json.dumps(line) + "\n")


def test_a_curve_without_intervals_is_drawn(workdir, tmp_path):
  rate = {"solve_rate": 0.5, "solve_rate_low": 0.4}
  (workdir / "result.json").write_text(json.dumps({"evaluations": {"0": rate, "2": rate}}))
  picture.draw(workdir, tmp_path / "a.svg")
  middle = picture.TOP + picture.GRID / 2
  circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', (tmp_path / "a.svg").read_text())
  assert [float(y) for _, y in circles] == [middle, middle]
