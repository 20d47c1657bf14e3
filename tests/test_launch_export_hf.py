"""Back to Hugging Face's layout: untouched checkpoints bit for bit, merged adapters, adapters for PEFT."""

import dataclasses
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import standin_tokenizer
import tiny
from absl import flags
from etils import epath
from programs import start
from recorded_models import TINY, adapters_of, compiled, load_converted, recorded, settings, tensors, write_checkpoint
from safetensors.numpy import load_file

from dmpo_jax import build, policy
from dmpo_jax.hub.convert import convert_model
from dmpo_jax.hub.export import ModelExport, Source, export_adapter, how_to_load
from dmpo_jax.hub.model_config import model_config_from_hf
from dmpo_jax.hub.peft import lora_config_from_peft, lora_config_to_peft
from dmpo_jax.hub.shards import Shards
from dmpo_jax.models.layers import quantize
from dmpo_jax.models.lora import LoraConfig
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.run import params as params_lib
from dmpo_jax.run import workdir as workdir_lib
from launch import export_hf
from launch.rehearse import bucket


@pytest.mark.parametrize("name", ["m1_base", "m2_gqa", "m3_tied", "m4_bf16"])
def test_there_and_back(tmp_path, name):
  source, middle, out = (epath.Path(tmp_path / part) for part in ("hf", "middle", "out"))
  write_checkpoint(source, name, max_bytes=50_000)
  convert_model(source, middle)
  model = ModelExport(export_hf.find_model(middle), "same")
  model.write(out, 40_000)
  stored, back = tensors(name), Shards(out)
  assert model.num_parameters == sum(array.size for array in stored.values())
  assert model.num_bytes == sum(array.nbytes for array in stored.values())
  assert set(back) == set(stored)
  for key, array in stored.items():
    assert back[key].dtype == array.dtype
    np.testing.assert_array_equal(back[key], array)
  assert len({tensor.file for tensor in back.tensors.values()}) > 1
  assert json.loads((out / "config.json").read_text()) == settings(name)


@pytest.mark.slow
def test_there_and_back_by_way_of_a_bucket(tmp_path):
  source, out = epath.Path(tmp_path / "hf"), epath.Path(tmp_path / "out")
  write_checkpoint(source, "m4_bf16", max_bytes=50_000)
  with bucket.running(("one",), tmp_path / "emulator") as emulator, pytest.MonkeyPatch.context() as patch:
    for name, value in emulator.environment.items():
      patch.setenv(name, value)
    steps = [
      ("launch.convert_hf", f"--hf={source}", "--out=gs://one/model"),
      ("launch.export_hf", "--model=gs://one/model", "--out=gs://one/hf", "--shard_gb=0.001"),
    ]
    for module, *args in steps:
      done = start(*args, module=module)
      assert done.returncode == 0, done.stderr[-3000:]
    refused = start(*steps[1][1:], module="launch.export_hf")
    assert emulator.unknown == []
    there = {name.removeprefix("hf/"): x.data for name, x in emulator.buckets.objects("one").items() if "hf/" in name}
  assert (refused.returncode, "error: --out=gs://one/hf exists already" in refused.stderr) == (2, True)
  out.mkdir()
  for name in filter(None, there):
    (out / name).write_bytes(there[name])
  stored, back = tensors("m4_bf16"), Shards(out)
  assert set(back) == set(stored)
  for key, array in stored.items():
    np.testing.assert_array_equal(back[key], array)
  assert json.loads(there["config.json"]) == settings("m4_bf16")


@pytest.mark.parametrize(("dtype", "is_float"), [("same", False), ("float32", True)])
def test_projections_in_int8_come_back_rounded(tmp_path, dtype, is_float):
  """Within half a step of their columns, and half a unit of bfloat16's last place; all else as it was."""
  source, middle, out = (epath.Path(tmp_path / part) for part in ("hf", "middle", "out"))
  write_checkpoint(source, "m4_bf16")
  convert_model(source, middle, "int8")
  ModelExport(export_hf.find_model(middle), dtype).write(out, 10**9)
  stored, back = tensors("m4_bf16"), Shards(out)
  assert set(back) == set(stored)
  for key, array in stored.items():
    assert back[key].dtype == (np.float32 if is_float else array.dtype)
    found, array = (x.astype(np.float32) for x in (back[key], array))
    if "blocks" in key and array.ndim == 2:
      step = abs(array).max(1, keepdims=True) / 127
      assert (abs(found - array) <= step * 0.5001 + (0 if is_float else abs(array) * 2**-8)).all()
      assert not np.array_equal(found, array)
    else:
      np.testing.assert_array_equal(found, array)


SPECIAL = {"<s>": 253, "</s>": settings("m2_gqa")["eos_token_id"], "<mask>": settings("m2_gqa")["mask_token_id"]}


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_biases_and_padded_ids_of_either_family(tmp_path, family):
  """There and back without the original's config.json, as for a run from random parameters."""
  config = dataclasses.replace(TINY, qkv_bias=True, shift_logits=family == "dream", head_dim=6)
  shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
  draw = np.random.default_rng(0).normal
  params = jax.tree.map(lambda x: draw(size=x.shape).astype(x.dtype), nn.unbox(shapes))
  policy, out, again = (epath.Path(tmp_path / part) for part in ("policy", "out", "again"))
  params_lib.save_params(policy, params)
  source = Source(config, family, None, params_lib.SavedParams(policy))
  ModelExport(source, "same").write(out, 10**9)
  assert "# It cannot load this model: it has no head_dim" in how_to_load(source, out)
  about = json.loads((out / "config.json").read_text())
  assert (about["torch_dtype"], about.get("attention_dropout", 0.0)) == ("float32", 0.0)
  assert family == "dream" or about["residual_dropout"] == about["embedding_dropout"] == 0.0
  convert_model(out, again)
  model, variables = load_converted(again)
  assert model.config == config
  jax.tree.map(np.testing.assert_array_equal, variables["params"], params)


def test_the_config_says_what_dtype_is_written(tmp_path):
  """Also where the conversion, not the export, has changed it, and where leaves differ."""
  source, middle, out = (epath.Path(tmp_path / part) for part in ("hf", "middle", "out"))
  norm = "model.transformer.ln_f.weight"
  write_checkpoint(source, "m4_bf16", **{norm: tensors("m4_bf16")[norm].astype(np.float32)})
  for dtype, wanted in (("same", "float32"), ("bfloat16", "bfloat16")):
    convert_model(source, middle / dtype, dtype)
    ModelExport(export_hf.find_model(middle / dtype), "same").write(out / dtype, 30_000)
    assert json.loads((out / dtype / "config.json").read_text())["torch_dtype"] == wanted
    index = json.loads((out / dtype / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in Shards(out / dtype).values())
    assert Shards(out / dtype)[norm].dtype == wanted


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--model=x", "--adapter"], "--adapter: only a run has adapters"),
    (["--run=x", "--adapter", "--dtype=bfloat16"], "--dtype: adapters are written in one file"),
    (["--run=x", "--adapter", "--shard_gb=5"], "--shard_gb: adapters are"),
    (["--run=x", "--base_name=me"], "--base_name: only an adapter names its base"),
    ([], "give either --run or --model"),
  ],
)
def test_flags_that_would_do_nothing(arguments, message):
  given = flags.FlagValues()
  flags.DEFINE_boolean("adapter", False, "", flag_values=given)
  for name in ("run", "model", "base_name", "dtype", "shard_gb"):
    flags.DEFINE_string(name, "", "", flag_values=given)
  given(["export_hf", *arguments])
  with pytest.raises(ValueError, match=message):
    export_hf.check_flags(given)


@pytest.fixture(scope="module", params=["same", "int8"])
def run(request, tmp_path_factory):
  """The workdir of a run that ended with the recorded adapters on the recorded model, or on that in int8."""
  folder = tmp_path_factory.mktemp("export")
  source = write_checkpoint(folder / "hf", "m2_gqa")
  pad = settings("m2_gqa")["pad_token_id"]
  special = SPECIAL if pad in SPECIAL.values() else SPECIAL | {"<pad>": pad}
  names = {id: token for token, id in special.items()}
  about = dict(eos_token="</s>", pad_token=names[pad], mask_token="<mask>")
  standin_tokenizer.write(folder / "hf", special, about, None)
  base = epath.Path(folder / "base")
  convert_model(source, base, request.param)
  plain = export_hf.find_model(base)
  ModelExport(plain, "float32").write(epath.Path(folder / "plain"), 10**9)
  lora = lora_config_from_peft(settings("adapter"), tensors("adapter"))
  c = tiny.config(
    model__init_from=str(base),
    model__d_model=48,
    model__num_heads=6,
    model__num_kv_heads=2,
    model__mlp_hidden_size=96,
    model__rope_theta=10_000.0,
    model__quantization="int8" if request.param == "int8" else "none",
    model__lora__rank=lora.rank,
    model__lora__alpha=lora.alpha,
    tokenizer__name="huggingface",
    tokenizer__path="",
    warm_start__updates=0,
  )
  model = build.build_model(c, build.make_tokenizer(c))
  workdir = epath.Path(folder / "run")
  workdir_lib.save_config(workdir, c)
  params_lib.save_params(workdir / "policy", adapters_of(tensors("adapter"), model.config))
  return workdir


def test_adapters_are_merged_into_the_weights(run, tmp_path):
  out = epath.Path(tmp_path / "out")
  ModelExport(export_hf.find_run(run), "same").write(out, 10**9)
  assert {path.name for path in out.iterdir()} == {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
  }
  again = epath.Path(tmp_path / "again")
  convert_model(out, again)
  model, variables = load_converted(again)
  arrays = recorded("adapter")
  logits = compiled(model)(variables, arrays["ids"])
  untouched = "model.transformer.blocks.1.ff_proj.weight"
  kernel, is_int8 = tensors("m2_gqa")[untouched], export_hf.find_run(run).config.quantization == "int8"
  if is_int8:
    values, scale = quantize(kernel.T)
    kernel = (values * scale).T
    assert np.std(logits - arrays["logits_adapter"]) < 0.05 * np.std(arrays["logits_adapter"])
  else:
    np.testing.assert_allclose(logits, arrays["logits_adapter"], rtol=0, atol=5e-4)
  np.testing.assert_array_equal(Shards(out)[untouched], kernel)


def test_what_rounding_does_to_an_update_is_the_norm_of_what_it_changes(run, tmp_path, capsys):
  source = export_hf.find_run(run)
  rounded_model, exact = ModelExport(source, "bfloat16"), ModelExport(source, "float32")
  rounded_model.write(epath.Path(tmp_path / "a"), 10**9)
  exact.write(epath.Path(tmp_path / "b"), 10**9)
  assert exact.rounding.error() is None
  plain, merged, rounded = Shards(run.parent / "plain"), Shards(tmp_path / "b"), Shards(tmp_path / "a")
  squares = {}
  for name in merged:
    before, learned = plain[name].astype(np.float64), merged[name].astype(np.float64) - plain[name]
    kept = rounded[name].astype(np.float64) - plain[name].astype(jnp.bfloat16).astype(np.float64)
    squares[name] = np.square(kept - learned).sum(), np.square(learned).sum()
    assert before.shape == learned.shape
  changed = {name: pair for name, pair in squares.items() if pair[1] > 0}
  wanted = np.sqrt(sum(lost for lost, _ in changed.values()) / sum(learned for _, learned in changed.values()))
  worst = max(changed, key=lambda name: changed[name][0] / changed[name][1])
  error, found, found_error = rounded_model.rounding.error()
  np.testing.assert_allclose(error, wanted, rtol=1e-3)
  assert error > 0.001
  assert found == worst
  np.testing.assert_allclose(found_error, np.sqrt(changed[worst][0] / changed[worst][1]), rtol=1e-3)


def test_a_policy_that_is_not_finite_is_not_exported(run, tmp_path):
  workdir = epath.Path(tmp_path / "run")
  shutil.copytree(run, workdir)
  adapters = jax.tree.map(np.array, adapters_of(tensors("adapter"), export_hf.find_run(run).config))
  adapters["blocks"]["k_proj"]["B"][1, 0, 0] = np.nan
  params_lib.save_params(workdir / "policy", adapters)
  name = "model.transformer.blocks.1.k_proj.weight"
  with pytest.raises(ValueError, match=f"tensor {name} has values that are not finite"):
    ModelExport(export_hf.find_run(workdir), "same").write(epath.Path(tmp_path / "out"), 10**9)
  assert not (tmp_path / "out").exists()


def test_damaged_adapters_are_not_exported(run, tmp_path):
  workdir, out = epath.Path(tmp_path / "run"), epath.Path(tmp_path / "out")
  shutil.copytree(run, workdir)
  source = export_hf.find_run(workdir)
  with (workdir / "policy" / "_METADATA").open("a") as file:
    file.write(" ")
  with pytest.raises(ValueError, match="_METADATA has changed since it was written"):
    export_adapter(source, out)
  with pytest.raises(ValueError, match="_METADATA has changed since it was written"):
    ModelExport(source, "same")
  assert not out.exists()


def test_peft_is_told_what_the_base_was_converted_from(run, tmp_path):
  """But of a base in int8, whose weights are others, where it is."""
  source = export_hf.find_run(run)
  export_adapter(source, epath.Path(tmp_path / "out"))
  about = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
  is_int8 = source.config.quantization == "int8"
  assert about["base_model_name_or_path"] == str(run.parent / ("base" if is_int8 else "hf"))


def test_adapters_are_not_exported_with_another_base(run, tmp_path):
  workdir = epath.Path(tmp_path / "run")
  shutil.copytree(run, workdir)
  adapters = adapters_of(tensors("adapter"), export_hf.find_run(run).config)
  params_lib.save_params(workdir / "policy", adapters, {"base": "0123", "buffers": 1})
  with pytest.raises(ValueError, match=r"were trained on the base 0123, and this base is"):
    export_hf.find_run(workdir)


def test_adapters_for_peft_are_the_recorded_ones(run, tmp_path):
  out = epath.Path(tmp_path / "out")
  export_adapter(export_hf.find_run(run), out, "m2_gqa")
  written = load_file(out / "adapter_model.safetensors")
  stored = tensors("adapter")
  assert written.keys() == stored.keys()
  for key, array in stored.items():
    np.testing.assert_array_equal(written[key], array)
  about, given = json.loads((out / "adapter_config.json").read_text()), settings("adapter")
  assert {key: about[key] for key in ("r", "lora_alpha", "peft_type", "bias")} == {
    key: given[key] for key in ("r", "lora_alpha", "peft_type", "bias")
  }
  assert about["target_modules"] == ["q_proj", "k_proj", "v_proj", "up_proj"]
  assert about["base_model_name_or_path"] == "m2_gqa"


def test_all_parameters_of_a_run_from_random_ones(tmp_path):
  c = tiny.config()
  workdir = epath.Path(tmp_path / "run")
  workdir_lib.save_config(workdir, c)
  model = build.build_model(c, build.make_tokenizer(c))
  shapes = jax.tree.map(
    lambda x: np.random.default_rng(0).normal(size=x.shape).astype(x.dtype),
    policy.abstract_collection(model, build.sharding.make_mesh(8), "params"),
  )
  params_lib.save_params(workdir / "policy", shapes)
  out = epath.Path(tmp_path / "out")
  ModelExport(export_hf.find_run(workdir), "bfloat16").write(out, 10**9)
  hf = json.loads((out / "config.json").read_text())
  assert hf["torch_dtype"] == "bfloat16"
  assert model_config_from_hf(hf, remat="full", end_token_ids=(hf["eos_token_id"],)) == model.config
  wanted = shapes["blocks"]["up_proj"]["kernel"][1].T.astype(jnp.bfloat16)
  np.testing.assert_array_equal(Shards(out)["model.transformer.blocks.1.up_proj.weight"], wanted)
  with pytest.raises(ValueError, match="all parameters were trained"):
    export_adapter(export_hf.find_run(workdir), epath.Path(tmp_path / "other"))


def test_what_cannot_be_exported(tmp_path):
  with pytest.raises(ValueError, match="is not a finished run"):
    export_hf.find_run(epath.Path(tmp_path))
  with pytest.raises(ValueError, match=r"has no model.json"):
    export_hf.find_model(epath.Path(tmp_path))
  c = tiny.config(model__lora__rank=2, warm_start__updates=0)
  workdir_lib.save_config(tmp_path, c)
  (tmp_path / "policy").mkdir()
  with pytest.raises(ValueError, match="adapters on random parameters"):
    export_hf.find_run(epath.Path(tmp_path))


def test_a_target_of_the_layers_does_not_name_the_head():
  lora = LoraConfig(2, 4.0, 0.0, ("q_proj", "ff_out"))
  pattern = lora_config_to_peft(lora, "llada", "base")["target_modules"]
  import re

  assert re.fullmatch(pattern, "model.transformer.blocks.11.ff_out")
  assert re.fullmatch(pattern, "model.transformer.blocks.0.q_proj")
  assert not re.fullmatch(pattern, "model.transformer.ff_out")
  of_layers = LoraConfig(2, 4.0, 0.0, ("q_proj", "ff_proj"))
  pattern = lora_config_to_peft(of_layers, "lladamoe", "base")["target_modules"]
  assert re.fullmatch(pattern, "model.layers.3.mlp.gate_proj")
  assert not re.fullmatch(pattern, "model.layers.3.mlp.experts.0.gate_proj")


@pytest.mark.parametrize("name", ["sentencepiece", "huggingface"])
def test_a_run_is_exported_with_its_tokenizer(tmp_path, name):
  workdir, out = epath.Path(tmp_path / "run"), epath.Path(tmp_path / "out")
  c = tiny.config(tokenizer__name=name, warm_start__updates=0)
  if name == "huggingface":
    special = {"<|mdm_mask|>": 260, "<|endoftext|>": 261}
    names = dict(eos_token="<|endoftext|>", pad_token="<|endoftext|>", mask_token="<|mdm_mask|>")
    c.tokenizer.path = str(standin_tokenizer.write(tmp_path / "tokenizer", special, names, None))
  model_parts = build.build_model_parts(c)
  params_lib.save_params(workdir / "policy", policy.initial_params(c, model_parts))
  workdir_lib.save_config(workdir, c)
  source = export_hf.find_run(workdir)
  ModelExport(source, "same").write(out, 10**9)
  said = how_to_load(source, out)
  if name == "huggingface":
    for file in ("tokenizer.json", "tokenizer_config.json"):
      assert (out / file).read_text() == (epath.Path(c.tokenizer.path) / file).read_text()
    assert f'AutoTokenizer.from_pretrained("{out}"' in said
  else:
    loaded = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    assert loaded.encode("1432") == model_parts.tokenizer.encode("1432")
    assert f'model_file="{out}/tokenizer.model"' in said
  assert "Copy configuration_llada.py, modeling_llada.py from GSAI-ML/LLaDA-8B-Instruct on the hub" in said
  assert json.loads((out / "config.json").read_text())["auto_map"]["AutoModel"] == "modeling_llada.LLaDAModelLM"
  about = json.loads((out / "config.json").read_text())
  elsewhere = {name: f"GSAI-ML/LLaDA-8B-Instruct--{code}" for name, code in about["auto_map"].items()}
  (out / "config.json").write_text(json.dumps(about | {"auto_map": elsewhere}))
  assert "Copy" not in how_to_load(source, out)  # transformers fetches it
