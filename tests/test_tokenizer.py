import json

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import base
from dmpo_jax.hub.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from dmpo_jax.tasks import TASKS
from launch import train_tokenizer

CONFIG = base.get_config()
ALPHABET = "()*+,-/0123456789="


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
  return load_tokenizer("sentencepiece", CONFIG.tokenizer.path)


def test_interface_and_special_ids(tokenizer):
  assert isinstance(tokenizer, Tokenizer)
  specials = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id)
  assert specials == (0, 1, 2, 4)
  assert tokenizer.vocab_size == 5 + len(ALPHABET)


def test_the_command_makes_the_file_in_the_repository():
  assert train_tokenizer.find_alphabet(num_records=100) == ALPHABET
  with open(CONFIG.tokenizer.path, "rb") as file:
    assert file.read() == train_tokenizer.train_model(ALPHABET)


def test_letters_that_no_token_stands_for(tokenizer):
  assert tokenizer.lacking("1 + \u00e9a1\n=") == "a\u00e9"


def test_pieces_are_texts_and_names(tokenizer):
  assert [tokenizer.piece(i) for i in (*tokenizer.encode("(1"), tokenizer.eos_token_id)] == ["(", "1", "</s>"]


def test_every_character_is_a_token_in_the_order_of_code_points(tokenizer):
  assert [tokenizer.encode(character) for character in ALPHABET] == [[5 + i] for i in range(len(ALPHABET))]


@given(st.text(alphabet=ALPHABET, max_size=40))
@settings(max_examples=100, deadline=None)
def test_encoding_is_a_token_a_character_and_comes_back(text):
  tokenizer = load_tokenizer("sentencepiece", CONFIG.tokenizer.path)
  ids = tokenizer.encode(text)
  assert len(ids) == len(text)
  assert tokenizer.decode(ids) == text


def test_all_task_text_is_known(tokenizer):
  rng = np.random.default_rng(0)
  for name in ("sudoku", "countdown"):
    task = TASKS[name](**CONFIG.task[name])
    for record in task.generate("test", 30, 0):
      for text in (task.prompt(record), task.demonstration(record, rng)):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert "?" not in text


def test_decoding_stops_at_the_first_eos_and_drops_specials(tokenizer):
  pad, bos, eos, mask = 0, 1, 2, 4
  one, two = tokenizer.encode("1")[0], tokenizer.encode("2")[0]
  assert tokenizer.decode([one, two, eos, one, eos]) == "12"
  assert tokenizer.decode([bos, one, mask, pad, two]) == "12"
  assert tokenizer.decode([eos, one]) == ""
  assert tokenizer.decode([]) == ""
  assert tokenizer.decode(np.array([one, two, eos], np.int32).tolist()) == "12"


def test_text_cannot_name_special_tokens(tokenizer):
  ids = set(tokenizer.encode("<mask></s><pad><s>1"))
  assert not ids & {0, 1, 2, 4}


def test_unknown_characters_keep_their_place(tokenizer):
  assert tokenizer.decode(tokenizer.encode("1x2 3")) == "1?2?3"


def test_unusable_files_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"tokenizer.path=.*no such file"):
    SentencePieceTokenizer(tmp_path / "nothing.model")
  path = tmp_path / "text.model"
  path.write_text("not a model")
  with pytest.raises(ValueError, match=r"tokenizer.path=.*not a sentencepiece model"):
    SentencePieceTokenizer(path)
  plain = tmp_path / "plain"
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["0123"]), model_prefix=str(plain), model_type="char", vocab_size=8, minloglevel=2
  )
  with pytest.raises(ValueError, match=r"must have the pieces <pad>"):
    SentencePieceTokenizer(f"{plain}.model")


def test_unknown_kind_is_refused():
  with pytest.raises(ValueError, match=r"tokenizer.name='wordpiece'.*sentencepiece"):
    load_tokenizer("wordpiece", "x")


def test_subwords_from_text_keep_tags_and_new_lines(tmp_path):
  rows = [{"question": f"What is {n} plus {n}?\nSay it.", "answer": f"It is {2 * n}."} for n in range(300)]
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  model = tmp_path / "subwords.model"
  model.write_bytes(train_tokenizer.train_subwords(train_tokenizer.read_sentences(path), vocab_size=310))
  tokenizer = load_tokenizer("sentencepiece", model, is_chat=False)
  text = "<reasoning>\nWhat is 12?\n</reasoning>\n<answer>\n24 \u20ac\n</answer>"
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert len(ids) < len(text)
  assert len(tokenizer.encode("<answer>")) == 1
