"""Objectives for models that attend by blocks: masks in each block, recorded losses of their trainers and of rivals."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import objectives
import pytest
from recorded_models import params_of, reader
from safetensors.numpy import load_file

from dmpo_jax.hub import layout
from dmpo_jax.hub.families import natural_family
from dmpo_jax.hub.model_config import model_config_from_hf
from dmpo_jax.logprobs import make_score
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.objectives.estimators import make_estimator
from dmpo_jax.objectives.masking import Blocks, Completions, MaskSampling, draw
from dmpo_jax.structs import Experience, Prompts, Scores

FOLDER = pathlib.Path(__file__).parent / "goldens"
TRAINERS, RIVALS = (json.loads((FOLDER / "blocks" / f"{name}.json").read_text()) for name in ("trainers", "rivals"))


@functools.cache
def recorded(file, case):
  with np.load(FOLDER / "blocks" / f"{file}.npz") as arrays:
    return {key.removeprefix(f"{case}_"): arrays[key] for key in arrays if key.startswith(f"{case}_")}


def close(found, wanted, rtol=1e-4):
  np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())


# Masks

START = np.array([3, 0])  # tokens of each prompt in the block of 4 where its completions begin


def completions(num_draws=1, c=6, committed_at=None):
  """Of two prompts, one of whose completions begins in the middle of a block; the last position is not counted."""
  shape = (2, num_draws, c)
  is_counted = jnp.broadcast_to(jnp.arange(c) < c - 1, shape)
  at = jnp.zeros(shape, jnp.int32) if committed_at is None else jnp.broadcast_to(jnp.asarray(committed_at), shape)
  return Completions(is_counted, at, jnp.arange(7) < 4 + jnp.asarray(START)[:, None])


def blocks_of(prompt, c=6):
  return (START[prompt] + np.arange(c)) // 4


@pytest.mark.parametrize(
  ("kind", "antithetic"), [("random", False), ("random", True), ("stratified", True), ("trajectory", False)]
)
def test_the_bound_is_the_sum_of_those_of_the_blocks(kind, antithetic):
  """Of a model that loses confidence with every masked token of a block: exact, however small the blocks.

  Along a trajectory of one position a call it is the same sum, as each number of masks is met as often.
  """
  masks = MaskSampling(2, antithetic, kind=kind, model_block=4)
  about = completions(2000, committed_at=np.array([3, 1, 0, 2, 4, 9]))
  estimator = make_estimator("elbo", masks)

  @jax.jit
  def estimate(keys):
    views = estimator.views(keys, about)
    blocks = Blocks.of(about, 4)
    num = blocks.split(views.is_masked, False).sum(-1, keepdims=True)
    log_prob = -blocks.join(jnp.broadcast_to(num, (*num.shape[:-1], 4)).astype(jnp.float32) ** 2)
    return estimator.tokens(log_prob, views).sum(-1).mean(1), views.is_masked, views.share

  found, is_masked, share = jax.device_get(estimate(jax.random.split(jax.random.key(0), (2, 2000))))
  for prompt in (0, 1):
    sizes = np.bincount(blocks_of(prompt)[:5])
    assert found[prompt] == pytest.approx(-sum(sum(m**2 for m in range(1, size + 1)) for size in sizes), rel=0.03)
  assert not is_masked[..., 5].any()
  np.testing.assert_array_equal(share > 0, is_masked)
  if antithetic:
    assert (is_masked[:, :, 0] ^ is_masked[:, :, 1])[..., :5].all()
  else:
    assert is_masked[1, ..., :4].any(-1).all()
    assert is_masked[1, ..., 4].all()  # a block with one counted position


def test_each_block_has_a_ratio_of_its_own():
  """Numbers of masked tokens in two blocks are independent; spread evenly over a completion's blocks if stratified."""
  about = Completions(jnp.ones((1, 600, 32), bool), jnp.zeros((1, 600, 32), jnp.int32), jnp.ones((1, 16), bool))
  keys = jax.random.split(jax.random.key(1), (1, 600))

  def numbers(kind):
    masks = MaskSampling(1, False, kind=kind, model_block=16)
    return np.asarray(jax.jit(lambda keys: draw(keys, about, masks).is_masked)(keys)).reshape(600, -1, 16).sum(-1)

  num = numbers("random")
  assert abs(np.corrcoef(num[:, 0], num[:, 1])[0, 1]) < 0.15
  np.testing.assert_array_equal(np.unique(num), np.arange(1, 17))
  assert np.ptp(np.bincount(numbers("stratified")[:, 0])[1:]) <= 2  # of 600 draws, 600 / 16 each


def test_the_supervised_loss_may_have_a_time_for_each_block():
  """Of tokens that all cost 1 nat: the bound is 1 on average, and numbers of masks in two blocks are independent."""
  objective = objectives.make("denoise", MaskSampling(1, False, 0.05, model_block=16), level="block")
  experience = experience_of(np.ones((1, 600, 32), bool), weight=jnp.ones((1, 600)))
  experience = experience.replace(prompts=Prompts(None, jnp.ones((1, 16), bool), None))

  @jax.jit
  def compute(keys):
    seen = []

    def score(is_masked, pairs=()):
      seen.append(is_masked)
      return Scores(-jnp.ones(is_masked.shape), jnp.ones(is_masked.shape))

    return objective.loss(score, experience, keys, 1)[0], seen[0]

  loss, is_masked = compute(jax.random.split(jax.random.key(2), (1, 600)))
  num = np.asarray(is_masked).reshape(600, -1, 16).sum(-1)
  assert loss == pytest.approx(1, abs=0.05)
  assert num.std(0).min() > 3
  assert abs(np.corrcoef(num[:, 0], num[:, 1])[0, 1]) < 0.15


def test_a_trajectory_is_cut_into_the_calls_of_each_block():
  """Two chunks of each block: the views are half-decided blocks, and every counted position is read once."""
  committed_at = np.array([2, 4, 7, 5, 6, 9])
  estimator = make_estimator("trajectory", MaskSampling(2, False, model_block=4))
  views = estimator.views(jax.random.split(jax.random.key(0), (2, 1)), completions(committed_at=committed_at))
  # prompt 0: blocks of calls [2], [4, 7, 5, 6], [9 uncounted]; prompt 1: [2, 4, 7, 5], [6, 9 uncounted]
  read = np.asarray(views.share > 0)[:, 0]
  np.testing.assert_array_equal(read[0, 0], [1, 1, 0, 1, 0, 0])
  np.testing.assert_array_equal(read[1, 0], [1, 1, 0, 0, 1, 0])
  np.testing.assert_array_equal(read.sum(1), [[1, 1, 1, 1, 1, 0]] * 2)
  is_masked = np.asarray(views.is_masked)[:, 0]
  np.testing.assert_array_equal(is_masked[0, :, 1:5], [[1, 1, 1, 1], [0, 1, 0, 1]])


# What others' trainers recorded


def experience_of(is_counted, **changes):
  """A buffer of which no more is read."""
  is_counted = jnp.asarray(is_counted)
  zeros, tokens = jnp.zeros(is_counted.shape[:2]), jnp.zeros(is_counted.shape, jnp.int32)
  numbers = dict.fromkeys(("reward", "log_p_old", "log_p_ref", "weight", "negative_weight"), zeros)
  arrays = dict(prompts=None, completion=tokens, is_counted=is_counted, is_kept=zeros == 0, committed_at=tokens)
  return Experience(**arrays | numbers | changes)


@pytest.mark.parametrize("name", TRAINERS)
def test_denoise_has_the_losses_of_block_trainers(name):
  """Of SDAR, BD3LM and dFactory: their masks from their uniform draws, their loss from each token's cross-entropy."""
  case, about = recorded("trainers", name), TRAINERS[name]
  masks = MaskSampling(1, False, about["min_ratio"], about["max_ratio"], model_block=4)
  objective = objectives.make("denoise", masks, weight=about["weight"], normalisation=about["normalisation"])
  is_counted = case["is_counted"][:, None]
  uniform = (jnp.asarray(case[key][:, None, None]) for key in ("u_time", "u_mask"))
  is_masked, divisor = objective.place(*uniform, jnp.asarray(is_counted))
  np.testing.assert_array_equal(is_masked[:, 0, 0], case["is_masked"])
  experience = experience_of(is_counted, weight=jnp.asarray(objective.demonstration_weights(is_counted)))
  log_prob = -jnp.asarray(case["token_nll"])[:, None, None]
  close(objective.rollout_losses(log_prob, is_masked, divisor, experience).mean(), case["loss"])


def row_scores(model, params, ids, is_masked, num_prompt):
  """Log-probs of a row's completion under its masks [r, l]."""
  prompts = Prompts(ids[None, :num_prompt], jnp.ones((1, num_prompt), bool), jnp.zeros(1, jnp.uint32))
  score = make_score(model, {"params": params}, prompts, ids[None, None, num_prompt:])
  return score(is_masked[None, None, :, num_prompt:]).log_prob[0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bd3lm_block4", "dfactory_shared2_bias"])
def test_a_block_trainers_loss_has_its_gradient(name):
  """Each row is scored alone; the second model is LLaDA2's, with experts."""
  about, case = TRAINERS[name], recorded("trainers", name)
  hf = json.loads((FOLDER / about["folder"] / "config.json").read_text()) | {"mask_token_id": about["mask_token_id"]}
  config = model_config_from_hf(hf)
  family = natural_family(config)
  params = params_of(load_file(FOLDER / about["folder"] / "model.safetensors"), config, family)
  model = Transformer(dataclasses.replace(config, block_length=about["block_length"]))
  masks = MaskSampling(1, False, about["min_ratio"], about["max_ratio"])
  objective = objectives.make("denoise", masks, weight=about["weight"], normalisation=about["normalisation"])
  is_counted = jnp.asarray(case["is_counted"])[:, None]
  uniform = (jnp.asarray(case[key][:, None, None]) for key in ("u_time", "u_mask"))
  is_masked, divisor = objective.place(*uniform, is_counted)
  experience = experience_of(is_counted, weight=jnp.asarray(objective.demonstration_weights(np.asarray(is_counted))))

  @jax.jit
  @jax.value_and_grad
  def compute(params):
    rows = []
    for row, num_prompt in enumerate(case["is_counted"].argmax(1)):
      ids, own = jnp.asarray(case["input_ids"][row]), is_masked[row, 0]
      rows.append(jnp.pad(row_scores(model, params, ids, own, int(num_prompt))[0], (int(num_prompt), 0)))
    log_prob = jnp.stack(rows)[:, None, None]
    return objective.rollout_losses(log_prob, is_masked, divisor, experience).mean()

  loss, gradient = compute(params)
  close(loss, case["loss"])
  found = dict(layout.to_tensors(reader(gradient), layout.checkpoint_places(config, family)))
  for number, tensor in enumerate(about["grads"]):
    wanted = case[f"grad_{number}"]
    np.testing.assert_allclose(found[tensor], wanted, rtol=2e-3, atol=1e-4 * np.abs(wanted).max())


# Rivals


def a_group(case, per_token=False):
  """A group of the recorded old estimates, one draw each; they may be divided by the length."""
  old = jnp.asarray(case["old"], jnp.float32)
  length = case.get("length", np.full(len(old), 4))
  is_kept = jnp.asarray(case.get("valid", np.ones(len(old), bool)))[None]
  is_counted = np.arange(6) < length[None, :, None]
  return experience_of(is_counted, is_kept=is_kept, token_log_p_old=(old * length if per_token else old)[None, :, None])


@pytest.mark.parametrize("name", ["ebpo_a", "ebpo_b", "ebpo_c"])
def test_ebpos_loss_is_that_of_dare(name):
  case = recorded("rivals", name)
  objective, experience = objectives.make("ebpo", kl_weight=0.0, **RIVALS[name]), a_group(case)
  advantage = jnp.asarray(case["advantages"])[None]

  def loss(log_p):
    return objective.group_loss(log_p[None], advantage, experience)[0][0]

  found, gradient = jax.value_and_grad(loss)(jnp.asarray(case["log_p"], jnp.float32))
  close(found, case["loss"])
  close(gradient, case["grad"])


@pytest.mark.parametrize("name", ["bgpo_token_mean", "bgpo_seq_mean"])
def test_bgpos_loss_is_that_of_dare(name):
  """Its estimates are divided by the length already. Where tokens are averaged, a rollout counts by its length."""
  case, objective = recorded("rivals", name), objectives.make("bgpo", kl_weight=0.0, **RIVALS[name])
  share = case["length"] if name == "bgpo_token_mean" else np.ones(3)

  def loss(log_p):
    log_ratio, advantage = (log_p - case["old"])[:, None], jnp.asarray(case["advantages"])[:, None]
    return (objective.surrogate(log_ratio, advantage)[0][:, 0] * share).sum() / share.sum()

  found, gradient = jax.value_and_grad(loss)(jnp.asarray(case["log_p"]))
  close(found, case["loss"])
  close(gradient, case["grad"])
  if name == "bgpo_seq_mean":
    experience, log_p = a_group(case, per_token=True), jnp.asarray(case["log_p"] * case["length"])[None, :, None]
    losses, _ = objective.group_loss(log_p, jnp.asarray(case["advantages"])[None], experience)
    close(losses[0], case["loss"])


@pytest.mark.slow
def test_ebpo_from_a_model_to_the_gradient_is_that_of_dare():
  """Each row alone, without its padding: there, too, nothing attends to it."""
  about, case = RIVALS["ebpo_model"], recorded("rivals", "ebpo_model")
  config = model_config_from_hf(json.loads((FOLDER / "blocks" / "sd_gqa" / "config.json").read_text()))
  params = params_of(load_file(FOLDER / "blocks" / "sd_gqa" / "model.safetensors"), config, "sdar")
  model, objective = Transformer(config), objectives.make("ebpo", clip=0.2, clip_high=0.2, kl_weight=0.0)
  experience, advantage = a_group(case), jnp.asarray(case["advantages"])[None]

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def compute(params):
    found = []
    for row, is_valid in enumerate(case["attention_mask"] > 0):
      num_prompt = int(is_valid[: about["prompt"]].sum())
      own = [jnp.asarray(case[key][row][..., is_valid]) for key in ("input_ids", "mask", "p_mask")]
      log_prob, p_mask = row_scores(model, params, *own[:2], num_prompt), own[2][:, num_prompt:]
      found.append(jnp.where(p_mask > 0, log_prob / jnp.where(p_mask > 0, p_mask, 1), 0))
    composite = jnp.stack([tokens.sum(-1).mean() for tokens in found])
    return objective.group_loss(composite[None], advantage, experience)[0][0], (found, composite)

  (loss, (found, composite)), gradient = compute(params)
  close(composite, case["composite"])
  for tokens, wanted in zip(found, case["token_elbo"], strict=True):
    close(tokens, wanted[:, : tokens.shape[1]])
  close(loss, case["loss"])
  tensors = dict(layout.to_tensors(reader(gradient), layout.checkpoint_places(config, "sdar")))
  for number, name in enumerate(about["grads"]):
    wanted = case[f"grad_{number}"]
    np.testing.assert_allclose(tensors[name], wanted, rtol=2e-3, atol=1e-4 * np.abs(wanted).max())
