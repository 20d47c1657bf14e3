"""GGUF files: what is read from them, and what is refused."""

import gguf
import numpy as np
import pytest
import tokenizers
from etils import epath
from recorded_models import compiled, load_converted
from tokenizers import pre_tokenizers

from dmpo_jax import files
from dmpo_jax.hub import pretrained
from dmpo_jax.hub.adapt import Adaptation
from dmpo_jax.hub.gguf import unpack
from dmpo_jax.hub.shards import Shards
from dmpo_jax.hub.tokenizer import HuggingFaceTokenizer
from launch import convert_hf

D, LAYERS, HEADS, KV_HEADS, FFN, HEAD_DIM = 64, 2, 4, 2, 96, 16
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAIRS = (("Ġ", "Ġ"), ("a", "b"))
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in PAIRS), "<tool>"]
TEMPLATE = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SETTINGS = {
  "general.architecture": "llama",
  "llama.embedding_length": D,
  "llama.block_count": LAYERS,
  "llama.feed_forward_length": FFN,
  "llama.attention.head_count": HEADS,
  "llama.attention.head_count_kv": KV_HEADS,
  "llama.attention.layer_norm_rms_epsilon": 1e-5,
  "llama.rope.freq_base": 100_000.0,
  "llama.rope.dimension_count": HEAD_DIM,
  "llama.context_length": 512,
  "llama.vocab_size": len(TOKENS),
  "tokenizer.ggml.model": "gpt2",
  "tokenizer.ggml.pre": "smollm",
  "tokenizer.ggml.tokens": TOKENS,
  "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL) - 1) + [4],
  "tokenizer.ggml.merges": [" ".join(pair) for pair in PAIRS],
  "tokenizer.ggml.bos_token_id": 1,
  "tokenizer.ggml.eos_token_id": 2,
  "tokenizer.ggml.padding_token_id": 2,
  "tokenizer.ggml.unknown_token_id": 0,
  "tokenizer.chat_template": TEMPLATE,
}


def weights():
  """A tiny model's tensors by llama.cpp's names, in torch's order of axes."""
  rng = np.random.default_rng(0)
  shapes = {"token_embd.weight": (len(TOKENS), D), "output_norm.weight": (D,)}
  for i in range(LAYERS):
    block = f"blk.{i}."
    shapes |= {f"{block}{name}.weight": (D,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"{block}attn_q.weight": (HEADS * HEAD_DIM, D), f"{block}attn_output.weight": (D, HEADS * HEAD_DIM)}
    shapes |= {f"{block}attn_{x}.weight": (KV_HEADS * HEAD_DIM, D) for x in "kv"}
    shapes |= {f"{block}ffn_{x}.weight": (FFN, D) for x in ("gate", "up")} | {f"{block}ffn_down.weight": (D, FFN)}
  return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write(path, settings=SETTINGS, tensors=None, quantised=()):
  """Write a GGUF file; `quantised` are the types of tensors that are not float32, by name."""
  writer = gguf.GGUFWriter(path, settings["general.architecture"])
  for name, value in settings.items():
    if name == "general.architecture":
      continue
    if isinstance(value, list):
      writer.add_array(name, value)
    else:
      add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
      add(name, value)
  for name, array in (weights() if tensors is None else tensors).items():
    kind = dict(quantised).get(name)
    if kind is None:
      writer.add_tensor(name, array)
    else:
      writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return epath.Path(path)


@pytest.fixture
def folder(tmp_path):
  path = epath.Path(tmp_path / "hf")
  path.mkdir()
  return path


def rows_in_halves(array, heads):
  """The rows of each head: first those of even number, then those of odd number."""
  split = array.reshape(heads, HEAD_DIM, -1)
  return np.concatenate([split[:, 0::2], split[:, 1::2]], axis=1).reshape(array.shape)


def test_tensors_have_the_names_and_rows_of_hugging_face(tmp_path, folder):
  unpack(write(tmp_path / "model.gguf"), folder)
  stored, ours = Shards(folder), weights()
  assert len(stored) == len(ours)
  np.testing.assert_array_equal(stored["model.embed_tokens.weight"], ours["token_embd.weight"])
  block, theirs = "model.layers.1.", "blk.1."
  for name, heads in (("q", HEADS), ("k", KV_HEADS)):
    expected = rows_in_halves(ours[f"{theirs}attn_{name}.weight"], heads)
    np.testing.assert_array_equal(stored[f"{block}self_attn.{name}_proj.weight"], expected)
  np.testing.assert_array_equal(stored[f"{block}self_attn.v_proj.weight"], ours[f"{theirs}attn_v.weight"])
  np.testing.assert_array_equal(stored[f"{block}mlp.down_proj.weight"], ours[f"{theirs}ffn_down.weight"])


def test_quantised_tensors_are_scales_times_whole_numbers(tmp_path, folder):
  name, q8, q4 = "blk.0.ffn_up.weight", gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1
  exact = weights()
  unpack(write(tmp_path / "model.gguf", quantised={name: q8, "blk.1.ffn_up.weight": q4}), folder)
  stored = Shards(folder)
  blocks = exact[name].reshape(FFN, -1, 32)
  scale = np.abs(blocks).max(-1, keepdims=True) / 127
  expected = np.rint(blocks / scale) * scale.astype(np.float16)
  np.testing.assert_allclose(stored["model.layers.0.mlp.up_proj.weight"], expected.reshape(FFN, D), rtol=1e-6)
  blocks = exact["blk.1.ffn_up.weight"].reshape(FFN, -1, 32)
  step = (blocks.max(-1) - blocks.min(-1)) / 15
  error = np.abs(stored["model.layers.1.mlp.up_proj.weight"].reshape(blocks.shape) - blocks).max(-1)
  assert (error <= 0.51 * step + 2e-3).all()
  assert (error > 0.2 * step).any()


def test_the_config_is_that_of_llama(tmp_path, folder):
  unpack(write(tmp_path / "model.gguf"), folder)
  config = files.read_object(folder / "config.json")
  expected = dict(
    model_type="llama", hidden_size=D, num_hidden_layers=LAYERS, intermediate_size=FFN, num_attention_heads=HEADS
  )
  expected |= dict(num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, rms_norm_eps=1e-5, rope_theta=100_000.0)
  expected |= dict(vocab_size=len(TOKENS), bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True)
  assert {key: config[key] for key in expected} == expected
  head = {"output.weight": weights()["token_embd.weight"] + 1}
  unpack(write(tmp_path / "untied.gguf", tensors=weights() | head), folder)
  assert files.read_object(folder / "config.json")["tie_word_embeddings"] is False
  np.testing.assert_array_equal(Shards(folder)["lm_head.weight"], head["output.weight"])


def test_the_tokenizer_splits_digits_and_knows_its_special_tokens(tmp_path, folder):
  unpack(write(tmp_path / "model.gguf"), folder)
  tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  pieces = ["ab", "Ġ", "1", "2", "ĠĠ", "3", "<|im_end|>", "Ġ", "c", "<tool>"]  # "  3": the spaces are a piece
  assert tokenizer.encode("ab 12  3<|im_end|> c<tool>").tokens == pieces
  assert tokenizer.decode(tokenizer.encode("ab 12 é<|im_end|>").ids) == "ab 12 é"
  about = files.read_object(folder / "tokenizer_config.json")
  assert (about["eos_token"], about["bos_token"], about["pad_token"]) == ("<|im_end|>", "<|im_start|>", "<|im_end|>")
  assert about["chat_template"] == TEMPLATE


def test_the_command_makes_a_diffusion_model_of_it(tmp_path, capsys):
  path, out = write(tmp_path / "model.gguf"), epath.Path(tmp_path / "out")
  with pytest.raises(ValueError, match=r"model.gguf is autoregressive .*--adapt makes a diffusion model of it"):
    convert_hf.run(str(path), None, out, None, "same")
  with pytest.raises(ValueError, match="is a file, and only the hub has revisions"):
    convert_hf.run(str(path), "main", out, None, "same")
  convert_hf.run(str(path), None, out, None, "same", Adaptation(is_wanted=True))
  assert f"mask token: '<|mask|>', added as id {len(TOKENS)}" in capsys.readouterr().out
  stored = pretrained.read_model(out)
  assert (stored.family, stored.origin) == ("llama", str(path))
  assert stored.fields["mask_token_id"] == len(TOKENS)
  tokenizer = HuggingFaceTokenizer(out, is_chat=True)
  assert (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.eot_token_id) == (len(TOKENS), 2, 2)
  prompt = [1, *tokenizer.encode("user\nab 1"), 2, *tokenizer.encode("\n"), 1, *tokenizer.encode("assistant\n")]
  assert tokenizer.encode_prompt("ab 1") == prompt
  model, variables = load_converted(out)
  assert np.isfinite(compiled(model)(variables, np.array([[1, 2, len(TOKENS)]], np.int32))).all()


def without(name):
  return {key: value for key, value in SETTINGS.items() if key != name}


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (SETTINGS | {"general.architecture": "mamba"}, "its architecture 'mamba' is not supported; it must be 'llama'"),
    (SETTINGS | {"llama.rope.scaling.type": "yarn"}, r"settings \{'rope.scaling.type': 'yarn'\} are not supported"),
    (SETTINGS | {"llama.attention.sliding_window": 64}, "'attention.sliding_window': 64"),
    (SETTINGS | {"llama.rope.dimension_count": 8}, "llama.rope.dimension_count=8 is not supported; it must be 16"),
    (SETTINGS | {"llama.attention.head_count_kv": [2, 4]}, "llama.attention.head_count_kv differs from layer to layer"),
    (without("llama.block_count"), "it has no llama.block_count"),
    (SETTINGS | {"tokenizer.ggml.pre": "tekken"}, "model 'gpt2' with pre 'tekken', is not supported"),
    (SETTINGS | {"tokenizer.ggml.model": "llama"}, "its tokenizer, model 'llama' with pre 'smollm'"),
    (without("tokenizer.ggml.tokens"), "it has no tokenizer.ggml.tokens"),
  ],
)
def test_what_is_not_supported_is_one_message_and_writes_nothing(tmp_path, folder, settings, message):
  with pytest.raises(ValueError, match=message):
    unpack(write(tmp_path / "model.gguf", settings), folder)
  assert not list(folder.iterdir())


def test_unknown_tensors_and_quantisations_are_named(tmp_path, folder):
  extra = weights() | {"rope_freqs.weight": np.ones(HEAD_DIM // 2, np.float32)}
  with pytest.raises(ValueError, match=r"1 tensors that Llama does not have, such as rope_freqs.weight"):
    unpack(write(tmp_path / "extra.gguf", tensors=extra), folder)
  counts = weights() | {"output.weight": np.ones((len(TOKENS), D), np.int32)}
  with pytest.raises(ValueError, match=r"output.weight has the quantisation I32, which the package gguf cannot undo"):
    unpack(write(tmp_path / "counts.gguf", tensors=counts), folder)
  assert not list(folder.iterdir())


def test_a_damaged_file_is_one_message(tmp_path, folder):
  path = write(tmp_path / "model.gguf")
  content = path.read_bytes()
  for damaged in (content[: len(content) // 2], b"GGML" + content[4:], content[:100], b""):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="cannot be read as GGUF: cut off, damaged or too new"):
      unpack(path, folder)
  with pytest.raises(ValueError, match="no such file on this machine"):
    unpack(epath.Path(tmp_path / "absent.gguf"), folder)
