"""The script for one GPU: what it checks and counts, and what it does without memory, time or a GPU."""

import json
import math
import time

import gpu_makers
import numpy as np
import programs as processes
import pytest

from launch.bench import gpu, gpu_report, gpu_work, programs, timing
from launch.bench.gpu_report import Section
from launch.bench.gpu_work import Case, Check
from launch.bench.results import Row


@pytest.fixture
def bench():
  return gpu.Bench(is_tiny=True, until=time.monotonic() + 60)


@pytest.mark.slow
def test_the_command_on_a_cpu(tmp_path):
  """Every section of the tiny run ends, and every check is right."""
  path = tmp_path / "gpu.json"
  done = processes.start("--tiny", f"--json={path}", module="launch.bench.gpu")
  assert done.returncode == 0, done.stdout + done.stderr[-3000:]
  found = json.loads(path.read_text())
  assert [section["state"] for section in found["sections"]] == ["done"] * len(gpu.ORDER)
  assert all(check["is_right"] for section in found["sections"] for check in section["checks"])
  rows = [row for section in found["sections"] for row in section["rows"]]
  assert len(rows) == 7
  for row in rows:
    assert row["tokens_per_second"] == pytest.approx(row["amount"] / row["seconds"])
    assert row["share_of_products"] == pytest.approx(row["flops_per_second"] / found["products_flops_per_second"])
  assert rows[0]["amount"] == 4 * 4 * (6 + 8)  # rollouts, masks, positions
  assert rows[0]["name"] in done.stdout
  assert "NeMo AutoModel" in done.stdout


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
  done = processes.start(f"--json={tmp_path}/gpu.json", module="launch.bench.gpu")
  assert done.returncode == 2
  (line,) = [line for line in done.stderr.splitlines() if "left" not in line]
  assert line.startswith("error: JAX finds no NVIDIA GPU (")
  assert "--tiny" in line
  assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize("is_tiny", [False, True])
def test_all_sizes_are_valid_configurations(is_tiny):
  programs.check(gpu.sampler_config(is_tiny))
  for name, quantization in gpu.ORDER:
    for keys in gpu.PROGRAMS[name].tries if name in gpu.PROGRAMS else ():
      config = gpu.llada(is_tiny, quantization, keys)
      programs.check(config)
      assert programs.calls_of("accumulate", config) == programs.calls_of("sample", config) == 1
      assert (config.model.quantization, config.model.dtype) == (quantization, "bfloat16")
      assert config.model.lora.rank == (2 if is_tiny else 128)


def test_out_of_memory_takes_smaller_sizes_and_says_so(bench, monkeypatch):
  asked = []

  def run_in_turns(makers, repeats, *, say, start):
    ((name, (_, (_, config))),) = makers.items()
    asked.append((config.rollout.group_size, config.model.remat, config.model.layer_rows))
    if len(asked) == 1:
      raise timing.ContenderFailed("update: ... RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
    return {name: timing.Timing((2.0, 1.0, 3.0), None, {"held_bytes": 70, "planned_bytes": 60, "flops": 8e12})}

  monkeypatch.setattr(timing, "run_in_turns", run_in_turns)
  section = gpu.run_section("update", "none", bench)
  assert asked == [(4, "dots", 0), (4, "full", 16)]
  assert section.note == "out of memory with 4 rollouts, remat dots, layer_rows 0"
  (row,) = section.rows
  assert row.name == "update, bfloat16 base, 4 rollouts, remat full"
  assert (row.amount, row.peak_bytes, row.planned_bytes) == (4 * 4 * 14, 70, 60)
  figures = gpu_report.figures(row, peak=16e12)
  assert (figures["seconds"], figures["flops_per_second"], figures["share_of_products"]) == (2.0, 4e12, 0.25)


def test_a_section_that_fails_is_reported(bench, monkeypatch, capsys):
  def run_in_turns(makers, repeats, *, say, start):
    raise timing.ContenderFailed("rollouts: Traceback ...\nXlaRuntimeError: INTERNAL: no engine")

  monkeypatch.setattr(timing, "run_in_turns", run_in_turns)
  section = gpu.run_section("rollouts", "int8", bench)
  assert (section.name, section.state) == ("rollouts, int8 base", "failed")
  assert "no engine" in capsys.readouterr().err
  late = gpu.Bench(is_tiny=False, until=time.monotonic() + 1)
  assert gpu.run_section("rollouts", "int8", late).state == "skipped"
  over = gpu.Bench(is_tiny=True, until=time.monotonic() - 1)
  assert gpu.run_section("rollouts", "int8", over).state == "stopped"


def test_a_process_whose_time_is_over_is_killed():
  start = time.monotonic()
  with pytest.raises(timing.ContenderFailed, match="sleep: its time is over"):
    timing.facts_of(gpu_makers.sleep, (60,), timing.Start(until=start + 0.2))
  assert time.monotonic() - start < 30


def test_a_wrong_result_is_noticed(bench, monkeypatch):
  exact = np.linspace(-1, 1, 64, dtype=np.float32)
  numbers = {"good": (exact + 0.01, exact + 0.001, exact), "rough": (exact + 0.05, exact + 0.03, exact)}
  numbers |= {"bad": (exact + 0.05, exact + 0.001, exact), "none": (exact * math.nan, exact, exact)}
  checks = {check.what: check for check in gpu_work.check_rounded(numbers)}
  assert {name for name, check in checks.items() if check.is_right} == {"good", "rough"}
  assert checks["good"].tolerance == gpu_work.TOLERANCE
  assert checks["rough"].tolerance == pytest.approx(0.06, rel=1e-3)
  monkeypatch.setattr(gpu, "check_samplers", lambda bench: Section("samplers", checks=[Check("wino", 0.1, 0.0)]))
  assert gpu.run_section("samplers", "", bench).state == "wrong"


def test_attention_is_compared_with_its_definition():
  """The rounded inputs are the same for all, so float32 against itself has no error, and bfloat16 a small one."""
  case = Case("padded", rows=3, queries=5, keys=7, heads=4, kv_heads=2, head_dim=8)
  checks = gpu_work.check_attention(case, "xla")
  assert [check.what.rpartition(": ")[2] for check in checks] == list(gpu_work.GRADIENTS)
  assert all(0 < check.error <= check.tolerance for check in checks)
  arrays, is_key = gpu_work._attention_inputs(case)
  assert is_key.sum(1).tolist() == [7, 4, 1]
  other = gpu_work._attention("xla")(*arrays, is_key.at[:, -1].set(False).at[:, 0].set(True))
  right = gpu_work._attention("xla")(*arrays, is_key)
  (check,) = gpu_work.check_rounded({"with other keys": (other[0], right[0], right[0])})
  assert not check.is_right


def test_the_tables_have_everything(capsys):
  row = Row("update", (2.0,), 100.0, "tokens", 2**30, None, 400e12)
  sections = [
    Section("products", facts={"flops_per_second": 800e12}),
    Section("attention", state="wrong", checks=[Check("kernel", 0.5, 0.02)], facts={"seconds": {"cudnn": 0.001}}),
    Section("update", rows=[row]),
    Section("scores", state="failed", note="Traceback\nValueError: why"),
  ]
  gpu_report.show({"device": "H100"}, sections, is_tiny=False)
  shown = capsys.readouterr().out
  for text in (
    "800.0 TFLOP/s, 81% of",
    "cudnn: 1.00 ms",
    "WRONG",
    "1,024 MiB",
    "200.0",
    "25%",
    "20%",
    "ValueError: why",
  ):
    assert text in shown
  found = gpu_report.as_json({}, sections, is_tiny=False)
  assert found["sections"][2]["rows"][0]["share_of_products"] == 0.25
  assert found["sections"][1]["checks"] == [{"what": "kernel", "error": 0.5, "tolerance": 0.02, "is_right": False}]
