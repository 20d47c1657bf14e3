"""A saved generation is played call by call; what cannot be played is named."""

import io
import json
import pathlib
import subprocess
import sys

import pytest
from etils import epath
from rich.console import Console

from dmpo_jax.run import watch
from launch import replay

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILM = {"pieces": ["4", "2", "!"], "committed_at": [1, 0, 1], "confidence": [0.5, 0.75, 1.0]}


@pytest.fixture
def workdir(tmp_path):
  folder = tmp_path / "run" / "generations"
  folder.mkdir(parents=True)
  line = {"index": 0, "sample": 0, "prompt": "6 * 7", "reward": 1.0, "is_solved": True, "denoising": FILM}
  for buffers in (0, 20):
    lines = [line, line | {"index": 1, "prompt": f"after {buffers}"}, line | {"index": 2, "denoising": {}}]
    (folder / f"{buffers:06d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return epath.Path(folder.parent)


def test_every_call_is_shown():
  console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
  watch.play(FILM, None, console=console, seconds=0.0)
  shown = console.file.getvalue()
  assert "call 1, with confidence: '2' 0.75" in shown
  assert "call 2, with confidence: '4' 0.50, '!' 1.00" in shown
  assert shown.index(f"{watch.MASKED}2{watch.MASKED}") < shown.index("42!")


def test_where_nobody_looks_it_is_the_end_alone():
  console = Console(file=io.StringIO(), width=60)
  watch.play(FILM, None, console=console, seconds=9.0)
  assert console.file.getvalue().splitlines() == ["42!", "call 2, with confidence: '4' 0.50, '!' 1.00"]


def test_the_reward_is_shown_with_its_parts(workdir):
  path = workdir / "generations" / "000000.jsonl"
  line = json.loads(path.read_text().splitlines()[0]) | {"reward_parts": {"correct": 0.75, "form": 0.25}}
  path.write_text(json.dumps(line) + "\n")
  command = [sys.executable, "-m", "launch.replay", f"--generations={path}", "--seconds=0"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
  assert done.stdout.splitlines()[-1] == "reward 1.000, correct 0.750, form 0.250, solved"


def test_a_generation_is_found_by_evaluation_and_prompt(workdir):
  assert replay.find_file(workdir, None).name == "000020.jsonl"
  assert replay.read_generation(replay.find_file(workdir, 0), 1, 0)["prompt"] == "after 0"


@pytest.mark.parametrize(
  ("find", "message"),
  [
    (lambda workdir: replay.find_file(workdir, 5), "--buffers=5: there were evaluations after 0, 20 buffers"),
    (lambda workdir: replay.find_file(workdir / "absent", None), "it holds no generations"),
    (lambda workdir: replay.read_generation(workdir / "absent.jsonl", 0, 0), "no such file"),
    (lambda workdir: replay.read_generation(replay.find_file(workdir, 0), 9, 0), "no such generation$"),
    (lambda workdir: replay.read_generation(replay.find_file(workdir, 0), 2, 0), "does not record when"),
    (
      lambda workdir: replay.read_generation(replay.find_file(workdir, 20), 9, 0),
      r"20.jsonl .* \(the last line cannot be",
    ),
  ],
)
def test_what_cannot_be_played_is_named(workdir, find, message):
  cut(workdir)
  with pytest.raises(ValueError, match=message):
    find(workdir)


def test_a_damaged_file_is_played_as_far_as_it_goes(workdir):
  cut(workdir)
  assert replay.read_generation(replay.find_file(workdir, None), 1, 0)["prompt"] == "after 20"


def cut(workdir):
  """Leave a file as a run that is writing it does, or another version."""
  with (workdir / "generations" / "000020.jsonl").open("a") as file:
    file.write('{"prompt": "of another version"}\n{"index": 9, "sam')
