"""launch/grade.py: both forms of saved generations under both graders, and what is wrong with a file."""

import gzip
import json
import pathlib
import subprocess
import sys

import pytest

from launch import grade

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens" / "graders.jsonl.gz"


def start(*args):
  command = [sys.executable, "-m", "launch.grade", *map(str, args)]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def recorded(task):
  rows = [json.loads(line) for line in gzip.decompress(GOLDENS.read_bytes()).decode().split("\n") if line]
  return [row for row in rows if row["task"] == task and "endoftext_run" in row]  # of the real model


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
  """The recorded generations of one task as two shards of d1's form: end tokens as a count, and as published."""

  def write(task):
    folder, rows = tmp_path_factory.mktemp(task), recorded(task)
    for shard in range(2):
      part = [dict(row) for row in rows[shard::2]]
      for row in part:
        if shard:
          row["generations"] += "<|endoftext|>" * row.pop("endoftext_run")
      path = folder / f"{task}_instruct_256_128_{shard}_generations.json"
      path.write_text(json.dumps({"gen_length": 256, "generations": part}))
    return sorted(folder.iterdir()), [*rows[::2], *rows[1::2]]

  return write


@pytest.mark.parametrize("task", ["sudoku", "countdown"])
def test_the_published_grader_gives_the_recorded_verdicts(theirs, task):
  files, rows = theirs(task)
  done = start(f"--task={task}", "--grader=published", "--json", "--generations", *files)
  assert done.returncode == 0, done.stderr[-2000:]
  report = json.loads(done.stdout)
  assert list(report["settings"]) == [f"{task}_instruct_256_128"]
  for item, row in zip(report["items"], rows, strict=True):
    assert item["extracted"] == row["expected"]["extracted"]
    if task == "sudoku":
      assert item["correct_cells"] == row["expected"]["correct_cells"]
    else:
      assert item["correct"] == row["expected"]["correct"]
  if task == "sudoku":
    assert report["total"]["processed"] == sum(row["expected"]["empty_cells"] for row in rows)


def test_own_generations_and_the_table(tmp_path):
  record = {"question": "?", "solution": "", "answer": "1,234"}
  line = {"record": record, "prompt_name": "default", "is_ended": True}
  texts = ["<answer>1,234</answer>", "\\boxed{1234} or \\boxed{5}", "no idea"]
  path = tmp_path / "000010.jsonl"
  path.write_text("".join(json.dumps(line | {"completion": text}) + "\n" for text in texts))
  done = start("--task=gsm8k", f"--generations={path}")
  assert done.returncode == 0, done.stderr[-2000:]
  assert "2 of 3 items are correct for one grader and wrong for the other" in done.stdout
  assert "default alone: thousands' commas" in done.stdout
  assert "published alone: several answers" in done.stdout
  assert "33.33 %" in done.stdout
  assert "default rewards, mean: reward 1.083, correct 0.667, form 0.417" in done.stdout
  (item, *_) = json.loads(start("--task=gsm8k", f"--generations={path}", "--json").stdout)["items"]
  assert (item["reward"], item["reward_parts"]) == (2.75, {"correct": 2.0, "form": 0.75})


def test_rows_that_cannot_be_used_are_listed(tmp_path):
  path = tmp_path / "bad.jsonl"
  path.write_text('{"record": {}}\n[]\n{"a"\n')
  with pytest.raises(ValueError, match=r"3 of 3 rows cannot be used\n  row 1: KeyError(.|\n)*row 3: JSONDecodeError"):
    grade.read_items(str(path), "gsm8k")
  with pytest.raises(ValueError, match="no such file"):
    grade.read_items(str(tmp_path / "absent"), "gsm8k")
