"""Conversion of checkpoints: the numbers that come out, what is refused, and the memory that it takes."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import standin_tokenizer
import tiny
from etils import epath
from recorded_models import TINY, compiled, load_converted, params_of, recorded, settings, tensors, write_checkpoint
from safetensors.numpy import save_file
from test_digests import flips

from dmpo_jax import build, policy, sharding
from dmpo_jax.files import Unreadable
from dmpo_jax.hub import convert, layout, pretrained
from dmpo_jax.hub.model_config import model_config_from_hf
from dmpo_jax.hub.shards import write_shards
from dmpo_jax.models.layers import quantize
from dmpo_jax.models.lora import LoraConfig
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.run.params import load_params

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["m1_base", "m2_gqa", "m3_tied", "m4_bf16"])
def test_a_converted_checkpoint_gives_the_recorded_logits(tmp_path, name):
  source = write_checkpoint(tmp_path / "hf", name, max_bytes=40_000)
  assert len(list(source.glob("*.safetensors"))) > 1
  seen = []
  out = epath.Path(tmp_path / "out")
  count, notes = convert.convert_model(source, out, report=seen.append)
  assert notes == ()
  stored = tensors(name)
  assert count == sum(array.size for array in stored.values())
  assert sum(seen) == sum(array.nbytes for array in stored.values())
  model, variables = load_converted(out)
  arrays = recorded(name)
  case = {"m1_base": 2, "m2_gqa": 1}.get(name, 0)
  logits = compiled(model)(variables, arrays[f"ids_{case}"])
  np.testing.assert_allclose(logits, arrays[f"logits_{case}"], rtol=0, atol=5e-4)


def test_pieces_and_dtypes(tmp_path, monkeypatch):
  monkeypatch.setattr(convert, "PIECE_BYTES", 1000)  # several pieces a tensor, the last one shorter
  stored, config = tensors("m4_bf16"), model_config_from_hf(settings("m4_bf16"), param_dtype="bfloat16")
  wanted = params_of(stored, config)
  for dtype in ("same", "float32"):
    out = epath.Path(tmp_path / dtype)
    convert.convert_model(write_checkpoint(tmp_path / f"hf_{dtype}", "m4_bf16"), out, dtype)
    saved = jax.tree.map(
      np.asarray, load_converted(out, param_dtype="float32" if dtype == "float32" else "bfloat16")[1]["params"]
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(np.float32), b.astype(np.float32)), saved, wanted)
  assert json.loads((out / "model.json").read_text())["num_layers"] == 4


def test_projections_in_int8(tmp_path, monkeypatch):
  """In pieces as in one; everything else as it was stored, and the recorded logits nearly."""
  monkeypatch.setattr(convert, "PIECE_BYTES", 1000)
  source, out, seen = write_checkpoint(tmp_path / "hf", "m4_bf16"), epath.Path(tmp_path / "out"), []
  convert.convert_model(source, out, "int8", seen.append)
  stored = tensors("m4_bf16")
  assert sum(seen) == sum(array.nbytes for array in stored.values())
  config = model_config_from_hf(settings("m4_bf16"), param_dtype="bfloat16")
  wanted = jax.tree.map(np.asarray, params_of(stored, config))
  model, variables = load_converted(out, param_dtype="bfloat16")
  assert model.config.quantization == "int8"
  for name, leaves in wanted["blocks"].items():
    if "kernel" in leaves:
      kernel, scale = quantize(leaves.pop("kernel"))
      wanted["blocks"][name] = leaves | {"kernel": kernel, "kernel_scale": scale}
  jax.tree.map(np.testing.assert_array_equal, variables["params"], wanted)
  arrays = recorded("m4_bf16")
  logits = compiled(model)(variables, arrays["ids_0"])
  assert 0.001 < np.std(logits - arrays["logits_0"]) / np.std(arrays["logits_0"]) < 0.1


@pytest.mark.parametrize("dtype", ["same", "float32", "int8"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_what_is_not_finite_is_named_and_leaves_nothing(tmp_path, dtype, value):
  name = "model.transformer.blocks.1.up_proj.weight"
  damaged = tensors("m4_bf16")[name].copy()
  damaged[3, 5] = value
  source = write_checkpoint(tmp_path / "hf", "m4_bf16", **{name: damaged})
  with pytest.raises(ValueError, match=rf"tensor {name} in .*model.safetensors has values that are not finite"):
    convert.convert_model(source, epath.Path(tmp_path / "out"), dtype)
  assert not (tmp_path / "out").exists()


def test_every_bit_that_flips_in_a_converted_folder_is_noticed_or_harmless(tmp_path):
  """In the arrays, in what describes them, and in the files that travelled along."""
  out = epath.Path(tmp_path / "out")
  convert.convert_model(write_checkpoint(tmp_path / "hf", "m3_tied"), out)
  config = pretrained.read_model(out).model_config()
  abstract = policy.abstract_collection(Transformer(config), sharding.make_mesh(8), "params")
  whole, unnoticed = load_params(out, abstract), set()
  for path, _ in flips(out):
    try:
      found = pretrained.read_model(out).model_config()
      jax.tree.map(np.testing.assert_array_equal, load_params(out, abstract), whole)
      assert found == config
      unnoticed.add(path.name)
    except Unreadable:
      pass
  assert unnoticed <= {"_CHECKPOINT_METADATA", "commit_success.txt"}
  with (out / "config.json").open("a") as file:
    file.write(" ")
  with pytest.raises(Unreadable, match=r"config\.json has changed since it was written.*remove .*digests\.json"):
    load_params(out, abstract)
  (out / "digests.json").unlink()
  load_params(out, abstract)


@pytest.mark.parametrize(
  ("garble", "message"),
  [
    (lambda text: "", r"it is empty\): convert the checkpoint again"),
    (lambda text: text[:40], "cannot be read"),
    (lambda text: "[]", "is not a JSON object"),
    (lambda text: text.replace('"num_layers": 2', '"num_layers": "2"'), "num_layers = '2', which is not of type int"),
  ],
)
def test_a_garbled_description_is_one_message(tmp_path, garble, message):
  out = epath.Path(tmp_path / "out")
  out.mkdir()
  pretrained.write_model(out, "llada", TINY, "")
  text = (out / "model.json").read_text().replace(f'"num_layers": {TINY.num_layers}', '"num_layers": 2')
  (out / "model.json").write_text(garble(text))
  with pytest.raises(Unreadable, match=message):
    pretrained.read_model(out)


def test_a_folder_of_before_there_was_int8_is_read(tmp_path):
  out = epath.Path(tmp_path / "out")
  convert.convert_model(write_checkpoint(tmp_path / "hf", "m3_tied"), out)
  about = json.loads((out / "model.json").read_text())
  assert about.pop("quantization") == "none"
  (out / "model.json").write_text(json.dumps(about))
  assert pretrained.read_model(out).model_config().quantization == "none"
  (out / "model.json").write_text(json.dumps({key: about[key] for key in about if key != "d_model"}))
  with pytest.raises(ValueError, match="convert the checkpoint again"):
    pretrained.read_model(out)


def test_files_travel_along(tmp_path):
  source = write_checkpoint(tmp_path / "hf", "m2_gqa", max_bytes=60_000)
  (source / "modeling_llada.py").write_text("code")
  (source / "notes.bin").write_text("no")
  out = epath.Path(tmp_path / "out")
  convert.convert_model(source, out)
  names = {"config.json", "digests.json", "model.json", "modeling_llada.py", "params"}
  assert {path.name for path in out.iterdir()} == names


@pytest.mark.parametrize(
  ("keywords", "message"),
  [
    (dict(drop="blocks.1.k_proj"), r"1 missing \(model.transformer.blocks.1.k_proj.weight\)"),
    ({"model.extra": np.zeros(1, np.float32)}, r"1 unknown \(model.extra\)"),
    ({"model.transformer.ln_f.weight": np.zeros(3, np.float32)}, r"ln_f.weight has \[3\], the config asks for \[32\]"),
  ],
)
def test_tensors_that_do_not_fit_leave_nothing(tmp_path, keywords, message):
  source = write_checkpoint(tmp_path / "hf", "m3_tied", **keywords)
  with pytest.raises(ValueError, match=message):
    convert.convert_model(source, epath.Path(tmp_path / "out"))
  assert not (tmp_path / "out").exists()


def test_damage_found_on_the_way_leaves_nothing(tmp_path):
  """A shard that shrinks after it has been checked."""
  source, out = write_checkpoint(tmp_path / "hf", "m3_tied"), epath.Path(tmp_path / "out")

  def cut(done):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])

  with pytest.raises(ValueError, match=r"model.safetensors is cut off: it ends inside"):
    convert.convert_model(source, out, report=cut)
  assert not out.exists()


def test_a_folder_with_something_in_it_is_not_touched(tmp_path):
  source, out = write_checkpoint(tmp_path / "hf", "m3_tied"), epath.Path(tmp_path / "out")
  out.mkdir()
  (out / "mine").write_text("x")
  with pytest.raises(ValueError, match="exists already"):
    convert.convert_model(source, out)
  assert [path.name for path in out.iterdir()] == ["mine"]


def test_adapters_are_converted_for_their_model(tmp_path):
  base, source = epath.Path(tmp_path / "base"), epath.Path(tmp_path / "adapter")
  convert.convert_model(write_checkpoint(tmp_path / "hf", "m2_gqa"), base)
  source.mkdir()
  save_file(tensors("adapter"), source / "adapter_model.safetensors")
  (source / "adapter_config.json").write_text(json.dumps(settings("adapter")))
  out = epath.Path(tmp_path / "out")
  convert.convert_adapter(source, base, out)
  lora = pretrained.read_adapter(out)
  assert (lora.rank, lora.alpha, lora.targets) == (4, 2.0, ("q_proj", "k_proj", "v_proj", "up_proj"))
  model, variables = load_converted(base, lora=lora)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  adapters = load_params(out, policy.abstract_collection(model, mesh, "lora"))
  arrays = recorded("adapter")
  logits = compiled(model)(variables | {"lora": adapters}, arrays["ids"])
  np.testing.assert_allclose(logits, arrays["logits_adapter"], rtol=0, atol=5e-4)
  with pytest.raises(ValueError, match=r"--base=.* has no model.json"):
    convert.convert_adapter(source, source, epath.Path(tmp_path / "other"))


SPECIAL = {"<s>": 298, "</s>": 290, "<eot>": 297, "<mask>": 296}  # beside the ids of m1_base


def test_a_run_takes_a_checkpoint_and_says_what_differs(tmp_path):
  """The checkpoint has the last word on the vocabulary; sizes that the configuration names must be its own."""
  source, out = write_checkpoint(tmp_path / "hf", "m1_base"), epath.Path(tmp_path / "out")
  names = dict(bos_token="<s>", eos_token="</s>", pad_token="</s>")
  standin_tokenizer.write(pathlib.Path(source), SPECIAL, names, None)
  convert.convert_model(source, out)
  config = tiny.config(model__init_from=str(out), tokenizer__name="huggingface", tokenizer__path="")
  sizes = dict(d_model=64, num_layers=3, num_heads=4, num_kv_heads=4, mlp_hidden_size=160, rope_theta=500_000.0)
  with pytest.raises(ValueError, match="is of another model") as caught:
    build.build_model(config, build.make_tokenizer(config))
  message = str(caught.value)
  assert "config.model has d_model = 16, the checkpoint 64" in message
  assert message.count("\n") == len(sizes)
  config.model.update(dict.fromkeys(sizes))  # all of them left open
  model = build.build_model(config, build.make_tokenizer(config))
  assert (model.config.vocab_size, model.config.embedding_size, model.config.mask_token_id) == (300, 320, 296)
  assert {name: getattr(model.config, name) for name in sizes} == sizes
  config.model.vocab_size = 290
  with pytest.raises(ValueError, match=r"config.model has vocab_size = 290, the checkpoint 300"):
    build.build_model(config, build.make_tokenizer(config))
  config.tokenizer.update(tiny.config().tokenizer)
  config.model.vocab_size = 0
  with pytest.raises(ValueError, match=r"(?s)the tokenizer has mask_token_id = 4, the checkpoint 296.*folder's own"):
    build.build_model(config, build.make_tokenizer(config))


def test_special_ids_that_config_json_lacks_are_the_tokenizers(tmp_path):
  source, out = write_checkpoint(tmp_path / "hf", "m1_base"), epath.Path(tmp_path / "out")
  lacking = {key: value for key, value in settings("m1_base").items() if not key.endswith("_token_id")}
  (source / "config.json").write_text(json.dumps(lacking))
  names = dict(eos_token="</s>", pad_token="<eot>", mask_token="<mask>")
  standin_tokenizer.write(pathlib.Path(source), SPECIAL, names, None)
  convert.convert_model(source, out)
  fields = pretrained.read_model(out).fields
  assert [fields[name] for name in ("mask_token_id", "eos_token_id", "pad_token_id")] == [296, 290, 297]


def test_a_tokenizer_of_another_model_is_not_converted(tmp_path):
  source = write_checkpoint(tmp_path / "hf", "m1_base")
  standin_tokenizer.write(pathlib.Path(source), SPECIAL | {"</s>": 295}, dict(eos_token="</s>", pad_token="</s>"), None)
  with pytest.raises(ValueError, match="eos_token_id=290, but the eos token '</s>' is 295"):
    convert.convert_model(source, epath.Path(tmp_path / "out"))
  assert not (tmp_path / "out").exists()


def test_adapters_of_another_kind_are_refused(tmp_path):
  pretrained.write_adapter(epath.Path(tmp_path), LoraConfig(4, 2.0, 0.0, ("q_proj",)))
  config = tiny.config(model__lora__rank=8, model__lora__init_from=str(tmp_path))
  with pytest.raises(ValueError, match="holds other adapters") as caught:
    build.build_model(config, build.make_tokenizer(config))
  assert "rank = 8, the adapters 4" in str(caught.value)
  assert "targets = ('q_proj', 'k_proj', 'v_proj', 'up_proj'), the adapters ('q_proj',)" in str(caught.value)


MEASURE = """
import json, resource, sys
from etils import epath
from dmpo_jax.hub import convert
source, out = map(epath.Path, sys.argv[1:])
convert.convert_model(source.parent / "small", source.parent / "small_out")  # so that all libraries are loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert.convert_model(source, out)
print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024))
"""


def test_memory_is_bounded_by_a_shard(tmp_path):
  """Below 1.3 times the largest shard plus one tensor: here less than half of the checkpoint, whatever its length."""
  write_checkpoint(tmp_path / "small", "m3_tied")
  sizes = dict(d_model=512, n_layers=12, n_heads=8, n_kv_heads=8, mlp_hidden_size=2048, weight_tying=False)
  hf = settings("m2_gqa") | sizes | dict(vocab_size=16384, embedding_size=16384)
  places = layout.checkpoint_places(model_config_from_hf(hf), "llada")
  shapes = {name: place.torch_shape for name, place in places.items()}
  nbytes = {name: 2 * int(np.prod(shape)) for name, shape in shapes.items()}
  source = epath.Path(tmp_path / "large")
  source.mkdir()
  draw = np.random.default_rng(0).normal(size=16384 * 512).astype(ml_dtypes.bfloat16)
  made = ((name, draw[: int(np.prod(shape))].reshape(shape)) for name, shape in shapes.items())
  write_shards(source, nbytes, made, 20 * 2**20)
  (source / "config.json").write_text(json.dumps(hf))
  largest = max(path.stat().length for path in source.glob("*.safetensors"))
  allowed = 1.3 * largest + max(nbytes.values())
  assert allowed < sum(nbytes.values()) / 3
  command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out")]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-2000:]
  assert float(done.stdout.splitlines()[-1]) < allowed
  _, variables = load_converted(epath.Path(tmp_path / "out"), param_dtype="bfloat16")
  head = variables["params"]["head"]
  np.testing.assert_array_equal(np.asarray(head), draw.reshape(16384, 512).T)
  assert jnp.array_equal(variables["params"]["blocks"]["ff_out"]["kernel"][11], draw[: 512 * 2048].reshape(512, 2048).T)
