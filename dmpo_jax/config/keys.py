"""Every key with its rule, and beside it what it must be to other keys. `configs/base.py` says what each key means."""

import functools
import operator
from collections.abc import Sequence

from dmpo_jax import ranges
from dmpo_jax.config.rules import (
  Rule,
  existing,
  flag,
  lengths,
  mesh_size,
  number,
  of,
  one_of,
  some_of,
  task_name,
  text,
  wandb_project,
  whole,
)
from dmpo_jax.hub.chat import is_switches
from dmpo_jax.hub.tokenizer import TOKENIZERS
from dmpo_jax.models.attention import ATTENTIONS
from dmpo_jax.models.config import DTYPES, QUANTIZATIONS, REMAT_POLICIES, ROPE_SCALING, is_rope_scaling
from dmpo_jax.models.lora import ALL_TARGETS
from dmpo_jax.models.router import ROUTERS
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.objectives.estimators import ESTIMATORS
from dmpo_jax.objectives.likelihood import Linear
from dmpo_jax.objectives.masking import KINDS, MaskSampling
from dmpo_jax.objectives.wdce import Wdce
from dmpo_jax.objectives.weights import Weighing
from dmpo_jax.samplers import SAMPLERS
from dmpo_jax.sharding import MESH_AXES
from dmpo_jax.tasks import TASKS, has_difficulty, mixture
from dmpo_jax.tasks.builtin import CHOICES
from dmpo_jax.tasks.sandbox import SANDBOXES

POSITIVE, FROM_ZERO, SHARE = map(of, (ranges.POSITIVE, ranges.FROM_ZERO, ranges.SHARE))
OLD_MASKS = "objective.wdce.old_masks"
# what works with models that attend by blocks
BLOCK_SAMPLERS = tuple(name for name, own in SAMPLERS.items() if own.has_blocks)
COMPARED = ("objective.name", "objective.wdce.baseline", "objective.wdce.unlearning", OLD_MASKS)


def divides(value: int, other: int) -> bool:
  return other % value == 0


def is_part(value: int, whole: int) -> bool:
  return value == 0 or divides(value, whole)


def is_at_most(value: int, most: int) -> bool:
  return most == 0 or value <= most  # 0: all


def block_problem(value: str | Sequence[str], block_length: int, known: Sequence[str]) -> str:
  """Say which choices work with a model of such blocks (0: full attention)."""
  chosen = [value] if isinstance(value, str) else value
  if block_length == 0 or all(name in known for name in chosen):
    return ""
  return f"one of {', '.join(known)}, as model.block_length = {block_length}: the others do not know blocks yet"


def compares_bounds(name: str, baseline: str, unlearning: str, old_masks: str) -> bool:
  """Whether a loss compares the policy's own bound, drawn anywhere in the completion, with a buffer's log p_old."""
  return name == "wddo" or (name == "wdce" and Wdce.compares_with_old(baseline, unlearning) and old_masks == "buffer")


def has_noise(likelihood: str, prompt_mask_ratio: float) -> bool:
  """Whether another estimate of the same likelihood would differ."""
  estimator = estimator_of(likelihood, MaskSampling(2), prompt_mask_ratio=prompt_mask_ratio)
  return estimator is not None and estimator.has_noise


def likelihood_problem(likelihood: str, name: str) -> str:
  """Say which likelihoods a loss can have that cannot have any."""
  allowed = OBJECTIVES[name].likelihoods
  return (
    "" if not allowed or likelihood in allowed else f"{' or '.join(allowed)}, as objective.name = {name!r} reads it"
  )


def is_log_p(likelihood: str) -> bool:
  return likelihood not in ESTIMATORS or ESTIMATORS[likelihood].is_log_p


def update_masks_problem(num: int, antithetic: bool, points: int, name: str, likelihood: str) -> str:
  """Say what the masks of an update must be to the estimator of its loss, or to the loss that draws them itself."""
  return masks_problem(num, antithetic, points, likelihood if OBJECTIVES[name].takes_likelihood else "elbo")


def buffer_masks_problem(num: int, antithetic: bool, points: int, name: str, likelihood: str) -> str:
  """Say what the masks that a buffer is scored under must be to their estimator."""
  return masks_problem(num, antithetic, points, likelihood) if OBJECTIVES[name].needs_weights else ""


def masks_problem(num: int, antithetic: bool, points: int, likelihood: str) -> str:
  estimator = estimator_of(likelihood, MaskSampling(num, antithetic), points)
  return estimator.problem().partition(": ")[2] if estimator is not None else ""


def estimator_of(
  likelihood: str, masks: MaskSampling, num_points: int = 1, prompt_mask_ratio: float = 0.0
) -> Linear | None:
  """Build an estimator with the settings that others depend on; None for what the sampler reports."""
  own = {
    "elbo_quadrature": {"num_points": num_points},
    "one_step": {"prompt_mask_ratio": prompt_mask_ratio},
    "eubo": {"beta": 1.0, "mixture": 1.0},
  }
  return ESTIMATORS[likelihood](masks, **own.get(likelihood, {})) if likelihood in ESTIMATORS else None


def kind_problem(kind: str, antithetic: bool, block_length: int, name: str, likelihood: str) -> str:
  """Say which masks the loss or its likelihood can have instead."""
  if problem := MaskSampling(2, antithetic, block_length=block_length, kind=kind).kind_problem():
    return problem
  objective = OBJECTIVES[name]
  is_own = not objective.takes_likelihood
  kinds = objective.mask_kinds if is_own or likelihood not in ESTIMATORS else ESTIMATORS[likelihood].mask_kinds
  reader = f"objective.name = {name!r}" if is_own else f"objective.likelihood = {likelihood!r}"
  return "" if kind in kinds else f"{' or '.join(kinds)}, as {reader} has no others"


def shrinkage_problem(shrinkage: str, num: int, antithetic: bool, points: int, name: str, likelihood: str) -> str:
  """Say what is missing to measure noise: two independent draws, or a likelihood that is a mean of draws."""
  if shrinkage == "none" or not OBJECTIVES[name].needs_weights:
    return ""
  estimator = estimator_of(likelihood, MaskSampling(num, antithetic), points)
  if estimator is None or estimator.num_estimates > 1:
    return ""
  return (
    f"none, as objective.num_elbo_samples = {num} with objective.likelihood = {likelihood!r} and "
    f"objective.antithetic = {antithetic} is one independent draw, which says nothing of its noise"
  )


def of_experts(rule: Rule) -> Rule:
  """Allow a key of the experts to be set only where the model has some."""
  return rule.also(
    "0, () or False, as {0}: the model has no experts",
    lambda value, router: not value or router != "none",
    "model.router",
  )


def of_sigmoid(rule: Rule) -> Rule:
  """Allow a key of one router to be set only with it."""
  return rule.also(
    "1, as {0}: only sigmoid has groups and a scale",
    lambda value, router: value == 1 or router == "sigmoid",
    "model.router",
  )


def compares_rewards(name: str, weighting: str, baseline: str, strength: float) -> bool:
  """Whether groups whose rewards are all equal teach nothing."""
  kind, own = OBJECTIVES[name], {"baseline": baseline, "baseline_strength": strength}
  return not kind.learns_from_demonstrations and kind.compares_rewards(weighting, own)


def mixture_problem(given: str, name: str) -> str:
  """Say what the tasks of a mixture must be, and their own keys."""
  if name != mixture.NAME:
    return f'"", as task.name = {name!r}: set task.name to {mixture.NAME}' if given else ""
  try:
    parts = mixture.read(given)
  except ValueError as error:
    return str(error)
  for task, part in parts.items():
    own = {"task.name": task} | {f"task.{key}": value for key, value in part.keys.items()}
    own |= {f"grading.{key}": value for key, value in part.limits.items()}
    for path, value in own.items():
      problem = "no mixture in a mixture" if value == mixture.NAME else KEYS[path].problem(value)
      if problem:
        return f"of {task!r}, {path} = {value!r}: {problem}"
    if own.get("task.curriculum") and not has_difficulty(task):
      return f"of {task!r}, task.curriculum: 0, as its prompts have no difficulty"
  return ""


DRAWN = ("objective.antithetic", "objective.elbo_quadrature.num_points", "objective.name", "objective.likelihood")

LIKELIHOOD = (
  one_of(*ESTIMATORS, "sampler")
  .checked_by(likelihood_problem, "objective.name")
  .checked_by(functools.partial(block_problem, known=tuple(ESTIMATORS)), "model.block_length")
  .also(
    "one that estimates log p (elbo, elbo_quadrature, ...), as {0} weighs rollouts by log p_ref - log p_old: coupled "
    "estimates a multiple of it",
    lambda likelihood, name: not OBJECTIVES[name].needs_weights or is_log_p(likelihood),
    "objective.name",
  )
  .also(
    "elbo or sampler, as {0} with {1} and {2} compares log p_old with the policy's elbo",
    lambda likelihood, *own: likelihood in ("elbo", "sampler") or not compares_bounds(*own),
    *COMPARED,
  )
  .also(
    "not trajectory, as {0} leaves none that could be replayed: wino takes tokens back, and a call of freedave decides "
    "several states (llada decides the same tokens)",
    lambda likelihood, sampler: likelihood != "trajectory" or SAMPLERS[sampler].has_trajectory,
    "sampler.name",
  )
  .also(
    "not sampler, as {0} gives no log-probabilities: random_order does",
    lambda likelihood, sampler: likelihood != "sampler" or SAMPLERS[sampler].gives_log_probs,
    "sampler.name",
  )
  .also(
    "not sampler, as {0} needs no log-probabilities of whole completions: wdce and wddo do",
    lambda likelihood, name: likelihood != "sampler" or OBJECTIVES[name].needs_weights,
    "objective.name",
  )
)

KEYS: dict[str, Rule] = {
  "seed": whole(0, 2**32 - 1),
  "model.init_from": existing("a folder of parameters", empty="random initialisation"),
  "model.vocab_size": whole(0),
  "model.embedding_size": whole(0).also(
    "0, or at least {0}", lambda rows, ids: rows == 0 or rows >= ids, "model.vocab_size"
  ),
  "model.d_model": whole(1).also(
    "an even multiple of {0}, or give a model.head_dim",
    lambda d_model, heads, head_dim: head_dim is not None or d_model % (2 * heads) == 0,
    "model.num_heads",
    "model.head_dim",
  ),
  "model.num_layers": whole(1),
  "model.num_heads": whole(1),
  "model.num_kv_heads": whole(1).also("a divisor of {0}", divides, "model.num_heads"),
  "model.head_dim": Rule(
    "an even whole number (rotary pairs), or None for model.d_model / model.num_heads",
    lambda value: value is None or (type(value) is int and value > 0 and value % 2 == 0),
  ),
  "model.mlp_hidden_size": whole(1),
  "model.rope_theta": POSITIVE,
  "model.rotary_fraction": number("(0, 1]"),
  "model.rope_scaling": Rule(ROPE_SCALING, lambda value: ranges.numbers().holds(value) and is_rope_scaling(value)),
  "model.rms_norm_eps": POSITIVE,
  "model.weight_tying": flag(),
  "model.qkv_bias": flag(),
  "model.qk_norm": flag(),
  "model.block_length": whole(0),
  "model.allow_other_blocks": flag(),
  "model.shift_logits": flag().also(
    "False, as {0}: no such model decodes by blocks",
    lambda shifts, block_length: not shifts or not block_length,
    "model.block_length",
  ),
  "model.out_bias": flag(),
  "model.clip_qkv": FROM_ZERO,
  "model.router": one_of("none", *ROUTERS),
  "model.num_experts": of_experts(whole(0)).also(
    "1 or more, as {0}", lambda number, router: number > 0 or router == "none", "model.router"
  ),
  "model.experts_per_token": of_experts(whole(0)).also(
    "from 1 up to {0}, as {1}",
    lambda number, experts, router: router == "none" or 0 < number <= experts,
    "model.num_experts",
    "model.router",
  ),
  "model.expert_size": of_experts(whole(0)).also(
    "1 or more, as {0}", lambda size, router: size > 0 or router == "none", "model.router"
  ),
  "model.shared_expert_size": of_experts(whole(0)),
  "model.expert_layers": of_experts(Rule("(), or a 0 or 1 for each layer", lambda value: set(value) <= {0, 1})).also(
    "(), or as many as {0}", lambda kinds, layers: len(kinds) in (0, layers), "model.num_layers"
  ),
  "model.expert_bias": of_experts(flag()),
  "model.expert_groups": of_sigmoid(whole(1)).also(
    "a divisor of {0}", lambda groups, experts: groups == 1 or divides(groups, experts), "model.num_experts"
  ),
  "model.expert_groups_per_token": of_sigmoid(whole(1))
  .also("at most {0}", operator.le, "model.expert_groups")
  .also(
    "more, as {0} of {1} and {2}: a token's groups must have as many experts",
    lambda kept, groups, number, experts: groups == 1 or number <= kept * experts // groups,
    "model.expert_groups",
    "model.experts_per_token",
    "model.num_experts",
  ),
  "model.expert_scale": of_sigmoid(POSITIVE),
  "model.dtype": one_of(*DTYPES),
  "model.quantization": one_of(*QUANTIZATIONS),
  "model.param_dtype": one_of(*DTYPES),
  "model.remat": one_of("none", *REMAT_POLICIES),
  "model.layer_rows": whole(0),
  "model.attention": one_of("auto", *ATTENTIONS),
  "model.lora.rank": whole(0).also(
    "1 or more, as {0} cannot be trained (new adapters change nothing where it is only sampled)",
    lambda rank, kind: rank > 0 or kind == "none",
    "model.quantization",
  ),
  "model.lora.alpha": POSITIVE,
  "model.lora.dropout": number("[0, 1)"),
  "model.lora.targets": some_of(*ALL_TARGETS, "all"),
  "model.lora.init_from": existing("a folder of adapters", empty="new ones"),
  "tokenizer.name": one_of(*TOKENIZERS),
  "tokenizer.path": existing("a tokenizer", empty="that of model.init_from").also(
    "the path of a tokenizer, as {0} has none: give a checkpoint, see launch/convert_hf.py",
    lambda path, init_from: bool(path or init_from),
    "model.init_from",
  ),
  "tokenizer.is_chat": flag(),
  "tokenizer.chat_template_kwargs": Rule(
    'a JSON object of names and values, such as {"enable_thinking": false}, or "" for none',
    is_switches,
  ).also(
    '"", as {0}: plain prompts have no template', lambda value, is_chat: not value or is_chat, "tokenizer.is_chat"
  ),
  # and the section of each task, which the task itself checks
  "task.name": task_name(),
  "task.mixture": text().checked_by(mixture_problem, "task.name"),
  "task.prompt": text(),
  "task.rewards": one_of(*CHOICES),
  "task.grader": one_of(*CHOICES),
  "task.records_dir": text(),
  "task.data_dir": text(),
  "task.eval_path": existing("a test file", empty="the generated test split").also(
    '"", as {0}: in task.mixture each task may have its own',
    lambda path, name: not path or name != mixture.NAME,
    "task.name",
  ),
  "task.num_train": whole(0),
  "task.num_test": whole(0),
  "task.curriculum": whole(0).also(
    "0, as a prompt of {0} has no difficulty", lambda num, name: num == 0 or has_difficulty(name), "task.name"
  ),
  "task.max_prompt_length": whole(1),
  "task.overlong_prompts": one_of("error", "skip", "cut_user"),
  "grading.workers": whole(1),
  "grading.seconds": POSITIVE,
  "grading.memory_gb": POSITIVE,
  "grading.concurrency": whole(1),
  "grading.retries": whole(0),
  "grading.sandbox": one_of(*SANDBOXES),
  # and the section of each sampler, which `samplers.make_options` checks
  "sampler.name": one_of(*SAMPLERS).checked_by(
    functools.partial(block_problem, known=BLOCK_SAMPLERS), "model.block_length"
  ),
  "sampler.completion_length": whole(1),
  "sampler.block_length": whole(1)
  .also("a divisor of {0}", divides, "sampler.completion_length")
  .also("{0}, the blocks of the model", lambda block, own: own in (0, block), "model.block_length"),
  "sampler.steps": whole(1).also(
    "a multiple of the number of blocks, {0} / {1}",
    lambda steps, length, block: length % block > 0 or steps % (length // block) == 0,
    "sampler.completion_length",
    "sampler.block_length",
  ),
  "sampler.temperature": FROM_ZERO,
  "sampler.slots": whole(0).also(
    "0, as {0}: only rows of a model that attends by blocks have caches of their own",
    lambda slots, block_length: slots == 0 or block_length > 0,
    "model.block_length",
  ),
  "sampler.guidance": FROM_ZERO.also(
    "0, as {0}: models that attend by blocks are not guided yet",
    lambda guidance, block_length: guidance == 0 or block_length == 0,
    "model.block_length",
  ),
  "rollout.num_prompts": whole(1).also("at most {0}", is_at_most, "task.num_train"),
  "rollout.group_size": whole(1),
  "rollout.chunk_prompts": whole(0).also(
    "0 or a divisor of {0}: a shorter chunk would be another program to compile", is_part, "rollout.num_prompts"
  ),
  "rollout.chunk_rollouts": whole(0)
  .also("0 or a divisor of {0}", is_part, "rollout.group_size")
  .also(
    "0, as {0} and {1}: only of a single prompt can the rollouts be split over chunks",
    lambda rollouts, prompts, group_size: rollouts in (0, group_size) or prompts == 1,
    "rollout.chunk_prompts",
    "rollout.group_size",
  )
  .also(
    "0, as {0} spreads the mask ratios over a whole group",
    lambda rollouts, masks, group_size: rollouts in (0, group_size) or masks != "stratified",
    "objective.masks",
    "rollout.group_size",
  ),
  "rollout.prompt_lengths": whole(1),
  "rollout.pipelined": flag()
  .also(
    "False, as {0} asks for more of the policy once rewards are known, and by then it has moved on",
    lambda pipelined, rounds: not pipelined or rounds == "fixed",
    "objective.elbo_rounds",
  )
  .also(
    "False, as {0} learns from demonstrations",
    lambda pipelined, name: not pipelined or not OBJECTIVES[name].learns_from_demonstrations,
    "objective.name",
  )
  .also(
    "False, as {0} takes the policy that drew the buffer for its reference",
    lambda pipelined, name: not pipelined or not OBJECTIVES[name].has_teacher,
    "objective.name",
  ),
  "rollout.drop_equal_groups": flag(),
  "rollout.until_informative": whole(0)
  .also("at most {0}", operator.le, "rollout.num_prompts")
  .also(
    "0, as {0} keeps groups whose rewards are all the same",
    lambda groups, drops: groups == 0 or drops,
    "rollout.drop_equal_groups",
  )
  .also(
    "0, as {0} generates a buffer before the rewards of the one before it are known",
    lambda groups, pipelined: groups == 0 or not pipelined,
    "rollout.pipelined",
  )
  .also(
    "0, as {0} with {1} and {2} compares no rewards of a group",
    lambda groups, *own: groups == 0 or compares_rewards(*own),
    "objective.name",
    "objective.weighting",
    "objective.wdce.baseline",
    "objective.wdce.baseline_strength",
  ),
  "rollout.max_batches": whole(1),
  "rollout.early_exit": flag().also(
    'False unless objective.counted = "until_eos" ({0}): what early exit fills in is not the policy\'s choice',
    lambda exits, counted: not exits or counted == "until_eos",
    "objective.counted",
  ),
  "objective.name": one_of(*OBJECTIVES),
  "objective.counted": one_of("all", "until_eos"),
  "objective.num_mask_samples": whole(1).checked_by(update_masks_problem, *DRAWN),
  "objective.masks": one_of(*KINDS)
  .checked_by(
    kind_problem, "objective.antithetic", "objective.mask_block_length", "objective.name", "objective.likelihood"
  )
  .also(
    "random or stratified, as {0} takes tokens back, and a trajectory would not be what it met",
    lambda kind, sampler: kind != "trajectory" or not SAMPLERS[sampler].can_revoke,
    "sampler.name",
  ),
  "objective.antithetic": flag(),
  "objective.min_mask_ratio": SHARE.also("below {0}", operator.lt, "objective.max_mask_ratio"),
  "objective.max_mask_ratio": number("(0, 1]"),
  "objective.mask_block_length": whole(0)
  .also(
    "0, as {0} with {1} and {2} compares log p_old with an elbo of masks anywhere",
    lambda length, *own: length == 0 or not compares_bounds(*own),
    *COMPARED,
  )
  .also(
    "0, as {0}: the model has blocks of its own", lambda length, own: length == 0 or own == 0, "model.block_length"
  ),
  "objective.sync_reference_every": whole(0).also(
    "as many as {0}, as {1} takes the policy that drew the buffer for its reference",
    lambda every, updates, name: not OBJECTIVES[name].has_teacher or every == updates,
    "train.updates_per_buffer",
    "objective.name",
  ),
  "objective.likelihood": LIKELIHOOD,
  "objective.num_elbo_samples": whole(1).checked_by(buffer_masks_problem, *DRAWN),
  "objective.elbo_rounds": one_of("fixed", "adaptive").also(
    "fixed, as {0} (one_step: with {1}) has no noise to average",
    lambda rounds, *likelihood: rounds == "fixed" or has_noise(*likelihood),
    "objective.likelihood",
    "objective.one_step.prompt_mask_ratio",
  ),
  "objective.max_noise": POSITIVE,
  "objective.max_rounds": whole(1),
  # the settings of the importance weights, and of each likelihood and objective, state their values themselves
  **{f"objective.{key}": of(own) for key, own in Weighing.ranges.items()},
  "objective.proximal": of(Weighing.ranges["proximal"]).also(
    "fixed, as {0} takes no proximal step",
    lambda proximal, weighting: proximal == "fixed" or weighting != "reward",
    "objective.weighting",
  ),
  "objective.part_weights": of(Weighing.ranges["part_weights"]).also(
    "(), as {0} does not take the parts of the reward apart",
    lambda weights, scaling: not weights or scaling == "standardise_parts",
    "objective.reward_scaling",
  ),
  "objective.max_weight": of(Weighing.ranges["max_weight"]).also(
    "1.0, as {0} leaves no share of a group to cut",
    lambda most, weighting: most == 1 or weighting != "reward",
    "objective.weighting",
  ),
  "objective.shrinkage": of(Weighing.ranges["shrinkage"])
  .also(
    "none, as {0} has no log-ratio",
    lambda shrinkage, weighting: shrinkage == "none" or weighting == "tilt",
    "objective.weighting",
  )
  .also(
    "none, as {0} (one_step: with {1}) has no noise to measure",
    lambda shrinkage, *likelihood: shrinkage == "none" or has_noise(*likelihood),
    "objective.likelihood",
    "objective.one_step.prompt_mask_ratio",
  )
  .also(
    "none, as {0} leaves no log-ratio: with {1} every buffer's policy is its own reference",
    lambda shrinkage, every, updates: shrinkage == "none" or not every or updates % every > 0,
    "objective.sync_reference_every",
    "train.updates_per_buffer",
  )
  .checked_by(shrinkage_problem, "objective.num_elbo_samples", *DRAWN),
  **{
    f"objective.{name}.{key}": of(own)
    for name, kind in (ESTIMATORS | OBJECTIVES).items()
    for key, own in kind.ranges.items()
  },
  "objective.one_step.prompt_mask_ratio": of(ESTIMATORS["one_step"].ranges["prompt_mask_ratio"]).also(
    "0, as with {0} all rollouts of a prompt share it, without masks, and {1} reads it",
    lambda ratio, block_length, likelihood: ratio == 0 or block_length == 0 or likelihood != "one_step",
    "model.block_length",
    "objective.likelihood",
  ),
  "objective.denoise.level": of(OBJECTIVES["denoise"].ranges["level"]).also(
    "sequence, as {0} has one block", lambda level, size: level == "sequence" or size > 0, "model.block_length"
  ),
  OLD_MASKS: of(Wdce.ranges["old_masks"])
  .also(
    "buffer, as {0} with {1} and {2} compares nothing with log p_old",
    lambda masks, name, *own: masks == "buffer" or name != "wdce" or Wdce.compares_with_old(*own),
    *COMPARED[:3],
  )
  .also(
    "buffer, as with {0} the policy has moved on once the masks of updates are scored",
    lambda masks, pipelined: masks == "buffer" or not pipelined,
    "rollout.pipelined",
  ),
  "warm_start.updates": whole(0).also(
    "0, as {0} cannot be trained", lambda updates, kind: updates == 0 or kind == "none", "model.quantization"
  ),
  "warm_start.batch_size": whole(1),
  "warm_start.learning_rate": POSITIVE,
  "warm_start.min_mask_ratio": number("(0, 1)"),
  "warm_start.correct_share": SHARE,
  "optim.learning_rate": POSITIVE,
  "optim.warmup_updates": whole(0),
  "optim.b1": number("[0, 1)"),
  "optim.b2": number("[0, 1)"),
  "optim.weight_decay": FROM_ZERO,
  "optim.clip_norm": POSITIVE,
  "optim.max_skips_in_a_row": whole(1),
  "train.num_buffers": whole(0),
  "train.updates_per_buffer": whole(1),
  "train.microbatch_prompts": whole(0).also("0 or a divisor of {0}", is_part, "rollout.num_prompts"),
  "sharding.data": mesh_size(),
  "sharding.fsdp": mesh_size().also("a size, as {0}", lambda *sizes: sizes.count(-1) < 2, "sharding.data"),
  "sharding.tensor": mesh_size().also(
    "a size, as {0} and {1}",
    lambda size, *others: size != -1 or -1 not in others,
    "sharding.data",
    "sharding.fsdp",
  ),
  **{f"sharding.rollout.{axis}": mesh_size(empty="that of the updates") for axis in MESH_AXES},
  "sharding.rollout.data": mesh_size(empty="that of the updates").also(
    "one of three of which at most one is -1, as {0} and {1}",
    lambda *sizes: sizes.count(-1) < 2,
    "sharding.rollout.fsdp",
    "sharding.rollout.tensor",
  ),
  "eval.every_buffers": whole(0),
  "eval.num_prompts": whole(0).also(
    "at most {0}",
    lambda prompts, test, path: bool(path) or is_at_most(prompts, test),
    "task.num_test",
    "task.eval_path",
  ),
  "eval.batch_size": whole(1),
  "eval.temperature": FROM_ZERO,
  "eval.num_samples": whole(1),
  "eval.tasks": some_of(*TASKS, empty="the configured one"),
  "eval.lengths": lengths(),
  "eval.samplers": some_of(*SAMPLERS, empty="the configured one").checked_by(
    functools.partial(block_problem, known=BLOCK_SAMPLERS), "model.block_length"
  ),
  "eval.early_exit": flag(),
  "serve.host": text(),
  "serve.port": whole(0, 65535),
  "serve.batch_size": whole(1),
  "serve.max_queue": whole(1).also(
    "at least {0}, as one request may ask for so many choices", operator.ge, "serve.batch_size"
  ),
  "serve.max_prompt_length": whole(1),
  "serve.max_seconds": POSITIVE,
  "log.wandb_project": wandb_project(),
  "checkpoint.every_updates": whole(1),
  "checkpoint.keep": whole(1),
}
