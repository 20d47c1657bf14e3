"""What configuration keys must be to each other: the second table of `config.py`, after each key's own (`rules.py`)."""

import dataclasses
import operator
from collections.abc import Callable

from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.objectives.estimators import ESTIMATORS


@dataclasses.dataclass(frozen=True)
class Relation:
  """What one key must be to others; looked at only where all of them are right in themselves."""

  path: str
  others: tuple[str, ...]
  holds: Callable[..., bool]  # of the values of path and others
  allowed: str  # {0}, {1}, ... stand for the others and their values


def divides(value: int, other: int) -> bool:
  return other % value == 0


def is_multiple(value: int, other: int) -> bool:
  return value % other == 0


def is_paired(value: int, antithetic: bool, drawn_for: str) -> bool:
  return value % 2 == 0 or not antithetic or drawn_for not in ("elbo", "eubo")


def drawn_for(key: str, objective: str, likelihood: str) -> str:
  """The estimator that so many mask samples are drawn for; "" where they are not used.

  A loss that takes no estimator draws its masks as `elbo` does.
  """
  if key == "num_mask_samples":
    return likelihood if OBJECTIVES[objective].takes_likelihood else "elbo"
  return likelihood if OBJECTIVES[objective].needs_weights else ""


def mask_sample_relations(key: str) -> tuple[Relation, ...]:
  """What a number of mask samples must be to the estimator that it is for."""
  path, names = f"objective.{key}", ("objective.name", "objective.likelihood")
  return (
    Relation(
      path,
      ("objective.antithetic", *names),
      lambda value, antithetic, *names: is_paired(value, antithetic, drawn_for(key, *names)),
      "even, as {0} draws masks in pairs",
    ),
    Relation(
      path,
      names,
      lambda value, *names: drawn_for(key, *names) != "coupled" or (value > 1 and value % 2 == 1),
      "odd and 3 or more, for pairs and the full mask of {1}",
    ),
    Relation(
      path,
      ("objective.elbo_quadrature.num_points", *names),
      lambda value, points, *names: drawn_for(key, *names) != "elbo_quadrature" or value % points == 0,
      "a multiple of {0}",
    ),
  )


def compares_bounds(name: str, baseline: str, unlearning: str) -> bool:
  """Whether a loss sets the policy's own bound, drawn anywhere in the completion, against log p_old."""
  return name == "wddo" or (name == "wdce" and (baseline == "model" or unlearning == "bounded"))


def has_no_noise(likelihood: str, prompt_mask_ratio: float) -> bool:
  """Whether a likelihood is the same however often it is taken."""
  return likelihood in ("sampler", "trajectory") or (likelihood == "one_step" and prompt_mask_ratio == 0)


def estimates_log_p(likelihood: str) -> bool:
  """Whether a likelihood estimates log p itself, not a multiple of it."""
  return likelihood not in ESTIMATORS or ESTIMATORS[likelihood].is_log_p


COMPARED = ("objective.name", "objective.wdce.baseline", "objective.wdce.unlearning")

RELATIONS = (
  Relation(
    "model.d_model",
    ("model.num_heads", "model.head_dim"),
    lambda d, n, head_dim: head_dim is not None or d % (2 * n) == 0,
    "an even multiple of {0}, or give a model.head_dim",
  ),
  Relation("model.num_kv_heads", ("model.num_heads",), divides, "a divisor of {0}"),
  Relation(
    "sampler.name",
    ("model.shift_logits",),
    lambda name, is_shifted: not (is_shifted and name in ("prefix_cache", "dual_cache", "wino")),
    "a sampler that runs whole rows (llada, parallel, ...), as {0}",
  ),
  Relation(
    "model.embedding_size",
    ("model.vocab_size",),
    lambda rows, ids: rows == 0 or rows >= ids,
    "0, or at least {0}",
  ),
  Relation(
    "tokenizer.path",
    ("model.init_from",),
    lambda path, init_from: bool(path or init_from),
    "the path of a tokenizer, as {0} has none: give a checkpoint, see launch/convert_hf.py",
  ),
  Relation(
    "model.lora.rank",
    ("model.quantization",),
    lambda rank, kind: rank > 0 or kind == "none",
    "1 or more, as {0} cannot be trained (new adapters change nothing where it is only sampled)",
  ),
  Relation(
    "warm_start.updates",
    ("model.quantization",),
    lambda updates, kind: updates == 0 or kind == "none",
    "0, as {0} cannot be trained",
  ),
  Relation("sampler.block_length", ("sampler.completion_length",), divides, "a divisor of {0}"),
  Relation(
    "sampler.steps",
    ("sampler.completion_length", "sampler.block_length"),
    lambda steps, length, block: length % block > 0 or steps % (length // block) == 0,
    "a multiple of the number of blocks, {0} / {1}",
  ),
  *mask_sample_relations("num_mask_samples"),
  *mask_sample_relations("num_elbo_samples"),
  Relation(
    "objective.likelihood",
    ("objective.name",),
    lambda likelihood, name: name != "spg" or likelihood == "eubo",
    "eubo, as {0} sets an upper bound against a lower one",
  ),
  Relation(
    "objective.likelihood",
    ("objective.name",),
    lambda likelihood, name: not OBJECTIVES[name].needs_weights or estimates_log_p(likelihood),
    "one that estimates log p (elbo, elbo_quadrature, ...), as {0} weighs rollouts by log p_ref - log p_old: coupled "
    "estimates a multiple of it",
  ),
  Relation(
    "objective.sync_reference_every",
    ("train.updates_per_buffer", "objective.name"),
    lambda every, updates, name: not OBJECTIVES[name].has_teacher or every == updates,
    "as many as {0}, as {1} takes the policy that drew the buffer for its reference",
  ),
  Relation(
    "objective.likelihood",
    COMPARED,
    lambda likelihood, *own: likelihood in ("elbo", "sampler") or not compares_bounds(*own),
    "elbo or sampler, as {0} with {1} and {2} compares log p_old with the policy's elbo",
  ),
  Relation(
    "objective.mask_block_length",
    COMPARED,
    lambda length, *own: length == 0 or not compares_bounds(*own),
    "0, as {0} with {1} and {2} compares log p_old with an elbo of masks anywhere",
  ),
  Relation(
    "objective.proximal",
    ("objective.weighting",),
    lambda proximal, weighting: proximal == "fixed" or weighting != "reward",
    "fixed, as {0} takes no proximal step",
  ),
  Relation(
    "objective.part_weights",
    ("objective.reward_scaling",),
    lambda weights, scaling: not weights or scaling == "standardise_parts",
    "(), as {0} does not take the parts of the reward apart",
  ),
  Relation(
    "objective.max_weight",
    ("objective.weighting",),
    lambda most, weighting: most == 1 or weighting != "reward",
    "1.0, as {0} leaves no share of a group to cut",
  ),
  Relation(
    "objective.elbo_rounds",
    ("objective.likelihood", "objective.one_step.prompt_mask_ratio"),
    lambda rounds, likelihood, ratio: rounds == "fixed" or not has_no_noise(likelihood, ratio),
    "fixed, as {0} (one_step: with {1}) has no noise to average",
  ),
  Relation("objective.min_mask_ratio", ("objective.max_mask_ratio",), operator.lt, "below {0}"),
  Relation(
    "objective.likelihood",
    ("sampler.name",),
    lambda likelihood, sampler: likelihood != "trajectory" or sampler not in ("wino", "freedave"),
    "not trajectory, as {0} leaves none that could be replayed: wino takes tokens back, and a call of freedave decides "
    "several states (llada decides the same tokens)",
  ),
  Relation(
    "objective.likelihood",
    ("sampler.name",),
    lambda likelihood, sampler: likelihood != "sampler" or sampler == "random_order",
    "not sampler, as {0} gives no log-probabilities: random_order does",
  ),
  Relation(
    "objective.likelihood",
    ("objective.name",),
    lambda likelihood, name: likelihood != "sampler" or OBJECTIVES[name].needs_weights,
    "not sampler, as {0} needs no log-probabilities of whole completions: wdce and wddo do",
  ),
  Relation(
    "rollout.chunk_prompts",
    ("rollout.num_prompts",),
    lambda size, prompts: size == 0 or divides(size, prompts),
    "0 or a divisor of {0}: a shorter chunk would be another program to compile",
  ),
  Relation(
    "rollout.early_exit",
    ("objective.counted",),
    lambda exits, counted: not exits or counted == "until_eos",
    'False unless objective.counted = "until_eos" ({0}): what early exit fills in is not the policy\'s choice',
  ),
  Relation(
    "rollout.pipelined",
    ("objective.elbo_rounds",),
    lambda pipelined, rounds: not pipelined or rounds == "fixed",
    "False, as {0} asks for more of the policy once rewards are known, and by then it has moved on",
  ),
  Relation(
    "rollout.pipelined",
    ("objective.name",),
    lambda pipelined, name: not pipelined or not OBJECTIVES[name].learns_from_demonstrations,
    "False, as {0} learns from demonstrations",
  ),
  Relation(
    "rollout.pipelined",
    ("objective.name",),
    lambda pipelined, name: not pipelined or not OBJECTIVES[name].has_teacher,
    "False, as {0} takes the policy that drew the buffer for its reference",
  ),
  Relation(
    "rollout.num_prompts", ("task.num_train",), lambda prompts, train: not train or prompts <= train, "at most {0}"
  ),
  Relation(
    "train.microbatch_prompts",
    ("rollout.num_prompts",),
    lambda size, prompts: size == 0 or divides(size, prompts),
    "0 or a divisor of {0}",
  ),
  Relation(
    "eval.num_prompts",
    ("task.num_test", "task.eval_path"),
    lambda prompts, test, path: bool(path) or not test or prompts <= test,
    "at most {0}",
  ),
  Relation(
    "serve.max_queue", ("serve.batch_size",), operator.ge, "at least {0}, as one request may ask for so many choices"
  ),
  Relation("sharding.fsdp", ("sharding.data",), lambda a, b: (a, b).count(-1) < 2, "a size, as {0}"),
  Relation(
    "sharding.tensor",
    ("sharding.data", "sharding.fsdp"),
    lambda a, b, c: a != -1 or -1 not in (b, c),
    "a size, as {0} and {1}",
  ),
  Relation(
    "sharding.rollout.data",
    ("sharding.rollout.fsdp", "sharding.rollout.tensor"),
    lambda *sizes: sizes.count(-1) < 2,
    "one of three of which at most one is -1, as {0} and {1}",
  ),
)
