"""Masks: their distribution, their antithetic pairs, and that a row's noise belongs to the row alone."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmpo_jax import noise
from dmpo_jax.objectives.masking import MaskSampling, draw_masks, mask_along_trajectory, place_masks

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "objectives"
RANGE = dict(min_ratio=0.1, max_ratio=1.0)
MOST = 40  # prompts of the largest batch below; keys are always made for so many, to compile once


@functools.partial(
  jax.jit,
  static_argnames="masks",
  compiler_options={"xla_backend_optimization_level": 0},  # noise takes long to compile, and little to run
)
def draw_on_device(key_data, is_counted, masks):
  order = jnp.array([0, 3, 3, 1, 3, 2, 2, 9])[: is_counted.shape[-1]]
  committed_at = jnp.broadcast_to(order, is_counted.shape) if masks.kind == "trajectory" else None
  return draw_masks(jax.random.wrap_key_data(key_data), is_counted, masks, committed_at)


def draw(keys, is_counted, **settings):
  return jax.tree.map(np.asarray, draw_on_device(keys, is_counted, MaskSampling(**settings)))


@jax.jit
def make_keys(prompt_ids, step):
  return jax.random.key_data(noise.row_keys(noise.step_key(0, "loss", step), prompt_ids, 3))


def place(u_ratio, u_position, is_counted, **settings):
  masks = MaskSampling(u_ratio.shape[-1] * (1 + settings["antithetic"]), **settings)
  return jax.jit(place_masks, static_argnames="masks")(u_ratio, u_position, is_counted, masks)


def keys_of(prompt_ids, step=0):
  """The keys of three rollouts of each prompt, as NumPy's numbers."""
  ids = np.zeros(MOST, np.uint32)
  ids[: len(prompt_ids)] = prompt_ids
  return np.asarray(make_keys(ids, step))[: len(prompt_ids)]


def counted(p, g, c):
  return np.ones((p, g, c), bool)


def test_positions_are_masked_where_their_noise_is_below_the_ratio():
  u_ratio = np.array([[[0.0, 0.5]]], np.float32)
  u_position = np.array([[[[0.05, 0.2, 0.1], [0.0, 0.54, 0.56]]]], np.float32)
  is_masked, ratio = place(u_ratio, u_position, counted(1, 1, 3), antithetic=True, **RANGE)
  np.testing.assert_allclose(ratio[0, 0], [0.1, 0.55, 0.9, 0.45], rtol=1e-6)
  expected = [[True, False, False], [True, True, False], [False, True, True], [False, False, True]]
  np.testing.assert_array_equal(is_masked[0, 0], expected)


def test_ratios_from_0_1_to_1_leave_0_to_0_9_to_their_complements():
  # what is written 0.1 + 0.9 u is no clamp to [0.1, 0.9]; a complement may mask nothing
  u_ratio = np.array([[[0.0, np.nextafter(np.float32(1), np.float32(0))]]], np.float32)
  u_position = np.full((1, 1, 2, 3), 0.95, np.float32)
  is_masked, ratio = place(u_ratio, u_position, counted(1, 1, 3), antithetic=True, **RANGE)
  np.testing.assert_allclose(ratio[0, 0], [0.1, 1, 0.9, 0], atol=1e-6)
  np.testing.assert_array_equal(is_masked[0, 0].any(-1), [False, True, True, False])


def test_antithetic_pairs_predict_every_counted_position_once():
  is_counted = np.arange(7) < np.array([[7, 4, 2], [1, 0, 7], [7, 7, 7]])[..., None]
  is_masked, ratio = draw(keys_of([5, 6, 7]), is_counted, num=4, antithetic=True, **RANGE)
  assert is_masked.shape == (3, 3, 4, 7)
  pairs = np.broadcast_to(is_counted[:, :, None], (3, 3, 2, 7))
  np.testing.assert_array_equal(is_masked[:, :, :2] ^ is_masked[:, :, 2:], pairs)
  assert not (is_masked & ~is_counted[:, :, None]).any()
  np.testing.assert_allclose(ratio[:, :, :2] + ratio[:, :, 2:], 1, rtol=1e-6)


def test_drawn_masks_are_uniform_in_ratio_and_independent_given_it():
  is_masked, ratio = draw(
    keys_of(range(MOST)), counted(MOST, 3, 50), num=20, antithetic=False, min_ratio=0.2, max_ratio=0.7
  )
  is_masked, ratio = is_masked.reshape(-1, 20, 50), ratio.reshape(-1, 20)
  assert ratio.min() >= 0.2
  assert ratio.max() <= 0.7
  # 2400 draws: the quantiles of a uniform have a standard error below 0.5 * 0.5 / sqrt(2400)
  np.testing.assert_allclose(np.quantile(ratio, [0.25, 0.5, 0.75]), [0.325, 0.45, 0.575], atol=0.02)
  standard = (is_masked - ratio[..., None]) / np.sqrt(ratio * (1 - ratio))[..., None]
  assert np.mean(standard) == pytest.approx(0, abs=4 / np.sqrt(standard.size))
  # no correlation of positions, of mask samples, of rollouts, or with the ratio
  for columns in (
    standard.reshape(-1, 50),
    standard.swapaxes(1, 2).reshape(-1, 20),
    standard.reshape(MOST, 3, -1).swapaxes(1, 2).reshape(-1, 3),
    np.stack([standard.mean(-1).ravel(), ratio.ravel()], axis=-1),
  ):
    off_diagonal = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert np.abs(off_diagonal).max() < 5 / np.sqrt(len(columns))


def test_a_row_is_independent_of_its_batch_of_padding_and_of_further_mask_samples():
  keywords = dict(antithetic=False, **RANGE)
  whole, ratio = draw(keys_of([11, 12, 13]), counted(3, 3, 7), num=4, **keywords)
  shuffled, _ = draw(keys_of([13, 11, 12]), counted(3, 3, 7), num=4, **keywords)
  np.testing.assert_array_equal(whole, shuffled[[1, 2, 0]])
  is_counted = np.pad(counted(1, 3, 7), ((0, 0), (0, 0), (0, 5)))
  alone, alone_ratio = draw(keys_of([12]), is_counted, num=6, **keywords)
  np.testing.assert_array_equal(alone[:, :, :4, :7], whole[1:2])
  np.testing.assert_array_equal(alone_ratio[:, :, :4], ratio[1:2])
  assert not alone[..., 7:].any()


def test_other_steps_rollouts_and_mask_samples_get_other_noise():
  keywords = dict(num=4, antithetic=False, **RANGE)
  _, now = draw(keys_of([1, 2, 3]), counted(3, 3, 7), **keywords)
  _, later = draw(keys_of([1, 2, 3], step=1), counted(3, 3, 7), **keywords)
  assert len(np.unique(np.concatenate([now.ravel(), later.ravel()]))) == 2 * now.size


def test_devices_change_no_mask():
  keywords = dict(num=4, antithetic=False, **RANGE)
  mesh = jax.make_mesh((8,), ("rows",))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
  keys, is_counted = jax.device_put((keys_of(range(8)), counted(8, 3, 7)), rows)
  split, _ = draw_on_device(keys, is_counted, MaskSampling(**keywords))
  assert len(split.sharding.device_set) == 8
  whole, _ = draw(keys_of([0, 1, 2]), counted(3, 3, 7), **keywords)
  np.testing.assert_array_equal(np.asarray(split)[:3], whole)


def test_a_point_of_the_trajectory_masks_what_the_sampler_had_still_to_decide():
  committed_at = np.array([[[2, 0, 1, 1, 0]]], np.int32)  # the last position does not count
  is_counted = np.array([[[True, True, True, True, False]]])
  ratio = np.array([[[1.0, 0.76, 0.74, 0.5, 0.26, 0.24, 0.0]]], np.float32)
  is_masked, share = jax.jit(mask_along_trajectory)(ratio, committed_at, is_counted)
  # 0, 0, 1, 2, 2, 3 and 3 of the four are before the chosen one; the two of call 1 go together
  later, tied = [True, False, True, True, False], [True, False, False, False, False]
  everything = [True, True, True, True, False]
  np.testing.assert_array_equal(is_masked[0, 0], [everything, everything, later, later, later, tied, tied])
  np.testing.assert_allclose(share[0, 0], [1, 1, 0.75, 0.75, 0.75, 0.25, 0.25])


def test_a_call_is_met_as_often_as_it_decided_positions():
  committed_at = np.array([[[0, 3, 3, 1, 3, 2, 2, 9]]], np.int32)
  is_counted = np.arange(8)[None, None] < 7
  ratio = (np.arange(7, dtype=np.float32)[None, None] + 0.5) / 7
  is_masked, _ = jax.jit(mask_along_trajectory)(ratio, committed_at, is_counted)
  assert sorted(np.asarray(is_masked[0, 0]).sum(-1)) == [3, 3, 3, 5, 5, 6, 7]
  is_masked, _ = draw(keys_of([3]), is_counted.repeat(3, 1), num=5, antithetic=False, kind="trajectory")
  assert set(is_masked.sum(-1).ravel()) <= {3, 5, 6, 7}
  assert len(set(is_masked.sum(-1).ravel())) > 2


def test_stratified_ratios_are_uniform_and_evenly_spread_over_a_rollout_and_its_group():
  settings = dict(antithetic=False, min_ratio=0.2, max_ratio=0.7, kind="stratified")
  is_masked, ratio = draw(keys_of(range(MOST)), counted(MOST, 3, 50), num=4, **settings)
  share = (ratio - 0.2) / 0.5
  assert (share >= -1e-6).all()
  assert (share < 1 + 1e-5).all()
  np.testing.assert_allclose(np.diff(np.sort(share, axis=-1)), 1 / 4, atol=1e-5)
  np.testing.assert_allclose(np.diff(np.sort(share.reshape(MOST, 12), axis=-1)), 1 / 12, atol=1e-5)
  # the groups' shifts are independent: where the lowest of 12 stands is uniform
  lowest = 12 * share.reshape(MOST, 12).min(-1)
  np.testing.assert_allclose(np.quantile(lowest, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.25)
  standard = (is_masked - ratio[..., None]) / np.sqrt(ratio * (1 - ratio))[..., None]
  assert np.mean(standard) == pytest.approx(0, abs=4 / np.sqrt(standard.size))


def test_stratified_masks_of_a_group_depend_on_no_other():
  settings = dict(num=4, kind="stratified", antithetic=True, **RANGE)
  whole, _ = draw(keys_of([11, 12, 13]), counted(3, 3, 7), **settings)
  shuffled, _ = draw(keys_of([13, 11, 12]), counted(3, 3, 7), **settings)
  np.testing.assert_array_equal(whole, shuffled[[1, 2, 0]])
  _, later = draw(keys_of([11, 12, 13], step=1), counted(3, 3, 7), **settings)
  assert len(np.unique(later.round(5))) == later.size


@pytest.mark.parametrize("name", ["wdce", "elbo"])
def test_recorded_noise_gives_the_recorded_masks(name):
  # recorded from the official PyTorch code
  arrays = np.load(GOLDENS / f"{name}.npz")
  cases = json.loads((GOLDENS / f"{name}.json").read_text())
  for case, settings in cases.get("cases", cases).items():
    recorded = {key: arrays[f"{case}/{key}"] for key in ("u_lambda", "u_mask", "mask")}
    rows = len(arrays[f"{case}/prompt_ids"])
    is_counted = np.ones((1, rows, recorded["mask"].shape[-1]), bool)
    if settings.get("non_eos"):
      is_counted = arrays[f"{case}/completion_mask"][None]
    by_row = {key: value.reshape(-1, rows, *value.shape[1:]).swapaxes(0, 1)[None] for key, value in recorded.items()}
    is_masked, _ = place(
      by_row["u_lambda"],
      by_row["u_mask"],
      is_counted,
      antithetic=settings["antithetic"],
      min_ratio=settings["min_ratio"],
      max_ratio=1.0,
    )
    if case == "noneos_intmask":
      # there an integer mask indexed whole rows and unmasked the last two; here only uncounted positions stay unmasked
      assert not recorded["mask"][-2:].any()
      assert np.asarray(is_masked).any((0, 1, 3)).all()
      assert not (np.asarray(is_masked) & ~is_counted[:, :, None]).any()
      np.testing.assert_array_equal(is_masked[:, :, :3], (by_row["mask"] & is_counted[:, :, None])[:, :, :3])
    else:
      np.testing.assert_array_equal(is_masked, by_row["mask"], err_msg=case)


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    (dict(num=3), "^3 mask samples: must be even, as objective.antithetic = True"),
    (dict(num=0), "^0 mask samples: must be at least 1"),
    (dict(min_ratio=-0.1), "mask ratios from -0.1 to 1.0"),
    (dict(max_ratio=1.5), "mask ratios from 0.1 to 1.5"),
    (dict(kind="stratifed"), "^stratifed masks: must be one of .*; did you mean 'stratified'"),
    (dict(kind="trajectory"), "^trajectory masks: must be random or stratified, as objective.antithetic = True"),
    (dict(kind="trajectory", antithetic=False, block_length=4), "as objective.mask_block_length = 4 masks within one"),
    (dict(min_ratio=0.9, max_ratio=0.5), "mask ratios from 0.9 to 0.5: must be 0 <= min <= max <= 1"),
  ],
)
def test_wrong_arguments_are_refused(changed, message):
  keywords = dict(num=2, antithetic=True, **RANGE) | changed
  with pytest.raises(ValueError, match=message):
    draw(keys_of([0]), counted(1, 3, 4), **keywords)
