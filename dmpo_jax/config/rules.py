"""Which values each configuration key may have: a table for `config.py`, as is that of `relations.py`.

`configs/base.py` says what each key means.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Collection
from typing import Any

from etils import epath

from dmpo_jax.hub.tokenizer import TOKENIZERS
from dmpo_jax.models.attention import ATTENTIONS
from dmpo_jax.models.lora import TARGETS
from dmpo_jax.objectives import OBJECTIVES, wddo
from dmpo_jax.objectives.estimators import ESTIMATORS
from dmpo_jax.objectives.weights import BASELINES, REWARD_SCALINGS, WEIGHTINGS
from dmpo_jax.samplers import SAMPLERS, llada
from dmpo_jax.samplers.parallel import RULES as PARALLEL_RULES
from dmpo_jax.sharding import MESH_AXES
from dmpo_jax.tasks import TASKS, user
from dmpo_jax.tasks.builtin import CHOICES


@dataclasses.dataclass(frozen=True)
class Rule:
  """The values that one key may have."""

  allowed: str
  holds: Callable[[Any], bool]
  names: Collection[str] = ()  # for a did-you-mean


MOST = 2**31 - 1  # what the arrays' int32 can count


def whole(low: int, high: int = MOST) -> Rule:
  """Allow whole numbers from `low` to `high`."""
  allowed = f"a whole number, {low} or more, below 2**31" if high == MOST else f"a whole number from {low} to {high}"
  return Rule(allowed, lambda value: type(value) is int and low <= value <= high)


def number(interval: str) -> Rule:
  """Allow the finite numbers of an interval such as "[0, 1)"."""
  low, high = map(float, interval[1:-1].split(","))

  def holds(value: Any) -> bool:
    if type(value) not in (int, float) or not math.isfinite(value):
      return False
    return (low <= value if interval[0] == "[" else low < value) and (
      value <= high if interval[-1] == "]" else value < high
    )

  return Rule(f"a number in {interval}", holds)


def numbers() -> Rule:
  """Allow a sequence of finite numbers, or none."""
  one = number("(-inf, inf)")

  def holds(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(map(one.holds, value))

  return Rule("a tuple of numbers, or ()", holds)


def flag() -> Rule:
  """Allow True and False."""
  return Rule("True or False", lambda value: type(value) is bool)


def one_of(*names: str) -> Rule:
  """Allow one of these names."""
  return Rule(f"one of {', '.join(names)}", lambda value: value in names, names)


def task_name() -> Rule:
  """Allow a task's name, or a user's file that exists."""
  allowed = f"one of {', '.join(TASKS)}, or the path of a .py or .jsonl file that exists"

  def holds(value: Any) -> bool:
    return value in TASKS or (isinstance(value, str) and user.is_file(value) and epath.Path(value).is_file())

  return Rule(allowed, holds, tuple(TASKS))


def some_of(*names: str, empty: str = "") -> Rule:
  """Allow a sequence of these names, at least one; none too, where `empty` says what it means."""

  def holds(value: Any) -> bool:
    is_list = isinstance(value, tuple | list) and (len(value) > 0 or bool(empty))
    return is_list and all(name in names for name in value)

  return Rule(f"a tuple of {', '.join(names)}" + (f", or () for {empty}" if empty else ""), holds, names)


def lengths() -> Rule:
  """Allow a sequence of whole numbers above 0, or none."""

  def holds(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(type(length) is int and length > 0 for length in value)

  return Rule("a tuple of whole numbers, 1 or more, or () for the configured length", holds)


def existing(what: str, empty: str = "") -> Rule:
  """Allow the path of something that exists; the empty path too, where `empty` says what it means."""
  allowed = f"the path of {what} that exists" + (f', or "" for {empty}' if empty else "")
  return Rule(allowed, lambda value: isinstance(value, str) and (epath.Path(value).exists() if value else bool(empty)))


def text() -> Rule:
  """Allow any string."""
  return Rule("a string", lambda value: isinstance(value, str))


def mesh_size(empty: str = "") -> Rule:
  """Allow the size of a mesh axis; 0 too, where `empty` says what it means."""
  allowed = "1 or more, or -1 for the devices left" + (f", or 0 for {empty}" if empty else "")
  return Rule(allowed, lambda value: type(value) is int and (value >= 1 or value == -1 or (value == 0 and bool(empty))))


NO_WANDB = 'Weights & Biases is not installed: `pip install wandb`, or "" to do without it'


def wandb_project() -> Rule:
  """Allow a project's name where Weights & Biases is installed, and the empty one."""
  return Rule(
    f"the name of a project; {NO_WANDB}",
    lambda value: isinstance(value, str) and (not value or importlib.util.find_spec("wandb") is not None),
  )


CLIPPED = ("diffu_grpo", "coupled_grpo", "gdpo", "tracerl")  # the objectives with a clipped ratio
PARALLEL = ("parallel", "prefix_cache", "dual_cache")  # the samplers with a rule of parallel decoding

# A task's own section is checked against the task's fields; other choices' own keys as far as they are named here.
RULES: dict[str, Rule] = {
  "seed": whole(0, 2**32 - 1),
  "model.init_from": existing("a folder of parameters", empty="random initialisation"),
  "model.vocab_size": whole(0),
  "model.embedding_size": whole(0),
  "model.d_model": whole(1),
  "model.num_layers": whole(1),
  "model.num_heads": whole(1),
  "model.num_kv_heads": whole(1),
  "model.head_dim": Rule(
    "an even whole number (rotary pairs), or None for model.d_model / model.num_heads",
    lambda value: value is None or (type(value) is int and value > 0 and value % 2 == 0),
  ),
  "model.mlp_hidden_size": whole(1),
  "model.rope_theta": number("(0, inf)"),
  "model.rms_norm_eps": number("(0, inf)"),
  "model.weight_tying": flag(),
  "model.qkv_bias": flag(),
  "model.shift_logits": flag(),
  "model.dtype": one_of("float32", "bfloat16"),
  "model.quantization": one_of("none", "int8"),
  "model.param_dtype": one_of("float32", "bfloat16"),
  "model.remat": one_of("none", "dots", "full"),
  "model.layer_rows": whole(0),
  "model.attention": one_of("auto", *ATTENTIONS),
  "model.lora.rank": whole(0),
  "model.lora.alpha": number("(0, inf)"),
  "model.lora.dropout": number("[0, 1)"),
  "model.lora.targets": some_of(*TARGETS, "all"),
  "model.lora.init_from": existing("a folder of adapters", empty="new ones"),
  "tokenizer.name": one_of(*TOKENIZERS),
  "tokenizer.path": existing("a tokenizer", empty="that of model.init_from"),
  "tokenizer.is_chat": flag(),
  "task.name": task_name(),
  "task.prompt": text(),
  "task.rewards": one_of(*CHOICES),
  "task.grader": one_of(*CHOICES),
  "task.records_dir": text(),
  "task.data_dir": text(),
  "task.eval_path": existing("a test file", empty="the generated test split"),
  "task.num_train": whole(0),
  "task.num_test": whole(0),
  "task.max_prompt_length": whole(1),
  "task.overlong_prompts": one_of("error", "skip", "cut_user"),
  "sampler.name": one_of(*SAMPLERS),
  "sampler.completion_length": whole(1),
  "sampler.block_length": whole(1),
  "sampler.steps": whole(1),
  "sampler.temperature": number("[0, inf)"),
  "sampler.guidance": number("[0, inf)"),
  "sampler.llada.remasking": one_of(*llada.REMASKING),
  "sampler.freedave.remasking": one_of(*llada.REMASKING),
  "sampler.freedave.draft_length": whole(1),
  "sampler.entropy_bound.bound": number("[0, inf)"),
  **{f"sampler.{name}.rule": one_of(*PARALLEL_RULES) for name in PARALLEL},
  **{f"sampler.{name}.threshold": number("[0, inf)") for name in (*PARALLEL, "wino")},
  **{f"sampler.{name}.factor": number("[0, inf)") for name in PARALLEL},
  "sampler.wino.threshold_back": number("[0, inf)"),
  "rollout.num_prompts": whole(1),
  "rollout.group_size": whole(1),
  "rollout.chunk_prompts": whole(0),
  "rollout.pipelined": flag(),
  "rollout.early_exit": flag(),
  "objective.name": one_of(*OBJECTIVES),
  "objective.counted": one_of("all", "until_eos"),
  "objective.num_mask_samples": whole(1),
  "objective.antithetic": flag(),
  "objective.min_mask_ratio": number("[0, 1]"),
  "objective.max_mask_ratio": number("(0, 1]"),
  "objective.mask_block_length": whole(0),
  "objective.sync_reference_every": whole(0),
  "objective.likelihood": one_of(*ESTIMATORS, "sampler"),
  "objective.num_elbo_samples": whole(1),
  "objective.elbo_rounds": one_of("fixed", "adaptive"),
  "objective.max_noise": number("(0, inf)"),
  "objective.max_rounds": whole(1),
  "objective.one_step.prompt_mask_ratio": number("[0, 1)"),
  "objective.elbo_quadrature.num_points": whole(1, 16),
  "objective.eubo.beta": number("[1, inf)"),
  "objective.eubo.mixture": number("[0, 1]"),
  "objective.weighting": one_of(*WEIGHTINGS),
  "objective.alpha": number("(0, inf)"),
  "objective.proximal": one_of("fixed", "adaptive"),
  "objective.kappa": number("(0, 1]"),
  "objective.min_ess": number("(0, 1]"),
  "objective.reward_scaling": one_of(*REWARD_SCALINGS),
  "objective.part_weights": numbers(),
  "objective.max_weight": number("(0, 1]"),
  "objective.wdce.baseline": one_of(*BASELINES),
  "objective.wdce.baseline_strength": number("[0, inf)"),
  "objective.wdce.unlearning": one_of("unbounded", "bounded"),
  "objective.wdce.min_log_ratio": number("(-inf, 0]"),
  "objective.wddo.sets": one_of(*wddo.SETS),
  "objective.wddo.alpha_ddo": number("[0, inf)"),
  "objective.wddo.beta": number("(0, inf)"),
  **{f"objective.{name}.clip": number("(0, inf)") for name in CLIPPED},
  **{f"objective.{name}.kl_weight": number("[0, inf)") for name in CLIPPED},
  "objective.wd1.sharpness": number("(0, inf)"),
  "objective.dtm.tilt": number("(0, inf)"),
  "objective.dtm.control_variate": number("[0, inf)"),
  "warm_start.updates": whole(0),
  "warm_start.batch_size": whole(1),
  "warm_start.learning_rate": number("(0, inf)"),
  "warm_start.min_mask_ratio": number("(0, 1)"),
  "warm_start.correct_share": number("[0, 1]"),
  "optim.learning_rate": number("(0, inf)"),
  "optim.warmup_updates": whole(0),
  "optim.b1": number("[0, 1)"),
  "optim.b2": number("[0, 1)"),
  "optim.weight_decay": number("[0, inf)"),
  "optim.clip_norm": number("(0, inf)"),
  "optim.max_skips_in_a_row": whole(1),
  "train.num_buffers": whole(0),
  "train.updates_per_buffer": whole(1),
  "train.microbatch_prompts": whole(0),
  "sharding.data": mesh_size(),
  "sharding.fsdp": mesh_size(),
  "sharding.tensor": mesh_size(),
  **{f"sharding.rollout.{axis}": mesh_size(empty="that of the updates") for axis in MESH_AXES},
  "eval.every_buffers": whole(0),
  "eval.num_prompts": whole(0),
  "eval.batch_size": whole(1),
  "eval.temperature": number("[0, inf)"),
  "eval.num_samples": whole(1),
  "eval.tasks": some_of(*TASKS, empty="the configured one"),
  "eval.lengths": lengths(),
  "eval.samplers": some_of(*SAMPLERS, empty="the configured one"),
  "eval.early_exit": flag(),
  "grading.workers": whole(1),
  "grading.seconds": number("(0, inf)"),
  "grading.memory_gb": number("(0, inf)"),
  "serve.host": text(),
  "serve.port": whole(0, 65535),
  "serve.batch_size": whole(1),
  "serve.max_queue": whole(1),
  "serve.max_prompt_length": whole(1),
  "serve.max_seconds": number("(0, inf)"),
  "log.wandb_project": wandb_project(),
  "checkpoint.every_updates": whole(1),
  "checkpoint.keep": whole(1),
}
