"""Tokenizers of Hugging Face's layout: ids, chat templates, and special ids that are not the model's."""

import gzip
import json
import pathlib

import jinja2
import pytest
import standin_tokenizer as standin
from tokenizers import pre_tokenizers

from dmpo_jax.hub import chat
from dmpo_jax.hub.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from dmpo_jax.messages import Turn

MODEL = dict(mask_token_id=126336, eos_token_id=126081, pad_token_id=126081, vocab_size=126464)
DREAM_MODEL = dict(MODEL, mask_token_id=151666, eos_token_id=151643, pad_token_id=151643, vocab_size=152064)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return standin.write(tmp_path_factory.mktemp("llada"), model_config=MODEL)


@pytest.fixture(scope="module")
def tokenizer(folder):
  return load_tokenizer("huggingface", folder, is_chat=True)


def copy(folder, path, *, settings=None, model=None):
  """The folder with other settings and model's config."""
  path.mkdir()
  for file in folder.iterdir():
    (path / file.name).write_bytes(file.read_bytes())
  if settings is not None:
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
  if model is not None:
    (path / "config.json").write_text(json.dumps(model))
  return path


def test_interface_and_special_ids(tokenizer):
  assert isinstance(tokenizer, Tokenizer)
  assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (126080, 126081, 126081)
  assert (tokenizer.mask_token_id, tokenizer.eot_token_id, tokenizer.vocab_size) == (126336, 126348, 126349)


def test_a_prompt_is_a_conversation_whose_answer_begins(tokenizer):
  def header(role):
    return [126346, *tokenizer.encode(role), 126347, *tokenizer.encode("\n\n")]

  wanted = [126080, *header("user"), *tokenizer.encode("Wer da?"), 126348, *header("assistant")]
  assert tokenizer.encode_prompt("  Wer da?\n") == wanted
  assert tokenizer.encode_prompt([Turn("user", "Wer da?")]) == wanted
  assert tokenizer.encode_prompt("Wer da?", "<reasoning>") == wanted + tokenizer.encode("<reasoning>")
  said = [126080, *header("system"), *tokenizer.encode("Kurz."), 126348, *wanted[1:]]
  assert tokenizer.encode_prompt([Turn("system", "Kurz."), Turn("user", "Wer da?")]) == said


def test_an_answer_is_what_the_template_puts_behind_its_prompt(tokenizer, tmp_path):
  ids = tokenizer.encode("Ich.")
  assert tokenizer.encode_answer("Wer da?", " Ich.\n") == [*ids, 126348]  # as the template trims it
  assert tokenizer.encode_answer([Turn("system", "Kurz."), Turn("user", "Wer da?")], "Ich.") == [*ids, 126348]
  assert tokenizer.encode_answer("Wer da?", "ch.", "I") == [*tokenizer.encode("ch."), 126348]
  # a template that renders an answered prompt otherwise, and one whose turns end with EOS, which is not in the answer
  odd = "{{ messages | length }}" + standin.LLADA_TEMPLATE
  ended = standin.LLADA_TEMPLATE.replace("<|eot_id|>", "<|endoftext|>\n")
  for name, template, end in (("odd", odd, [126348]), ("ended", ended, [])):
    path = standin.write(tmp_path / name, template=template, model_config=MODEL)
    assert HuggingFaceTokenizer(path, is_chat=True).encode_answer("Wer da?", "Ich.") == ids + end
  assert HuggingFaceTokenizer(path, is_chat=False).encode_answer("Wer da?", " Ich.") == tokenizer.encode(" Ich.")


def test_text_comes_back(tokenizer):
  for text in ("", "a b\n\nc", "żółć, 1 + 1 = 2 ✓", " leading"):
    assert tokenizer.decode(tokenizer.encode(text)) == text
  one, two = tokenizer.encode("1")[0], tokenizer.encode("2")[0]
  assert tokenizer.decode([one, 126336, 126080, two]) == "12"
  assert tokenizer.decode([one, 126348, two, 126081, two]) == "1"
  assert tokenizer.decode([one, 126081, two, 126348, two]) == "1"


def test_pieces_are_texts_and_names(tokenizer):
  text = " one, 12"
  assert "".join(map(tokenizer.piece, tokenizer.encode(text))) == text
  assert tokenizer.piece(126348) == "<|eot_id|>"
  assert "\ufffd" in tokenizer.piece(tokenizer.encode("✓")[0])
  assert tokenizer.piece(126400) == ""


def test_plain_text_where_no_chat_is_asked_for(folder):
  tokenizer = load_tokenizer("huggingface", folder, is_chat=False)
  assert tokenizer.encode_prompt("2 + 2 =", " ") == tokenizer.encode("2 + 2 = ")
  assert tokenizer.eot_token_id == tokenizer.eos_token_id


def test_the_second_family(tmp_path):
  standin.write(tmp_path / "dream", standin.DREAM, standin.DREAM_CONFIG, standin.DREAM_TEMPLATE, DREAM_MODEL)
  tokenizer = load_tokenizer("huggingface", tmp_path / "dream", is_chat=True)
  assert (tokenizer.mask_token_id, tokenizer.eot_token_id, tokenizer.pad_token_id) == (151666, 151645, 151643)
  ids = tokenizer.encode_prompt("hi")
  assert ids[0] == 151644
  assert tokenizer.decode(ids[1:]) == "user\nhi"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(mask_token_id=126335), None),  # <unused>, yet an id: nothing contradicts it
    (dict(eos_token_id=126082), r"eos_token_id=126082, but the eos token '<\|endoftext\|>' is 126081"),
    (dict(pad_token_id=0), "pad_token_id=0, but the pad token"),
    (dict(bos_token_id=5), "bos_token_id=5, but the bos token"),
    (dict(eot_token_id=5), r"eot_token_id=5, but the eot token '<\|eot_id\|>' is 126348"),
    (dict(mask_token_id=126400), "mask_token_id=126400, which is no token"),
    (dict(mask_token_id=None), "there is no mask token"),
    (dict(eos_token_id=[126348, 126080]), "eos_token_id=126348, but the eos token '<|endoftext|>' is 126081"),
    (
      dict(eos_token_id=[126081, 126400, "x"]),
      r"config.json has \[126400, 'x'\] in eos_token_id=\[126081, 126400, 'x'\]",
    ),
    (dict(pad_token_id=[1]), r"pad_token_id=\[1\], where one id is needed"),
    (dict(mask_token_id=126335, vocab_size=None), None),  # nothing either
    (dict(vocab_size=126000), "vocab_size=126000, but there are 126349 tokens"),
  ],
)
def test_special_ids_are_checked_against_the_model(folder, tmp_path, change, message):
  path = copy(folder, tmp_path / "other", model=MODEL | change)
  if message is None:
    assert HuggingFaceTokenizer(path, is_chat=True).mask_token_id == 126335
    return
  with pytest.raises(ValueError, match=message):
    HuggingFaceTokenizer(path, is_chat=True)


def test_every_listed_eos_ends_a_completion(folder, tmp_path):
  """Those of config.json and of generation_config.json, beside the tokenizer's own, which fills up."""
  path = copy(folder, tmp_path / "listed", model=MODEL | dict(eos_token_id=[126348, 126081]))
  (path / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[126081, 126080], temperature=0.6)))
  tokenizer = HuggingFaceTokenizer(path, is_chat=False)
  assert (tokenizer.eos_token_id, tokenizer.eot_token_id) == (126081, 126081)
  assert tokenizer.end_token_ids == (126081, 126348, 126080)
  for end in tokenizer.end_token_ids:
    assert tokenizer.decode([*tokenizer.encode("ja"), end, *tokenizer.encode("nein")]) == "ja"
  (path / "generation_config.json").write_text(json.dumps(dict(eos_token_id=126080)))
  assert HuggingFaceTokenizer(path, is_chat=False).end_token_ids == (126081, 126348, 126080)
  (path / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[126081, 200_000])))
  with pytest.raises(ValueError, match=r"generation_config.json has \[200000\] in eos_token_id"):
    HuggingFaceTokenizer(path, is_chat=False)


PUBLISHED = json.loads(
  gzip.decompress((pathlib.Path(__file__).parent / "goldens/chats/published.json.gz").read_bytes())
)


@pytest.mark.parametrize("name", PUBLISHED["models"])
def test_published_templates_render_as_by_transformers(name):
  """With and without the header of an answer, and SDAR's with each value of its switch."""
  own, templates = PUBLISHED["models"][name], {}
  for case in own["renderings"]:
    switch = case.get("enable_thinking")
    if switch not in templates:
      templates[switch] = chat.Template(
        own["template"], own["special"], {} if switch is None else {"enable_thinking": switch}
      )
    turns = [Turn(turn["role"], turn["content"]) for turn in PUBLISHED["conversations"][case["conversation"]]]
    assert templates[switch].render(turns, is_answering=case["add_generation_prompt"]) == case["text"], case


def test_a_switch_reaches_prompts_and_must_be_the_templates(folder, tmp_path):
  path = copy(folder, tmp_path / "switch")
  template = "{{ messages[0].content }}|{{ '' if enable_thinking else '<no>' }}"
  (path / "chat_template.jinja").write_text(template)
  for switches, text in (({}, "x|<no>"), ({"enable_thinking": True}, "x|")):
    tokenizer = load_tokenizer("huggingface", path, is_chat=True, switches=switches)
    assert tokenizer.encode_prompt("x") == tokenizer.encode(text)
  with pytest.raises(ValueError, match=r"chat_template_kwargs: 'think' is no switch of .* reads enable_thinking"):
    load_tokenizer("huggingface", path, is_chat=True, switches={"think": True})
  with pytest.raises(ValueError, match="'think' is no switch of the chat template, which has no switches"):
    load_tokenizer("huggingface", folder, is_chat=True, switches={"think": True})


def test_settings_and_properties_of_tokens(folder, tmp_path):
  """add_bos_token ends like a token's name and is none; a token may come with its properties."""
  settings = standin.LLADA_CONFIG | {"add_bos_token": True, "add_eos_token": 3, "sep_token": {"content": None}}
  settings["bos_token"] = {"content": settings["bos_token"], "lstrip": False}
  path = copy(folder, tmp_path / "settings", settings=settings | {"chat_template": standin.LLADA_TEMPLATE})
  assert HuggingFaceTokenizer(path, is_chat=True).encode_prompt("x")[0] == 126080


def test_unusable_folders_are_refused(folder, tmp_path):
  with pytest.raises(ValueError, match=r"tokenizer.path=.*no tokenizer.json there"):
    load_tokenizer("huggingface", tmp_path)
  broken = copy(folder, tmp_path / "broken")
  (broken / "tokenizer.json").write_text("{")
  with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer"):
    load_tokenizer("huggingface", broken)
  plain = copy(folder, tmp_path / "plain", settings=standin.LLADA_CONFIG)
  with pytest.raises(ValueError, match=r"no chat template: set tokenizer.is_chat=False"):
    load_tokenizer("huggingface", plain, is_chat=True)
  bad = copy(folder, tmp_path / "bad", settings=standin.LLADA_CONFIG | {"chat_template": "{% for %}"})
  with pytest.raises(ValueError, match="the chat template is invalid"):
    load_tokenizer("huggingface", bad, is_chat=True)
  with pytest.raises(ValueError, match="sentencepiece model has no chat template"):
    load_tokenizer("sentencepiece", "x", is_chat=True)


def test_templates_are_found_in_all_their_places(folder, tmp_path):
  named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
  assert chat.find_template(tmp_path / "none", {"chat_template": named}) == "yes"
  (tmp_path / "chat_template.jinja").write_text("file")
  assert chat.find_template(tmp_path / "chat_template.jinja", {"chat_template": "config"}) == "file"
  listed = standin.LLADA_CONFIG | {"chat_template": [{"name": "default", "template": standin.LLADA_TEMPLATE}]}
  tokenizer = HuggingFaceTokenizer(copy(folder, tmp_path / "listed", settings=listed), is_chat=True)
  assert tokenizer.eot_token_id == 126348


def test_templates_have_what_transformers_gives_them():
  source = """{% for message in messages %}
  {% if message.role == 'system' %}{% continue %}{% endif %}
{% generation %}{{ message.content }}{% endgeneration %}
{% endfor %}{{ bos_token }}{{ {'a': 'é<'} | tojson }}{{ strftime_now('%Y')[:1] }}"""
  template = chat.Template(source, {"bos_token": "<s>"})
  assert template.render([Turn("system", "no"), Turn("user", "yes")]) == 'yes<s>{"a": "é<"}2'


def test_templates_are_sandboxed_and_may_refuse():
  with pytest.raises(ValueError, match=r"refuses the conversation.*unsafe"):
    chat.Template("{{ messages.__class__.__mro__ }}{{ ''.__class__.mro() }}", {}).render([Turn("user", "x")])
  with pytest.raises(ValueError, match=r"refuses the conversation.*only users"):
    chat.Template("{{ raise_exception('only users') }}", {}).render([Turn("user", "x")])
  with pytest.raises(jinja2.TemplateError):
    chat.Template("{{", {})


def test_dreams_files_make_a_tokenizer(tmp_path):
  """Dream has Qwen2's vocab.json and merges.txt, and its special tokens in tokenizer_config.json alone."""
  alphabet = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
  vocab = alphabet | {"he": 256, "hel": 257, "Ġw": 258}
  (tmp_path / "vocab.json").write_text(json.dumps(vocab))
  (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\nhe l\nĠ w\n")
  properties = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
  special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
  added = {str(259 + i): {"content": token} | properties for i, token in enumerate(special)}
  settings = standin.DREAM_CONFIG | {"chat_template": standin.DREAM_TEMPLATE, "added_tokens_decoder": added}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  model = dict(model_type="Dream", bos_token_id=259, eos_token_id=259, pad_token_id=259, mask_token_id=263)
  (tmp_path / "config.json").write_text(json.dumps(model))
  tokenizer = load_tokenizer("huggingface", tmp_path, is_chat=True)
  assert (tokenizer.mask_token_id, tokenizer.eot_token_id, tokenizer.bos_token_id) == (263, 261, 262)
  assert tokenizer.encode("hello w12") == [257, vocab["l"], vocab["o"], 258, vocab["1"], vocab["2"]]
  assert tokenizer.decode(tokenizer.encode("hello wörld 12\n\n x")) == "hello wörld 12\n\n x"
  assert tokenizer.encode_prompt("w")[:1] == [260]
  settings["added_tokens_decoder"] = {"270": added["259"]}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  with pytest.raises(ValueError, match="does not get its id 270"):
    load_tokenizer("huggingface", tmp_path)
