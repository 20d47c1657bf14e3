"""The program as a user starts it: help, mistakes in one message, and the smoke run from beginning to end."""

import json
import re

import jax
import pytest
from etils import epath
from programs import ROOT, start

from dmpo_jax import main


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return tmp_path_factory.mktemp("main") / "smoke"


def test_help_names_the_flags():
  done = start("--help")
  assert done.returncode == 0
  assert "--config" in done.stdout
  assert "--workdir" in done.stdout
  assert "python -m dmpo_jax.main --config=configs/sudoku_tiny.py" in done.stdout


def test_every_mistake_is_listed_before_anything_starts(workdir):
  done = start(
    "--config=configs/smoke.py",
    f"--workdir={workdir}",
    "--config.objective.wdce.baseline=negativ",
    "--config.sampler.block_length=5",
    "--config.optim.clip_norm=-1.0",
  )
  assert done.returncode == 2
  assert "3 problems in the configuration" in done.stderr
  assert "config.objective.wdce.baseline = 'negativ'" in done.stderr
  assert "did you mean 'negative'?" in done.stderr
  assert "config.sampler.block_length = 5" in done.stderr
  assert "config.optim.clip_norm = -1.0" in done.stderr
  assert "Traceback" not in done.stderr
  assert not workdir.exists()


# words in what libraries print as they start: Abseil's and TensorFlow's log lines, warnings
LIBRARIES = {"WARNING", "InitializeLog", "oneDNN", "tensorflow", "TensorFlow", "orbax", "Warning", "UserWarning"}
SHORT = ("--config.sampler.completion_length=8", "--config.sampler.block_length=8")


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (("--config=configs/bench.py:foo",), "configs/bench*.py:foo: must be one of sudoku, countdown"),
    (("--config=configs/smoke.py", "--config.task.max_prompt_length=5"), "task.max_prompt_length=5"),
    (("--config=configs/smoke.py", "--mode=eval"), "holds no finished policy"),
    (("--config=tests/tiny.py", *SHORT), "sampler.completion_length=8: the demonstration '4302214300201034' has 16"),
    (("--config=tests/tiny.py", "--mode=sample", "--prompt=1"), "holds no finished policy"),
  ],
)
def test_a_mistake_reads_as_one_message(tmp_path, args, message):
  done = start(f"--workdir={tmp_path / 'run'}", *args)
  assert done.returncode == 2
  assert message in done.stderr
  assert "Traceback" not in done.stderr
  assert "\n" not in done.stderr.strip()
  assert not any((tmp_path / "run").glob("*"))


def test_a_mistake_shows_where_it_was_found_when_asked(tmp_path):
  done = start("--config=configs/absent.py", f"--workdir={tmp_path / 'run'}", "--traceback")
  assert done.returncode == 2
  assert "Traceback" in done.stderr
  assert "error: " in done.stderr


@pytest.mark.parametrize("from_environment", [False, True])
def test_compiled_programs_are_kept_beside_the_workdir(tmp_path, monkeypatch, from_environment):
  """Without being asked to, and elsewhere only where the environment says so."""
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
  if not from_environment:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  changed = {}
  monkeypatch.setattr(main.jax.config, "update", changed.__setitem__)
  main.keep_compiled_programs(epath.Path(tmp_path / "run"))
  wanted = {
    "jax_compilation_cache_dir": str(tmp_path / ".jax_cache"),
    "jax_persistent_cache_min_compile_time_secs": 0,
  }
  assert changed == ({} if from_environment else wanted)


@pytest.mark.parametrize("workdir", ["gs://bucket/run", "gs://bucket"])
def test_compiled_programs_of_a_bucket_are_kept_in_it(monkeypatch, workdir):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  changed = {}
  monkeypatch.setattr(main.jax.config, "update", changed.__setitem__)
  main.keep_compiled_programs(epath.Path(workdir))
  assert changed == {"jax_compilation_cache_dir": "gs://bucket/.jax_cache"}


@pytest.mark.slow
def test_the_smoke_run_from_beginning_to_end(workdir):
  command = ("--config=configs/smoke.py", f"--workdir={workdir}")
  first = start(*command)
  assert first.returncode == 0, first.stderr[-2000:]
  result = json.loads((workdir / "result.json").read_text())
  assert "after wdce" in first.stdout
  assert str(workdir / "policy") in first.stdout
  assert "3 buffers of 32 rollouts, 6 updates" in first.stdout
  assert "warm start 20/20" in first.stderr
  assert "loss" in first.stderr
  assert not (LIBRARIES & set(re.findall(r"\w+", first.stdout + first.stderr))), "a library printed something"
  second = start(*command, "--quiet")
  assert second.returncode == 0
  assert "has finished its 3 buffers: nothing left to do" in second.stdout
  assert json.loads((workdir / "result.json").read_text()) == result
  other = start(*command, "--config.objective.alpha=0.5")
  assert other.returncode == 2
  assert "config.objective.alpha: 0.05 -> 0.5" in other.stderr
  evaluation = start(*command, "--mode=eval")
  assert evaluation.returncode == 0, evaluation.stderr[-2000:]
  assert "By <code>--mode=eval</code>, the best first" in (workdir / "report.html").read_text()
  left = {path.name + "/" * path.is_dir() for path in workdir.iterdir()}
  assert {name for name in left if f"`{name}`" not in (ROOT / "docs" / "runs.md").read_text()} == set()
  again = {row["policy"]: row for row in json.loads((workdir / "evaluation" / "result.json").read_text())}
  for policy in ("last", "best"):
    assert again[policy]["solve_rate"] == result[policy]["solve_rate"]
    assert again[policy]["reward_mean"] == result[policy]["reward_mean"]
    assert again[policy]["is_as_in_training"]
  command += ("--mode=sample", "--config.sampler.name=wino")  # the sampler is none of the run's business
  (workdir / "prompts.txt").write_text("1234\n4321\n")
  with (workdir / "prompts.txt").open() as pipe:
    sampled = start(*command, "--json", stdin=pipe)
  assert sampled.returncode == 0, sampled.stderr[-2000:]
  lines = [json.loads(line) for line in sampled.stdout.splitlines()]
  assert [line["prompt"] for line in lines] == ["1234", "4321"]
  assert lines[0].keys() == {
    *("prompt", "ids", "text", "calls", "tokens_per_call", "tokens_per_second", "confidence"),
  }


def test_a_full_device_is_no_crash_of_another_process():
  full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes.\nand a page of buffers")
  code, said = main._explain(full)
  assert code == 1
  assert said.startswith("out of device memory: RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes.\n")
  assert "buffers" not in said
  for key in ("rollout.chunk_prompts", "train.microbatch_prompts", "model.layer_rows", "model.remat"):
    assert key in said
  assert main._explain(jax.errors.JaxRuntimeError("INTERNAL: something")) == (1, "")  # alone, its traceback says more
