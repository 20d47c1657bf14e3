"""What is seen of long work: lines now and then, a bar on a terminal, its parts, compilation, and --quiet."""

import io
import re
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from dmpo_jax.run import progress as progress_lib
from dmpo_jax.run.progress import Progress


@pytest.fixture
def clock(monkeypatch):
  """A clock that stands still until the test moves it."""
  now = [0.0]
  monkeypatch.setattr(progress_lib.time, "monotonic", lambda: now[0])
  return now


def work(clock, seconds, total=4, done=0, is_quiet=False, **console):
  """The output of a Progress whose steps take `seconds` each."""
  output = io.StringIO()
  console = Console(file=output, width=100, **console)
  with Progress("warm_start", total, done=done, console=console, is_quiet=is_quiet) as bar:
    for step in range(done, total):
      clock[0] += seconds
      bar.advance(reward_mean=0.25 * step, tokens_per_second_sample=12345.6, seconds_sample=1.0)
  return output.getvalue()


def test_without_a_terminal_a_line_is_printed_now_and_then(clock):
  assert work(clock, seconds=3, total=9).splitlines() == [
    "warm start 1/9  reward 0.000  tokens/s 12,346",
    "warm start 5/9  reward 1.000  tokens/s 12,346  0:12 left",
    "warm start 9/9  reward 2.000  tokens/s 12,346  in 0:27",
  ]


def test_work_that_is_resumed_counts_on(clock):
  assert work(clock, seconds=3700, total=9, done=6).splitlines() == [
    "warm start 7/9  reward 1.500  tokens/s 12,346",
    "warm start 8/9  reward 1.750  tokens/s 12,346  1:01:40 left",
    "warm start 9/9  reward 2.000  tokens/s 12,346  in 3:05:00",
  ]


def test_quiet_is_one_line_at_the_end_on_a_terminal_too(clock):
  for console in ({}, {"force_terminal": True}):
    clock[0] = 0.0
    text = re.sub(r"\x1b\[[0-9;]*m", "", work(clock, seconds=30, is_quiet=True, **console))
    assert text == "warm start 4/4  reward 0.750  tokens/s 12,346  in 2:00\n"


def test_on_a_terminal_it_is_redrawn(clock):
  text = work(clock, seconds=3, force_terminal=True)
  assert "4/4" in text
  assert "reward 0.750  tokens/s 12,346" in text
  assert text.count("\n") == 2
  output = io.StringIO()
  with Progress("train", 9, console=Console(file=output, width=100, force_terminal=True), is_quiet=False) as bar:
    for _ in range(3):
      clock[0] += 3
      bar.advance()
      bar.part("sampling", 1, 4)
  assert "3/9" in output.getvalue()
  assert "0:18 left" in output.getvalue()


def test_other_processes_show_nothing(monkeypatch, capfd):
  monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
  monkeypatch.setattr("jax.process_index", lambda: 1)
  with Progress("train", 2) as bar:
    bar.advance(2, loss=1.0)
  assert capfd.readouterr() == ("", "")


def test_results_and_progress_do_not_mix(capfd):
  with Progress("train", 1) as bar:
    bar.advance()
  assert capfd.readouterr() == ("", "train 1/1  in 0:00\n")


def test_parts_are_said_where_something_is_due(clock):
  progress_lib.part("nobody looks", 1, 2)
  output = io.StringIO()
  with Progress("train", 2, console=Console(file=output, width=100), is_quiet=False) as bar:
    for number in range(4):
      progress_lib.part("sampling", number, 4)
      clock[0] += 6
    bar.advance()
    progress_lib.part("saving")
    bar.advance()
  assert output.getvalue().splitlines() == [
    "train 0/2  sampling 2/4",
    "train 1/2",
    "train 2/2  in 0:24",
  ]


def test_work_inside_other_work_is_a_part_of_it(clock):
  output = io.StringIO()
  console = Console(file=output, width=100)
  with Progress("study", 2, unit="runs", console=console, is_quiet=False) as whole:
    with Progress("train", 3, is_quiet=False) as inner:
      for step in range(3):
        clock[0] += 6
        inner.part("sampling", 1, 2)
        inner.advance(loss=step / 4)
    whole.advance(2)
  assert output.getvalue().splitlines() == [
    "study 0/2 runs  train 1/3  sampling 1/2  loss 0.000",
    "study 2/2 runs  in 0:18",
  ]


def test_bytes_have_a_speed(clock):
  output = io.StringIO()
  with Progress("converting", 4_000_000_000, unit="bytes", console=Console(file=output), is_quiet=False) as bar:
    for _ in range(4):
      clock[0] += 20
      bar.advance(1_000_000_000)
  assert output.getvalue().splitlines()[1:] == [
    "converting 2.0/4.0 GB  50 MB/s, 0:40 left",
    "converting 3.0/4.0 GB  50 MB/s, 0:20 left",
    "converting 4.0/4.0 GB  in 1:20",
  ]


def test_what_is_compiled_is_said(monkeypatch):
  seen = []
  monkeypatch.setattr(Progress, "compiling", lambda self, name: seen.append(name))

  def peculiar(x):
    return x * 2.125 + 1

  with Progress("train", 1, console=Console(file=io.StringIO())):
    jax.jit(peculiar)(jnp.ones(3))
  jax.jit(lambda x: x * 3.125 + 1)(jnp.ones(3))  # nobody looks
  assert seen[-1] == ""
  assert "peculiar" in seen[-2]


def test_a_long_compilation_is_said_while_it_lasts(monkeypatch):
  monkeypatch.setattr(progress_lib, "COMPILING_SECONDS", 0.02)
  output, printed = io.StringIO(), threading.Event()
  monkeypatch.setattr(output, "write", lambda text, write=output.write: (write(text), printed.set())[0], raising=False)
  with Progress("train", 1, console=Console(file=output), is_quiet=False) as bar:
    for name in ("update", "", "update"):  # of one that is soon compiled nothing is said
      bar.compiling(name)
    assert printed.wait(timeout=20)
    time.sleep(0.1)
    bar.compiling("")
  assert output.getvalue() == "train 0/1  compiling update\n"
  quiet = io.StringIO()
  with Progress("train", 1, console=Console(file=quiet), is_quiet=True) as bar:
    bar.compiling("update")
    time.sleep(0.1)
  assert quiet.getvalue() == ""


def test_the_flag_is_heard(monkeypatch):
  given = progress_lib.flags.FlagValues()
  progress_lib.flags.DEFINE_bool("quiet", False, "", flag_values=given)
  monkeypatch.setattr(progress_lib.flags, "FLAGS", given)
  assert not progress_lib.wants_quiet()  # not parsed: a library's user has no flags
  given([sys.argv[0], "--quiet"])
  assert progress_lib.wants_quiet()
