"""Configurations: every problem in one message, and workdirs that belong to another configuration."""

import dataclasses
import importlib.util
import json
import pathlib

import pytest
from ml_collections import ConfigDict

from configs import base
from dmpo_jax import config as config_lib
from dmpo_jax.config import rules
from dmpo_jax.config.keys import KEYS
from dmpo_jax.run import workdir as workdir_lib
from dmpo_jax.samplers import SAMPLERS, Sampler

CONFIGS = sorted(path.stem for path in pathlib.Path(base.HERE).glob("*.py"))


@pytest.fixture
def config():
  return base.get_config()


def problems(config):
  with pytest.raises(config_lib.ConfigError) as caught:
    config_lib.validate(config)
  count, *lines = str(caught.value).split("\n  ")
  assert count.startswith(f"{len(lines)} problem")
  return lines


@pytest.mark.parametrize("name", [*CONFIGS, "a2d_qwen3_0.6b:full", "a2d_qwen3_0.6b:sft"])
def test_every_config_is_valid(name, tmp_path):
  name, _, settings = name.partition(":")
  spec = importlib.util.spec_from_file_location("a_config", pathlib.Path(base.HERE) / f"{name}.py")
  module = importlib.util.module_from_spec(spec)  # by path, as the flag does it: a name may have a dot
  spec.loader.exec_module(module)
  config = module.get_config(*([settings] if settings else []))
  if not config.tokenizer.path:  # it is for a checkpoint that the user has
    (line,) = problems(config)
    assert "config.tokenizer.path" in line
    config.model.init_from = str(tmp_path)
  config_lib.validate(config)


def test_every_key_of_base_has_a_rule_and_every_rule_a_key(config):
  leaves = config_lib.flatten(config)
  assert KEYS.keys() <= leaves.keys()
  without = [path.split(".") for path in leaves if path not in KEYS]
  assert all(len(keys) == 3 and keys[0] in ("task", "sampler") for keys in without)


@pytest.mark.parametrize(
  ("path", "value", "allowed"),
  [
    ("seed", -1, "a whole number from 0"),
    ("model.num_layers", 0, "a whole number, 1 or more"),
    ("model.num_layers", True, "a whole number, 1 or more"),
    ("model.vocab_size", 2**31, "a whole number, 0 or more, below 2**31"),
    ("model.d_model", 66, "an even multiple of model.num_heads = 4, or give a model.head_dim"),
    ("serve.max_queue", 7, "at least serve.batch_size = 8"),
    ("model.d_model", 60, "an even multiple of model.num_heads = 4"),
    ("model.head_dim", 7, "an even whole number (rotary pairs), or None"),
    ("model.num_kv_heads", 3, "a divisor of model.num_heads = 4"),
    ("sampler.name", "lada", "did you mean 'llada'?"),
    ("model.remat", "some", "one of none, products, dots, attention, full"),
    ("model.quantization", "int4", "one of none, int8"),
    ("model.init_from", "no/such/folder", "the path of a folder of parameters that exists"),
    ("model.lora.targets", ("q_prj",), "did you mean 'q_proj'?"),
    ("model.lora.targets", (), "a tuple of"),
    ("tokenizer.path", "", "the path of a tokenizer, as model.init_from = '' has none"),
    ("tokenizer.path", "no/such/file", "the path of a tokenizer that exists"),
    ("tokenizer.chat_template_kwargs", "enable_thinking=false", "a JSON object of names and values, such as"),
    ("tokenizer.chat_template_kwargs", '{"messages": []}', "a JSON object of names and values, such as"),
    ("tokenizer.chat_template_kwargs", '{"x": 1}', '"", as tokenizer.is_chat = False: plain prompts have no template'),
    ("model.embedding_size", -1, "a whole number, 0 or more"),
    ("task.name", "sudoko", "did you mean 'sudoku'?"),
    ("task.overlong_prompts", "skpi", "did you mean 'skip'?"),
    ("task.name", "no/such/task.py", "or the path of a .py or .jsonl file that exists"),
    ("task.rewards", "publish", "did you mean 'published'?"),
    ("grading.seconds", 0.0, "a number in (0, inf)"),
    ("eval.lengths", (16, 0), "a tuple of whole numbers, 1 or more"),
    ("eval.tasks", ("gsm",), "did you mean 'gsm8k'?"),
    ("sampler.block_length", 5, "a divisor of sampler.completion_length = 16"),
    ("sampler.temperature", float("nan"), "a number in [0, inf)"),
    ("sampler.llada.remasking", "low_confidense", "did you mean 'low_confidence'?"),
    ("sampler.name", "win", "did you mean 'wino'?"),
    ("sampler.guidance", -1.0, "a number in [0, inf)"),
    (
      "sampler.dual_cache.rule",
      "treshold",
      "entropy, dynamic, sequential; did you mean 'threshold'?",
    ),
    ("sampler.freedave.draft_length", 0, "must be 1 or more"),
    ("model.expert_size", 64, "0, () or False, as model.router = 'none': the model has no experts"),
    ("rollout.chunk_prompts", 5, "0 or a divisor of rollout.num_prompts = 32"),
    ("rollout.until_informative", 33, "at most rollout.num_prompts = 32"),
    ("rollout.chunk_rollouts", 3, "0 or a divisor of rollout.group_size = 8"),
    ("rollout.chunk_rollouts", 4, "0, as rollout.chunk_prompts = 0 and rollout.group_size = 8"),
    ("rollout.early_exit", True, 'False unless objective.counted = "until_eos"'),
    ("objective.likelihood", "sampler", "not sampler, as sampler.name = 'llada' gives no log-probabilities"),
    ("objective.kappa", 0.0, "a number in (0, 1]"),
    ("objective.kappa", 1.5, "a number in (0, 1]"),
    ("objective.alpha", 0.0, "a number in (0, inf)"),
    ("objective.part_weights", (1.0, "2"), "a tuple of numbers, or ()"),
    ("objective.num_mask_samples", 3, "even, as objective.antithetic = True"),
    ("objective.num_elbo_samples", 1, "even, as objective.antithetic = True"),
    ("objective.min_mask_ratio", 1.0, "below objective.max_mask_ratio = 1.0"),
    ("rollout.group_size", 0, "a whole number, 1 or more"),
    ("rollout.num_prompts", 9000, "at most task.num_train = 8192"),
    ("train.microbatch_prompts", 5, "0 or a divisor of rollout.num_prompts = 32"),
    ("train.microbatch_prompts", 64, "0 or a divisor of rollout.num_prompts = 32"),
    ("eval.num_prompts", 257, "at most task.num_test = 256"),
    ("sharding.fsdp", 0, "1 or more, or -1"),
    ("sharding.rollout.tensor", -2, "1 or more, or -1 for the devices left, or 0 for that of the updates"),
    ("sharding.fsdp", -1, "a size, as sharding.data = -1"),
    ("checkpoint.keep", 0, "a whole number, 1 or more"),
  ],
)
def test_one_wrong_value_is_one_line(config, path, value, allowed):
  with config.ignore_type():
    config.update_from_flattened_dict({path: value})
  (line,) = problems(config)
  assert line.startswith(f"config.{path} = {value!r}: ")
  assert allowed in line


@pytest.mark.parametrize(
  ("path", "value", "allowed"),
  [
    ("sampler.name", "dual_cache", "one of llada, parallel, entropy_bound, editing, as model.block_length = 16"),
    ("sampler.block_length", 8, "model.block_length = 16, the blocks of the model"),
    ("sampler.guidance", 0.5, "0, as model.block_length = 16"),
    ("model.shift_logits", True, "False, as model.block_length = 16"),
    ("eval.samplers", ("llada", "wino"), "one of llada, parallel, entropy_bound, editing, as model.block_length = 16"),
    ("objective.likelihood", "sampler", "one of one_step, elbo, elbo_quadrature, "),
    ("objective.one_step.prompt_mask_ratio", 0.15, "0, as with model.block_length = 16"),
    ("objective.mask_block_length", 4, "0, as model.block_length = 16"),
  ],
)
def test_what_knows_no_blocks_is_refused_for_models_that_attend_by_them(config, path, value, allowed):
  config.model.block_length = 16
  if path == "objective.one_step.prompt_mask_ratio":
    config.objective.update(likelihood="one_step", one_step={"prompt_mask_ratio": 0.0})
  config_lib.validate(config)
  with config.ignore_type():
    config.update_from_flattened_dict({path: value})
  assert any(line.startswith(f"config.{path} = {value!r}: ") and allowed in line for line in problems(config))


def test_all_problems_stand_in_one_message(config):
  with config.ignore_type():
    config.train.num_buffers = "ten"
    config.optim.learning_rate = "1e-4"
    config.objective.wdce.baseline = "negatve"
    config.sampler.steps = 0
  lines = problems(config)
  assert [line.split(" = ")[0] for line in lines] == [
    "config.sampler.steps",
    "config.objective.wdce.baseline",
    "config.optim.learning_rate",
    "config.train.num_buffers",
  ]
  assert lines[1].endswith("did you mean 'negative'?")


def test_training_and_evaluation_have_one_dtype_policy(config):
  # there is no second base in other numbers to evaluate on
  assert {path for path in config_lib.flatten(config) if "dtype" in path} == {"model.dtype", "model.param_dtype"}


@pytest.mark.parametrize(
  ("path", "value", "reason"),
  [
    ("objective.elbo_rounds", "adaptive", "asks for more of the policy once rewards are known"),
    ("objective.name", "denoise", "learns from demonstrations"),
  ],
)
def test_what_cannot_be_drawn_ahead_is_refused(config, path, value, reason):
  config.rollout.pipelined = True
  config_lib.validate(config)
  config.update_from_flattened_dict({path: value})
  (line,) = problems(config)
  assert line.startswith(f"config.rollout.pipelined = True: False, as {path} = {value!r} {reason}")


@pytest.mark.parametrize(
  ("changes", "path", "allowed"),
  [
    (dict(name="wddo", likelihood="trajectory"), "likelihood", "elbo or sampler, as objective.name = 'wddo'"),
    (dict(name="wdce", likelihood="coupled", num_elbo_samples=3), "likelihood", "one that estimates log p (elbo, "),
    ({"wdce.baseline": "model", "likelihood": "one_step"}, "likelihood", "with objective.wdce.baseline = 'model'"),
    ({"wdce.unlearning": "bounded", "likelihood": "eubo"}, "likelihood", "objective.wdce.unlearning = 'bounded'"),
    ({"wdce.unlearning": "bounded", "mask_block_length": 4}, "mask_block_length", "0, as objective.name = 'wdce'"),
    (dict(name="coupled_grpo", likelihood="coupled"), "num_mask_samples", "odd and 3 or more"),
    (dict(masks="trajectory"), "masks", "random or stratified, as objective.antithetic = True adds complements"),
    (dict(masks="trajectory", antithetic=False, mask_block_length=4), "masks", "as objective.mask_block_length = 4"),
    (dict(masks="trajectory", antithetic=False, name="denoise"), "masks", "as objective.name = 'denoise' has no"),
    (dict(masks="stratified", name="wd1", likelihood="one_step"), "masks", "random, as objective.likelihood = 'one"),
    (dict(likelihood="elbo_quadrature", num_elbo_samples=3), "num_elbo_samples", "num_points = 2"),
    ({"wdce.baselin": "none"}, "wdce.baselin", "no such key; did you mean 'objective.wdce.baseline'?"),
    (dict(weighting="reward", proximal="adaptive"), "proximal", "fixed, as objective.weighting = 'reward'"),
    ({"wdce.old_masks": "update"}, "wdce.old_masks", "buffer, as objective.name = 'wdce' with"),
    (dict(shrinkage="reliability", weighting="softmax"), "shrinkage", "none, as objective.weighting = 'softmax'"),
    (dict(shrinkage="reliability", sync_reference_every=2), "shrinkage", "none, as objective.sync_reference_every = 2"),
    (dict(shrinkage="reliability", num_elbo_samples=2), "shrinkage", "as objective.num_elbo_samples = 2 with"),
    (dict(shrinkage="reliability", likelihood="trajectory"), "shrinkage", "as objective.likelihood = 'trajectory'"),
    (dict(part_weights=(1.0, 2.0)), "part_weights", "(), as objective.reward_scaling = 'none'"),
    (dict(weighting="reward", max_weight=0.5), "max_weight", "1.0, as objective.weighting = 'reward'"),
    (dict(elbo_rounds="adaptive", likelihood="trajectory"), "elbo_rounds", "as objective.likelihood = 'trajectory'"),
  ],
)
def test_what_would_be_compared_wrongly_or_not_be_read_is_refused(config, changes, path, allowed):
  config.objective.update_from_flattened_dict(changes)
  (line,) = problems(config)
  assert line.startswith(f"config.objective.{path} = ")
  assert allowed in line


@pytest.mark.parametrize("changes", [{"weighting": "reward"}, {"name": "denoise"}])
def test_batches_cannot_follow_until_groups_teach_something_where_rewards_are_not_compared(config, changes):
  config.rollout.until_informative = 4
  config_lib.validate(config)
  config.objective.update_from_flattened_dict(changes)
  (line,) = problems(config)
  assert line.startswith("config.rollout.until_informative = 4: 0, as objective.name = ")


def test_a_sampler_that_takes_tokens_back_gives_no_masks_along_its_trajectory(config):
  config.objective.masks, config.objective.antithetic, config.sampler.name = "trajectory", False, "wino"
  (line,) = problems(config)
  assert line.startswith("config.objective.masks = 'trajectory': random or stratified, as sampler.name = 'wino' takes")


def test_a_group_in_several_chunks_cannot_spread_its_mask_ratios(config):
  config.rollout.chunk_prompts, config.rollout.chunk_rollouts, config.objective.masks = 1, 4, "stratified"
  (line,) = problems(config)
  assert line.startswith("config.rollout.chunk_rollouts = 4: 0, as objective.masks = 'stratified'")


@pytest.mark.parametrize("sampler", ["wino", "freedave"])
def test_a_sampler_whose_states_cannot_be_replayed_has_no_trajectory(config, sampler):
  config.objective.likelihood = "trajectory"
  config_lib.validate(config)
  config.sampler.name = sampler
  (line,) = problems(config)
  assert line.startswith("config.objective.likelihood = 'trajectory': not trajectory, as sampler.name = ")
  config_lib.validate(config, "eval")  # but a run that has one may be evaluated with any sampler


def test_a_width_of_heads_leaves_the_models_width_free(config):
  config.model.d_model = 66
  config.model.head_dim = 16
  config_lib.validate(config)


def test_an_int8_base_is_not_trained(config):
  config.model.quantization = "int8"
  config.warm_start.updates = 5
  first, second = sorted(problems(config))
  assert "config.model.lora.rank = 0: 1 or more, as model.quantization = 'int8'" in first
  assert "config.warm_start.updates = 5: 0, as model.quantization = 'int8'" in second
  config.model.lora.rank, config.warm_start.updates = 4, 0
  config_lib.validate(config)


def test_a_run_of_before_there_were_some_keys_is_the_same_run(config):
  config.objective.name = "wddo"
  older = ConfigDict(config.to_dict())
  del older.model.quantization
  for key in ("part_weights", "masks", "shrinkage"):
    del older.objective[key]
  del older.objective.wddo.scale
  assert config_lib.differences(older, config) == []
  assert config_lib.fingerprint(older) == config_lib.fingerprint(config)
  older.objective.name = config.objective.name = "denoise"
  del older.objective.denoise.level
  assert config_lib.differences(older, config) == []
  config.model.quantization = "int8"
  assert config_lib.differences(older, config) == ["config.model.quantization: 'absent' -> 'int8'"]


def test_an_estimate_without_noise_has_no_rounds(config):
  config.objective.update(dict(elbo_rounds="adaptive", likelihood="one_step"))
  config_lib.validate(config)
  config.objective.one_step.prompt_mask_ratio = 0.0
  (line,) = problems(config)
  assert "objective.one_step.prompt_mask_ratio = 0.0" in line


def test_steps_are_a_multiple_of_the_blocks(config):
  config.sampler.block_length = 4
  config.sampler.steps = 6
  (line,) = problems(config)
  assert "sampler.completion_length = 16 / sampler.block_length = 4" in line
  config.sampler.steps = 32  # more calls than tokens: allowed
  config_lib.validate(config)


def test_single_masks_may_be_odd(config):
  config.objective.antithetic = False
  config.objective.num_mask_samples = 3
  config_lib.validate(config)


def test_missing_and_unknown_keys(config):
  del config.train["num_buffers"]
  config.train.num_bufers = 3
  missing, unknown = problems(config)
  assert unknown == "config.train.num_bufers = 3: no such key; did you mean 'train.num_buffers'?"
  assert missing.startswith("config.train.num_buffers is missing")


def test_own_section_of_the_task(config):
  with config.ignore_type():
    config.task.sudoku.min_blanks = "4"
  (line,) = problems(config)
  assert line == "config.task.sudoku.min_blanks = '4': a value of type int"
  config = base.get_config()
  config.task.sudoku.max_blank = 3
  (line,) = problems(config)
  assert line.endswith("did you mean 'max_blanks'?")
  config = base.get_config()
  config.task.sudoku.min_blanks = 11  # above max_blanks: the task itself refuses
  (line,) = problems(config)
  assert line.startswith("config.task.sudoku.min_blanks=11")
  config.task.name = "countdown"  # and where another task is chosen, nobody minds
  config_lib.validate(config)


def test_a_samplers_own_section_is_optional_if_its_options_have_defaults(config, monkeypatch):
  config.sampler.name = "wino"
  del config.sampler.wino["threshold_back"]
  config_lib.validate(config)
  del config.sampler["wino"]
  config_lib.validate(config)
  options = dataclasses.make_dataclass("Options", [("depth", int), ("width", int, 3)], frozen=True)
  monkeypatch.setitem(SAMPLERS, "mine", Sampler(options, lambda denoiser, keys, plan, options: None))
  monkeypatch.setitem(KEYS, "sampler.name", rules.one_of("mine"))
  config.sampler.name = "mine"
  (line,) = problems(config)
  assert line == "config.sampler.mine.depth is missing"
  config.sampler.mine = ConfigDict({"depth": 2})
  config_lib.validate(config)


def test_what_a_mode_does_not_read_need_not_fit_together(config):
  """A policy that random_order drew the rollouts of may be evaluated and sampled with any sampler."""
  config.objective.likelihood, config.eval.num_prompts = "sampler", 1000
  assert len(problems(config)) == 2
  with pytest.raises(config_lib.ConfigError, match=r"^1 problem.*\n  config.eval.num_prompts = 1000: at most"):
    config_lib.validate(config, mode="eval")
  for mode in ("sample", "serve"):
    config_lib.validate(config, mode=mode)
    config.sampler.block_length = 5
    with pytest.raises(config_lib.ConfigError, match=r"config.sampler.block_length = 5"):
      config_lib.validate(config, mode=mode)
    config.sampler.block_length = 16


def test_own_section_of_the_sampler(config):
  config.sampler.name = "wino"
  config.sampler.wino.treshold = 0.5
  (line,) = problems(config)
  assert line == "config.sampler.wino.treshold = 0.5: no such option; did you mean 'threshold'?"
  config.sampler.name = "random_order"  # a mistake in another section is one too, but a section may be left out
  assert problems(config) == [line]
  del config.sampler["wino"]
  config_lib.validate(config)


def test_fingerprint_belongs_to_what_decides_results(config):
  same, other = base.get_config(), base.get_config()
  same.train.num_buffers = 99
  same.sharding.fsdp = 2
  same.task.data_dir = "elsewhere"
  same.task.countdown.num_numbers = 6  # not the task in use
  other.objective.alpha = 0.2
  assert config_lib.fingerprint(config) == config_lib.fingerprint(same)
  assert config_lib.fingerprint(config) == config_lib.fingerprint(json.loads(json.dumps(config.to_dict())))
  assert config_lib.fingerprint(config) != config_lib.fingerprint(other)
  assert len(config_lib.fingerprint(config)) == 16


def test_workdir_of_another_config_is_refused(config, tmp_path):
  workdir_lib.check_workdir(tmp_path, config)
  workdir_lib.save_config(tmp_path, config)
  (tmp_path / "base").mkdir()
  config.train.num_buffers = 40
  workdir_lib.check_workdir(tmp_path, config)
  config.objective.alpha = 0.5
  config.seed = 7
  with pytest.raises(config_lib.ConfigError) as caught:
    workdir_lib.check_workdir(tmp_path, config)
  message = str(caught.value)
  assert "config.objective.alpha: 0.1 -> 0.5" in message
  assert "config.seed: 0 -> 7" in message
  assert "num_buffers" not in message
  assert str(tmp_path / "config.json") in message
  assert "--workdir" in message


def test_a_users_own_task_is_checked_before_anything_starts(config, tmp_path):
  path = tmp_path / "task.py"
  path.write_text("def records(split): return []\ndef prompt(record): return ''\n")
  config.task.name = str(path)
  (line,) = problems(config)
  assert "the file defines no function reward" in line
  path = tmp_path / "rows.jsonl"
  path.write_text("")
  config.task.name = str(path)
  config.task.user.grader = "maths"
  (line,) = problems(config)
  assert line == "config.task.user.grader='maths': must be one of exact, number, math"


def test_the_prompts_of_a_task_are_named(config):
  config.task.prompt = "publishd"
  (line,) = problems(config)
  assert line == "config.task.prompt='publishd': must be one of bare, default, published_train, published_eval"


def test_a_finished_run_may_be_evaluated_otherwise(config, tmp_path):
  workdir_lib.save_config(tmp_path, config)
  (tmp_path / "policy").mkdir()
  config.eval.lengths = (8, 16)
  config.task.grader = "published"
  workdir_lib.check_workdir(tmp_path, config, mode="eval")
  with pytest.raises(config_lib.ConfigError, match=r"config.eval.lengths"):
    workdir_lib.check_workdir(tmp_path, config)
  config.sampler.steps = 32
  with pytest.raises(config_lib.ConfigError, match=r"config.sampler.steps"):
    workdir_lib.check_workdir(tmp_path, config, mode="eval")
