"""One update of every objective with every likelihood and sampler that validation lets through.

Of each such triple one case runs, from the rollouts of its sampler to the new parameters. The other switches (early
exit and what is counted, antithetic masks, padding, full or adapters, these with stratified masks or masks along the
trajectory) change from case to case so that each value of each meets every objective and likelihood, every sampler, and
each value of every other switch. In each case

  - everything is finite,
  - the likelihoods and the loss equal those of `plain_losses.py`, from whole logits of one unpadded row at a time,
  - a rollout was dropped, which the plain way has never had.

What a dropped rollout does to the parameters, one case of each objective compares with a group that never had it. One
case of each runs on a model that attends by blocks; its plain form predicts a block of one row at a time.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import plain_losses
import pytest
import tiny
from plain_losses import View

from dmpo_jax import build, noise, phases, policy, rollout, sharding
from dmpo_jax.chunks import Chunking
from dmpo_jax.config import ConfigError, validate
from dmpo_jax.grading import Grades, Grading
from dmpo_jax.models.trainable import Trainable
from dmpo_jax.objectives import OBJECTIVES, masking
from dmpo_jax.objectives.estimators import ESTIMATORS
from dmpo_jax.objectives.masking import Completions, MaskSampling
from dmpo_jax.policy import Policies
from dmpo_jax.samplers import SAMPLERS
from dmpo_jax.structs import Prompts
from dmpo_jax.tasks.sudoku import Sudoku

pytestmark = pytest.mark.slow

P, G, Q, C, ROWS, STEP = 2, 3, 6, 8, 18, 1
ENDINGS = (("all", False), ("until_eos", False), ("until_eos", True))  # what is counted, and early exit
REWARD = np.array([[0.0, 1.0, 0.4], [0.9, 0.1, 0.3]], np.float32)
IS_KEPT = np.array([[True, False, True], [True, True, True]])

READS_LIKELIHOOD = [name for name in OBJECTIVES if name not in ("dtm", "denoise")]
OWN_MASKS = ("wdce", "wddo", "dtm", "denoise")  # whose updates draw masks whatever the likelihood is


def config_of(objective, likelihood, sampler, antithetic=True, has_adapters=False, ending=ENDINGS[0], blocks=0):
  mask_samples = 3 if likelihood == "coupled" else 2
  own = dict(likelihood=likelihood, name=objective, antithetic=antithetic, alpha=1.0, kappa=0.5, counted=ending[0])
  own |= dict(num_mask_samples=2 if objective in OWN_MASKS else mask_samples)
  own |= dict(num_elbo_samples=mask_samples, sync_reference_every=2 * (objective == "dtm"))
  if has_adapters and (objective in OWN_MASKS[:-1] or likelihood in ("elbo", "unweighted", "eubo")):
    own |= dict(masks="stratified" if antithetic else "trajectory")
  if objective == "wdce" and likelihood in ("elbo", "sampler"):  # the others compare with nothing
    own |= dict(wdce__baseline="model", wdce__unlearning="bounded", wdce__min_log_ratio=-1.0)
  if OBJECTIVES[objective].needs_token_log_probs:
    own[f"{objective}__clip"] = 0.2
  changes = {f"objective__{key}": value for key, value in own.items()}
  changes |= dict(sampler__name=sampler, sampler__completion_length=C, sampler__block_length=4, sampler__steps=C)
  changes |= dict(model__num_layers=1, model__lora__rank=2 * has_adapters, model__lora__dropout=0.0)
  changes |= dict(model__lora__alpha=2.0, model__block_length=blocks)
  if blocks:
    changes |= dict(objective__one_step__prompt_mask_ratio=0.0)
  changes |= dict(rollout__num_prompts=P, rollout__group_size=G, rollout__early_exit=ending[1], optim__clip_norm=1e3)
  return tiny.config(**changes)


def is_valid(*triple):
  try:
    validate(config_of(*triple))
  except ConfigError:
    return False
  return True


TRIPLES = [
  triple
  for triple in itertools.product(OBJECTIVES, (*ESTIMATORS, "sampler"), SAMPLERS)
  if (triple[0] in READS_LIKELIHOOD or triple[1] == "elbo") and is_valid(*triple)
]
TRIPLES = [triple for triple in TRIPLES if triple[0] != "denoise" or triple[2] == "llada"]  # it learns from no rollouts
# These read no more of a likelihood than espo and gdsd do: sums of positions, and its estimates.
TRIPLES = [triple for triple in TRIPLES if triple[0] not in ("ebpo", "bgpo") or triple[1] == "elbo"]
PAIRS = list(dict.fromkeys(triple[:2] for triple in TRIPLES))


def switches_of(objective, likelihood, sampler):
  """Antithetic masks, adapters, padding and the ending of a triple's case."""
  pair, number = PAIRS.index((objective, likelihood)), list(SAMPLERS).index(sampler)
  bits = ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))[pair % 4]
  is_other_side = (number + pair // 4) % 2
  return (*(bool(bit ^ is_other_side) for bit in bits), ENDINGS[(pair + number) % 3])


def test_the_cases_cover_what_they_say():
  assert len(TRIPLES) >= 250
  assert {name for name, _, _ in TRIPLES} == set(OBJECTIVES)
  assert {name for _, name, _ in TRIPLES} == {*ESTIMATORS, "sampler"}
  assert {name for _, _, name in TRIPLES} == set(SAMPLERS)
  cases = [(*triple, *switches_of(*triple)) for triple in TRIPLES if triple[0] != "denoise" and triple[1] != "sampler"]
  values = [dict.fromkeys(case[place] for case in cases) for place in range(7)]
  for first, second in itertools.combinations(range(7), 2):
    met = {(case[first], case[second]) for case in cases}
    if second > 2:  # a choice and a switch, or two switches
      assert met == set(itertools.product(values[first], values[second])), (first, second)


def test_some_rollouts_end_and_others_do_not(use_devices):
  use_devices(1)
  ended = {name: rollouts_of(name, True, True, True, False).num_tokens < C for name in SAMPLERS}
  assert sum(is_ended.any() for is_ended in ended.values()) > len(SAMPLERS) // 2
  assert not any(is_ended.all() for is_ended in ended.values())


# What the cases share


@functools.cache
def parts_of(has_adapters, blocks=0):
  return build.build_model_parts(config_of("wdce", "elbo", "llada", has_adapters=has_adapters, blocks=blocks))


@functools.cache
def grading():
  task = Sudoku(min_blanks=4, max_blanks=10, demo_patience=11.0)
  return Grading(task=task), list(task.generate("test", P, 0))


def moved(params, scale, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(x + scale * rng.normal(size=x.shape), x.dtype), params)


@functools.cache
def policies_of(has_adapters):
  """The base, what the policy that drew the rollouts trains, and what has become of it since."""
  parts = parts_of(has_adapters)
  base = moved(policy.random_collection(parts.model, parts.mesh, "params", jax.random.key(1)), 0.05, 0)
  start = policy.random_collection(parts.model, parts.mesh, "lora", jax.random.key(2)) if has_adapters else base
  scale = 0.2 if has_adapters else 0.02  # so that ratios are neither 1 nor all clipped
  old = moved(start, scale, 1)
  return base, old, moved(old, scale, 2)


@functools.cache
def prompts_of(has_padding):
  tokens = np.random.default_rng(3).integers(5, 20, (P, Q)).astype(np.int32)
  is_valid = np.ones((P, Q), bool)
  is_valid[0, :2] = not has_padding
  return Prompts(np.where(is_valid, tokens, 0), is_valid, np.array([7, 11], np.uint32))


@functools.cache
def rollouts_of(sampler, has_adapters, has_padding, early_exit, with_reference):
  parts = parts_of(has_adapters)
  base, old, _ = policies_of(has_adapters)
  likelihood, ending = "sampler" if with_reference else "elbo", ENDINGS[2] if early_exit else ENDINGS[0]
  config = config_of("wdce", likelihood, sampler, has_adapters=has_adapters, ending=ending)
  with jax.set_mesh(parts.mesh):
    sample = phases.training_sample(config, parts.model, parts.mesh)
    key = noise.step_key(0, "rollout", 0)
    return jax.device_get(sample(Policies(old, base), prompts_of(has_padding), key))


class Case:
  """One configuration, its compiled programs and its policies."""

  def __init__(self, config):
    self.config, self.objective = config, config.objective
    self.has_adapters = config.model.lora.rank > 0
    self.blocks = config.model.block_length
    self.parts = parts_of(self.has_adapters, self.blocks)
    self.base, self.old, self.new = policies_of(self.has_adapters)
    self.learner = phases.make_objective(config)
    self.has_teacher = self.learner.has_teacher
    optimizer = phases.training_optimizer(config)
    self.state = phases.fresh_state(self.new, optimizer, self.parts.mesh)
    if self.has_teacher:
      self.state = self.state.replace(reference=self.old)
    where = jax.tree.map(lambda x: x.sharding, self.state), sharding.replicated(self.parts.mesh)
    self.scoring = None
    if not self.learner.learns_from_demonstrations:
      self.scoring = phases.training_scoring(config, self.parts.model, self.parts.mesh)
    self._update = phases.training_update(config, self.parts.model, optimizer, where)

  def update(self, experience):
    state = jax.tree.map(jnp.copy, self.state).replace(step=jnp.int32(STEP))
    with jax.set_mesh(self.parts.mesh):
      return jax.device_get(self._update(state, self.base, experience, jax.random.key(0)))

  def experience(self, rollouts, prompts, counted, is_kept):
    judge, records = grading()
    policies = Policies(self.old, self.base, self.old if self.has_teacher else None)
    collector = rollout.Collector(
      sample=lambda policies: lambda prompts, key, first: rollouts,
      scoring=self.scoring,
      grading=judge,
      tokenizer=self.parts.tokenizer,
      seed=0,
      chunking=Chunking(is_kept.shape[1]),
      counted=counted,
    )
    with jax.set_mesh(self.parts.mesh):
      pending = collector.generate(policies, rollout.Batch(0, prompts, records))
      reward = np.where(is_kept, REWARD[:, : is_kept.shape[1]], 0)
      grades = Grades(reward, is_kept, reward > 0.5, per_second=1.0)
      return collector.complete(pending.replace(wait=lambda: grades), policies)


@functools.cache
def case_of(objective, likelihood, antithetic, has_adapters):
  sampler = "random_order" if likelihood == "sampler" else "llada"
  return Case(config_of(objective, likelihood, sampler, antithetic, has_adapters))


# The plain way


@functools.cache
def tables(has_adapters, blocks):
  """Log-probabilities of all ids at every position of whole rows, each as long as it is."""
  model = parts_of(has_adapters, blocks).model

  @jax.jit
  def logits(variables, tokens):
    return model.apply(variables, tokens)

  return logits


def block_numbers(prompts, number, size, c):
  """The block of each position of a prompt's completions."""
  return (prompts.is_valid[number].sum() % size + np.arange(c)) // size


def log_distributions(variables, case, prompts, rows, clean, prompt_is_masked):
  """Of the completion's positions in rows [p, g, r, c]: [p, g, r, c, v] in float64."""
  if not case.blocks:
    return whole_distributions(variables, case, prompts, rows, prompt_is_masked)
  numbers = np.stack([block_numbers(prompts, number, case.blocks, rows.shape[-1]) for number in range(len(rows))])
  numbers, result = numbers[:, None, None], 0.0
  for block in range(numbers.max() + 1):
    found = whole_distributions(variables, case, prompts, np.where(numbers < block, clean, rows), None)
    result = np.where((numbers == block)[..., None], found, result)
  return result


def whole_distributions(variables, case, prompts, rows, prompt_is_masked):
  config, (p, g, r, c) = case.parts.model.config, rows.shape
  result = []
  for number in range(p):
    prompt = np.broadcast_to(prompts.tokens[number], (g, r, Q))
    if prompt_is_masked is not None:
      prompt = np.where(prompt_is_masked[number], config.mask_token_id, prompt)
    whole = np.concatenate([prompt[..., prompts.is_valid[number]], rows[number]], -1).reshape(g * r, -1)
    filled = np.pad(whole, ((0, ROWS - g * r), (0, 0)))
    logits = np.asarray(tables(case.has_adapters, case.blocks)(variables, filled), np.float64)[
      : g * r, -c:, : config.vocab_size
    ]
    shifted = logits - logits.max(-1, keepdims=True)
    result.append((shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))).reshape(g, r, c, -1))
  return np.stack(result)


@functools.partial(jax.jit, static_argnames=("estimator", "purpose", "step"))
def draw(prompts, is_counted, committed_at, *, estimator, purpose, step):
  """The views of an update or a measure, with the probability that each mask sample masks a position with."""
  keys = noise.row_keys(noise.step_key(0, purpose, step), prompts.prompt_id, is_counted.shape[1])
  about = Completions(is_counted, committed_at, prompts.is_valid)
  if isinstance(estimator, MaskSampling):  # of a loss that draws its masks itself
    return *masking.draw(keys, about, estimator)[:2], None
  views = estimator.views(keys, about)
  ratio = jnp.ones((*views.is_masked.shape[:3], 1))
  if type(estimator).__name__ == "Coupled":
    masks = dataclasses.replace(estimator.masks, num=len(estimator.draws) - 1, antithetic=True)
    ratio = masking.draw(keys, about, masks).ratio
    ratio = jnp.pad(ratio, ((0, 0), (0, 0), (1, 0), (0, 0)), constant_values=1)
  return views.is_masked, ratio, views.prompt_is_masked


def look(case, experience, about, which, replays=False):
  """What policies say of a buffer under masks: views [policy][p][g].

  Args:
    replays: what is not counted is shown as the sampler saw it, not as MASK.
  """
  is_masked, ratio, prompt_is_masked = map(lambda x: None if x is None else np.asarray(x), about)
  completion, config = np.asarray(experience.completion), case.parts.model.config
  stands = np.where(experience.is_counted, completion, experience.seen if replays else config.mask_token_id)
  clean = stands[:, :, None]
  rows = np.where(is_masked, config.mask_token_id, clean)
  trainable = Trainable.of(case.parts.model.config)
  variables = {
    "ref": trainable.reference(case.base, case.old if case.has_teacher else None),
    "old": trainable.policy(case.old, case.base),
    "new": trainable.policy(case.new, case.base),
  }
  log_p = {
    name: log_distributions(variables[name], case, experience.prompts, rows, clean, prompt_is_masked)
    for name in (*which, *(("ref",) if case.has_teacher else ()))
  }
  found = {}
  for name in which:
    own = np.take_along_axis(log_p[name], np.broadcast_to(completion[:, :, None, :, None], (*rows.shape, 1)), -1)[
      ..., 0
    ]
    divergence = own * 0
    if case.has_teacher:
      divergence = (np.exp(log_p["ref"]) * (log_p["ref"] - log_p[name])).sum(-1)
    found[name] = [
      [
        View(
          own[i, j],
          is_masked[i, j],
          ratio[i, j],
          experience.is_counted[i, j],
          experience.committed_at[i, j],
          divergence[i, j],
          block_numbers(experience.prompts, i, case.blocks, rows.shape[-1]) if case.blocks else None,
          case.objective,
        )
        for j in range(completion.shape[1])
      ]
      for i in range(completion.shape[0])
    ]
  return found


def arrays_of(experience):
  return experience.prompts, experience.is_counted, experience.committed_at


def check_measure(case, experience, rollouts):
  """Compare what was measured with the plain way; returns it by group and rollout: sequences, and tokens."""
  o, likelihood = case.objective, case.objective.likelihood
  if case.learner.needs_weights and likelihood != "sampler":
    estimator = phases.make_likelihood(case.config, o.num_elbo_samples)
    about = draw(*arrays_of(experience), estimator=estimator, purpose="measure", step=0)
    found = look(case, experience, about, ("old", "ref"), replays=likelihood == "trajectory")
    for name, measured in (("old", experience.log_p_old), ("ref", experience.log_p_ref)):
      plain = [[plain_losses.tokens(likelihood, o, view).sum() for view in group] for group in found[name]]
      np.testing.assert_allclose(measured, plain, rtol=2e-4, atol=1e-4, err_msg=name)
  if case.learner.needs_weights:
    for i in range(P):
      kept = np.flatnonzero(IS_KEPT[i])
      old, ref = experience.log_p_old[i, kept], experience.log_p_ref[i, kept]
      weights = plain_losses.weights_of(REWARD[i, kept], np.float64(ref), np.float64(old), o)
      for measured, plain in zip((experience.weight, experience.negative_weight), weights, strict=True):
        np.testing.assert_allclose(measured[i, kept], plain, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(measured[i, ~IS_KEPT[i]], 0)
  if case.learner.needs_token_log_probs:
    views = look(case, experience, update_masks(case, experience), ("old", "ref"), replays=likelihood == "trajectory")
    pairs = [("old", experience.token_log_p_old), ("ref", experience.token_log_p_ref)]
    for name, measured in pairs[: 1 + case.learner.needs_reference]:
      measured = measured[:, :, STEP % measured.shape[2]]
      if case.learner.reads_tokens:
        plain = [[plain_losses.tokens(likelihood, o, view) for view in group] for group in views[name]]
      else:
        num = measured.shape[-1]
        plain = [[plain_losses.by_draw(likelihood, o, view, num) for view in group] for group in views[name]]
      np.testing.assert_allclose(measured, plain, rtol=2e-4, atol=1e-4, err_msg=name)


def update_masks(case, experience):
  o = case.objective
  make = phases.mask_sampling if o.name in OWN_MASKS else phases.make_likelihood
  estimator = make(case.config, o.num_mask_samples)
  if o.name == "denoise":
    estimator = dataclasses.replace(estimator, model_block=0)
  return draw(*arrays_of(experience), estimator=estimator, purpose="loss", step=STEP)


def plain_loss(case, experience):
  """The loss of the rollouts that were kept, of what was measured."""
  o = case.objective
  replays = o.likelihood == "trajectory" and o.name not in OWN_MASKS
  views = look(case, experience, update_masks(case, experience), ("new",), replays=replays)["new"]

  def of_update(measured, i, j):
    return None if measured is None else np.float64(measured[i, j, STEP % measured.shape[2]])

  total = 0.0
  for i, group in enumerate(views):
    rollouts = [
      plain_losses.Rollout(
        group[j],
        float(experience.reward[i, j]),
        float(experience.weight[i, j]),
        float(experience.negative_weight[i, j]),
        float(experience.log_p_old[i, j]),
        of_update(experience.token_log_p_old, i, j),
        of_update(experience.token_log_p_ref, i, j),
      )
      for j in np.flatnonzero(experience.is_kept[i])
    ]
    total += plain_losses.LOSSES[case.objective.name](rollouts, case.objective)
  return total / len(views)


def check_loss(case, experience, loss, sampler):
  # EBPO's ratio is of whole completions: what float32 rounds is not divided by the length
  atol = 2e-4 if case.objective.name == "ebpo" else 1e-5
  np.testing.assert_allclose(loss, plain_loss(case, experience), rtol=2e-4, atol=atol, err_msg=sampler)


def check_finite(tree):
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)


@pytest.mark.parametrize(("objective", "likelihood"), PAIRS)
def test_an_update_equals_its_plain_form(use_devices, objective, likelihood):
  use_devices(1)
  for sampler in [name for pair in TRIPLES for name in pair[2:] if pair[:2] == (objective, likelihood)]:
    antithetic, has_adapters, has_padding, (counted, early_exit) = switches_of(objective, likelihood, sampler)
    case = case_of(objective, likelihood, antithetic, has_adapters)
    prompts = prompts_of(has_padding)
    rollouts = rollouts_of(sampler, has_adapters, has_padding, early_exit, likelihood == "sampler")
    if case.learner.learns_from_demonstrations:
      experience = rollout.demonstrate(prompts, rollouts.completion[:, 0])
    else:
      experience, figures = case.experience(rollouts, prompts, counted, IS_KEPT)
      assert figures["scores_failed" if case.scoring.score else "rewards_failed"] == (not case.scoring.score)
      check_measure(case, experience, rollouts)
    state, metrics = case.update(experience)
    check_finite((state.trainable, state.opt_state, metrics))
    assert state.num_skipped == 0
    check_loss(case, experience, metrics["loss"], sampler)
    changes = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.trainable, jax.device_get(case.new))
    assert max(jax.tree.leaves(changes)) > 0


ON_BLOCKS = {name: "elbo" for name in OBJECTIVES} | dict(
  diffu_grpo="one_step",
  coupled_grpo="coupled",
  gdpo="elbo_quadrature",
  gdsd="unweighted",
  tracerl="trajectory",
  spg="eubo",
)


@pytest.mark.parametrize(("objective", "likelihood"), ON_BLOCKS.items())
def test_an_update_on_blocks_equals_its_plain_form(use_devices, objective, likelihood):
  """With complementary pairs or not, with padding and a prompt that ends inside a block."""
  use_devices(1)
  antithetic = list(ON_BLOCKS).index(objective) % 2 == 0
  case = Case(config_of(objective, likelihood, "llada", antithetic, blocks=4))
  prompts, rollouts = prompts_of(True), rollouts_of("llada", False, True, False, False)
  if case.learner.learns_from_demonstrations:
    experience = rollout.demonstrate(prompts, rollouts.completion[:, 0])
  else:
    experience, _ = case.experience(rollouts, prompts, "until_eos", IS_KEPT)
    check_measure(case, experience, rollouts)
  state, metrics = case.update(experience)
  check_finite((state.trainable, metrics))
  check_loss(case, experience, metrics["loss"], "llada")
  assert metrics["grad_norm"] > 0


PUBLISHED = dict(wdce="elbo", wddo="elbo", diffu_grpo="one_step", coupled_grpo="coupled", gdpo="elbo_quadrature")
PUBLISHED |= dict(espo="elbo", gdsd="unweighted", ebpo="elbo", bgpo="elbo")
PUBLISHED |= dict(tracerl="trajectory", wd1="one_step", spg="eubo", dtm="elbo")


@pytest.mark.parametrize(("objective", "likelihood"), PUBLISHED.items())
def test_a_dropped_rollout_is_as_if_it_had_never_been(use_devices, objective, likelihood):
  """Whatever it holds, the gradients are those of groups without it."""
  use_devices(1)
  case, prompts = case_of(objective, likelihood, False, False), prompts_of(True)
  rollouts = rollouts_of("llada", False, True, False, False)
  is_kept = np.ones((P, G), bool)
  is_kept[:, -1] = False
  dropped, _ = case.experience(rollouts, prompts, "all", is_kept)
  poison = {
    name: np.where(is_kept.reshape(P, G, *[1] * (value.ndim - 2)), value, np.nan).astype(np.float32)
    for name in ("reward", "log_p_old", "log_p_ref", "weight", "negative_weight", "token_log_p_old", "token_log_p_ref")
    if (value := getattr(dropped, name)) is not None
  }
  poison["completion"] = np.where(is_kept[..., None], dropped.completion, 7)
  alone, _ = case.experience(jax.tree.map(lambda x: x[:, :-1], rollouts), prompts, "all", is_kept[:, :-1])
  (one, metrics), (other, wanted) = case.update(dropped.replace(**poison)), case.update(alone)
  assert metrics["grad_norm"] > 0
  for name, value in wanted.items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=2e-5, err_msg=name)
  moments = jax.tree.leaves(one.opt_state), jax.tree.leaves(other.opt_state)
  for ours, theirs in zip(*moments, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-6)
