"""The rehearsal: what it makes small, the checkpoint that it makes, and that its checks see what is wrong."""

import importlib
import json
import signal

import numpy as np
import pytest
from etils import epath
from programs import begin, finish
from remains import rows_of

from dmpo_jax import evaluate, train
from dmpo_jax.config import flatten, validate
from dmpo_jax.hub import layout
from dmpo_jax.hub.export import ModelExport
from dmpo_jax.hub.families import family_of
from dmpo_jax.hub.model_config import model_config_from_hf
from dmpo_jax.hub.shards import Shards
from dmpo_jax.hub.tokenizer import HuggingFaceTokenizer
from launch import convert_hf, export_hf
from launch.outcome import compare
from launch.rehearse import bucket, checkpoint, checks, jobs, task
from launch.rehearse.jobs import Failed
from launch.rehearse.shrink import shrink

NAMES = ("llada_8b", "llada_8b_official", "dream_7b", "llada_moe_7b", "llada2_mini")


def small(name, folder, **overrides):
  """A configuration, shrunk, and what was changed in it."""
  config = importlib.import_module(f"configs.{name}").get_config()
  with config.unlocked():
    config.update_from_flattened_dict(overrides)
    changes = shrink(config)
    config.update_from_flattened_dict({path: new for path, (_, new) in changes.items()})
    config.task.name, config.model.init_from = "launch/rehearse/task.py", str(folder)
  return config, changes


@pytest.mark.parametrize("name", NAMES)
def test_a_shrunk_configuration_is_valid_and_keeps_its_structure(tmp_path, name):
  config, changes = small(name, tmp_path)
  validate(config)
  scale = ("model", "task.num", "sampler", "rollout", "train", "eval", "optim.warmup", "checkpoint", "grading.workers")
  assert all(path.startswith(scale) for path in changes)
  assert not any(isinstance(old, str | bool) for old, _ in changes.values())
  before, after = importlib.import_module(f"configs.{name}").get_config(), config
  assert after.model.num_heads / after.model.num_kv_heads == before.model.num_heads / before.model.num_kv_heads
  assert after.model.lora.alpha / after.model.lora.rank == before.model.lora.alpha / before.model.lora.rank
  steps_a_token = before.sampler.steps / before.sampler.completion_length
  assert after.sampler.steps / after.sampler.completion_length == steps_a_token
  assert after.sampler.completion_length // after.sampler.block_length == 2
  assert len(after.eval.lengths) == len(before.eval.lengths)


def test_the_published_widths():
  changes = shrink(importlib.import_module("configs.llada_8b").get_config())
  assert changes["model.d_model"] == (4096, 64)
  assert changes["model.mlp_hidden_size"] == (12288, 192)
  assert changes["train.microbatch_prompts"] == (2, 4)
  assert changes["eval.lengths"] == ((128, 256, 512), (8, 16, 32))


@pytest.mark.parametrize(
  ("overrides", "wanted"),
  [
    ({"sharding.tensor": 8}, {"model.num_kv_heads": 8, "model.d_model": 128}),
    ({"model.lora.rank": 0}, {"model.lora.rank": 0, "model.lora.alpha": 64.0}),
    ({"model.num_layers": 1, "train.num_buffers": 1}, {"model.num_layers": 1, "train.num_buffers": 3}),
    ({"rollout.chunk_prompts": 4}, {"rollout.chunk_prompts": 4}),
    ({"rollout.chunk_prompts": 32}, {"rollout.chunk_prompts": 8}),
    (
      {"rollout.chunk_prompts": 1, "rollout.chunk_rollouts": 8},
      {"rollout.chunk_prompts": 1, "rollout.chunk_rollouts": 2, "rollout.group_size": 4},
    ),
    ({"eval.batch_size": 64}, {"eval.batch_size": 8, "eval.num_prompts": 16}),
    ({"eval.num_prompts": 0}, {"eval.num_prompts": 16}),
    ({"model.d_model": None, "model.num_heads": None, "model.num_kv_heads": None}, {"model.d_model": None}),
    ({"sampler.block_length": 256, "sampler.steps": 256}, {"sampler.block_length": 16, "sampler.steps": 16}),
    ({"train.updates_per_buffer": 1}, {"train.updates_per_buffer": 1}),
    ({"model.vocab_size": 100, "model.embedding_size": 128}, {"model.vocab_size": 504, "model.embedding_size": 512}),
  ],
)
def test_what_is_small_already_or_tied_to_another_key(tmp_path, overrides, wanted):
  config, _ = small("llada_8b", tmp_path, **overrides)
  values = flatten(config)
  assert {path: values[path] for path in wanted} == wanted
  validate(config)


@pytest.mark.parametrize("name", ["llada_8b", "dream_7b", "llada_moe_7b", "llada2_mini"])
def test_the_checkpoint_is_one_of_the_family_with_a_tokenizer_that_fits(tmp_path, name):
  config, _ = small(name, tmp_path)
  count = checkpoint.write(tmp_path / "hf", config)
  about = json.loads((tmp_path / "hf" / "config.json").read_text())
  model = model_config_from_hf(about)
  assert (model.d_model, model.shift_logits) == (config.model.d_model, bool(config.model.shift_logits))
  stored = Shards(epath.Path(tmp_path / "hf")).tensors
  assert sum(int(np.prod(tensor.shape)) for tensor in stored.values()) == count
  places = layout.checkpoint_places(model, family_of(about))
  layout.check_tensors({key: tensor.shape for key, tensor in stored.items()}, places, "hf")
  tokenizer = HuggingFaceTokenizer(tmp_path / "hf", is_chat=True)
  assert tokenizer.mask_token_id == model.mask_token_id
  assert tokenizer.eot_token_id != tokenizer.eos_token_id
  text = task.prompt(task.records("test")[0])
  ids = tokenizer.encode_prompt(text)
  assert len(ids) <= config.task.max_prompt_length
  assert text in tokenizer.decode(ids)


def test_the_tasks_rewards_differ():
  record = task.records("train")[0]
  assert task.reward(record, "aei, bcd") == 3 / 8
  assert task.reward(record, "") == 0
  numbers = {split: {one["number"] for one in task.records(split)} for split in ("train", "test")}
  assert [len(found) for found in numbers.values()] == [64, 16]
  assert not numbers["train"] & numbers["test"]


def left(folder, steps=(0, 1, 2), rewards=((0.1, 0.2), (0.3, 0.2)), indices=(0, 1, 2)):
  """What a finished run leaves, as far as checks look at it."""
  workdir = epath.Path(folder)
  (workdir / "generations").mkdir(parents=True)
  rows = [{"phase": "train", "step": step} for step in steps]
  for row, (mean, std) in zip(rows[1:], rewards, strict=False):
    row |= {"reward_mean": mean, "reward_std": std}
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (workdir / "result.json").write_text(json.dumps({"evaluations": {"0": {}}}))
  lines = "".join(json.dumps({"index": index}) + "\n" for index in indices)
  (workdir / "generations" / "000000.jsonl").write_text(lines)
  return workdir


def test_what_is_whole_passes(tmp_path):
  workdir = left(tmp_path / "run")
  assert checks.last_row(workdir) == 2
  assert checks.rows_in_order(workdir, 2) == "rows 0 to 2 once, in order"
  assert checks.rewards(workdir, must_vary=True) == "mean rewards 0.100 to 0.300"
  assert checks.generations(workdir, 3) == "1 evaluations of 3 prompts each"
  assert checks.last_row(epath.Path(tmp_path / "absent")) == -1


@pytest.mark.parametrize("steps", [(0, 1), (0, 1, 1, 2), (0, 2, 1), (0, 1, 2, 3)])
def test_rows_that_are_lost_or_twice_or_out_of_order(tmp_path, steps):
  with pytest.raises(Failed, match="rows in order"):
    checks.rows_in_order(left(tmp_path / "run", steps=steps), 2)


@pytest.mark.parametrize("indices", [(0, 1), (0, 1, 1, 2), (0, 1, 3), ()])
def test_prompts_that_are_lost_or_twice(tmp_path, indices):
  with pytest.raises(Failed, match="every prompt once"):
    checks.generations(left(tmp_path / "run", indices=indices), 3)


@pytest.mark.parametrize("rewards", [((0.0, 0.0), (0.0, 0.0)), ((0.1, 0.2), (0.1, 0.2)), ((0.1, 0.0), (0.2, 0.1))])
def test_rewards_that_are_all_the_same(tmp_path, rewards):
  workdir = left(tmp_path / "run", rewards=rewards)
  with pytest.raises(Failed, match="rewards vary"):
    checks.rewards(workdir, must_vary=True)
  assert "equal, so nothing is learned" in checks.rewards(workdir, must_vary=False)


def test_an_evaluation_that_lacks_a_setting(tmp_path):
  workdir = left(tmp_path / "run")
  (workdir / "evaluation").mkdir()
  rows = [{"task": "sudoku", "policy": "last", "num_prompts": 3}] * 2
  (workdir / "evaluation" / "result.json").write_text(json.dumps(rows))
  assert checks.evaluations(workdir, {"sudoku": 3}, 2) == "2 settings on 3 prompts of sudoku"
  for arguments in (({"sudoku": 3}, 3), ({"sudoku": 3, "countdown": 3}, 2), ({"sudoku": 4}, 2)):
    with pytest.raises(Failed, match="evaluation complete"):
      checks.evaluations(workdir, *arguments)


def test_one_bit_is_a_difference():
  one, other = np.array([0.0, 1.0], np.float32), np.array([-0.0, 1.0], np.float32)
  assert compare({"a": one, "row": {"x": 1}}, {"a": one.copy(), "row": {"x": 1}}) == ""
  assert compare({"a": one}, {"a": other}) == "a differs"
  assert compare({"a": one}, {"a": one.astype(np.float64)}) == "a differs"
  assert compare({"a": one}, {}) == "a is missing in one of them"


@pytest.fixture
def hosts(tmp_path):
  return jobs.Hosts(2, 1, 2, tmp_path / "hosts", {})


def run_module(monkeypatch, tmp_path, hosts, program):
  """Processes of a module that is written for the test; it sees its number as the last argument."""
  monkeypatch.setattr(jobs, "ROOT", tmp_path)
  (tmp_path / "told.py").write_text(program)
  return jobs.running("told", [], hosts, tmp_path / "logs")


def test_hosts_have_folders_of_their_own_and_exit_codes_are_as_a_shell_tells_them(monkeypatch, tmp_path, hosts):
  program = (
    "import os, sys, time; print(os.environ['TMPDIR']); sys.exit(7) if sys.argv[-1][-1] == '0' else time.sleep(60)"
  )
  with run_module(monkeypatch, tmp_path, hosts, program) as job:
    job.processes[0].wait(60)
    job.signal(1, signal.SIGKILL)
    assert job.codes(60) == [7, 137]
  assert job.output().strip() == str(tmp_path / "hosts" / "host0")
  with pytest.raises(Failed, match=r"exit codes \[7, 137\] where \[0, 137\]") as failed:
    job.expect([0, 137], 60)
  assert failed.value.log == tmp_path / "logs" / "process0.log"


def test_a_process_that_hangs_is_named_and_ended(monkeypatch, tmp_path, hosts):
  with run_module(monkeypatch, tmp_path, hosts, "import time; time.sleep(60)") as job:
    with pytest.raises(Failed, match="process 0 did not end within"):
      job.codes(0.1)
    with pytest.raises(Failed, match=r"waiting for news: not in"):
      job.wait_for("news", lambda: False, 0.1)
  assert all(process.returncode == -signal.SIGKILL for process in job.processes)


def test_a_process_that_ends_while_something_is_waited_for(monkeypatch, tmp_path, hosts):
  with run_module(monkeypatch, tmp_path, hosts, "raise SystemExit(3)") as job:  # noqa: SIM117
    with pytest.raises(Failed, match=r"waiting for news: process . ended with 3"):
      job.wait_for("news", lambda: False, 60)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (("--config=configs/llada_8b.py", "--processes=3"), "--processes=3: must be even"),
    (("--config=configs/llada_8b.py", "--workdir=runs/x"), "--workdir=runs/x: must be a gs:// path"),
    (("--config=configs/llada_8b.py", "--out=tests"), "--out=tests exists and is not the folder of a rehearsal"),
    (("--config=configs/sudoku_tiny.py",), "config.tokenizer.name = 'sentencepiece': must be 'huggingface'"),
    (
      ("--config=configs/llada_8b.py", "--config.model.init_from=tests"),
      "config.model.init_from = 'tests': must be ''",
    ),
    (("--config=configs/llada_8b.py", "--config.sampler.name=magic"), "config.sampler.name = 'magic'"),
    (("--config=configs/llada_8b.py", "now"), "unknown argument 'now'"),
    ((), "--config"),
  ],
)
def test_mistakes_are_named(tmp_path, options, message):
  out = () if any(option.startswith("--out=") for option in options) else (f"--out={tmp_path / 'out'}",)
  done = finish(begin(*options, *out, module="launch.rehearse"), timeout=120)
  assert done.returncode == 2, done.stderr[-2000:]
  assert message in done.stderr
  assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
  ("workdir", "message"),
  [
    ("gs://bucket/used", "--workdir=gs://bucket/used is not empty: give a new path, or remove it"),
    ("gs://absent/new", "--workdir=gs://absent/new: there is no bucket absent"),
  ],
)
def test_a_bucket_of_the_users_is_asked_first(monkeypatch, tmp_path, workdir, message):
  with bucket.running(("bucket",), tmp_path / "bucket") as emulator:
    emulator.buckets.put("bucket", "used/file", b"", {})
    for name, value in emulator.environment.items():
      monkeypatch.setenv(name, value)
    options = ("--config=configs/llada_8b.py", f"--out={tmp_path / 'out'}", f"--workdir={workdir}")
    done = finish(begin(*options, module="launch.rehearse"), timeout=120)
  assert done.returncode == 2, done.stderr[-2000:]
  assert message in done.stderr
  assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_whole_way(tmp_path):
  """As a user runs it before renting a pod."""
  options = ("--config=configs/llada_8b.py", "--processes=4", "--devices=4", f"--out={tmp_path / 'out'}")
  done = finish(begin(*options, module="launch.rehearse"), timeout=1800)
  assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
  assert "undisturbed" in done.stdout  # of a cell whose text is broken somewhere
  assert done.stdout.count("once, in order") == 2


@pytest.mark.slow
def test_a_configuration_with_experts_trains_evaluates_and_exports(tmp_path, use_devices):
  """The command of configs/llada_moe_7b.py at a small size: two buffers, an evaluation, and adapters merged."""
  use_devices(1)
  fewer = {"model.num_experts": 8, "model.experts_per_token": 2, "model.remat": "none", "model.layer_rows": 0}
  fewer |= {"model.dtype": "float32", "model.param_dtype": "float32"}
  config, _ = small("llada_moe_7b", tmp_path / "checkpoint", **fewer)
  with config.unlocked():
    config.update_from_flattened_dict(
      {
        "sampler.completion_length": 8,
        "sampler.block_length": 8,
        "sampler.steps": 2,
        "rollout.num_prompts": 2,
        "rollout.group_size": 2,
        "rollout.chunk_prompts": 0,
        "objective.num_mask_samples": 2,
        "objective.num_elbo_samples": 2,
        "train.microbatch_prompts": 0,
        "train.num_buffers": 2,
        "train.updates_per_buffer": 1,
        "eval.num_prompts": 4,
        "eval.batch_size": 4,
        "eval.lengths": (),
      }
    )
  checkpoint.write(tmp_path / "hf", config)
  convert_hf.run(str(tmp_path / "hf"), None, epath.Path(tmp_path / "checkpoint"), None, "same")
  workdir, back = epath.Path(tmp_path / "run"), epath.Path(tmp_path / "back")
  train.main(config, workdir)
  evaluate.main(config, workdir)
  rows = rows_of(workdir)
  assert [row["step"] for row in rows] == [0, 1, 2]
  number, each = config.model.num_experts, config.model.experts_per_token
  for row in rows[1:]:
    assert row["grad_norm"] > 0
    assert 1 <= row["router_max_load"] <= number / each
    assert 0 < row["router_entropy"] <= np.log(number) + 1e-5
    assert np.log(each) <= row["router_load_entropy"] <= np.log(number) + 1e-5
  assert len(json.loads((workdir / "evaluation" / "result.json").read_text())) == 2  # of the last and the best policy
  ModelExport(export_hf.find_run(workdir), "same").write(back, 10**9)
  before, after = Shards(epath.Path(tmp_path / "hf")), Shards(back)
  assert before.tensors.keys() == after.tensors.keys()
  changed = {name for name in before if not np.array_equal(before[name], after[name])}
  assert {name.split(".")[-2] for name in changed} == {"q_proj", "k_proj", "v_proj", "o_proj"}
