"""The gradient step: microbatches, devices and padding change nothing; what is not finite is skipped."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from etils import epath
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache
from remains import leave_alone, policy_of, rows_of

from dmpo_jax import build, noise, phases, policy, rollout, sharding, train, update
from dmpo_jax.logprobs import make_score
from dmpo_jax.models.trainable import Trainable
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.policy import Policies
from dmpo_jax.run.checkpoints import Checkpoints
from dmpo_jax.run.params import SavedParams
from dmpo_jax.run.preemption import Preempted
from dmpo_jax.structs import Prompts
from launch.bench import programs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return epath.Path(tmp_path_factory.mktemp("update"))


def begin(config, folder, num_devices, use_devices):
  use_devices(num_devices)
  config.warm_start.updates = 0  # the base is random here, and saved nowhere
  parts = build.build_parts(config, folder / "run")
  with jax.set_mesh(parts.mesh):
    return parts, *phases.training_phase(config, folder / "run", parts, policy.initial_params(config, parts))


def experience_of(parts, config):
  """A buffer with rewards and weights that differ inside each group."""
  p, g, c = config.rollout.num_prompts, config.rollout.group_size, config.sampler.completion_length
  rng = np.random.default_rng(0)
  prompts, _ = parts.prompts.batch(0, p)
  weight, negative = rng.dirichlet(np.ones(g), (2, p)).astype(np.float32)
  completion = rng.integers(12, 16, (p, g, c)).astype(np.int32)
  demonstrations = rollout.demonstrate(prompts, completion[:, 0])
  zeros = np.zeros((p, g), np.float32)
  return demonstrations.replace(
    completion=completion,
    is_counted=np.ones((p, g, c), bool),
    reward=zeros,
    is_kept=np.ones((p, g), bool),
    log_p_old=zeros,
    log_p_ref=zeros,
    weight=weight,
    negative_weight=negative,
    committed_at=np.zeros((p, g, c), np.int32),
  )


def step_of(begun, experience):
  """The parameters and metrics after one update from a fresh state."""
  parts, phase, state = begun
  with jax.set_mesh(parts.mesh):
    state, metrics = phase.update(state, phase.frozen, experience)
  return jax.device_get((state, metrics))


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["negative", "model"])
def test_microbatches_and_devices_change_nothing(folder, use_devices, baseline):
  whole = tiny.config(objective__wdce__baseline=baseline, optim__learning_rate=0.1)
  parted = tiny.config(objective__wdce__baseline=baseline, optim__learning_rate=0.1, train__microbatch_prompts=1)
  sharded = tiny.config(
    objective__wdce__baseline=baseline, optim__learning_rate=0.1, sharding__fsdp=2, sharding__tensor=2
  )
  results = []
  for config, num_devices in ((whole, 1), (parted, 1), (sharded, 8)):
    begun = begin(config, folder, num_devices, use_devices)
    results.append(step_of(begun, experience_of(begun[0], config)))
  for (_, metrics), number in zip(results, (1, 4, 1), strict=True):
    assert metrics.pop("microbatches") == number
  (state, metrics), *others = results
  assert metrics["grad_norm"] > 0
  for other_state, other_metrics in others:
    for name, value in metrics.items():
      np.testing.assert_allclose(other_metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    moments = jax.tree.leaves(state.opt_state), jax.tree.leaves(other_state.opt_state)
    for ours, theirs in zip(*moments, strict=True):
      np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("objective", "microbatch"), [("wdce", 0), ("wdce", 1), ("wd1", 0)])
def test_a_prompt_without_a_kept_rollout_is_as_if_it_had_never_been(folder, use_devices, objective, microbatch):
  own = dict(objective__name=objective, objective__likelihood="one_step" if objective == "wd1" else "elbo")
  results, experience = [], None
  for num_prompts in (4, 3):
    common = dict(rollout__num_prompts=num_prompts, train__microbatch_prompts=microbatch, optim__clip_norm=1e3)
    config = tiny.config(**common, **own)
    begun = begin(config, folder, 1, use_devices)
    if experience is None:
      experience = experience_of(begun[0], config)
      is_kept = np.arange(num_prompts)[:, None] + 0 * experience.reward < 3
      experience = experience.replace(reward=experience.weight, is_kept=is_kept)
    results.append(step_of(begun, jax.tree.map(lambda x, n=num_prompts: x[:n], experience)))
  (state, metrics), (wanted_state, wanted) = results
  assert wanted["grad_norm"] > 0
  assert metrics.pop("microbatches") == (4 if microbatch else 1)
  assert wanted.pop("microbatches") == (3 if microbatch else 1)
  for name, value in wanted.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
  moments = jax.tree.leaves(state.opt_state), jax.tree.leaves(wanted_state.opt_state)
  for ours, theirs in zip(*moments, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_figures_of_routers_are_those_of_all_tokens_of_a_buffer(folder, use_devices):
  """Against every token's probabilities, computed plainly: padding, dropped rollouts and filled rows do not count."""
  config = tiny.config(
    model__num_layers=3,
    model__router="softmax",
    model__num_experts=5,
    model__experts_per_token=2,
    model__expert_size=8,
    model__expert_layers=(1.0, 0.0, 1.0),
    model__expert_bias=True,
    model__layer_rows=1,
    objective__min_mask_ratio=1 - 1e-6,  # all is masked, so that rows are known
    objective__antithetic=False,
    train__microbatch_prompts=1,
  )
  begun = begin(config, folder, 1, use_devices)
  parts, _, state = begun
  model = parts.model
  experience = experience_of(parts, config)
  p, g, c = experience.completion.shape
  is_valid = np.ones(experience.prompts.tokens.shape, bool)
  is_valid[1, :3] = False
  is_kept = np.ones((p, g), bool)
  is_kept[2, 1] = False
  experience = experience.replace(prompts=experience.prompts.replace(is_valid=is_valid), is_kept=is_kept)
  params = jax.device_get(state.trainable)  # donated by the step
  _, metrics = step_of(begun, experience)

  masks = np.full((p, c), model.config.mask_token_id, np.int32)
  rows = np.concatenate([experience.prompts.tokens, masks], axis=1)
  is_token = np.concatenate([is_valid, np.ones((p, c), bool)], axis=1)
  plain = Transformer(dataclasses.replace(model.config, layer_rows=0))
  about = dict(is_valid=jnp.asarray(is_token), method="hidden", capture_intermediates=True, mutable="intermediates")
  _, seen = jax.jit(lambda params, rows: plain.apply({"params": params}, rows, **about))(params, rows)
  wanted = []
  for name in ("blocks_0", "blocks_2"):
    (x,) = seen["intermediates"][name]["ff_norm"]["__call__"]
    logits = np.asarray(x[0], np.float64) @ np.asarray(params[name]["experts"]["router"][0], np.float64)
    prob = np.exp(logits - logits.max(-1, keepdims=True))
    prob /= prob.sum(-1, keepdims=True)
    chosen = np.argsort(-(prob + params[name]["experts"]["bias"][0]), axis=-1)[..., :2]
    weight = is_token * is_kept.sum(-1, keepdims=True)  # each kept rollout has the same rows
    share = np.bincount(chosen.ravel(), np.repeat(weight.ravel(), 2), minlength=5) / (2 * weight.sum())
    entropy = -(prob * np.log(prob)).sum(-1)
    wanted.append(
      (5 * share.max(), -(share[share > 0] * np.log(share[share > 0])).sum(), np.average(entropy, None, weight))
    )
  found = [metrics[name] for name in ("router_max_load", "router_load_entropy", "router_entropy")]
  np.testing.assert_allclose(found, np.mean(wanted, axis=0), rtol=1e-5)


def test_groups_that_are_learned_from_are_packed_by_hand(use_devices):
  use_devices(1)
  experience = rollout.demonstrate(Prompts(*np.zeros((2, 8, 1), np.int32), np.arange(8)), np.zeros((8, 1), np.int32))

  def packed(chosen, number):
    is_informative = np.isin(np.arange(8), chosen)
    parts = update.pack(experience.replace(is_informative=is_informative), number)
    assert all(part.is_informative is None for part in parts)
    return [np.where(part.is_kept[:, 0], part.prompts.prompt_id, -1).tolist() for part in parts]

  assert packed([1, 4, 6], 4) == [[1, 4], [6, -1]]
  assert packed([0, 1, 2, 3, 4, 5, 6, 7], 4) == [[0, 1], [2, 3], [4, 5], [6, 7]]
  assert packed([5], 8) == [[5]]
  assert packed([], 4) == []
  assert packed([2, 7], 1) == [[2, 7]]
  assert packed([7], 1) == [[7, -1]]  # a quarter at least
  assert packed([2, 3, 7], 1) == [[2, 3, 7, -1]]
  assert packed([1, 2, 3, 4, 5], 1) == [[1, 2, 3, 4, 5, -1, -1, -1]]
  assert packed([], 1) == []
  assert len(update.pack(experience, 2)) == 2  # nothing says what is learned from: all are


CHOSEN = [False, True, False, True]
FAMILIES = {
  "wdce": {},
  "wddo": {},
  "coupled_grpo": dict(objective__likelihood="coupled", objective__num_mask_samples=3),
  "wd1": dict(objective__likelihood="one_step"),
  "spg": dict(objective__likelihood="eubo"),
  "dtm": dict(objective__sync_reference_every=2),
}


@pytest.mark.parametrize(
  ("objective", "microbatch", "num_devices"),
  [
    ("wdce", 0, 1),
    ("wdce", 1, 1),
    *(pytest.param(name, 0, 1, marks=pytest.mark.slow) for name in FAMILIES if name != "wdce"),
    pytest.param("coupled_grpo", 2, 8, marks=pytest.mark.slow),
  ],
)
def test_a_packed_update_is_the_plain_one_without_what_the_other_groups_add(
  folder, use_devices, objective, microbatch, num_devices
):
  """The plain twin: the mean over the whole buffer's groups of which a rollout is kept, those left out as zeros."""
  own = dict(objective__name=objective, train__microbatch_prompts=microbatch, optim__clip_norm=1e9)
  config = tiny.config(**own, **FAMILIES[objective], optim__learning_rate=0.1, sharding__fsdp=2, sharding__tensor=2)
  parts, phase, state = begin(config, folder, num_devices, use_devices)
  experience = experience_of(parts, config)
  is_kept = np.ones((4, 4), bool)
  is_kept[0], is_kept[1, 2] = False, False  # the first group is dropped whole: it does not count in the mean
  noise_of = np.random.default_rng(1).normal
  near = -3 + 0.1 * noise_of(size=(4, 4, 2, 16))  # to log p of a policy at random
  per_token = near.astype(np.float32) if objective == "coupled_grpo" else None
  experience = experience.replace(
    reward=experience.weight, is_kept=is_kept, token_log_p_old=per_token, token_log_p_ref=per_token
  )
  taken, metrics = step_of(
    (parts, phase, jax.tree.map(lambda x: x.copy(), state)), experience.replace(is_informative=np.array(CHOSEN))
  )
  assert metrics["microbatches"] == {0: 1, 1: 2, 2: 1}[microbatch]

  def loss(trained):
    given = jax.tree.map(jax.numpy.asarray, experience.replace(is_kept=is_kept & np.array(CHOSEN)[:, None]))
    score = make_score(
      parts.model,
      {"params": trained},
      given.prompts,
      given.completion,
      is_counted=given.is_counted,
      teacher={"params": state.reference} if state.reference is not None else None,
    )
    keys = noise.row_keys(noise.step_key(config.seed, "loss", 0), given.prompts.prompt_id, config.rollout.group_size)
    return phases.make_objective(config).loss(
      score, update.of_update(given, jax.numpy.int32(0)), keys, 3
    )  # of three groups

  with jax.set_mesh(parts.mesh):
    (wanted, figures), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.trainable)
  np.testing.assert_allclose(metrics["loss"], wanted, rtol=2e-5)
  np.testing.assert_allclose(metrics["loss_entropy"], figures["loss_entropy"] * 3 / 2, rtol=2e-5, err_msg="of two")
  (moments,) = [part.mu for part in jax.tree.leaves(taken.opt_state, is_leaf=is_adam) if is_adam(part)]
  for ours, theirs in zip(jax.tree.leaves(moments), jax.tree.leaves(jax.device_get(gradient)), strict=True):
    wanted = (1 - config.optim.b1) * theirs
    assert np.linalg.norm(ours - wanted) < 1e-4 * np.linalg.norm(wanted)


def test_groups_whose_gradient_is_0_may_be_left_out(folder, use_devices):
  """Under the negative baseline weights cancel where rewards are equal: what is left out changes nothing."""
  config = tiny.config(optim__learning_rate=0.1)
  begun = begin(config, folder, 1, use_devices)
  experience = experience_of(begun[0], config)
  negative = np.where(np.array(CHOSEN)[:, None], experience.negative_weight, experience.weight)
  experience = experience.replace(negative_weight=negative)
  parts, phase, state = begun
  results = []
  for is_informative in (None, np.array(CHOSEN)):
    own = (parts, phase, jax.tree.map(lambda x: x.copy(), state))
    results.append(step_of(own, experience.replace(is_informative=is_informative)))
  (whole, _), (packed, metrics) = results
  assert metrics["grad_norm"] > 0
  for ours, theirs in zip(*(jax.tree.leaves(each.trainable) for each in (packed, whole)), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_buffer_that_teaches_nothing_counts_a_step_alone(folder, use_devices):
  config = tiny.config(objective__sync_reference_every=2, optim__learning_rate=0.1)
  parts, phase, state = begin(config, folder, 1, use_devices)
  experience = experience_of(parts, config)
  nothing = experience.replace(is_informative=np.zeros(4, bool))
  with jax.set_mesh(parts.mesh):
    state, _ = phase.update(state, phase.frozen, experience)
    before = jax.device_get(state)
    state, metrics = phase.update(state, phase.frozen, nothing)
  after = jax.device_get(state)
  assert metrics == {"loss": 0, "grad_norm": 0, "microbatches": 0}
  assert (after.step, after.num_skipped, after.num_skipped_in_a_row) == (2, 0, 0)
  jax.tree.map(np.testing.assert_array_equal, (after.trainable, after.opt_state), (before.trainable, before.opt_state))
  jax.tree.map(np.testing.assert_array_equal, after.reference, before.trainable)  # it was due


def test_what_is_not_finite_changes_only_the_counters(folder, use_devices):
  config = tiny.config()
  parts, phase, state = begin(config, folder, 1, use_devices)
  experience = experience_of(parts, config)
  bad = experience.replace(weight=np.full_like(experience.weight, np.nan))
  before = jax.device_get((state.trainable, state.opt_state))
  with jax.set_mesh(parts.mesh):
    given, _ = phase.update(state, phase.frozen, bad)
    state, _ = phase.update(given, phase.frozen, bad)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given)), "its memory is the new state's"
    assert (int(state.step), int(state.num_skipped), int(state.num_skipped_in_a_row)) == (2, 2, 2)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get((state.trainable, state.opt_state)))
    state, metrics = phase.update(state, phase.frozen, experience)
  assert np.isfinite(metrics["loss"])
  assert (int(state.step), int(state.num_skipped), int(state.num_skipped_in_a_row)) == (3, 2, 0)
  assert np.abs(jax.device_get(state.trainable)["embedding"] - before[0]["embedding"]).max() > 0


def test_a_skipped_update_syncs_the_reference_too(folder, use_devices):
  """The reference of the buffer that follows is the policy that draws it, whether or not the last update was taken."""
  own = dict(model__lora__rank=2, model__lora__dropout=0.0, optim__learning_rate=0.1)
  config = tiny.config(objective__name="dtm", objective__sync_reference_every=2, **own)
  parts, phase, state = begin(config, folder, 1, use_devices)
  rewards = np.eye(config.rollout.num_prompts, config.rollout.group_size, dtype=np.float32)
  experience = experience_of(parts, config).replace(reward=rewards)
  bad = experience.replace(reward=np.nan * rewards)
  with jax.set_mesh(parts.mesh):
    state, _ = phase.update(state, phase.frozen, experience)
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), *jax.device_get((state.trainable, state.reference)))
    assert max(jax.tree.leaves(gaps)) > 0, "not due yet"
    state, _ = phase.update(state, phase.frozen, bad)
    assert int(state.num_skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((state.trainable, state.reference)))
    _, metrics = phase.update(state, phase.frozen, experience)
  np.testing.assert_allclose(metrics["loss_kl"], 0, atol=1e-6)


def test_adapters_learn_and_dropout_is_in_the_gradient_step_alone(folder, use_devices):
  config = tiny.config(model__lora__rank=2, model__lora__dropout=0.5, optim__learning_rate=0.1)
  parts, phase, state = begin(config, folder, 1, use_devices)
  experience = experience_of(parts, config)
  before = jax.device_get(state.trainable)
  assert set(before["blocks"]) == {"q_proj", "k_proj", "v_proj", "up_proj"}
  after, metrics = step_of((parts, phase, state), experience)
  assert np.abs(after.trainable["blocks"]["q_proj"]["B"]).max() > 0, "adapters start at B = 0 and move"
  without = begin(tiny.config(model__lora__rank=2, model__lora__dropout=0.0), folder, 1, use_devices)
  _, plain = step_of(without, experience)
  np.testing.assert_allclose(metrics["loss"], plain["loss"], rtol=1e-5, err_msg="B = 0: dropout has nothing to drop")
  assert abs(metrics["grad_norm"] - plain["grad_norm"]) > 1e-4, "but the gradient of B sees it"


def test_nothing_is_compiled_after_the_first_iteration(folder, use_devices):
  """Buffers of other prompts and completions run the programs that are there: rollouts, scores, weights, updates."""
  config = tiny.config(rollout__chunk_prompts=2, sampler__name="parallel", objective__elbo_rounds="adaptive")
  parts, phase, state = begin(config, folder, 1, use_devices)
  state = state.replace(step=state.step + 2)  # from here on rollouts are scored
  compiled, counts = [], []

  def note(event, *_, **about):
    if event.endswith("backend_compile_duration"):
      compiled.append(about)

  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    with jax.set_mesh(parts.mesh):
      for buffer in range(3):
        experience, _ = phase.buffers.complete(state, buffer, phase.buffers.generate(state, buffer))
        for _ in range(2):
          state, _ = phase.update(state, phase.frozen, experience)
        counts.append(len(compiled))
  finally:
    jax.monitoring.unregister_event_duration_listener(note)
  assert 3 <= counts[0] <= 12, "the sampler, the scores, the update, and few that are small"
  assert counts[1:] == [counts[0]] * 2


HALF = dict(model__dtype="bfloat16", model__param_dtype="bfloat16")
PUBLISHED = dict(optim__b1=0.9, optim__b2=0.99, optim__weight_decay=0.1, optim__clip_norm=0.2)


def dtypes_of(tree):
  return {str(leaf.dtype) for leaf in jax.tree.leaves(tree) if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)}


def test_small_steps_move_parameters_that_compute_in_bfloat16(folder, use_devices):
  """A learning rate of 1e-6 against LLaDA-8B's weights of about 0.02 is one of 1e-5 here."""
  config = tiny.config(**HALF, **PUBLISHED, optim__learning_rate=1e-5)
  parts, phase, state = begin(config, folder, 1, use_devices)
  assert dtypes_of((state.trainable, state.opt_state)) == {"float32"}
  assert dtypes_of(phase.frozen) == {"bfloat16"}
  before, experience = jax.device_get(state.trainable), experience_of(parts, config)
  jax.tree.map(lambda ours, base: np.testing.assert_array_equal(ours, base), before, jax.device_get(phase.frozen))
  with jax.set_mesh(parts.mesh):
    for _ in range(20):
      state, _ = phase.update(state, phase.frozen, experience)
  after = jax.device_get(state.trainable)
  assert dtypes_of((state.trainable, state.opt_state)) == {"float32"}
  moved = [(a != b).ravel() for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)]
  assert np.concatenate(moved).mean() > 0.99
  rounded = jax.tree.map(lambda x: np.asarray(x, jax.numpy.bfloat16), (after, before))
  stuck = [(a == b).ravel() for a, b in zip(*map(jax.tree.leaves, rounded), strict=True)]
  assert np.concatenate(stuck).mean() > 0.5, "most of these steps are too small for bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "frozen"), [(0, "bfloat16"), (2, "bfloat16"), (2, "float32")])
def test_what_is_trained_and_its_moments_are_float32(folder, use_devices, rank, frozen):
  config = tiny.config(model__dtype="bfloat16", model__param_dtype=frozen, model__lora__rank=rank)
  parts, phase, state = begin(config, folder, 1, use_devices)
  state, _ = step_of((parts, phase, state), experience_of(parts, config))
  assert dtypes_of((state.trainable, state.opt_state)) == {"float32"}
  assert dtypes_of(phase.frozen) == {frozen}
  config.warm_start.updates = 1
  with jax.set_mesh(parts.mesh):
    _, state = phases.warm_start_phase(config, parts)
  assert dtypes_of((state.trainable, state.opt_state)) == {"float32"}


@pytest.mark.slow
def test_parameters_rounded_once_are_those_rounded_at_every_use(folder, use_devices):
  """Loss and gradient against a plain twin, whose layers round float32 parameters each time that they multiply."""
  config = tiny.config(**HALF, optim__learning_rate=0.1, train__microbatch_prompts=2)
  parts, phase, state = begin(config, folder, 1, use_devices)
  experience = jax.tree.map(jax.numpy.asarray, experience_of(parts, config))
  after, metrics = step_of((parts, phase, jax.tree.map(lambda x: x.copy(), state)), experience)

  def loss(trainable):
    score = make_score(parts.model, {"params": trainable}, experience.prompts, experience.completion)
    keys = noise.row_keys(
      noise.step_key(config.seed, "loss", 0), experience.prompts.prompt_id, config.rollout.group_size
    )
    return phases.make_objective(config).loss(score, experience, keys, 4)[0]

  whole, gradient = jax.jit(jax.value_and_grad(loss))(state.trainable)
  np.testing.assert_allclose(metrics["loss"], whole, rtol=1e-5)
  (moments,) = [part.mu for part in jax.tree.leaves(after.opt_state, is_leaf=is_adam) if is_adam(part)]
  scale = 0.1 * min(1, config.optim.clip_norm / float(metrics["grad_norm"]))
  for ours, theirs in zip(jax.tree.leaves(moments), jax.tree.leaves(gradient), strict=True):
    wanted = scale * theirs
    assert np.linalg.norm(ours - wanted) < 0.1 * np.linalg.norm(wanted), "as near as bfloat16's sums are"


def is_adam(part):
  return isinstance(part, optax.ScaleByAdamState)


def test_groups_of_rows_have_their_gradients_summed_in_float32(folder, use_devices):
  """As near to the gradient in float32 as one group of all rows is."""
  gradients = {}
  for name, own in (
    ("exact", HALF | dict(model__dtype="float32")),
    ("whole", HALF),
    ("groups", HALF | dict(model__layer_rows=1)),
  ):
    config = tiny.config(**own, rollout__group_size=16)
    parts, phase, state = begin(config, folder, 1, use_devices)
    after, _ = step_of((parts, phase, state), experience_of(parts, config))
    (moments,) = [part.mu for part in jax.tree.leaves(after.opt_state, is_leaf=is_adam) if is_adam(part)]
    gradients[name] = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(moments["blocks"])])
  errors = {
    name: np.linalg.norm(gradients[name] - gradients["exact"]) / np.linalg.norm(gradients["exact"])
    for name in ("whole", "groups")
  }
  assert errors["groups"] < 1.2 * errors["whole"] < 0.1


@pytest.mark.parametrize("layer_rows", [0, 1])
def test_parameters_are_gathered_in_the_activations_dtype(tmp_path, layer_rows):
  """As the program is when it has been split over the devices; later a CPU's compiler widens all bfloat16."""
  config = tiny.config(**HALF, sharding__fsdp=4, model__layer_rows=layer_rows, model__num_layers=3)
  meshes = programs.make_meshes(config, jax.devices()[:4])
  model = build.place_model(programs.make_model(config), config, *meshes)
  options = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True, "xla_dump_hlo_pass_re": "spmd-partitioning"}
  try:  # what comes from the cache is not compiled, and not written out; JAX asks once whether there is one
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    programs.trace("accumulate", config, model, meshes).lower().compile(compiler_options=options)
  finally:
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
  (path,) = tmp_path.glob("*jit_accumulate*after_spmd-partitioning*")
  gathered = re.findall(r"= (\w+)\[(?:1,)?(\d+,\d+)\]\S* all-gather", path.read_text())
  assert {dtype for dtype, _ in gathered if dtype != "s32"} == {"bf16"}
  assert {shape for dtype, shape in gathered if dtype == "bf16"} == {"16,16", "16,32", "32,16", "16,24"}
  embedding = re.findall(r"= (\w+)\[24,(?:16|4)\]\S* (?:all-reduce|reduce-scatter)", path.read_text())
  assert set(embedding) == {"f32"}, "a token may stand a thousand times in a batch"


def test_a_checkpoint_that_was_trained_in_bfloat16_goes_on_in_float32(folder, use_devices, tmp_path):
  config = tiny.config(**HALF)
  _, _, state = begin(config, folder, 1, use_devices)
  older = jax.tree.map(lambda x: x.astype("bfloat16") if x.dtype == "float32" else x, state)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(3, older.replace(step=older.step + 3), None, {})
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    restored = checkpoints.restore_latest(sharding.abstract(state)).state
  assert dtypes_of((restored.trainable, restored.opt_state)) == {"float32"}
  assert int(restored.step) == 3
  wanted = jax.tree.map(lambda x: x.astype("float32"), older.trainable)
  jax.tree.map(np.testing.assert_array_equal, restored.trainable, wanted)


def test_the_best_policy_is_saved_in_float32_and_sampled_as_in_training(folder, use_devices):
  config = tiny.config(**HALF, optim__learning_rate=0.01)
  parts, phase, state = begin(config, folder, 1, use_devices)
  with jax.set_mesh(parts.mesh):
    state, _ = phase.update(state, phase.frozen, experience_of(parts, config))
    phase.keep_best(state.trainable, 1)
    assert set(map(str, SavedParams(folder / "run" / "best").dtypes().values())) == {"float32"}
    (loaded,), _ = policy.load_policies(config, folder / "run", parts, ["best"])
    trained = Trainable(False, "bfloat16").computing(state.trainable)
    jax.tree.map(lambda ours, theirs: np.testing.assert_array_equal(ours, theirs.astype("bfloat16")), loaded, trained)
    prompts, _ = parts.prompts.batch(0, 4)
    sample = phases.training_sample(config, parts.model, parts.mesh)
    drawn = [sample(Policies(policy, {}), prompts, jax.random.key(0)) for policy in (loaded, trained)]
  jax.tree.map(np.testing.assert_array_equal, *drawn)


def notice_at(patch, number):
  """Let JAX say that the machines are about to be taken away when it is asked for the `number`-th time."""
  count = itertools.count(1)
  patch.setattr(multihost_utils, "reached_preemption_sync_point", lambda poll: next(count) == number)


def is_in_update(notice):
  return any(entry.path.name == "update.py" for entry in notice.traceback)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_step_interrupted_between_microbatches_has_changed_nothing(folder, use_devices, monkeypatch, rank):
  config = tiny.config(model__lora__rank=rank, train__microbatch_prompts=1)
  parts, phase, state = begin(config, folder, 1, use_devices)
  experience, before = experience_of(parts, config), jax.device_get(state)
  for number in (1, 3, 4):
    with monkeypatch.context() as patch, jax.set_mesh(parts.mesh):
      notice_at(patch, number)
      with pytest.raises(Preempted):
        phase.update(state, phase.frozen, experience)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
  again = step_of((parts, phase, state), experience)
  alone = step_of(begin(config, folder, 1, use_devices), experience)
  jax.tree.map(np.testing.assert_array_equal, again, alone)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_interrupted_between_microbatches_ends_as_if_left_alone(tmp_path, use_devices, monkeypatch, rank):
  """Polls come before a buffer, before it is sampled and scored, before an update, and before each microbatch."""
  use_devices(1)
  own = dict(model__lora__rank=rank, train__microbatch_prompts=2, train__num_buffers=1, warm_start__updates=0)
  config = tiny.config(**own, objective__wdce__baseline="none", checkpoint__every_updates=100)
  alone, workdir = leave_alone(config, tmp_path / "alone"), epath.Path(tmp_path / "run")
  for number, step in ((5, "0"), (6, "1")):
    with monkeypatch.context() as patch:
      notice_at(patch, number)
      with pytest.raises(Preempted) as notice:
        train.main(config, workdir)
    assert is_in_update(notice)
    assert (workdir / "checkpoints" / "train" / step / "experience").exists()
  train.main(config, workdir)
  jax.tree.map(np.testing.assert_array_equal, policy_of(workdir), policy_of(alone))
  assert rows_of(workdir) == rows_of(alone)


COIN = """
def records(split):
  return [{"n": n} for n in (range(64) if split == "train" else range(64, 80))]

def prompt(record):
  return f"({record['n'] + 100}="

def reward(record, completion):
  return float(sum(map(ord, completion)) % 2) if record["n"] % 3 else 1.0  # a third of the groups are left out
"""


@pytest.mark.slow
def test_a_run_that_packs_its_updates_and_is_interrupted_ends_as_if_left_alone(tmp_path, use_devices, monkeypatch):
  use_devices(1)
  (tmp_path / "coin.py").write_text(COIN)
  own = dict(rollout__drop_equal_groups=True, train__microbatch_prompts=1, train__num_buffers=2, warm_start__updates=0)
  config = tiny.config(**own, task__name=str(tmp_path / "coin.py"), objective__wdce__baseline="none")
  alone, workdir = leave_alone(config, tmp_path / "alone"), epath.Path(tmp_path / "run")
  rows = rows_of(alone)[1:]
  assert any(0 < row["groups_dropped"] < 4 for row in rows)
  assert all(row["microbatches"] == 4 - row["groups_dropped"] for row in rows)
  for number in (5, 4):  # polls come before a buffer, before it is sampled, before an update, before each microbatch
    with monkeypatch.context() as patch:
      notice_at(patch, number)
      with pytest.raises(Preempted) as notice:
        train.main(config, workdir)
    assert is_in_update(notice)
  train.main(config, workdir)
  jax.tree.map(np.testing.assert_array_equal, policy_of(workdir), policy_of(alone))
  assert rows_of(workdir) == rows_of(alone)


def test_the_groups_of_two_batches_are_pooled_by_hand():
  def batch(first, chosen):
    prompts = Prompts(*np.zeros((2, 4, 1), np.int32), np.arange(first, first + 4))
    experience = rollout.demonstrate(prompts, np.zeros((4, 1), np.int32))
    return experience.replace(is_informative=np.isin(prompts.prompt_id, chosen))

  pooled = rollout.pool(batch(0, [2]), batch(4, [5, 7]))
  assert pooled.prompts.prompt_id.tolist() == [2, 5, 7, 0]
  assert pooled.is_informative.tolist() == [True, True, True, False]
  assert rollout.pool(pooled, batch(8, [8, 9, 10])).prompts.prompt_id.tolist() == [2, 5, 7, 8]


@pytest.mark.slow
def test_batches_are_added_until_a_buffer_has_its_groups(tmp_path, use_devices, monkeypatch):
  """Each prompt is graded in one batch alone, and a run that is interrupted ends as if left alone."""
  use_devices(1)
  graded = tmp_path / "graded.txt"
  noted = f"  with open({str(graded)!r}, 'a') as file:\n    file.write(f\"{{record['n']}} \")\n  return"
  (tmp_path / "coin.py").write_text(COIN.replace("  return float", noted + " float"))
  own = dict(rollout__drop_equal_groups=True, rollout__until_informative=3, rollout__max_batches=3)
  own |= dict(train__num_buffers=2, train__updates_per_buffer=1, warm_start__updates=0, rollout__chunk_prompts=2)
  config = tiny.config(**own, task__name=str(tmp_path / "coin.py"), grading__workers=1)
  alone, workdir = leave_alone(config, tmp_path / "alone"), epath.Path(tmp_path / "run")
  rows = rows_of(alone)[1:]
  assert max(row["batches"] for row in rows) > 1
  for row in rows:
    num_informative = 4 * row["batches"] - row["groups_dropped"]
    assert num_informative >= 3 or row["batches"] == 3
  numbers = [number for number in map(int, graded.read_text().split()) if number < 64]  # the others are evaluated
  assert len(set(numbers)) == 4 * sum(row["batches"] for row in rows)
  assert all(numbers.count(number) == 4 for number in numbers)
  for number in (5, 8):  # in the middle of a batch
    with monkeypatch.context() as patch:
      notice_at(patch, number)
      with pytest.raises(Preempted):
        train.main(config, workdir)
  train.main(config, workdir)
  jax.tree.map(np.testing.assert_array_equal, policy_of(workdir), policy_of(alone))
  assert rows_of(workdir) == rows_of(alone)
