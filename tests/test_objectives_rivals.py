"""The rivals on a group of two rollouts: the loss by hand, which way its gradient points, and what drops out."""

import functools
import math

import documents
import jax
import jax.numpy as jnp
import numpy as np
import objectives
import pytest

from dmpo_jax.objectives.clipped import centred_advantage, clipped_surrogate, k3, leave_one_out_advantage
from dmpo_jax.objectives.estimators import Coupled, Elbo, ElboQuadrature, Eubo, OneStep, Trajectory, Unweighted
from dmpo_jax.objectives.masking import Completions, MaskSampling
from dmpo_jax.structs import Experience, Prompts, Scores

LIKELIHOODS = {
  "diffu_grpo": OneStep(MaskSampling(1), prompt_mask_ratio=0.0),
  "wd1": OneStep(MaskSampling(1), prompt_mask_ratio=0.0),
  "coupled_grpo": Coupled(MaskSampling(3, min_ratio=0.2, max_ratio=0.8)),
  "gdpo": ElboQuadrature(MaskSampling(2), num_points=2),
  "espo": Elbo(MaskSampling(2)),
  "gdsd": Unweighted(MaskSampling(1, antithetic=False, min_ratio=1.0)),
  "tracerl": Trajectory(MaskSampling(2)),
  "spg": Eubo(MaskSampling(2, antithetic=False, min_ratio=0.3), beta=1.5, mixture=0.5),
}
RIVALS = (*LIKELIHOODS, "dtm")
LEARNERS = (*RIVALS, "wdce", "wddo")
C = 2
OLD = np.log(np.array([[[0.5, 0.25], [0.4, 0.5]]], np.float32))


def make_experience(reward=(1.0, 0.0), **changes):
  """One prompt with two rollouts of two tokens; log p_old as in OLD, p_ref twice as sure."""
  reward = np.array([reward], np.float32)
  g = reward.shape[1]
  zeros = np.zeros((1, g), np.float32)
  arrays = dict(
    prompts=Prompts(np.zeros((1, 3), np.int32), np.ones((1, 3), bool), np.zeros(1, np.uint32)),
    completion=np.arange(g * C, dtype=np.int32).reshape(1, g, C),
    is_counted=np.ones((1, g, C), bool),
    reward=reward,
    is_kept=np.ones((1, g), bool),
    log_p_old=zeros,
    log_p_ref=zeros,
    weight=np.asarray(jax.nn.softmax(jnp.asarray(reward))),
    negative_weight=np.asarray(jax.nn.softmax(jnp.asarray(-reward))),
    committed_at=np.broadcast_to(np.arange(C, dtype=np.int32), (1, g, C)).copy(),
    token_log_p_old=OLD[:, :g],
    token_log_p_ref=OLD[:, :g] / 2,
  )
  return Experience(**arrays | changes)


@functools.partial(jax.jit, static_argnames=("name", "kl_weight", "seed"))
def value_and_grad(log_p, experience, *, name, kl_weight=0.1, seed=1):
  """The loss of a policy that says log_p [1, g, c] of the tokens whatever it sees, its metrics and gradient."""
  own = {"kl_weight": kl_weight} if "kl_weight" in objectives.OWN.get(name, {}) else {}
  objective = objectives.make(name, likelihood=LIKELIHOODS.get(name), **own)

  def compute(log_p):
    def score(is_masked, prompt_is_masked=None, pairs=()):
      log_prob = jnp.broadcast_to(log_p[:, :, None], is_masked.shape)
      old = jnp.asarray(OLD)[:, : log_p.shape[1], None]  # of two tokens, by the policy that drew the completions
      log_ratios = old - log_prob, jnp.log1p(-jnp.exp(old)) - jnp.log1p(-jnp.exp(log_prob))
      divergence = jnp.exp(old) * log_ratios[0] + (1 - jnp.exp(old)) * log_ratios[1]
      return Scores(log_prob=log_prob, entropy=jnp.ones_like(log_prob), divergence=divergence)

    keys = jax.random.split(jax.random.key(seed), log_p.shape[:2])
    return objective.loss(score, experience, keys, 1)

  (value, metrics), gradient = jax.value_and_grad(compute, has_aux=True)(log_p)
  return value, metrics, gradient


def run(name, log_p=OLD, experience=None, **keywords):
  experience = experience or make_experience()
  if name in ("espo", "gdsd"):  # of whole completions, one estimate
    whole = [np.sum(each, -1, keepdims=True) for each in (experience.token_log_p_old, experience.token_log_p_ref)]
    experience = experience.replace(token_log_p_old=whole[0], token_log_p_ref=whole[1])
  return value_and_grad(jnp.asarray(log_p), experience, name=name, **keywords)


def test_the_objective_that_the_documents_add():
  names = {}
  exec(documents.code("extending.md", "import dataclasses"), names)  # the page's own text

  def score(is_masked, prompt_is_masked=None, pairs=()):
    log_prob = jnp.broadcast_to(jnp.asarray(OLD)[:, :, None], is_masked.shape)
    return Scores(log_prob=log_prob, entropy=jnp.ones_like(log_prob))

  keys = jax.random.split(jax.random.key(1), (1, 2))
  experience = jax.tree.map(jnp.asarray, make_experience())
  objective = names["Reinforce"](objectives.MASKS, OneStep(MaskSampling(1), prompt_mask_ratio=0.0))
  loss, _ = objective.loss(score, experience, keys, 1)
  assert loss.item() == pytest.approx(-0.5 * OLD[0, 0].sum() + 0.5 * OLD[0, 1].sum(), rel=1e-5)


def test_diffu_grpo_by_hand():
  # ratios 1.1 and 1.5 for the better rollout, of which the second is clipped; 0.5 and 1 for the other
  log_p = OLD + np.log(np.array([[[1.1, 1.5], [0.5, 1.0]]], np.float32))
  kl = np.asarray(k3(jnp.asarray(OLD / 2), jnp.asarray(log_p)))[0].mean(-1)
  better = -0.5 * (1.1 + 1.2) / 2 + 0.1 * kl[0]
  worse = -(-0.5 * 0.8 - 0.5 * 1.0) / 2 + 0.1 * kl[1]
  loss, metrics, gradient = run("diffu_grpo", log_p)
  assert loss.item() == pytest.approx((better + worse) / 2, rel=1e-5)
  assert metrics["loss_clipped"].item() == pytest.approx(0.5)
  gradient = run("diffu_grpo", log_p, kl_weight=0.0)[2][0]
  np.testing.assert_allclose(gradient, [[-0.5 * 1.1 / 4, 0], [0, 0.5 / 4]], rtol=1e-5, atol=1e-7)


def test_coupled_grpo_by_hand():
  # the estimate of a token is a sum of its log-probabilities, here all the same: at log p_old = that, ratios are 1
  estimate = jax.jacobian(lambda log_p: run_tokens("coupled_grpo", log_p))(jnp.zeros((1, 2, C)))
  share = np.asarray(jnp.einsum("pgcpgc->pgc", estimate))
  experience = make_experience(token_log_p_old=share * OLD, token_log_p_ref=share * OLD)
  loss, metrics, gradient = run("coupled_grpo", OLD, experience)
  # leave-one-out advantages of two rollouts are 1 and -1
  assert loss.item() == pytest.approx(0, abs=1e-6)
  assert metrics["loss_kl"].item() == pytest.approx(0, abs=1e-6)
  np.testing.assert_allclose(gradient[0], [[-1.0] * C, [1.0] * C] * share[0] / (2 * C), rtol=1e-5)
  assert (share >= 0.5 + 0.5).all()  # once in full, once in the pair, whose share is above a half


def run_tokens(name, log_p):
  e = make_experience()
  keys = jax.random.split(jax.random.key(1), log_p.shape[:2])
  views = LIKELIHOODS[name].views(
    keys, Completions(jnp.asarray(e.is_counted), jnp.asarray(e.committed_at), jnp.ones((1, 3), bool))
  )
  return LIKELIHOODS[name].tokens(jnp.broadcast_to(log_p[:, :, None], views.is_masked.shape), views)


def test_tracerl_by_hand():
  log_p = OLD + np.log(np.array([[[1.1, 1.5], [0.5, 1.0]]], np.float32))
  kl = float(k3(jnp.asarray(OLD), jnp.asarray(log_p)).mean())
  # standardised advantages of two rollouts are 1 and -1
  surrogate = ((1.1 + 1.2) / 2 + (-0.8 - 1.0) / 2) / 2
  loss, metrics, _ = run("tracerl", log_p)
  assert loss.item() == pytest.approx(-surrogate + 0.1 * kl, rel=1e-5)
  assert metrics["loss_kl"].item() == pytest.approx(kl, rel=1e-5)


def test_tracerl_takes_a_chunks_mean_of_the_surrogate_and_its_sum_of_the_kl():
  ratio = np.array([[[1.1, 1.15, 0.9], [1.0, 1.0, 1.0]]])
  old = np.log(np.full((1, 2, 3), 0.5))
  kl = 1 / ratio - 1 + np.log(ratio)
  experience = make_experience(
    completion=np.zeros((1, 2, 3), np.int32),
    is_counted=np.ones((1, 2, 3), bool),
    committed_at=np.array([[[0, 0, 1], [0, 1, 1]]], np.int32),
    token_log_p_old=old.astype(np.float32),
    token_log_p_ref=None,
  )

  def compute(log_p):
    def score(is_masked, prompt_is_masked=None, pairs=()):
      log_prob = jnp.broadcast_to(log_p[:, :, None], is_masked.shape)
      return Scores(log_prob=log_prob, entropy=log_prob)

    keys = jax.random.split(jax.random.key(1), (1, 2))
    objective = objectives.make("tracerl", likelihood=LIKELIHOODS["tracerl"])
    return objective.loss(score, jax.tree.map(jnp.asarray, experience), keys, 1)

  log_p = jnp.asarray(old + np.log(ratio), jnp.float32)
  (loss, metrics), gradient = jax.value_and_grad(compute, has_aux=True)(log_p)
  surrogate = ((1.1 + 1.15) / 2 + 0.9) / 2 - 1  # of advantages 1 and -1
  assert loss.item() == pytest.approx((-surrogate + 0.1 * kl.sum() / 2) / 2, rel=1e-4)
  assert metrics["loss_kl"].item() == pytest.approx(((kl[0, 0, :2].mean() + kl[0, 0, 2]) / 2) / 2, rel=1e-3)
  np.testing.assert_allclose(gradient[0, 1], [0.5 / 2, 0.25 / 2, 0.25 / 2], rtol=1e-5)


def test_gdpo_by_hand():
  tokens = np.asarray(run_tokens("gdpo", jnp.asarray(OLD)))
  shift = np.array([[[0.1, 0.3], [-0.5, -0.1]]], np.float32)  # a sequence's ratio is exp of the mean over its tokens
  experience = make_experience(token_log_p_old=tokens - shift, token_log_p_ref=tokens)
  loss, metrics, _ = run("gdpo", OLD, experience)
  first, second = 0.5 * 1.2, -0.5 * 0.8  # exp(0.2) = 1.22 and exp(-0.3) = 0.74, both clipped
  assert loss.item() == pytest.approx(-(first + second) / 2, rel=1e-5)
  assert metrics["loss_clipped"].item() == 1.0


def test_espo_by_hand():
  tokens = np.asarray(run_tokens("espo", jnp.asarray(OLD)))
  shift = np.array([[[0.1, 0.5], [-0.5, -0.1]]], np.float32)
  experience = make_experience(token_log_p_old=tokens - shift, token_log_p_ref=tokens - [[[1.0, 0.0], [0.0, 0.0]]])
  loss, metrics, _ = run("espo", OLD, experience)
  # leave-one-out advantages are 1 and -1; exp(0.3) = 1.35 and exp(-0.3) = 0.74 are clipped to 1.2 and 0.8
  assert metrics["loss_kl"].item() == pytest.approx(1 / 2 / 2 / 2, rel=1e-4)  # 1 nat of the first, of two tokens each
  assert loss.item() == pytest.approx(-(1.2 - 0.8) / 2 + 0.1 * 0.125, rel=1e-4)
  assert metrics["loss_clipped"].item() == 1.0


def test_gdsd_by_hand():
  experience = make_experience(token_log_p_old=OLD - np.array([[[0.1, 0.0], [0.5, 0.5]]], np.float32))
  loss, metrics, gradient = run("gdsd", OLD, experience, kl_weight=0.0)
  # it aims at half a nat a token up and down; the second went up by 1, of which log 1.2 counts and has no gradient
  assert loss.item() == pytest.approx(((0.05 - 0.5) ** 2 + (math.log(1.2) / 2 + 0.5) ** 2) / 2, rel=1e-5)
  np.testing.assert_allclose(gradient[0], [[(0.05 - 0.5) / 2] * C, [0, 0]], rtol=1e-5)
  assert metrics["loss_clipped"].item() == 0.5


def test_wd1_by_hand():
  loss, metrics, gradient = run("wd1")
  plus = 1 / (1 + math.exp(-1))  # of advantages 0.5 and -0.5
  share = plus - (1 - plus)
  assert loss.item() == pytest.approx(-share * OLD[0, 0].sum() + share * OLD[0, 1].sum(), rel=1e-5)
  np.testing.assert_allclose(gradient[0], [[-share] * C, [share] * C], rtol=1e-5)
  assert metrics["loss_coefficient"].item() == pytest.approx(2 * share, rel=1e-5)


def test_spg_takes_the_lower_bound_of_the_good_and_the_mixture_of_the_bad():
  likelihood, experience = LIKELIHOODS["spg"], make_experience()
  keys = jax.random.split(jax.random.key(7), (1, 2))
  counted = jnp.asarray(experience.is_counted)
  views = likelihood.views(keys, Completions(counted, jnp.asarray(experience.committed_at), jnp.ones((1, 3), bool)))
  is_read = np.asarray(views.share[0] > 0)
  lower = (OLD[0] * np.asarray(views.share[0]).sum(1)).sum(-1) / C
  # the published mean: over the positions that some mask hid, whose number is another than C
  powers = (np.asarray(views.share[0]) * np.exp(1.5 * OLD[0])[:, None]).sum(1)
  num_read = is_read.any(1).sum(-1)
  upper = np.log(powers, out=np.zeros_like(powers), where=powers > 0).sum(-1) / 1.5 / np.maximum(num_read, 1)
  assert num_read[1] == 1
  loss, metrics, _ = run("spg", seed=7)
  mixed = (lower + upper) / 2
  assert loss.item() == pytest.approx(-(0.5 * lower[0] - 0.5 * mixed[1]).item() / 2, rel=1e-5)
  assert metrics["loss_gap"].item() == pytest.approx((mixed - lower).mean(), rel=1e-4)


def test_dtm_by_hand():
  loss, metrics, gradient = run("dtm")
  better, worse = math.exp(1) - 1, math.exp(-1) - 1  # of rewards 0.5 and -0.5 at a tilt of 2; the divergence is 0
  per_mask = -np.array([better, worse]) / 2  # a mean over two rollouts
  assert loss.item() == pytest.approx((np.asarray(gradient) * OLD).sum(), rel=1e-5)
  assert metrics["loss_coefficient"].item() == pytest.approx((better - worse) / 2, rel=1e-5)
  assert metrics["loss_kl"].item() == pytest.approx(0, abs=1e-6)
  share = np.asarray(gradient)[0] / per_mask[:, None]
  assert (share > 0).all()  # each position is masked in one of a pair's halves,
  assert set(share.sum(-1).round(5)) <= {0.5, 1.0}  # of which one may be empty


@pytest.mark.parametrize("control_variate", [0.0, 0.5, 1.0])
def test_dtm_is_least_where_the_old_policy_is_tilted(control_variate):
  """All completions of two tokens, as often as the old policy draws them, in every state that they are masked to."""
  counts, reward, tilt = np.array([[3, 1], [2, 4]]), np.array([[0.0, 1.0], [0.5, -1.0]]), 1.5
  drawn = [(a, b) for a in range(2) for b in range(2) for _ in range(counts[a, b])]
  completion = np.array([drawn], np.int32)

  def conditionals(weight):
    """[position, state of the other one: 0, 1 or masked, token]"""
    first, second = weight / weight.sum(0), weight / weight.sum(1, keepdims=True)
    alone = weight.sum(1) / weight.sum(), weight.sum(0) / weight.sum()
    return np.log([[*first.T, alone[0]], [*second, alone[1]]])

  old, new = conditionals(counts), conditionals(counts * np.exp(tilt * reward))
  experience = jax.tree.map(
    jnp.asarray,
    make_experience([reward[a, b] for a, b in drawn]).replace(completion=completion, is_counted=completion >= 0),
  )

  def compute(table, is_all):
    def score(is_masked, prompt_is_masked=None, pairs=()):
      is_masked = jnp.broadcast_to(is_all, is_masked.shape)
      y = jnp.broadcast_to(experience.completion[:, :, None], is_masked.shape)
      state = jnp.where(is_masked, 2, y)[..., ::-1]
      log_p, log_old = (
        jax.nn.log_softmax(jnp.asarray(each, jnp.float32))[jnp.arange(2), state] for each in (table, old)
      )
      log_prob = jnp.take_along_axis(log_p, y[..., None], -1)[..., 0]
      divergence = (jnp.exp(log_old) * (log_old - log_p)).sum(-1)
      return Scores(log_prob=log_prob, entropy=log_prob, divergence=divergence)

    keys = jnp.broadcast_to(jax.random.key(0), completion.shape[:2])
    masks = MaskSampling(1, antithetic=False, min_ratio=1.0)
    objective = objectives.make("dtm", masks, tilt=tilt, control_variate=control_variate)
    return objective.loss(score, experience, keys, 1)[0]

  slope = jax.jit(jax.grad(compute))
  for is_all in (True, False):  # both positions hidden, or each with the other one in sight
    np.testing.assert_allclose(slope(new, is_all), 0, atol=1e-6)
    assert np.abs(slope(old, is_all)).max() > 0.05


def test_advantages_by_hand():
  reward, is_kept = jnp.array([[1.0, 0.0, 5.0, 2.0]]), jnp.array([[True, True, False, True]])
  np.testing.assert_allclose(centred_advantage(reward, is_kept), [[0, -1, 0, 1]])
  np.testing.assert_allclose(leave_one_out_advantage(reward, is_kept), [[0, -1.5, 0, 1.5]])
  np.testing.assert_allclose(leave_one_out_advantage(reward[:, :1], is_kept[:, :1]), [[0]])


def test_clipping_stops_only_what_went_too_far():
  log_ratio, advantage = jnp.log(jnp.array([[1.5, 0.5, 1.5, 0.5]])), jnp.array([[1.0, 1.0, -1.0, -1.0]])
  value, is_clipped = clipped_surrogate(log_ratio, advantage, 0.2)
  np.testing.assert_allclose(value, [[1.2, 0.5, -1.5, -0.8]], rtol=1e-6)
  np.testing.assert_array_equal(is_clipped, [[True, False, False, True]])


@pytest.mark.parametrize("name", LEARNERS)
def test_a_step_down_raises_the_better_rollout(name):
  keywords = {} if name in ("wdce", "wddo") else {"kl_weight": 0.0}
  tokens = np.asarray(run_tokens(name, jnp.asarray(OLD))) if name in LIKELIHOODS else OLD  # ratios of 1
  _, metrics, gradient = run(name, experience=make_experience(token_log_p_old=tokens), **keywords)
  gradient = np.asarray(gradient[0]).sum(-1)
  assert gradient[0] < 0 < gradient[1]
  assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("name", RIVALS)
def test_equal_rewards_and_groups_of_one_teach_nothing(name):
  np.testing.assert_allclose(run(name, experience=make_experience((0.7, 0.7)), kl_weight=0.0)[2], 0, atol=1e-6)
  alone = make_experience((0.7,))
  np.testing.assert_allclose(run(name, OLD[:, :1], alone, kl_weight=0.0)[2], 0, atol=1e-6)


@pytest.mark.parametrize("name", RIVALS)
def test_a_constant_reward_and_the_order_change_nothing(name):
  plain = run(name)
  shifted = run(name, experience=make_experience((3.0, 2.0)))
  np.testing.assert_allclose(shifted[2], plain[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_dropped_rollout_poisons_nothing(name):
  results = []
  for value in (np.nan, 0.3):
    e = make_experience((1.0, value), is_kept=np.array([[True, False]]))
    poisoned = np.array(OLD)
    poisoned[0, 1] = value
    e = e.replace(token_log_p_old=poisoned, token_log_p_ref=poisoned, log_p_old=np.array([[-1.0, value]], np.float32))
    e = e.replace(weight=np.array([[0.9, value]], np.float32), negative_weight=np.array([[0.1, value]], np.float32))
    results.append(run(name, experience=e))
  assert np.isfinite(results[0][0])
  assert np.isfinite(results[0][2]).all()
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), *results)
  np.testing.assert_array_equal(results[0][2][0, 1], 0)


@pytest.mark.parametrize(
  ("name", "own"),
  [
    ("wdce", {}),
    ("wddo", dict(sets="independent")),
    ("denoise", {}),
    ("coupled_grpo", dict(likelihood=Coupled(MaskSampling(5, min_ratio=0.2, max_ratio=0.8)))),
    ("wd1", dict(likelihood=Elbo(MaskSampling(4, block_length=1)))),
    ("dtm", {}),
    ("spg", dict(likelihood=Eubo(MaskSampling(4, min_ratio=0.2, max_ratio=0.8), beta=1.5, mixture=0.5))),
  ],
)
def test_a_position_of_a_pair_is_read_in_one_of_the_two(name, own):
  """What a policy says of the other one may be anything, such as what it says of its partner."""
  experience = make_experience(is_counted=np.array([[[True, True], [True, False]]]))
  objective, named = objectives.make(name, **own), []

  @functools.partial(jax.jit, static_argnames="is_shared")
  def compute(sharpness, experience, keys, is_shared):
    def score(is_masked, prompt_is_masked=None, pairs=()):
      named.append(pairs)
      log_prob = sharpness * (jnp.cos(jnp.arange(is_masked.size)).reshape(is_masked.shape) - 1.5)
      for i, j in pairs if is_shared else ():
        wanted = jnp.where(is_masked[:, :, i], log_prob[:, :, i], log_prob[:, :, j])
        log_prob = log_prob.at[:, :, i].set(wanted).at[:, :, j].set(wanted)
      return Scores(log_prob=log_prob, entropy=jnp.exp(log_prob), divergence=log_prob**2)

    return objective.loss(score, experience, keys, 1)

  run_both = [
    jax.value_and_grad(functools.partial(compute, is_shared=shared), has_aux=True) for shared in (False, True)
  ]
  keys = jax.random.split(jax.random.key(1), (1, 2))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5), *(run(1.0, experience, keys) for run in run_both)
  )
  assert named[0]


@pytest.mark.slow
def test_independent_sets_of_wddo_are_no_complements():
  # there the fake set is the other half of the pairs: every mask the complement of a real one
  seen = []

  def score(is_masked, prompt_is_masked=None, pairs=()):
    seen.append(np.asarray(is_masked))
    return Scores(log_prob=jnp.full(is_masked.shape, -1.0), entropy=jnp.zeros(is_masked.shape))

  zeros = np.zeros((1, 2, 64), np.int32)
  wide = make_experience(is_counted=zeros == 0, completion=zeros, committed_at=zeros)
  wide = jax.tree.map(jnp.asarray, wide)
  keys = jax.random.split(jax.random.key(0), (1, 2))
  for sets in ("shared", "independent"):
    objectives.make("wddo", sets=sets).loss(score, wide, keys, 1)
  shared, both = seen
  real, fake = both[:, :, :2], both[:, :, 2:]
  np.testing.assert_array_equal(real, shared)
  for masks in (real, fake):
    np.testing.assert_array_equal(masks[:, :, 0], ~masks[:, :, 1])
  for i in range(2):
    for j in range(2):
      assert 0 < (real[:, :, i] ^ fake[:, :, j]).mean() < 1
