"""Autoregressive checkpoints as diffusion models: the mask token, the table's rows, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import standin_tokenizer
from etils import epath
from recorded_models import FOLDER, compiled, load_converted, recorded, settings, tensors
from safetensors.numpy import load_file

from dmpo_jax.hub import adapt, pretrained
from dmpo_jax.hub.adapt import Adaptation
from dmpo_jax.hub.convert import convert_model
from dmpo_jax.hub.export import ModelExport, how_to_load
from dmpo_jax.hub.tokenizer import load_tokenizer
from launch import export_hf

WANTED = Adaptation(is_wanted=True)
TOKENS = {"<s>": 1, "</s>": 2, "<last>": 154}  # of 160 rows of the table
NAMES = dict(bos_token="<s>", eos_token="</s>", pad_token="</s>")


def checkpoint(tmp_path, name="a2d_llama", *, tokens=TOKENS, names=NAMES, **changes):
  """Write a recorded checkpoint, as an autoregressive one unless `changes` say otherwise, with a tokenizer."""
  source = tmp_path / "hf"
  shutil.copytree(FOLDER / name, source)
  about = settings(name) | {"model_type": settings(name)["model_type"].removeprefix("a2d-")} | changes
  (source / "config.json").write_text(json.dumps(about))
  if tokens:
    standin_tokenizer.write(source, tokens, names, None)
  return epath.Path(source)


def read(path):
  return json.loads(path.read_text())


def exported(folder, out):
  ModelExport(export_hf.find_model(folder), "same").write(out, 10**9)
  return load_file(out / "model.safetensors")


def test_a_free_row_of_the_table_is_the_mask_tokens(tmp_path):
  """The weights are as they were, and a run and the export have the same tokens."""
  out, back = epath.Path(tmp_path / "out"), epath.Path(tmp_path / "back")
  notes = convert_model(checkpoint(tmp_path), out, asked=WANTED).notes
  assert notes == (
    "mask token: '<|mask|>', added as id 155",
    "the table has a row for it that no token uses (160 rows), which stays as it is",
  )
  fields = pretrained.read_model(out).fields
  wanted = dict(mask_token_id=155, eos_token_id=2, pad_token_id=2, vocab_size=156, embedding_size=160)
  assert {name: fields[name] for name in wanted} == wanted
  assert not fields["shift_logits"]
  model, variables = load_converted(out)
  arrays = recorded("a2d_llama")
  logits = compiled(model)(variables, arrays["ids_0"])
  np.testing.assert_allclose(logits, arrays["logits_0"], rtol=0, atol=5e-4)
  written, stored = exported(out, back), tensors("a2d_llama")
  assert written.keys() == stored.keys()
  for name, array in stored.items():
    np.testing.assert_array_equal(written[name], array)
  for folder in (out, back):
    tokenizer = load_tokenizer("huggingface", folder)
    assert (tokenizer.vocab_size, tokenizer.mask_token_id, tokenizer.encode("<|mask|>")) == (156, 155, [155])
    about = read(folder / "config.json")
    assert (about["model_type"], about["mask_token_id"], about["used_vocab_size"]) == ("llama", 155, 156)
  again = epath.Path(tmp_path / "again")
  assert convert_model(back, again).notes == ()
  assert pretrained.read_model(again).fields == fields
  with pytest.raises(ValueError, match=r"--adapt: .* is a diffusion model already"):
    convert_model(back, again, asked=WANTED)


def test_a_full_table_grows_by_rows_that_are_the_mean(tmp_path, monkeypatch):
  monkeypatch.setattr(adapt, "CHUNK_ROWS", 50)
  out = epath.Path(tmp_path / "out")
  source = checkpoint(tmp_path, tokens=TOKENS | {"<last>": 159})
  count, notes = convert_model(source, out, asked=WANTED)
  assert notes[1] == "the table grows from 160 to 256 rows; a new row is the mean of the others"
  fields = pretrained.read_model(out).fields
  assert (fields["mask_token_id"], fields["vocab_size"], fields["embedding_size"]) == (160, 161, 256)
  written, stored = exported(out, epath.Path(tmp_path / "back")), tensors("a2d_llama")
  assert count == sum(array.size for array in written.values())
  for name in ("model.embed_tokens.weight", "lm_head.weight"):
    np.testing.assert_array_equal(written[name][:160], stored[name])
    mean = np.broadcast_to(stored[name].mean(0), (96, 32))
    np.testing.assert_allclose(written[name][160:], mean, rtol=0, atol=1e-6)
  model, variables = load_converted(out)
  arrays = recorded("a2d_llama")
  logits = compiled(model)(variables, arrays["ids_0"])
  np.testing.assert_allclose(logits[..., :160], arrays["logits_0"], rtol=0, atol=5e-4)


def test_a_tied_table_in_bfloat16_grows_too(tmp_path):
  source, out = checkpoint(tmp_path, "a2d_qwen3_bf16", tokens=TOKENS | {"<last>": 175}), epath.Path(tmp_path / "out")
  convert_model(source, out, asked=WANTED)
  written, stored = exported(out, epath.Path(tmp_path / "back")), tensors("a2d_qwen3_bf16")
  name = "model.embed_tokens.weight"
  assert (written.keys(), written[name].shape, written[name].dtype) == (stored.keys(), (256, 40), stored[name].dtype)
  np.testing.assert_array_equal(written[name][:176], stored[name])
  mean = stored[name].astype(np.float64).mean(0).astype(stored[name].dtype)
  np.testing.assert_array_equal(written[name][200], mean)


@pytest.mark.parametrize(
  ("asked", "names", "token", "note"),
  [
    (WANTED._replace(mask_token="<last>"), NAMES, 154, "mask token: '<last>', id 154 of its tokenizer"),
    (WANTED._replace(mask_token="[M]"), NAMES, 155, "mask token: '[M]', added as id 155"),
    (WANTED, NAMES | {"mask_token": "<last>"}, 154, "mask token: '<last>', id 154 of its tokenizer"),
    # a tokenizer with a mask token is that of a diffusion model
    (adapt.AS_IT_IS, NAMES | {"mask_token": "<last>"}, 154, "mask token: '<last>', id 154 of its tokenizer"),
  ],
)
def test_the_mask_token_is_the_one_asked_for_or_the_tokenizers_own(tmp_path, asked, names, token, note):
  out = epath.Path(tmp_path / "out")
  notes = convert_model(checkpoint(tmp_path, names=names), out, asked=asked).notes
  assert notes[0] == note
  assert pretrained.read_model(out).fields["mask_token_id"] == token
  assert load_tokenizer("huggingface", out).mask_token_id == token


def test_special_ids_are_the_tokenizers(tmp_path):
  """As in chat models, whose config.json lists several ends; and a tokenizer without padding."""
  out = epath.Path(tmp_path / "out")
  names = dict(bos_token={"content": "<s>"}, eos_token="<last>")
  source = checkpoint(tmp_path, names=names, eos_token_id=[2, 154], pad_token_id=None, bos_token_id=7)
  notes = convert_model(source, out, asked=WANTED).notes
  assert notes[2:] == (
    "eos token: id 154 of the tokenizer; each of config.json's [2, 154] ends a completion",
    "bos token: id 1 of the tokenizer, where config.json has 7",
    "pad token: EOS, id 154, as the tokenizer has none",
  )
  tokenizer, fields = load_tokenizer("huggingface", out), pretrained.read_model(out).fields
  assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (154, 154, 1)
  assert (fields["eos_token_id"], fields["pad_token_id"]) == (154, 154)
  assert tokenizer.end_token_ids == (154, 2)
  back = epath.Path(tmp_path / "back")
  ModelExport(export_hf.find_model(out), "same").write(back, 10**9)
  assert json.loads((back / "config.json").read_text())["eos_token_id"] == [2, 154]


@pytest.mark.parametrize("shift_logits", [True, False])
def test_logits_are_shifted_if_asked(tmp_path, shift_logits):
  out, back = epath.Path(tmp_path / "out"), epath.Path(tmp_path / "back")
  convert_model(checkpoint(tmp_path), out, asked=WANTED._replace(shift_logits=shift_logits))
  assert pretrained.read_model(out).fields["shift_logits"] == shift_logits
  exported(out, back)
  assert read(back / "config.json")["shift_logits"] == shift_logits
  again = epath.Path(tmp_path / "again")
  convert_model(back, again)
  assert pretrained.read_model(again).fields["shift_logits"] == shift_logits


def test_dllms_models_come_without_a_mask_token_and_go_back_as_they_came(tmp_path):
  """dllm adds the token when it loads them; config.json stays theirs."""
  out, back = epath.Path(tmp_path / "out"), epath.Path(tmp_path / "back")
  source = checkpoint(tmp_path, model_type="a2d-llama")
  notes = convert_model(source, out).notes
  assert notes[0] == "mask token: '<|mask|>', added as id 155"
  fields = pretrained.read_model(out).fields
  assert (fields["mask_token_id"], fields["vocab_size"], fields["shift_logits"]) == (155, 160, False)
  exported(out, back)
  about = read(back / "config.json")
  assert about.pop("torch_dtype") == "float32"
  assert about == settings("a2d_llama")
  lines = how_to_load(export_hf.find_model(out), back)
  assert "import dllm; from transformers import AutoModelForMaskedLM, AutoTokenizer\n" in lines
  assert "trust_remote_code" not in lines


def test_the_files_of_qwens_tokenizer_get_the_token_too(tmp_path):
  source = checkpoint(tmp_path, "a2d_qwen2", tokens=None)
  letters = {letter: i for i, letter in enumerate("abcdefghij")}
  (source / "vocab.json").write_text(json.dumps(letters))
  (source / "merges.txt").write_text("#version: 0.2\n")
  added = {"10": {"content": "</s>", "special": True}}
  (source / "tokenizer_config.json").write_text(json.dumps(dict(added_tokens_decoder=added, eos_token="</s>")))
  (source / "added_tokens.json").write_text(json.dumps({"</s>": 10}))
  (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
  out = epath.Path(tmp_path / "out")
  assert convert_model(source, out, asked=WANTED).notes[0] == "mask token: '<|mask|>', added as id 11"
  assert load_tokenizer("huggingface", out).encode("ab<|mask|></s>") == [0, 1, 11, 10]
  assert read(out / "added_tokens.json") == {"</s>": 10, "<|mask|>": 11}
  assert read(out / "special_tokens_map.json")["mask_token"] == "<|mask|>"


@pytest.mark.parametrize(
  ("own", "asked", "message"),
  [
    ({}, adapt.AS_IT_IS, r"autoregressive \(model_type='llama'\): --adapt makes .* '<\|mask\|>', added as id 155"),
    (dict(model_type="a2d-llama"), WANTED, "--adapt: .* is a diffusion model already; leave it out"),
    (dict(mask_token_id=5), WANTED, "--adapt: .* is a diffusion model already; leave it out"),
    (dict(mask_token_id=5), Adaptation(mask_token="<s>"), "--mask_token: config.json has mask_token_id=5 already"),
    (dict(tokens=None), WANTED, "has no tokenizer, from which the id of its mask token would come: copy one"),
    (dict(tokens=None, model_type="a2d-llama"), adapt.AS_IT_IS, "has no tokenizer, from which"),
    (
      dict(names=NAMES | {"mask_token": "<last>"}),
      WANTED._replace(mask_token="<s>"),
      "--mask_token=<s>: the tokenizer's mask token is '<last>'",
    ),
  ],
)
def test_what_cannot_be_adapted_leaves_nothing(tmp_path, own, asked, message):
  with pytest.raises(ValueError, match=message):
    convert_model(checkpoint(tmp_path, **own), epath.Path(tmp_path / "out"), asked=asked)
  assert not (tmp_path / "out").exists()


def test_models_for_diffusion_are_not_adapted(tmp_path):
  shutil.copytree(FOLDER / "m3_tied", tmp_path / "hf")
  for asked in (WANTED, Adaptation(shift_logits=True)):
    with pytest.raises(ValueError, match="llada is a model for diffusion: leave out --adapt"):
      convert_model(epath.Path(tmp_path / "hf"), epath.Path(tmp_path / "out"), asked=asked)


def test_a_tokenizer_that_cannot_be_read_is_one_message(tmp_path):
  source = checkpoint(tmp_path)
  (source / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer"):
    convert_model(source, epath.Path(tmp_path / "out"), asked=WANTED)
