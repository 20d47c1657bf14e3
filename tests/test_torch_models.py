"""The models, adapters and tokenizers against `transformers` and PEFT, where these are installed (make test-torch)."""

import json
import pathlib
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import documents
import numpy as np
import pytest
import standin_tokenizer as standin
from etils import epath
from recorded_models import TINY, adapters_of, compiled, load_converted, params_of, settings, tensors
from safetensors.numpy import load_file, save_file
from test_models_dream import HF as DREAM
from test_models_dream import random_tensors

from dmpo_jax.hub import chat, layout
from dmpo_jax.hub.adapt import Adaptation
from dmpo_jax.hub.convert import convert_model
from dmpo_jax.hub.export import ModelExport, Source, export_adapter, how_to_load
from dmpo_jax.hub.families import FAMILIES, family_of
from dmpo_jax.hub.model_config import model_config_from_hf
from dmpo_jax.hub.peft import lora_config_from_peft
from dmpo_jax.hub.shards import write_shards
from dmpo_jax.hub.tokenizer import load_tokenizer
from dmpo_jax.messages import Turn
from dmpo_jax.models.lora import LoraConfig
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.run import params as params_lib
from launch import export_hf

pytestmark = pytest.mark.torch
WHY = "PyTorch is not installed: make test-torch"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
peft = pytest.importorskip("peft", reason=WHY)

IDS = np.random.default_rng(1).integers(0, TINY.vocab_size, (2, 11))
# LLaDA's modules by the names that transformers' Llama has
AS_LLAMA = {
  "model.transformer.wte.": "model.embed_tokens.",
  "model.transformer.ln_f.": "model.norm.",
  "model.transformer.ff_out.": "lm_head.",
  "model.transformer.blocks.": "model.layers.",
  ".attn_norm.": ".input_layernorm.",
  ".ff_norm.": ".post_attention_layernorm.",
  ".q_proj.": ".self_attn.q_proj.",
  ".k_proj.": ".self_attn.k_proj.",
  ".v_proj.": ".self_attn.v_proj.",
  ".attn_out.": ".self_attn.o_proj.",
  ".ff_proj.": ".mlp.gate_proj.",
  ".up_proj.": ".mlp.up_proj.",
  ".ff_out.": ".mlp.down_proj.",
}


def bidirectional_logits(model, ids):
  """A causal model's logits with attention everywhere: a mask of four axes that adds nothing."""
  mask = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])
  with torch.no_grad():
    return model.eval()(torch.tensor(ids), attention_mask=mask, use_cache=False).logits.numpy()


def as_llama(config, stored):
  """Give LLaDA's tensors, arrays or torch's, to transformers' Llama."""
  peer = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      hidden_size=config.d_model,
      num_hidden_layers=config.num_layers,
      num_attention_heads=config.num_heads,
      num_key_value_heads=config.num_kv_heads,
      intermediate_size=config.mlp_hidden_size,
      vocab_size=config.embedding_size,
      rope_theta=config.rope_theta,
      rms_norm_eps=config.rms_norm_eps,
      tie_word_embeddings=False,
    )
  )
  renamed = {}
  for name, array in stored.items():
    for ours, theirs in AS_LLAMA.items():
      name = name.replace(ours, theirs)
    renamed[name] = torch.as_tensor(array)
  peer.load_state_dict(renamed)
  return peer


def test_llada_is_llama_in_both_directions():
  config = TINY
  rng = np.random.default_rng(0)
  places = layout.checkpoint_places(config, "llada")
  shapes = {name: place.torch_shape for name, place in places.items()}
  stored = {name: rng.normal(size=shape, scale=0.4).astype(np.float32) for name, shape in shapes.items()}
  params = params_of(stored, config)
  logits = compiled(Transformer(config))({"params": params}, IDS)
  np.testing.assert_allclose(logits, bidirectional_logits(as_llama(config, stored), IDS), rtol=0, atol=5e-4)


def test_dream_is_qwen_in_both_directions():
  config = model_config_from_hf(DREAM)
  stored = random_tensors(config)
  own = {key: value for key, value in DREAM.items() if key not in ("model_type", "architectures", "use_mrope")}
  peer = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**own))
  peer.load_state_dict({name: torch.tensor(array) for name, array in stored.items()})
  params = params_of(stored, config, "dream")
  logits = compiled(Transformer(config))({"params": params}, IDS)
  np.testing.assert_allclose(logits, bidirectional_logits(peer, IDS), rtol=0, atol=5e-4)


class Named(torch.nn.Module):
  """LLaDA's modules by their names, without what connects them."""

  def __init__(self, stored):
    super().__init__()
    self.config = {"model_type": "llada"}
    for name, array in stored.items():
      *path, last, _ = name.split(".")
      node = self
      for part in path:
        if not hasattr(node, part):
          node.add_module(part, torch.nn.Module())
        node = getattr(node, part)
      if array.ndim == 2:
        linear = torch.nn.Linear(*array.shape[::-1], bias=False)
        linear.weight.data = torch.tensor(array)
        node.add_module(last, linear)

  def prepare_inputs_for_generation(self):
    raise NotImplementedError


@pytest.mark.parametrize("targets", [("q_proj", "k_proj", "v_proj", "up_proj"), ("all",)])
def test_peft_loads_an_exported_adapter(tmp_path, targets):
  lora = LoraConfig(3, 6.0, 0.0, targets)
  config = model_config_from_hf(settings("m2_gqa"), lora=lora)
  rng = np.random.default_rng(0)
  adapters = {}
  for place in layout.adapter_places(config, "llada").values():
    *_, name, part = place.path
    adapters.setdefault(name, {})[part] = rng.normal(size=(config.num_layers, *place.shape)).astype(np.float32)
  folder = epath.Path(tmp_path)
  params_lib.save_params(folder / "policy", {"blocks": adapters})
  source = Source(config, "llada", None, params_lib.SavedParams(folder / "policy"), origin="base")
  export_adapter(source, folder / "out")
  model = peft.PeftModel.from_pretrained(Named(tensors("m2_gqa")), str(folder / "out"))
  wrapped = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
  assert len(wrapped) == config.num_layers * len(lora.targets)
  for name in lora.targets:
    layer = model.get_submodule(f"base_model.model.model.transformer.blocks.1.{name}")
    delta = layer.get_delta_weight("default").detach().numpy()
    ours = lora.scale * adapters[name]["A"][1] @ adapters[name]["B"][1]
    np.testing.assert_allclose(delta, ours.T, rtol=1e-4, atol=1e-5)


def test_a_merged_export_is_what_peft_merges(tmp_path):
  lora = lora_config_from_peft(settings("adapter"), tensors("adapter"))
  config = model_config_from_hf(settings("m2_gqa"), lora=lora)
  folder = epath.Path(tmp_path)
  params_lib.save_params(folder / "base", params_of(tensors("m2_gqa"), config))
  params_lib.save_params(folder / "policy", adapters_of(tensors("adapter"), config))
  source = Source(config, "llada", *(params_lib.SavedParams(folder / name) for name in ("base", "policy")))
  ModelExport(source, "same").write(folder / "out", 10**9)
  adapter = tmp_path / "adapter"
  adapter.mkdir()
  save_file(tensors("adapter"), adapter / "adapter_model.safetensors")
  (adapter / "adapter_config.json").write_text(json.dumps(settings("adapter")))
  merged = peft.PeftModel.from_pretrained(Named(tensors("m2_gqa")), str(adapter)).merge_and_unload()
  written = load_file(folder / "out" / "model.safetensors")
  for name in ("q_proj", "up_proj", "ff_out"):
    key = f"model.transformer.blocks.0.{name}"
    theirs = merged.get_submodule(key).weight.detach().numpy()
    np.testing.assert_allclose(written[f"{key}.weight"], theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_prompts_are_rendered_as_transformers_renders_them(tmp_path, family):
  made = {
    "llada": (standin.LLADA, standin.LLADA_CONFIG, standin.LLADA_TEMPLATE, dict(mask_token_id=126336)),
    "dream": (standin.DREAM, standin.DREAM_CONFIG, standin.DREAM_TEMPLATE, None),
  }[family]
  standin.write(tmp_path, *made)
  ours = load_tokenizer("huggingface", tmp_path, is_chat=True)
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
  for text in ("Solve 2 + 2.", "  spaces and\n\nlines \n", "żółć <|eot_id|> <mask>"):
    messages = [{"role": "user", "content": text}]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    wanted = theirs(rendered + "<reasoning>", add_special_tokens=False)["input_ids"]
    assert ours.encode_prompt(text, "<reasoning>") == wanted
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(wanted[3:]) == theirs.decode(
      wanted[3 : first_end(ours, wanted[3:]) + 3], skip_special_tokens=True
    )


def first_end(tokenizer, ids):
  ends = [ids.index(token) for token in (tokenizer.eos_token_id, tokenizer.eot_token_id) if token in ids]
  return min(ends, default=len(ids))


TEMPLATES = (
  "{%- for m in messages -%}\n  {%- if m.role == 'system' %}{% continue %}{% endif %}\n"
  "[{{ m.role }}] {{ m.content | trim }}\n"
  "{%- endfor %}{% if add_generation_prompt %}\n[assistant]{% endif %}",
  "{% for m in messages %}\n    {% if loop.first %}{{ bos_token }}{% endif %}\n"
  "{{ m | tojson(indent=2) }}\n{% endfor %}",
  "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% generation %}{{ m.content }}"
  "{% endgeneration %}{% endfor %}{{ ns.n }}{{ strftime_now('%Y') }}",
)


@pytest.mark.parametrize("source", TEMPLATES)
def test_templates_of_all_kinds_are_rendered_alike(tmp_path, source):
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(standin.write(tmp_path))
  turns = [Turn("system", "be é <brief>"), Turn("user", " hi \n"), Turn("assistant", "yes"), Turn("user", "and?")]
  messages = [{"role": role, "content": content} for role, content in turns]
  for is_answering in (True, False):
    wanted = theirs.apply_chat_template(
      messages, chat_template=source, add_generation_prompt=is_answering, tokenize=False
    )
    template = chat.Template(source, theirs.special_tokens_map)
    assert template.render(turns, is_answering=is_answering) == wanted


def write_dreams_tokenizer(folder, **more):
  """Write vocab.json, merges.txt and tokenizer_config.json, with further entries in the last."""
  from tokenizers import pre_tokenizers

  vocab = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
  merges = ["h e", "he l", "Ġ w", "1 2", "Ċ Ċ"]
  vocab |= {"".join(pair.split(" ")): 256 + i for i, pair in enumerate(merges)}
  (folder / "vocab.json").write_text(json.dumps(vocab))
  (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
  properties = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
  added = {str(len(vocab) + i): {"content": token} | properties for i, token in enumerate(standin.DREAM)}
  about = standin.DREAM_CONFIG | {"added_tokens_decoder": added, "tokenizer_class": "Qwen2Tokenizer"} | more
  (folder / "tokenizer_config.json").write_text(json.dumps(about))


def test_dreams_files_are_read_as_qwens(tmp_path):
  write_dreams_tokenizer(tmp_path)
  ours = load_tokenizer("huggingface", tmp_path)
  theirs = transformers.Qwen2Tokenizer.from_pretrained(tmp_path)
  for text in ("hello  world 12\n\n\nIt's 34, you're", "é\u0301 <|im_end|>x", "tabs\t\tand  \n spaces "):
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


# Stand-ins for the published files: modules of the same names. LLaDA's own class lacks `all_tied_weights_keys`, without
# which transformers 5 does not load it.
LLADA_FILES = {
  "configuration_llada.py": """
from transformers import PretrainedConfig

class LLaDAConfig(PretrainedConfig):
  model_type = "llada"
""",
  "modeling_llada.py": """
import torch
from transformers import PreTrainedModel
from .configuration_llada import LLaDAConfig

class LLaDAModelLM(PreTrainedModel):
  config_class, base_model_prefix, _tied_weights_keys, all_tied_weights_keys = LLaDAConfig, "", None, {}

  def __init__(self, config):
    super().__init__(config)
    part = lambda **parts: torch.nn.ModuleDict(parts)
    line = lambda width, height: torch.nn.Linear(width, height, bias=False)
    norm = lambda: torch.nn.LayerNorm(d, bias=False)
    d, f = config.d_model, config.mlp_hidden_size
    kv = d // config.n_heads * config.n_kv_heads
    block = lambda: part(q_proj=line(d, d), k_proj=line(d, kv), v_proj=line(d, kv), attn_out=line(d, d),
      ff_proj=line(d, f), up_proj=line(d, f), ff_out=line(f, d), attn_norm=norm(), ff_norm=norm())
    self.model = part(transformer=part(wte=torch.nn.Embedding(config.embedding_size, d), ln_f=norm(),
      ff_out=line(d, config.embedding_size), blocks=torch.nn.ModuleList(block() for _ in range(config.n_layers))))
""",
}
DREAM_FILES = {
  "configuration_dream.py": """
from transformers import Qwen2Config

class DreamConfig(Qwen2Config):
  model_type = "Dream"
""",
  "modeling_dream.py": """
from transformers import Qwen2ForCausalLM
from .configuration_dream import DreamConfig
from .generation_utils import DreamGenerationConfig

class DreamModel(Qwen2ForCausalLM):
  config_class = DreamConfig

  @classmethod
  def from_pretrained(cls, path, *args, **options):
    model = super().from_pretrained(path, *args, **options)
    model.generation_config = DreamGenerationConfig.from_pretrained(path)
    return model
""",
  "generation_utils.py": """
from transformers import GenerationConfig

class DreamGenerationConfig(GenerationConfig):
  pass
""",
  "generation_config.json": "{}",
  "tokenization_dream.py": """
from transformers import Qwen2Tokenizer

class DreamTokenizer(Qwen2Tokenizer):
  pass
""",
}


class Published(NamedTuple):
  """A family's checkpoint as it is published, but tiny."""

  settings: Mapping[str, Any]  # config.json
  stored: Mapping[str, np.ndarray]
  write_tokenizer: Callable[[pathlib.Path], Any]
  files: Mapping[str, str]  # that the model's code needs
  as_causal: Callable[[torch.nn.Module], torch.nn.Module]  # a loaded model -> one of transformers' that computes it


def published_llada():
  about, stored = settings("m2_gqa"), tensors("m2_gqa")
  special = {"<|mdm_mask|>": about["mask_token_id"], "<|endoftext|>": about["eos_token_id"]}
  names = dict(eos_token="<|endoftext|>", pad_token="<|endoftext|>")
  config = model_config_from_hf(about)
  return Published(
    about | {"auto_map": dict(FAMILIES["llada"].code)},
    stored,
    lambda folder: standin.write(folder, special, names, None),
    LLADA_FILES,
    lambda model: as_llama(config, model.state_dict()),
  )


def published_dream():
  # as write_dreams_tokenizer numbers them
  ids = dict(mask_token_id=265, bos_token_id=264, eos_token_id=261, pad_token_id=261)
  about = DREAM | {"vocab_size": 272, "auto_map": dict(FAMILIES["dream"].code)} | ids
  classes = dict(
    tokenizer_class="DreamTokenizer", auto_map={"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
  )
  return Published(
    about,
    random_tensors(model_config_from_hf(about)),
    lambda folder: write_dreams_tokenizer(folder, **classes),
    DREAM_FILES,
    lambda model: model,
  )


def published_of(model_type, **own):
  """A model that transformers has, already with a mask token."""
  ids = dict(mask_token_id=265, eos_token_id=261, pad_token_id=261)  # as write_dreams_tokenizer numbers them
  about = {key: value for key, value in DREAM.items() if key not in ("architectures", "bos_token_id", "use_mrope")}
  about |= {"model_type": model_type, "vocab_size": 272} | ids | own
  stored = random_tensors(model_config_from_hf(about), family_of(about))
  return Published(about, stored, write_dreams_tokenizer, {}, lambda model: model)


LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=16)

PUBLISHED = {
  "llada": published_llada,
  "dream": published_dream,
  "qwen3": lambda: published_of("qwen3", head_dim=8),
  "qwen2": lambda: published_of("qwen2", tie_word_embeddings=True),
  "llama": lambda: published_of("llama", head_dim=10, rope_scaling=LLAMA3),
}


def test_every_family_that_is_exported_is_loaded_here():
  assert PUBLISHED.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_lines_that_an_export_prints_load_it(tmp_path, family):
  published = PUBLISHED[family]()
  source, middle, out = (epath.Path(tmp_path / part) for part in ("hf", "middle", "out"))
  source.mkdir()
  published.write_tokenizer(tmp_path / "hf")
  write_shards(
    source, {name: array.nbytes for name, array in published.stored.items()}, published.stored.items(), 10**9
  )
  (source / "config.json").write_text(json.dumps(published.settings))
  convert_model(source, middle)
  found = export_hf.find_model(middle)
  ModelExport(found, "same").write(out, 10**9)
  names, hub = ", ".join(sorted(published.files)), FAMILIES[family].published_at
  copied = f"# Copy {names} from {hub} on the hub to {out} first\n" in how_to_load(found, out)
  assert copied == bool(published.files)
  for name, text in published.files.items():
    (out / name).write_text(text)
  lines, loaded = textwrap.dedent(how_to_load(found, out)), {}
  assert len([line for line in lines.splitlines() if not line.startswith("#")]) == 3
  assert "Copy" not in lines
  exec(lines, loaded)
  state = loaded["model"].state_dict()
  is_tied = published.settings.get("tie_word_embeddings")
  assert set(state) == set(published.stored) | ({"lm_head.weight"} if is_tied else set())
  for name, array in published.stored.items():
    np.testing.assert_array_equal(state[name].float().numpy(), array.astype(np.float32))
  model, variables = load_converted(middle)
  logits = bidirectional_logits(published.as_causal(loaded["model"]), IDS)
  np.testing.assert_allclose(compiled(model)(variables, IDS), logits, rtol=0, atol=5e-4)
  ours, text = load_tokenizer("huggingface", out), "hello  world 12\n\n"
  assert loaded["tokenizer"](text, add_special_tokens=False)["input_ids"] == ours.encode(text)
  assert loaded["tokenizer"].convert_ids_to_tokens(ours.mask_token_id) in ("<|mdm_mask|>", "<|mask|>")


SMALL = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SMALL |= dict(vocab_size=262, eos_token_id=256, bos_token_id=None, pad_token_id=None)


def autoregressive(kind):
  """A small random model of transformers, with biases and norms that matter."""
  torch.manual_seed(0)
  config = {
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "llama": lambda: transformers.LlamaConfig(**SMALL, head_dim=10, rope_theta=1e4, rope_scaling=LLAMA3),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=None),
  }[kind]()
  model = transformers.AutoModelForCausalLM.from_config(config)
  for name, parameter in model.named_parameters():
    if "norm" in name or "bias" in name:
      torch.nn.init.uniform_(parameter, 0.5, 1.5)
    else:
      torch.nn.init.normal_(parameter, std=0.3)
  return model.eval()


TOKENS = {"<|im_start|>": 257, "<|im_end|>": 256, "<last>": 261}  # the table is full: a mask token needs a row


def check_adaptation(tmp_path, model):
  """Save, adapt, compare under a full and a causal mask, export, and load as transformers loads any model."""
  source, middle, out = tmp_path / "hf", epath.Path(tmp_path / "middle"), epath.Path(tmp_path / "out")
  model.save_pretrained(source)
  standin.write(source, TOKENS, dict(eos_token="<|im_end|>", pad_token="<|im_end|>"), None)
  notes = convert_model(epath.Path(source), middle, asked=Adaptation(is_wanted=True)).notes
  assert notes[0] == "mask token: '<|mask|>', added as id 262"
  ours, variables = load_converted(middle)
  ids = np.random.default_rng(2).integers(0, 262, (2, 40))
  causal = np.tril(np.ones((2, 40, 40), bool))
  run = compiled(ours)
  np.testing.assert_allclose(run(variables, ids)[..., :262], bidirectional_logits(model, ids), rtol=0, atol=5e-4)
  with torch.no_grad():
    wanted = model(torch.tensor(ids)).logits.numpy()
  np.testing.assert_allclose(run(variables, ids, attention_mask=causal)[..., :262], wanted, rtol=0, atol=5e-4)

  ModelExport(export_hf.find_model(middle), "same").write(out, 10**9)
  loaded, about = transformers.AutoModelForCausalLM.from_pretrained(str(out), output_loading_info=True)
  assert not about["missing_keys"]
  assert not about["unexpected_keys"]
  assert not transformers.AutoModel.from_pretrained(str(out), output_loading_info=True)[1]["missing_keys"]
  with torch.no_grad():
    np.testing.assert_array_equal(loaded(torch.tensor(ids)).logits.numpy()[..., :262], wanted)
  ids[:, ::3] = 262  # the mask token, whose row is new
  np.testing.assert_allclose(run(variables, ids), bidirectional_logits(loaded, ids), rtol=0, atol=5e-4)
  tokenizer = transformers.AutoTokenizer.from_pretrained(str(out))
  assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<|mask|>", 262)
  assert tokenizer("ab<|mask|>", add_special_tokens=False)["input_ids"] == load_tokenizer("huggingface", out).encode(
    "ab<|mask|>"
  )


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_an_autoregressive_model_becomes_one_for_diffusion(tmp_path, kind):
  check_adaptation(tmp_path, autoregressive(kind))


def test_peft_puts_our_adapters_on_transformers_models(tmp_path):
  model, lora = autoregressive("qwen3"), LoraConfig(3, 6.0, 0.0, ("all",))
  model.save_pretrained(tmp_path / "hf")
  (source, out), policy = (epath.Path(tmp_path / part) for part in ("hf", "out")), epath.Path(tmp_path / "policy")
  about = json.loads((source / "config.json").read_text()) | {"mask_token_id": 5}
  (source / "config.json").write_text(json.dumps(about))
  convert_model(source, out)
  ours, variables = load_converted(out, lora=lora)
  rng, adapters = np.random.default_rng(0), {}
  for place in layout.adapter_places(ours.config, "qwen3").values():
    *_, name, part = place.path
    shape = (ours.config.num_layers, *place.shape)
    adapters.setdefault(name, {})[part] = rng.normal(size=shape, scale=0.2).astype(np.float32)
  params_lib.save_params(policy, {"blocks": adapters})
  export_adapter(Source(ours.config, "qwen3", None, params_lib.SavedParams(policy)), epath.Path(tmp_path / "adapter"))
  with_adapters = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
  logits = compiled(ours)(variables | {"lora": {"blocks": adapters}}, IDS)
  np.testing.assert_allclose(logits, bidirectional_logits(with_adapters, IDS), rtol=0, atol=5e-4)
  assert np.abs(logits - compiled(ours)(variables, IDS)).max() > 0.1


def test_the_family_that_the_documents_add(tmp_path, monkeypatch):
  text, names = documents.code("extending.md", '"""Mistral'), {}
  assert len(text.splitlines()) <= 40
  exec(text, names)
  monkeypatch.setitem(FAMILIES, "mistral", names["MISTRAL"])
  check_adaptation(tmp_path, autoregressive("mistral"))
