"""Layers of experts: against the authors' code (LLaDA-MoE), against all experts of all tokens, and on many devices."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding
from recorded_models import FOLDER, TINY, compiled, load_converted, reader, settings, tensors, tiny
from safetensors.numpy import load_file, save_file

from configs import llada_moe_7b
from dmpo_jax import policy, sharding
from dmpo_jax.hub import convert, layout, pretrained
from dmpo_jax.hub.export import ModelExport
from dmpo_jax.hub.families import family_of
from dmpo_jax.hub.model_config import model_config_from_hf, model_config_to_hf
from dmpo_jax.hub.peft import lora_config_from_peft, lora_config_to_peft
from dmpo_jax.models import experts
from dmpo_jax.models.layers import quantize
from dmpo_jax.models.lora import TARGETS, LoraConfig
from dmpo_jax.models.router import ROUTERS, Share, describe
from dmpo_jax.models.transformer import empty_kv_cache
from dmpo_jax.structs import Routing
from launch import export_hf

MASKS = {"lladamoe_base": 171, "lladamoe_clip": 122, "lladamoe_plain": 142}
MOE = dict(
  router="softmax",
  num_experts=4,
  experts_per_token=2,
  expert_size=8,
  shared_expert_size=8,
  expert_layers=(0.0, 1.0, 1.0),
  expert_bias=True,
  clip_qkv=0.5,
  out_bias=True,
)

SIGMOID = dict(router="sigmoid", expert_groups=2, expert_groups_per_token=1, expert_scale=2.5)


@functools.cache
def recorded(name):
  return dict(np.load(FOLDER / name / "io.npz"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """The recorded checkpoints, converted."""
  found = {}
  for name, mask in MASKS.items():
    source = tmp_path_factory.mktemp(name)
    save_file(tensors(name), source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(settings(name) | {"mask_token_id": mask}))
    found[name] = epath.Path(source) / "converted"
    convert.convert_model(epath.Path(source), found[name])
  return found


@pytest.mark.parametrize("name", MASKS)
def test_logits_are_the_recorded_ones_and_tensors_come_back(folders, name, tmp_path):
  model, variables = load_converted(folders[name])
  run, arrays = compiled(model), recorded(name)
  np.testing.assert_allclose(run(variables, arrays["ids_0"]), arrays["logits_0"], rtol=0, atol=5e-4)
  in_order = jnp.broadcast_to(jnp.arange(arrays["pad_ids"].shape[1]), arrays["pad_ids"].shape)  # padding counts too
  padded = run(variables, arrays["pad_ids"], is_valid=arrays["pad_att2d"] > 0, positions=in_order)
  np.testing.assert_allclose(padded, arrays["pad_logits"], rtol=0, atol=5e-4)

  back = epath.Path(tmp_path / "back")
  ModelExport(export_hf.find_model(folders[name]), "same").write(back, 40_000)
  written = {}
  for path in back.glob("*.safetensors"):
    written |= load_file(path)
  stored = tensors(name)
  assert written.keys() == stored.keys()
  for key, array in stored.items():
    np.testing.assert_array_equal(written[key], array)


def test_an_int8_base_with_experts_comes_back_rounded(tmp_path):
  """Projections and experts; routers, their bias, norms and tables as they were."""
  source, out, back = (epath.Path(tmp_path / name) for name in ("hf", "out", "back"))
  source.mkdir()
  stored = tensors("lladamoe_base")
  save_file(stored, source / "model.safetensors")
  (source / "config.json").write_text(json.dumps(settings("lladamoe_base") | {"mask_token_id": 171}))
  convert.convert_model(source, out, "int8")
  model, variables = load_converted(out)
  kernel = variables["params"]["blocks_1"]["experts"]["up_proj_kernel"]
  assert (model.config.quantization, kernel.dtype) == ("int8", jnp.int8)
  ModelExport(export_hf.find_model(out), "same").write(back, 10**9)
  written = load_file(back / "model.safetensors")
  assert written.keys() == stored.keys()
  for name, array in stored.items():
    if "_proj." in name:
      values, scale = quantize(array.T)
      array = (values * scale).T
    np.testing.assert_allclose(written[name], array, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", MASKS)
def test_a_description_there_and_back(name):
  hf = settings(name) | {"mask_token_id": MASKS[name]}
  config = model_config_from_hf(hf)
  written = model_config_to_hf(config, "lladamoe")
  assert model_config_from_hf(written) == config
  for key in written.keys() & hf.keys() - {"dtype", "qk_layernorm", "moe_router_enable_expert_bias"}:
    assert written[key] == hf[key], key


def test_its_config_json_has_no_mask_token_and_may_have_lladas_type():
  for kind in ("lladamoe", "llada"):
    assert family_of(settings("lladamoe_base") | {"model_type": kind}) == "lladamoe"
  assert model_config_from_hf(settings("lladamoe_base") | {"vocab_size": 157184}).mask_token_id == 156895


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(num_experts=None), "has num_experts=null where a positive integer is needed"),
    (dict(moe_layer_freq=[1, 2, 1]), r"moe_layer_freq=\[1, 2, 1\] where a list of 0 and 1 is needed"),
    (dict(moe_layer_freq=[1, 1]), "model.expert_layers has 2 entries"),
    (dict(num_experts_per_tok=9), "model.experts_per_token=9"),
    (dict(rope_scaling={"type": "linear"}), "'rope_scaling'"),
  ],
)
def test_a_wrong_description_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    model_config_from_hf(settings("lladamoe_base") | {"mask_token_id": 171} | change)


def test_choices_and_weights_are_the_recorded_ones():
  for name in MASKS:
    arrays, stored, seen = recorded(name), tensors(name), 0
    for layer in range(3):
      if f"router_logits_0_{layer}" in arrays:
        bias = stored.get(f"model.layers.{layer}.mlp.expert_bias")
        wanted, seen = arrays[f"router_experts_0_{layer}"], seen + 1
        logits, bias = jnp.asarray(arrays[f"router_logits_0_{layer}"]), None if bias is None else jnp.asarray(bias)
        chosen, weights = ROUTERS["softmax"](logits, bias, Share(wanted.shape[-1]))
        np.testing.assert_array_equal(chosen, wanted)
        np.testing.assert_allclose(weights, arrays[f"router_weights_0_{layer}"], atol=1e-5)
    assert seen


@pytest.mark.parametrize("name", ["lladamoe_clip", "lladamoe_plain"])
def test_gradients_are_the_recorded_ones(folders, name):
  model, variables = load_converted(folders[name])
  arrays = recorded(name)
  noisy, ids, is_masked = (jnp.asarray(arrays[f"train_{key}"]) for key in ("noisy", "ids", "mask"))

  def compute(params):
    log_p = jax.nn.log_softmax(model.apply({"params": params}, noisy))
    found = jnp.take_along_axis(log_p, ids[..., None], -1)[..., 0]
    return -jnp.where(is_masked, found, 0).sum() / is_masked.sum()

  loss, gradient = jax.jit(jax.value_and_grad(compute))(variables["params"])
  np.testing.assert_allclose(loss, arrays["train_loss"], rtol=1e-4)
  places = layout.checkpoint_places(model.config, "lladamoe")
  found = dict(layout.to_tensors(reader(gradient), places))
  names = [str(each) for each in arrays["train_grad_norm_names"]]
  norms = np.array([np.linalg.norm(found[each]) for each in names])
  np.testing.assert_allclose(norms, arrays["train_grad_norms"], rtol=2e-3, atol=1e-4 * norms.max())
  for number, each in enumerate(("mlp.gate", "mlp.experts.1.down_proj", "self_attn.k_proj")):
    wanted = arrays[f"train_grad_{number}"]
    actual = found[f"model.layers.0.{each}.weight"]
    np.testing.assert_allclose(actual, wanted, rtol=2e-3, atol=1e-4 * np.abs(wanted).max())


def plain(x, gate, bias, ff_proj, up_proj, ff_out, *, router, share, dtype):
  """All experts of all tokens, of which the chosen ones count."""
  flat = x.reshape(-1, x.shape[-1])
  chosen, weights = router(flat @ gate, bias, share)
  taken = (jax.nn.one_hot(chosen, gate.shape[-1]) * weights[..., None]).sum(1)
  hidden = jax.nn.silu(jnp.einsum("td,edf->tef", flat, ff_proj)) * jnp.einsum("td,edf->tef", flat, up_proj)
  return jnp.einsum("tef,efd,te->td", hidden, ff_out, taken).reshape(x.shape)


@pytest.mark.parametrize(("router", "share"), [("softmax", Share(2)), ("sigmoid", Share(2, 3, 2, 2.5))])
def test_sorted_tokens_give_what_all_experts_of_all_tokens_give(router, share):
  rng = np.random.default_rng(0)
  shapes = ((3, 7, 6), (6, 6), (6,), (6, 6, 4), (6, 6, 4), (6, 4, 6))
  arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
  arrays[1] = arrays[1].at[:, 0].add(3 * jnp.sign(arrays[0][0, 0]))  # an expert that is crowded; others may be empty

  def total(run):
    own = dict(router=ROUTERS[router], share=share, dtype=jnp.float32)
    return jax.value_and_grad(lambda *given: (run(*given, **own) ** 2).sum(), range(6))

  def sorted_by_expert(x, gate, bias, *kernels, **own):
    return experts.mix(x, gate, bias, *map(experts.Weights, kernels), **own)[0]

  found, wanted = jax.jit(total(sorted_by_expert))(*arrays), jax.jit(total(plain))(*arrays)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)


def test_figures_of_a_router_by_hand():
  """Two layers, three experts, two of them for each of four tokens."""
  load = jnp.array([[4.0, 4.0, 0.0], [2.0, 2.0, 4.0]])
  figures = jax.jit(lambda *sums: describe(Routing(*sums), experts_per_token=2))
  found = figures(10 * load, 10 * jnp.array([4.0, 2.0]))  # of ten copies of the tokens
  entropies = np.log(2), 0.5 * np.log(2) + 0.5 * np.log(4)
  assert found["router_max_load"] == 1.5
  np.testing.assert_allclose(found["router_load_entropy"], np.mean(entropies), rtol=1e-6)
  np.testing.assert_allclose(found["router_entropy"], (4 / 4 + 2 / 4) / 2, rtol=1e-6)
  nothing = figures(0 * load, jnp.zeros(2))
  assert all(value == 0 for value in nothing.values())


@pytest.mark.slow
@pytest.mark.parametrize("router", [{}, SIGMOID])
def test_many_devices_give_what_one_gives(router):
  """Rows that the devices share in chunks, with gradients of every parameter, and rows that they do not divide."""
  model, variables = tiny(**MOE | router, remat="full", layer_rows=1)
  tokens = jnp.asarray(np.random.default_rng(1).integers(0, 29, (8, 5)), jnp.int32)

  def total(params):
    return (model.apply({"params": params}, tokens, method="hidden")[0] ** 2 * jnp.arange(5.0)[:, None]).sum()

  alone = jax.jit(jax.value_and_grad(total))(variables["params"])
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  placed = jax.tree.map(
    lambda array, where: jax.device_put(array, where.sharding),
    variables["params"],
    policy.abstract_collection(model, mesh, "params"),
  )
  kernel = placed["blocks_1"]["experts"]["ff_out_kernel"]
  assert isinstance(kernel.sharding, NamedSharding)
  assert tuple(kernel.sharding.spec)[:3] == (None, "fsdp", "tensor")
  with jax.set_mesh(mesh):
    split = jax.jit(jax.value_and_grad(total))(placed)
    uneven = compiled(model)({"params": placed}, tokens[:3])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), split, alone)
  np.testing.assert_allclose(uneven, compiled(model)(variables, tokens)[:3], atol=1e-5)
  assert np.abs(alone[1]["blocks_1"]["experts"]["router"]).max() > 0
  np.testing.assert_array_equal(alone[1]["blocks_1"]["experts"]["bias"], 0)


def test_a_cached_suffix_is_what_it_was_in_the_whole_row():
  model, variables = tiny(**MOE)
  run, tokens = compiled(model, "hidden"), jnp.asarray(np.random.default_rng(1).integers(0, 29, (2, 7)), jnp.int32)
  hidden, kv_cache = run(variables, tokens, kv_cache=empty_kv_cache(model.config, *tokens.shape))
  suffix, _ = run(variables, tokens[:, 4:], kv_cache=kv_cache, cache_start=4)
  np.testing.assert_allclose(suffix, hidden[:, 4:], rtol=0, atol=1e-5)


def test_adapters_are_on_attention_and_by_choice_on_shared_experts():
  lora = LoraConfig(2, 4.0, 0.0, ("q_proj", "shared_up_proj"))
  model, _ = tiny(**MOE, lora=lora)
  adapters = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["lora"]
  assert {run: set(names) for run, names in adapters.items()} == {
    "blocks_0": {"q_proj"},
    "blocks_1": {"q_proj", "shared_up_proj"},
  }
  about = lora_config_to_peft(lora, "lladamoe", "base")
  names = ("self_attn.q_proj", "shared_expert.up_proj", "mlp.experts.0.up_proj", "mlp.up_proj")
  matches = [bool(re.fullmatch(about["target_modules"], f"model.layers.2.{name}")) for name in names]
  assert matches == [True, True, False, False]
  places = layout.adapter_places(model.config, "lladamoe")
  assert places["base_model.model.model.layers.2.shared_expert.up_proj.lora_B.weight"].index == (1,)
  assert lora_config_from_peft(about, places, "lladamoe") == lora
  everything = dataclasses.replace(model.config, lora=LoraConfig(2, 4.0), expert_layers=())
  assert everything.adaptable == (*TARGETS[:4], "shared_ff_proj", "shared_up_proj", "shared_ff_out")
  with pytest.raises(ValueError, match=r"model\.lora\.targets: the model has no up_proj; it has q_proj, k_proj"):
    dataclasses.replace(everything, lora=LoraConfig(2, 4.0, 0.0, ("q_proj", "up_proj")))
  with pytest.raises(ValueError, match="the model has no shared_up_proj"):
    dataclasses.replace(TINY, lora=LoraConfig(2, 4.0, 0.0, ("all", "shared_up_proj")))


def test_what_experts_need_is_said():
  for change, message in (
    (dict(experts_per_token=5), "experts_per_token at most num_experts"),
    (dict(expert_layers=(1.0,)), "model.expert_layers has 1 entries"),
    (dict(router="tanh"), "model.router='tanh': must be one of none, softmax, softmax_normalised, sigmoid"),
    (dict(expert_groups=2), "model.router='softmax': must be 'sigmoid' with model.expert_groups=2"),
    (SIGMOID | dict(expert_groups_per_token=3), "the second be from 1 up to it"),
  ):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(TINY, **MOE | change)


def test_the_configuration_has_the_published_sizes():
  """Those that users of LLaDA-MoE-7B-A1B describe; in bfloat16 they count 14,032 MiB, 12,288 of them experts."""
  described = settings("lladamoe_base") | dict(
    hidden_size=2048,
    num_hidden_layers=16,
    num_attention_heads=16,
    num_key_value_heads=16,
    dense_intermediate_size=8192,
    expert_intermediate_size=1024,
    shared_expert_intermediate_size=None,
    num_experts=64,
    num_experts_per_tok=8,
    moe_layer_freq=[1] * 16,
    moe_router_enable_expert_bias=None,
    partial_rotary_factor=1,
    rope_theta=50_000,
    rms_norm_eps=1e-5,
    eos_token_id=156892,
    pad_token_id=156892,
    vocab_size=157184,
  )
  model = model_config_from_hf(described)
  sizes = {name: 2 * np.prod(place.torch_shape) for name, place in layout.checkpoint_places(model, "lladamoe").items()}
  assert round(sum(sizes.values()) / 2**20) == 14_032
  assert sum(size for name, size in sizes.items() if ".experts." in name) / 2**20 == 12_288
  own = {key: value for key, value in llada_moe_7b.get_config().model.items() if key in pretrained.FIELDS and value}
  assert own.pop("expert_size") == 1024
  assert {key: getattr(model, key) for key in own} == own
