"""The whole story on a tiny run: resume bit for bit, adapters, supervised training, and stopping when it diverges."""

import json
import shutil

import docs_check
import documents
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from etils import epath
from programs import start
from remains import die_at_save, leave_alone, policy_of, rows_of
from standin_tokenizer import DREAM_CONFIG, DREAM_TEMPLATE
from standin_tokenizer import write as write_tokenizer

from dmpo_jax import train
from dmpo_jax.config import ConfigError
from dmpo_jax.files import Unreadable
from dmpo_jax.objectives import weights
from dmpo_jax.run import metrics
from dmpo_jax.run import params as params_lib


def config(**overrides):
  """Without a baseline every rollout is learned from: rewards of a policy at random may all be the same."""
  return tiny.config(**{"objective__wdce__baseline": "none"} | overrides)


@pytest.fixture(autouse=True)
def one_device(use_devices):
  use_devices(1)


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
  """A run that nothing interrupts."""
  workdir = leave_alone(config(), tmp_path_factory.mktemp("left_alone"))
  assert rows_of(workdir)[-1]["grad_norm"] > 0
  return workdir


def test_a_run_writes_what_it_promises(left_alone):
  rows = rows_of(left_alone)
  assert [(row["phase"], row["step"]) for row in rows] == [
    *(("warm_start", step) for step in (1, 2, 3)),
    *(("train", step) for step in (0, 1, 2, 3)),
  ]
  result = json.loads((left_alone / "result.json").read_text())
  assert result["base"]["num_prompts"] == 16
  assert result["last"] == result["evaluations"]["3"]
  assert {
    "reward_mean",
    "solve_rate",
    "effective_sample_size",
    "log_ratio_error",
    "entropy",
    "grad_norm",
    "prompts_cut",
    "prompts_skipped",
  } <= set(rows[-1])
  generations = (left_alone / "generations" / "000003.jsonl").read_text().splitlines()
  assert len(generations) == 16
  assert {"index", "record", "prompt", "completion", "extracted", "reward", "is_solved"} <= set(
    json.loads(generations[0])
  )
  for folder in ("policy", "best"):
    about = params_lib.read_metadata(left_alone / folder)
    assert about["buffers"] == 3
    assert about["base"] == params_lib.identity(left_alone / "base")
  assert "embedding" in (left_alone / "parameters.txt").read_text()


def test_a_finished_run_says_so_and_does_nothing(left_alone, capsys):
  before = (left_alone / "metrics.jsonl").read_text()
  train.main(config(), left_alone)
  assert "nothing left to do" in capsys.readouterr().out
  assert (left_alone / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("saves_before_the_end", [2, 5, 6])
def test_an_interrupted_run_ends_as_if_left_alone(left_alone, tmp_path, monkeypatch, saves_before_the_end):
  """Cut off in the warm start, in the middle of a buffer, and between two buffers."""
  workdir = epath.Path(tmp_path / "run")
  with monkeypatch.context() as patch:
    die_at_save(patch, saves_before_the_end)
    with pytest.raises(KeyboardInterrupt):
      train.main(config(), workdir)
  train.main(config(), workdir)
  jax.tree.map(np.testing.assert_array_equal, policy_of(workdir), policy_of(left_alone))
  assert rows_of(workdir) == rows_of(left_alone)


@pytest.mark.slow
@pytest.mark.parametrize(("saves_before_the_end", "step"), [(6, 3), (7, 4)])
def test_a_run_that_has_more_than_it_is_asked_for_ends(left_alone, tmp_path, monkeypatch, saves_before_the_end, step):
  """With the buffer that it was learning from, or at once between two; and it can go on from there."""
  workdir = epath.Path(tmp_path / "run")
  with monkeypatch.context() as patch:
    die_at_save(patch, saves_before_the_end)
    with pytest.raises(KeyboardInterrupt):
      train.main(config(), workdir)
  steps = [int(path.name) for path in (workdir / "checkpoints" / "train").iterdir() if path.name.isdigit()]
  assert max(steps) == step
  train.main(config(train__num_buffers=1), workdir)
  result = metrics.read_result(workdir)
  assert result["buffers"] == 2
  assert list(result["evaluations"]) == ["0", "2"]
  assert result["last"] == result["evaluations"]["2"]
  assert [row["step"] for row in rows_of(workdir) if row["phase"] == "train"] == [0, 1, 2]
  train.main(config(), workdir)
  jax.tree.map(np.testing.assert_array_equal, policy_of(workdir), policy_of(left_alone))
  of_run, of_other = (metrics.read_result(each)["last"] for each in (workdir, left_alone))
  assert of_run["reward_mean"] == of_other["reward_mean"]


def test_a_checkpoint_goes_on_from_its_own_base_only(left_alone, tmp_path):
  workdir = epath.Path(tmp_path / "run")
  shutil.copytree(left_alone, workdir)
  base = ocp.StandardCheckpointer().restore((left_alone / "base").resolve())
  params_lib.save_params(workdir / "base", jax.tree.map(lambda x: x + 1, base))
  before = rows_of(workdir)
  with pytest.raises(ConfigError, match=r"was trained from the base \w+, and this one is \w+: give --workdir a new"):
    train.main(config(train__num_buffers=4), workdir)
  assert rows_of(workdir) == before


def test_a_base_that_is_not_whole_is_written_again_unless_training_began_from_it(left_alone, tmp_path):
  shutil.copytree(left_alone, tmp_path / "run")
  workdir = epath.Path(tmp_path / "run")
  (workdir / "result.json").unlink()
  (workdir / "base").rmtree()
  (workdir / "base").mkdir()
  with pytest.raises(Unreadable, match=r"base holds no whole parameters.*put a copy"):
    train.main(config(), workdir)
  (workdir / "checkpoints" / "train").rmtree()
  train.main(config(), workdir)
  jax.tree.map(np.testing.assert_array_equal, policy_of(workdir), policy_of(left_alone))


@pytest.mark.slow
def test_more_buffers_go_on_from_a_finished_run(left_alone, tmp_path):
  workdir = epath.Path(tmp_path / "run")
  train.main(config(train__num_buffers=2), workdir)
  train.main(config(), workdir)
  jax.tree.map(np.testing.assert_array_equal, policy_of(workdir), policy_of(left_alone))


@pytest.mark.slow
def test_adapters_are_all_that_a_lora_run_saves(tmp_path):
  workdir = epath.Path(tmp_path / "run")
  train.main(config(model__lora__rank=2, train__num_buffers=1), workdir)
  policy = policy_of(workdir)
  assert set(policy["blocks"]) == {"q_proj", "k_proj", "v_proj", "up_proj"}
  assert set(policy["blocks"]["q_proj"]) == {"A", "B"}
  assert np.isfinite(policy["blocks"]["q_proj"]["B"]).all()


@pytest.mark.slow
def test_adapters_are_trained_on_an_int8_base(tmp_path, use_devices):
  """With samplers on a mesh of their own, which the base in int8 moves to."""
  use_devices(2)
  workdir = epath.Path(tmp_path / "run")
  own = dict(
    objective__wdce__baseline="none", model__lora__rank=2, train__num_buffers=1
  )  # so that any rewards have weights
  own |= dict(sharding__fsdp=2, sharding__rollout__fsdp=1, sharding__rollout__tensor=2, warm_start__updates=0)
  train.main(tiny.config(model__quantization="int8", **own), workdir)
  policy = policy_of(workdir)
  assert set(policy["blocks"]["q_proj"]) == {"A", "B"}
  assert (policy["blocks"]["q_proj"]["B"] != 0).any()


CHAT_IDS = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258, "<|beginoftext|>": 259, "<|mask|>": 260}


@pytest.mark.slow
def test_the_documented_command_trains_on_chats(tmp_path):
  lines = documents.code("tasks.md", '{"messages"').splitlines()
  rows = [lines[0].replace("2 + 2", f"2 + {n}") for n in range(40)]
  (tmp_path / "chats.jsonl").write_text("\n".join(rows))
  write_tokenizer(tmp_path / "chat", CHAT_IDS, DREAM_CONFIG, DREAM_TEMPLATE)
  found = docs_check.commands((documents.DOCS / "tasks.md").read_text())
  (command,) = [each for each in found if "--config.task.name=chats.jsonl" in each]
  flags = [flag for flag in command.split()[3:] if flag.startswith(("--config.objective", "--config.task"))]
  workdir = epath.Path(tmp_path / "run")
  done = start(
    *(
      "--config=tests/tiny.py",
      f"--workdir={workdir}",
      "--config.warm_start.updates=0",
      "--config.train.num_buffers=6",
    ),
    *(flag.replace("chats.jsonl", str(tmp_path / "chats.jsonl")) for flag in flags),
    *("--config.tokenizer.name=huggingface", f"--config.tokenizer.path={tmp_path}/chat", "--config.tokenizer.is_chat"),
    *(
      "--config.task.max_prompt_length=128",
      "--config.optim.learning_rate=1e-2",
      "--config.train.updates_per_buffer=1",
    ),
    *("--config.train.microbatch_prompts=2", "--config.objective.counted=until_eos"),
  )
  assert done.returncode == 0, done.stderr[-2000:]
  rows = rows_of(workdir)
  assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
  assert rows[-1]["loss"] > 0
  assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]  # on chats that were held out
  assert "reward_mean" not in rows[-1]


def spoil_weights(monkeypatch):
  """Let the weights of every buffer be NaN, and with them every loss."""
  weigh_buffer = weights.weigh_buffer

  def spoiled(*args):
    weighed, figures = weigh_buffer(*args)
    return weighed._replace(weight=weighed.weight * np.nan), figures

  monkeypatch.setattr(weights, "weigh_buffer", spoiled)


def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(tmp_path, monkeypatch):
  own = config(warm_start__updates=0, optim__max_skips_in_a_row=2)
  workdir = epath.Path(tmp_path / "run")
  spoil_weights(monkeypatch)
  with pytest.raises(train.Diverged, match="2 updates in a row"):
    train.main(own, workdir)
  assert (workdir / "checkpoints" / "train" / "2").exists()
  assert metrics.read_result(workdir) is None


def test_a_run_whose_updates_were_all_skipped_has_not_ended_well(tmp_path, monkeypatch):
  own, workdir = config(warm_start__updates=0, train__num_buffers=1), epath.Path(tmp_path / "run")
  spoil_weights(monkeypatch)
  for _ in range(2):  # nor when it is started again
    with pytest.raises(train.Diverged, match="all 2 updates had a loss or gradient that was not finite"):
      train.main(own, workdir)
  assert metrics.read_result(workdir) is None


@pytest.mark.slow
def test_a_run_without_a_signal_says_so(tmp_path, capsys, caplog):
  """While it runs, on the screen at its end, and on its page."""
  workdir = epath.Path(tmp_path / "run")
  own = dict(rollout__group_size=1, rollout__drop_equal_groups=True)
  train.main(config(warm_start__updates=0, train__num_buffers=1, **own), workdir)
  assert "no signal in 1 of 1 buffers: all rewards equal in every group" in capsys.readouterr().out
  assert "buffer 1: no signal: all rewards equal in 4 of 4 groups" in caplog.text
  assert "No signal in 1 of 1 buffers" in (workdir / "report.html").read_text()
  row = rows_of(workdir)[-1]
  wanted = {
    "without_signal": 1,
    "groups_dropped": 4,
    "microbatches": 0,
    "loss": 0,
    "grad_norm": 0,
    "updates_skipped": 0,
  }
  assert {name: row[name] for name in wanted} == wanted
