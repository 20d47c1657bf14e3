"""Files that a person or a crash has garbled: said in one message, and no row is lost silently."""

import json
import logging
import math
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath

from dmpo_jax import evaluate, files, generations, sharding
from dmpo_jax.config import ConfigError
from dmpo_jax.files import Unreadable
from dmpo_jax.run import metrics, workdir
from dmpo_jax.run.report.runs import read_runs

GARBLED = {
  "empty": (b"", "it is empty"),
  "blank": (b" \n", "it is empty"),
  "half": (b'{"a": 1, "b', "line 1 column 10"),
  "nul": (b'{"a": \0\0}', "NUL bytes, the first at byte 6"),
  "latin1": (b'{"a": "\xe9"}', "not UTF-8 at byte 7"),
  "deep": (b"[" * 100_000, "recursion"),
}


@pytest.mark.parametrize("kind", GARBLED)
def test_a_garbled_file_is_named_with_what_is_wrong_and_what_would_do(tmp_path, kind):
  content, problem = GARBLED[kind]
  (tmp_path / "some.json").write_bytes(content)
  with pytest.raises(Unreadable) as caught:
    files.read_json(tmp_path / "some.json", "remove it")
  message = str(caught.value)
  assert str(tmp_path / "some.json") in message
  assert problem in message
  assert message.endswith(": remove it")


def test_an_object_is_asked_for_where_one_is_needed(tmp_path):
  (tmp_path / "some.json").write_text("[1]")
  assert files.read_json(tmp_path / "some.json") == [1]
  with pytest.raises(Unreadable, match="is not a JSON object"):
    files.read_object(tmp_path / "some.json")


@pytest.mark.parametrize(
  ("content", "rows", "damaged", "is_cut", "problem"),
  [
    (b"", [], [], False, ""),
    (b'{"a": 1}\n{"a": 2}\n', [1, 2], [], False, ""),
    (b'{"a": 1}\n{"a": 2}', [1, 2], [], False, ""),  # whole, as an editor may leave it
    (b'{"a": 1}\n{"a', [1], [2], True, "the last line cannot be read"),
    (b'{"a": 1}\n{"a\n', [1], [2], False, "the last line cannot be read"),
    (b'{"a": 1}\n{"a\n{"a": 3}\n', [1, 3], [2], False, "1 line(s) cannot be read, first line 2"),
    (b'\0\0\0\n{"a": 2}\n\xff\n7\n', [2], [1, 3, 4], False, "3 line(s) cannot be read, first line 1"),
  ],
)
def test_lines_that_cannot_be_read_are_counted_and_the_others_kept(tmp_path, content, rows, damaged, is_cut, problem):
  (tmp_path / "lines.jsonl").write_bytes(content)
  lines = files.read_lines(tmp_path / "lines.jsonl")
  assert [row["a"] for row in lines.rows] == rows
  assert (lines.damaged, lines.is_cut, lines.problem) == (damaged, is_cut, problem)


def test_json_has_null_for_what_is_not_finite():
  value = {"a": math.nan, 1: [np.float32(math.inf), jnp.float32(0.5)], "c": (np.arange(2), True, "x", None)}
  written = files.to_json(value, indent=1)
  assert json.loads(written, parse_constant=pytest.fail) == {
    "a": None,
    "1": [None, 0.5],
    "c": [[0, 1], True, "x", None],
  }


def test_what_is_set_aside_has_a_free_name(tmp_path):
  for name in ("m.jsonl.damaged", "m.jsonl.damaged-2"):
    assert files.name_aside(tmp_path / "m.jsonl").name == name
    (tmp_path / name).touch()


def write_rows(folder, steps):
  with metrics.Metrics(folder) as log:
    for step in steps:
      log.write("train", step, {"loss": float(step)})


def steps_of(folder):
  return [row["step"] for row in files.read_lines(folder / "metrics.jsonl").rows]


@pytest.mark.parametrize(
  "line", [b'{"phase": "tr', b"\0" * 40, b"\xff\xfe", b'{"step": 2}', b'{"phase": "train", "step": "2"}']
)
def test_a_record_with_a_garbled_line_is_kept_beside_and_goes_on_with_the_other_rows(tmp_path, caplog, line):
  write_rows(tmp_path, range(5))
  lines = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
  garbled = b"\n".join([*lines[:2], line, *lines[3:]])
  (tmp_path / "metrics.jsonl").write_bytes(garbled)
  with caplog.at_level(logging.WARNING), metrics.Metrics(tmp_path) as log:
    log.forget("train", after=3)
    log.write("train", 4, {"loss": 14.0})
  assert steps_of(tmp_path) == [0, 1, 3, 4]
  assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == garbled
  assert "1 line(s) cannot be read: the file is copied to metrics.jsonl.damaged" in caplog.text
  assert "the rows of phase train, steps 2, are missing" in caplog.text


def test_rows_that_were_cut_off_are_named(tmp_path, caplog):
  write_rows(tmp_path, range(3))
  with caplog.at_level(logging.WARNING), metrics.Metrics(tmp_path) as log:
    log.forget("train", after=9)
    log.write("train", 10, {"loss": 1.0})
  assert "the rows of phase train, steps 3-9, are missing" in caplog.text
  assert metrics._ranges([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"


def test_a_half_line_at_the_end_is_a_killed_runs_and_nothing_to_speak_of(tmp_path, caplog):
  write_rows(tmp_path, range(3))
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"phase": "train", "ste')
  with caplog.at_level(logging.WARNING), metrics.Metrics(tmp_path) as log:
    log.forget("train", after=2)
  assert steps_of(tmp_path) == [0, 1, 2]
  assert not caplog.records
  assert not (tmp_path / "metrics.jsonl.damaged").exists()


@pytest.mark.parametrize("content", [b"", b'{"buffers": 3', b"\0\0", b"[]", b'{"buffers": 3}'])
def test_a_garbled_result_says_how_it_is_written_again(tmp_path, content):
  (tmp_path / "result.json").write_bytes(content)
  with pytest.raises(Unreadable, match=r"result\.json .*: remove it and re-run training"):
    metrics.read_result(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"task": {', b"\xff"])
def test_a_garbled_configuration_is_one_message(tmp_path, content):
  (tmp_path / "config.json").write_bytes(content)
  (tmp_path / "policy").mkdir()  # as after a run
  with pytest.raises(Unreadable, match=r"config\.json cannot be read .*: if the command's configuration is the run's"):
    workdir.check_workdir(tmp_path, tiny.config())


def test_starts_are_added_to_whatever_the_file_holds(tmp_path):
  for before in (b"", b'{"host": "a"}\n', b"\xff\0 half a li"):
    (tmp_path / "starts.jsonl").write_bytes(before)
    workdir.announce_start(epath.Path(tmp_path), tiny.config(), sharding.make_mesh(devices=jax.devices()[:1]))
    after = (tmp_path / "starts.jsonl").read_bytes()
    assert after.startswith(before)
    assert "devices" in files.read_lines(tmp_path / "starts.jsonl").rows[-1]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0garbage", b"pid=1\nhost=\xff\n"])
def test_a_garbled_lock_is_taken_over_if_nobody_renews_it(tmp_path, content, monkeypatch, capsys):
  monkeypatch.setattr(workdir, "LEASE_SECONDS", 0.5)
  (tmp_path / "run.lock").write_bytes(content)
  is_over = threading.Event()

  def renew():
    while not is_over.wait(0.1):
      os.utime(tmp_path / "run.lock")

  other = threading.Thread(target=renew)
  other.start()
  with pytest.raises(ConfigError, match=r"run\.lock does not say which"), workdir.alone_in(epath.Path(tmp_path)):
    pass
  is_over.set()
  other.join()
  with workdir.alone_in(epath.Path(tmp_path)):
    assert "pid=" in (tmp_path / "run.lock").read_text()
  assert "run.lock is damaged and nobody renews it: taken over" in capsys.readouterr().err


def test_a_garbled_table_of_evaluations_is_set_aside_and_made_again(tmp_path, capsys):
  path = epath.Path(tmp_path / "result.json")
  path.write_bytes(b'[{"task": "su')
  assert evaluate._read_own_rows(path) == []
  assert (tmp_path / "result.json.damaged").read_bytes() == b'[{"task": "su'
  assert "set aside as result.json.damaged, and evaluated again" in capsys.readouterr().out


def test_an_unfinished_evaluation_keeps_the_lines_that_can_be_read(tmp_path, caplog):
  about, lines = {"task": "sudoku"}, [{"index": i, "sample": 0, "completion": "é"} for i in range(3)]
  unfinished = generations.Unfinished(epath.Path(tmp_path / "000001.jsonl"), about)
  unfinished.add(lines)
  (path,) = tmp_path.iterdir()
  whole = path.read_bytes()
  path.write_bytes(whole.replace(b'"index": 1', b'"in\0ex": \xff'))
  with caplog.at_level(logging.WARNING):
    assert generations.Unfinished(epath.Path(tmp_path / "000001.jsonl"), about).read() == [lines[0], lines[2]]
  assert "1 line(s) cannot be read, first line 3" in caplog.text
  path.write_bytes(whole[:-5])  # killed in the middle of the last line
  assert generations.Unfinished(epath.Path(tmp_path / "000001.jsonl"), about).read() == lines[:2]
  path.write_bytes(b"\0" * 10)
  assert generations.Unfinished(epath.Path(tmp_path / "000001.jsonl"), about).read() == []


@pytest.mark.parametrize(
  "name", ["config.json", "metrics.jsonl", "result.json", "starts.jsonl", "evaluation/result.json"]
)
@pytest.mark.parametrize("kind", GARBLED)
def test_the_report_names_what_is_garbled_and_shows_the_rest(tmp_path, name, kind):
  write_rows(tmp_path, range(3))
  (tmp_path / name).parent.mkdir(exist_ok=True)
  (tmp_path / name).write_bytes(GARBLED[kind][0])
  (run,) = read_runs([tmp_path])
  is_empty_list_of_lines = name.endswith(".jsonl") and kind == "empty"
  assert is_empty_list_of_lines or any(name.rpartition("/")[2] in problem for problem in run.missing)
  assert name == "metrics.jsonl" or [row["step"] for row in run.rows["train"]] == [0, 1, 2]
