"""Block models with experts (SDAR's, LLaDA2's): their config.json, every published tensor, and logits of small ones."""

import dataclasses
import functools
import json
import lzma
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from recorded_models import compiled, load_converted, reader
from safetensors.numpy import load_file, save_file

from dmpo_jax.hub import convert, layout
from dmpo_jax.hub.export import ModelExport
from dmpo_jax.hub.families import natural_family
from dmpo_jax.hub.model_config import model_config_from_hf, model_config_to_hf
from dmpo_jax.models.transformer import Transformer
from launch import export_hf

FOLDER = pathlib.Path(__file__).parent / "goldens" / "blocks"
NAMES = {"sm_sharp": "sdar_moe", "sm_top4_dense": "sdar_moe", "l2_sharp": "llada2_moe", "l2_shared2_bias": "llada2_moe"}
MIXED = ("sm_top4_dense", "l2_shared2_bias")  # with layers of both kinds


def read(name):
  return json.loads((FOLDER / name).read_text())


@functools.cache
def recorded(name):
  return dict(np.load(FOLDER / name / "io.npz"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """The recorded checkpoints, converted."""
  found = {}
  for name in MIXED:
    source = epath.Path(tmp_path_factory.mktemp(name))
    (source / "config.json").write_text(json.dumps(read(f"{name}/config.json")))
    save_file(load_file(FOLDER / name / "model.safetensors"), source / "model.safetensors")
    found[name] = source / "converted"
    convert.convert_model(source, found[name])
  return found


@pytest.mark.parametrize(("name", "family", "size"), [
  ("sdar_30b", "sdar_moe", 61_064_245_248), ("llada2_mini", "llada2_moe", 32_511_286_784),
])  # fmt: skip
def test_the_published_tensors_are_all_accounted_for(name, family, size):
  """Names and bytes are those of SDAR-30B-A3B-Chat's and LLaDA2.0-mini's indexes; LLaDA2.1-mini has the same names."""
  published = read(f"{name}_config.json") | ({"mask_token_id": 151669} if family == "sdar_moe" else {})
  config = model_config_from_hf(published)
  names = lzma.decompress((FOLDER / f"{name}_tensors.txt.xz").read_bytes()).decode().split("\n")
  places = layout.checkpoint_places(config, family)
  assert sorted(layout.parts_of(places)) == names
  assert sum(2 * np.prod(place.torch_shape) for place in places.values()) == size
  assert model_config_from_hf(model_config_to_hf(config, family)) == config
  assert natural_family(config) == family


def test_what_the_published_descriptions_say():
  sdar = model_config_from_hf(read("sdar_30b_config.json") | {"mask_token_id": 151669})
  assert (sdar.router, sdar.num_experts, sdar.experts_per_token) == ("softmax_normalised", 128, 8)
  assert (sdar.block_length, sdar.qk_norm, sdar.expert_layers, sdar.expert_bias) == (4, True, (), False)
  llada2 = model_config_from_hf(read("llada2_mini_config.json"))
  assert (llada2.mask_token_id, llada2.eos_token_id, llada2.pad_token_id) == (156895, 156892, 156892)
  assert (llada2.router, llada2.block_length, llada2.rotary_width) == ("sigmoid", 32, 64)
  assert tuple(llada2.expert_share) == (8, 8, 4, 2.5)
  assert [(run.first, run.length, run.has_experts) for run in llada2.runs] == [(0, 1, False), (1, 19, True)]
  assert llada2.shared_expert_size == llada2.expert_size == 512


@pytest.mark.parametrize("name", NAMES)
def test_a_description_there_and_back(name):
  config = model_config_from_hf(read(f"{name}/config.json"))
  written = model_config_to_hf(config, NAMES[name])
  assert model_config_from_hf(written) == config
  given = read(f"{name}/config.json")
  for key in written.keys() & given.keys() - {"use_cache", "auto_map"}:
    assert written[key] == given[key], key


@pytest.mark.parametrize(("name", "change", "message"), [
  ("sm_sharp", dict(mask_token_id=None), "mask_token_id=null where an integer"),
  ("sm_sharp", dict(num_experts=None), "num_experts=null where a positive integer"),
  ("sm_sharp", dict(mlp_only_layers=[-1]), r"mlp_only_layers=\[-1\] where a list of integers"),
  ("sm_sharp", dict(attention_bias=True), "'attention_bias': True} is not supported"),
  ("l2_sharp", dict(n_group=5), "model.expert_groups=5"),
  ("l2_sharp", dict(topk_group=5), "model.expert_groups_per_token=5"),
  ("l2_sharp", dict(first_k_dense_replace=-1), "first_k_dense_replace=-1 where an integer of at least 0"),
  ("l2_sharp", dict(use_sliding_window=True), "'use_sliding_window': True} is not supported"),
])  # fmt: skip
def test_a_wrong_description_is_refused(name, change, message):
  with pytest.raises(ValueError, match=message):
    model_config_from_hf(read(f"{name}/config.json") | change)


def test_further_forms_of_the_keys():
  config = read("sm_sharp/config.json") | dict(num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
  assert model_config_from_hf(config).expert_layers == (0, 1, 0, 0, 0, 1)
  assert model_config_from_hf(config | dict(norm_topk_prob=False)).router == "softmax"
  with pytest.raises(ValueError, match=r"model.router='sigmoid': checkpoints of the family sdar_moe have softmax or"):
    model_config_to_hf(dataclasses.replace(model_config_from_hf(config), router="sigmoid"), "sdar_moe")
  none = model_config_from_hf(read("l2_sharp/config.json") | dict(num_shared_experts=None, first_k_dense_replace=0))
  assert (none.shared_expert_size, none.expert_layers) == (0, ())
  assert model_config_to_hf(none, "llada2_moe")["num_shared_experts"] is None
  with pytest.raises(ValueError, match=r"model.block_length=0: no checkpoint of the family llada2_moe attends so"):
    model_config_to_hf(dataclasses.replace(none, block_length=0), "llada2_moe")
  for change in (dict(expert_layers=(1.0, 0.0)), dict(shared_expert_size=none.expert_size + 1)):
    with pytest.raises(ValueError, match="of the family llada2_moe only first layers"):
      model_config_to_hf(dataclasses.replace(none, **change), "llada2_moe")


@pytest.mark.parametrize("name", MIXED)
def test_logits_are_the_recorded_ones_and_tensors_come_back(folders, name, tmp_path):
  model, variables = load_converted(folders[name])
  arrays = recorded(name)
  in_blocks = Transformer(dataclasses.replace(model.config, block_length=int(arrays["block_size_1"])))
  logits = compiled(in_blocks)(variables, arrays["ids_1"])
  np.testing.assert_allclose(logits, arrays["logits_1"], rtol=0, atol=5e-4)

  back = epath.Path(tmp_path / "back")
  ModelExport(export_hf.find_model(folders[name]), "same").write(back, 40_000)
  written = {}
  for path in back.glob("*.safetensors"):
    written |= load_file(path)
  stored = load_file(FOLDER / name / "model.safetensors")
  assert written.keys() == stored.keys()
  for key, array in stored.items():
    np.testing.assert_array_equal(written[key], array)
  given, after = read(f"{name}/config.json"), json.loads((back / "config.json").read_text())
  assert {key: after.get(key) for key in given} == given
  assert "block_size" not in after  # it has its family's


def test_bfloat16_does_not_round_the_bias_that_chooses_experts(folders, tmp_path):
  source, back = epath.Path(tmp_path / "source"), epath.Path(tmp_path / "back")
  ModelExport(export_hf.find_model(folders["l2_shared2_bias"]), "bfloat16").write(source, 10**9)
  convert.convert_model(source, epath.Path(tmp_path / "converted"), "bfloat16")
  ModelExport(export_hf.find_model(epath.Path(tmp_path / "converted")), "same").write(back, 10**9)
  stored, written = load_file(FOLDER / "l2_shared2_bias" / "model.safetensors"), load_file(back / "model.safetensors")
  exact = {name for name, array in written.items() if array.dtype == np.float32}
  assert exact == {name for name in stored if name.endswith("expert_bias")} != set()
  for name in exact:
    np.testing.assert_array_equal(written[name], stored[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXED)
def test_gradients_and_padded_rows_are_the_recorded_ones(folders, name):
  model, variables = load_converted(folders[name])
  model, arrays = Transformer(dataclasses.replace(model.config, block_length=4)), recorded(name)
  noisy, ids, is_masked = (jnp.asarray(arrays[f"train_{key}"]) for key in ("noisy", "ids", "mask"))

  def compute(params):
    log_p = jax.nn.log_softmax(model.apply({"params": params}, noisy))
    found = jnp.take_along_axis(log_p, ids[..., None], -1)[..., 0]
    return -jnp.where(is_masked, found, 0).sum() / is_masked.sum()

  loss, gradient = jax.jit(jax.value_and_grad(compute))(variables["params"])
  np.testing.assert_allclose(loss, arrays["train_loss"], rtol=1e-4)
  found = dict(layout.to_tensors(reader(gradient), layout.checkpoint_places(model.config, NAMES[name])))
  norms = np.array([np.linalg.norm(found[str(each)]) for each in arrays["train_grad_norm_names"]])
  np.testing.assert_allclose(norms, arrays["train_grad_norms"], rtol=2e-3, atol=1e-4 * norms.max())
  for number, each in enumerate(arrays["train_grad_names"]):
    wanted = arrays[f"train_grad_{number}"]
    np.testing.assert_allclose(found[str(each)], wanted, rtol=2e-3, atol=1e-4 * np.abs(wanted).max())
  if "leftpad_ids" in arrays:
    is_valid = np.arange(arrays["leftpad_ids"].shape[1]) >= arrays["leftpad_len"][:, None]
    logits = compiled(model)(variables, arrays["leftpad_ids"], is_valid=is_valid)
    np.testing.assert_allclose(logits[is_valid], arrays["leftpad_logits"][is_valid], rtol=0, atol=5e-4)
