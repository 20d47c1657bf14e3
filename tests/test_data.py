import dataclasses
import functools
import hashlib
import json
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import pytest

from configs import base
from dmpo_jax import data
from dmpo_jax.data import PromptStream, TaskData, prompt_id, prompt_ids
from dmpo_jax.files import Unreadable
from dmpo_jax.hub.tokenizer import Tokenizer, load_tokenizer
from dmpo_jax.structs import Prompts
from dmpo_jax.tasks import sources, user
from dmpo_jax.tasks.countdown import Countdown
from dmpo_jax.tasks.gsm8k import GSM8K
from dmpo_jax.tasks.sudoku import Sudoku

TASK = Sudoku(min_blanks=4, max_blanks=6, demo_patience=11.0)
COUNTDOWN = Countdown(num_numbers=3, max_number=99, demo_wrong=0.5)
SIZES = dict(num_train=30, num_test=7)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
  return load_tokenizer("sentencepiece", base.get_config().tokenizer.path)


@pytest.fixture(scope="module")
def records() -> list[dict]:
  return list(TASK.generate("train", 30, 0))


@pytest.fixture
def stream(records, tokenizer) -> PromptStream:
  return PromptStream(records, TASK, tokenizer, seed=5, max_prompt_length=20)


def puzzles(stream: PromptStream, position: int, n: int) -> list[str]:
  return [record["puzzle"] for record in stream.batch(position, n)[1]]


# Writing and reading records


def test_records_are_written_as_array_record_and_come_back(tmp_path):
  source = TaskData(TASK, "sudoku", records_dir=tmp_path, **SIZES)
  assert source.train() == list(TASK.generate("train", 30, 0))
  assert source.test() == list(TASK.generate("test", 7, 0))
  files = sorted(path.name for path in source.path("train").iterdir())
  assert [name for name in files if "array_record" in name] == [
    "task_records-test.array_record-00000-of-00001",
    "task_records-train.array_record-00000-of-00001",
  ]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["task_records"]  # nothing else is left there


def test_damaged_records_are_one_message_and_are_written_again_once_removed(tmp_path):
  source = TaskData(TASK, "sudoku", records_dir=tmp_path, **SIZES)
  expected = source.train()
  path = source.path("train") / "task_records-train.array_record-00000-of-00001"
  content = bytearray(path.read_bytes())
  places = [place for place, byte in enumerate(content) if byte]  # the others are padding
  content[places[len(places) // 3]] ^= 1
  path.write_bytes(bytes(content))
  with pytest.raises(Unreadable, match=r"cannot be read \(Corrupted .*remove the folder"):
    source.train()
  path.parent.rmtree()
  assert source.train() == expected


def test_prepared_records_are_used_again(tmp_path, monkeypatch):
  first = TaskData(TASK, "sudoku", records_dir=tmp_path, **SIZES).train()
  monkeypatch.setattr(Sudoku, "generate", lambda *_: pytest.fail("generated again"))
  assert TaskData(TASK, "sudoku", records_dir=str(tmp_path), **SIZES).train() == first


def test_nothing_is_said_on_stdout(tmp_path, capsys):
  TaskData(TASK, "sudoku", records_dir=tmp_path, **SIZES).test()
  assert capsys.readouterr().out == ""


def test_other_options_sizes_seeds_and_versions_are_other_folders(tmp_path, monkeypatch):
  def path(task=TASK, name="sudoku", **keywords):
    return TaskData(task, name, records_dir=tmp_path, **(SIZES | keywords)).path("train")

  paths = [
    path(),
    path(dataclasses.replace(TASK, max_blanks=7)),
    path(num_train=31),
    path(num_test=8),
    path(seed=1),
    path(COUNTDOWN, "countdown"),
  ]
  monkeypatch.setattr(Sudoku, "version", "1.0.1")
  paths.append(path())
  assert len(set(paths)) == len(paths)


def test_an_incomplete_folder_is_made_anew(tmp_path):
  source = TaskData(TASK, "sudoku", records_dir=tmp_path, **SIZES)
  expected = source.train()
  for damage in ("task_records-train.array_record-00000-of-00001", "dataset_info.json"):
    (source.path("train") / damage).unlink()
    assert source.train() == expected
  (source.path("train") / "dataset_info.json").write_text('{"name": "task_re')
  assert source.train() == expected


def test_what_a_killed_run_left_is_not_read(tmp_path):
  source = TaskData(TASK, "sudoku", records_dir=tmp_path, **SIZES)
  half = source.path("train").parent / f"incomplete.ABC123_{source.path('train').name}"
  half.mkdir(parents=True)
  (half / "task_records-train.array_record-00000-of-00001").write_bytes(b"half")
  assert source.train() == list(TASK.generate("train", 30, 0))


def test_a_failing_generator_leaves_nothing_to_read(tmp_path, monkeypatch):
  def failing(self, split, num, seed):
    yield {"puzzle": "3102200002100320", "solution": "3142243142131324"}
    raise ValueError(f"task.num_{split}={num}: too many")

  monkeypatch.setattr(Sudoku, "generate", failing)
  source = TaskData(TASK, "sudoku", records_dir=tmp_path, **SIZES)
  with pytest.raises(ValueError, match=r"task.num_train=30: too many"):
    source.train()
  assert not source.path("train").exists()
  assert not list(source.path("train").parent.iterdir())


def test_two_runs_may_prepare_the_same_records(tmp_path, monkeypatch):
  source = TaskData(TASK, "sudoku", records_dir=tmp_path, **SIZES)
  generate = Sudoku.generate

  def overtaken(self, split, num, seed):
    monkeypatch.setattr(Sudoku, "generate", generate)
    TaskData(TASK, "sudoku", records_dir=tmp_path, **SIZES).train()  # another run is done first
    return generate(self, split, num, seed)

  monkeypatch.setattr(Sudoku, "generate", overtaken)
  assert source.train() == list(TASK.generate("train", 30, 0))


def test_processes_wait_for_the_first_and_find_its_records(tmp_path, monkeypatch):
  first = TaskData(TASK, "sudoku", records_dir=tmp_path / "first", **SIZES)
  second = TaskData(TASK, "sudoku", records_dir=tmp_path / "second", **SIZES)
  events = []
  monkeypatch.setattr(jax, "process_count", lambda: 2)

  def meet(name, seconds, note):
    events.append((name, first.path("train").exists()))
    return {}

  monkeypatch.setattr(data, "meet", meet)
  monkeypatch.setattr(jax, "process_index", lambda: 0)
  expected = first.train()
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  assert second.train() == expected  # a disk of its own
  assert first.train() == expected  # a shared one
  names, are_there = zip(*events, strict=True)
  assert names == names[:2] * 3  # wherever a host has them
  assert all(are_there)


def test_streams_of_other_prompts_have_another_digest(records, tokenizer):
  def digest(chosen, **settings):
    own = dict(seed=5, max_prompt_length=20) | settings
    return PromptStream(chosen, TASK, tokenizer, **own).digest()

  assert digest(records) == digest(list(records), seed=6)
  others = [digest(records[:-1]), digest(records[::-1]), digest([*records[1:], records[0]])]
  assert len({digest(records), *others}) == 4


@pytest.mark.parametrize("own", [0, 1])
def test_what_one_host_cannot_write_fails_on_all(tmp_path, monkeypatch, own):
  (tmp_path / "file").write_text("")
  source = TaskData(TASK, "sudoku", records_dir=tmp_path / "file" / "data", **SIZES)
  message = rf"task.records_dir='{tmp_path}/file/data': .*Not a directory.*; set it to a folder that can be written to"
  with pytest.raises(ValueError, match=message):
    source.train()
  good = TaskData(TASK, "sudoku", records_dir=tmp_path, **SIZES)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "process_index", lambda: own)
  monkeypatch.setattr(data, "meet", lambda name, seconds, note: {1 - own: "the other's disk is full"})
  with pytest.raises(ValueError, match=r"^the other's disk is full$"):
    good.train()


def test_object_stores_are_refused():
  source = TaskData(TASK, "sudoku", records_dir="gs://bucket/data", **SIZES)
  with pytest.raises(ValueError, match=r"task.records_dir='gs://bucket/data'.*local or mounted"):
    source.train()


def test_a_published_file_stands_in_for_the_test_split(tmp_path):
  path = tmp_path / "puzzles.csv"
  path.write_text("Puzzle,Solution\n3102200002100320,3142243142131324\n")
  source = TaskData(TASK, "sudoku", records_dir=tmp_path / "data", eval_path=str(path), **SIZES)
  assert source.test() == [{"puzzle": "3102200002100320", "solution": "3142243142131324"}]
  assert not (tmp_path / "data").exists()


def test_neither_writing_nor_reading_imports_tensorflow(tmp_path):
  code = f"""
import sys
from dmpo_jax import data
from dmpo_jax.tasks.sudoku import Sudoku
task = Sudoku(min_blanks=4, max_blanks=6, demo_patience=11.0)
assert len(data.TaskData(task, "sudoku", records_dir={str(tmp_path)!r}, num_train=9, num_test=3).train()) == 9
assert "tensorflow" not in sys.modules
"""
  subprocess.run([sys.executable, "-c", code], check=True)


# The stream


def test_every_epoch_is_another_permutation(stream, records):
  everything = Counter(record["puzzle"] for record in records)
  epochs = [puzzles(stream, 30 * epoch, 30) for epoch in range(4)]
  assert all(Counter(epoch) == everything for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 4
  assert len(stream) == 30


@pytest.mark.parametrize("n", [1, 7, 8, 64])
def test_the_position_is_the_only_state(records, tokenizer, n):
  def fresh():
    return PromptStream(records, TASK, tokenizer, seed=5, max_prompt_length=20)

  whole = puzzles(fresh(), 0, 70)
  pieces = []
  for position in range(0, 70, n):
    pieces += puzzles(fresh(), position, min(n, 70 - position))  # a new stream each time: nothing is carried
  assert pieces == whole


def test_seeds_order_differently_and_share_no_epoch(records, tokenizer):
  orders = {
    tuple(puzzles(PromptStream(records, TASK, tokenizer, seed=seed, max_prompt_length=20), 30 * epoch, 30))
    for seed in range(3)
    for epoch in range(3)
  }
  assert len(orders) == 9


def test_without_a_seed_records_come_in_their_own_order(records, tokenizer):
  stream = PromptStream(records, TASK, tokenizer, seed=None, max_prompt_length=20)
  assert stream.batch(0, len(stream))[1] == records
  assert stream.batch(30, 3)[1] == records[:3]


def test_prompts_are_padded_on_the_left(tokenizer):
  records = [{"numbers": "1,2,3", "target": 6}, {"numbers": "75,30,4", "target": 49}]
  prompts, given = PromptStream(records, COUNTDOWN, tokenizer, seed=None, max_prompt_length=12).batch(0, 2)
  assert given == records
  assert isinstance(prompts, Prompts)
  assert prompts.tokens.dtype == np.int32
  assert prompts.is_valid.dtype == bool
  assert prompts.prompt_id.dtype == np.uint32
  for row, text in enumerate(["1,2,3=6", "75,30,4=49"]):
    ids = tokenizer.encode(text)
    assert prompts.tokens[row].tolist() == [tokenizer.pad_token_id] * (12 - len(ids)) + ids
    assert prompts.is_valid[row].tolist() == [False] * (12 - len(ids)) + [True] * len(ids)


def test_prompt_ids_are_stable(records, tokenizer):
  streams = [
    PromptStream(records, TASK, tokenizer, seed=0, max_prompt_length=18),
    PromptStream(records[::-1], TASK, tokenizer, seed=1, max_prompt_length=20),
  ]
  ids = []
  for stream in streams:
    prompts, given = stream.batch(0, 30)
    ids.append(dict(zip((record["puzzle"] for record in given), prompts.prompt_id.tolist(), strict=True)))
  assert ids[0] == ids[1]
  assert len(set(ids[0].values())) == 30
  assert prompt_id("3102200002100320") == 2350467720  # recorded: noise of saved runs hangs on it


def test_repeats_of_a_prompt_have_ids_of_their_own(stream):
  """In a buffer across two epochs; where the buffer begins in the stream does not matter."""
  prompts, records = stream.batch(25, 40)
  ids = prompts.prompt_id.tolist()
  assert len(set(ids)) == 40
  texts = [TASK.prompt(record) + TASK.prefill for record in records]
  firsts = [row for row, text in enumerate(texts) if text not in texts[:row]]
  assert 25 < len(firsts) < 40
  assert [ids[row] for row in firsts] == [prompt_id(texts[row]) for row in firsts]
  assert prompt_ids(["a", "b", "a", "a"]).tolist() == [prompt_id("a"), prompt_id("b"), *prompt_ids(["a"] * 3)[1:]]


def test_overlong_prompts_are_refused_and_counted(tokenizer):
  records = [
    {"numbers": "1,2,3", "target": 6},
    {"numbers": "75,30,4", "target": 49},
    {"numbers": "7,30,4", "target": 9},
  ]
  with pytest.raises(ValueError, match=r"task.max_prompt_length=7: 2 of 3 .*record 1 \(10\), record 2 \(8\).*to 10"):
    PromptStream(records, COUNTDOWN, tokenizer, seed=0, max_prompt_length=7, overlong="error")


def test_overlong_prompts_are_skipped_and_counted(tokenizer):
  records = [{"numbers": "1,2,3", "target": 6}, {"numbers": "75,30,4", "target": 49}, {"numbers": "7,3,4", "target": 8}]
  stream = PromptStream(records, COUNTDOWN, tokenizer, seed=0, max_prompt_length=7, overlong="skip")
  assert stream.num_skipped == 1
  assert len(stream) == 2
  assert Counter(record["target"] for record in stream.batch(0, 4)[1]) == {6: 2, 8: 2}
  with pytest.raises(ValueError, match="3 of 3 prompts"):
    PromptStream(records, COUNTDOWN, tokenizer, seed=0, max_prompt_length=3, overlong="skip")


def test_many_overlong_prompts_are_not_all_described(records, tokenizer):
  with pytest.raises(ValueError, match=r"30 of 30 prompts.*record 19 \(18\) and 10 more; set it to 18"):
    PromptStream(records, TASK, tokenizer, seed=0, max_prompt_length=8)


def test_a_demonstration_that_is_too_long_is_found_before_work_starts(stream):
  stream.check_demonstrations(16)
  with pytest.raises(ValueError, match=r"sampler.completion_length=15: the demonstration '\d+' has 16 tokens"):
    stream.check_demonstrations(15)


def test_a_demonstration_that_cannot_be_made_is_found_before_work_starts(tokenizer, tmp_path):
  path = tmp_path / "mine.py"
  text = "def records(split): return [{'n': 3}]\ndef prompt(r): return '3'\ndef reward(r, c): return 0\n"
  for body, message in (("1 / 0", r"raised ZeroDivisionError"), ("7", "returned 7, not a text")):
    path.write_text(f"{text}def demonstration(r, rng): return {body}\n")
    user._MODULES.clear()
    task = user.load(str(path), grader="exact")
    stream = PromptStream(task.records("train"), task, tokenizer, seed=0, max_prompt_length=8)
    with pytest.raises(ValueError, match=rf"mine.py': demonstration\(\{{'n': 3\}}\) {message}"):
      stream.check_demonstrations(8)


def test_letters_that_the_tokenizer_lacks_are_named(tokenizer, tmp_path, caplog):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"prompt": "1 \u00fc2", "answer": "3x"}\n')
  task = user.load(str(path), grader="exact")
  stream = PromptStream([{"prompt": "1 \u00fc2", "answer": "3x"}], task, tokenizer, seed=0, max_prompt_length=9)
  assert "the prompts have letters that the tokenizer lacks, as unknown tokens: \u00fc" in caplog.text
  stream.check_demonstrations(8)
  assert "the demonstrations have letters that the tokenizer lacks, as unknown tokens: x" in caplog.text


def test_where_records_are_lacking_is_said(tmp_path):
  for split in ("train", "test"):
    with pytest.raises(ValueError, match=rf"task.num_{split}=0: so many records of sudoku are generated"):
      TaskData(TASK, "sudoku", records_dir=tmp_path, **SIZES | {f"num_{split}": 0}).test()
  rows, code = tmp_path / "rows.jsonl", tmp_path / "mine.py"
  rows.write_text("")
  code.write_text("def records(split): return []\ndef prompt(r): return '3'\ndef reward(r, c): return 0\n")
  for path, hint in (
    (rows, "a tenth of its rows.*give more rows, or a file"),
    (code, r"records\('test'\) returns none"),
  ):
    task = user.load(str(path), grader="exact")
    with pytest.raises(ValueError, match=f"there is no test record in it; {hint}"):
      TaskData(task, str(path), records_dir=tmp_path, num_train=0, num_test=0).test()


def test_no_records_are_refused(tokenizer):
  with pytest.raises(ValueError, match="no records"):
    PromptStream([], TASK, tokenizer, seed=0, max_prompt_length=8)


def test_demonstrations_fit_exactly_or_are_filled_with_eos(stream, tokenizer):
  prompts, completion, records = stream.demonstrations(3, 8, 16)
  longer = stream.demonstrations(3, 8, 20)[1]
  assert completion.dtype == np.int32
  assert completion.shape == (8, 16)
  assert np.array_equal(longer[:, :16], completion)
  assert (longer[:, 16:] == tokenizer.eos_token_id).all()
  assert np.array_equal(prompts.tokens, stream.batch(3, 8)[0].tokens)
  for row, record in enumerate(records):
    text = tokenizer.decode(completion[row].tolist())
    cells = zip(text, record["puzzle"], record["solution"], strict=True)
    assert all(shown == right or (shown == "0" and given == "0") for shown, given, right in cells)


def test_demonstrations_depend_on_the_position_and_not_on_the_batch(stream, records, tokenizer):
  whole = stream.demonstrations(0, 40, 16)[1]
  again = PromptStream(records, TASK, tokenizer, seed=5, max_prompt_length=20).demonstrations(17, 5, 16)[1]
  assert np.array_equal(again, whole[17:22])
  other_seed = PromptStream(records, TASK, tokenizer, seed=6, max_prompt_length=20)
  assert not np.array_equal(other_seed.demonstrations(0, 40, 16)[1], whole)
  epochs = [
    dict(zip(puzzles(stream, start, 30), map(tuple, stream.demonstrations(start, 30, 16)[1].tolist()), strict=True))
    for start in (0, 30)
  ]
  assert epochs[0] != epochs[1]  # the same prompts, demonstrated differently


def test_demonstrations_too_long_are_refused(stream):
  with pytest.raises(ValueError, match=r"sampler.completion_length=12: the demonstration '\d{16}' has 16 tokens"):
    stream.demonstrations(0, 1, 12)


def test_records_stay_json(records):
  assert json.loads(json.dumps(records)) == records


# Hosts, overlong prompts that are cut, published files


def test_no_batch_waits_for_the_tokenizer_or_for_another_host(stream, monkeypatch):
  whole, records = stream.batch(17, 13)
  monkeypatch.setattr(stream, "_encode", None)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  prompts, again = stream.batch(17, 13)
  assert again == records
  jax.tree.map(np.testing.assert_array_equal, prompts, whole)


class Chat:
  """A tokenizer of characters with a header and a footer around the user's turn."""

  vocab_size = 256
  pad_token_id = bos_token_id = 0
  eos_token_id = eot_token_id = mask_token_id = 4
  end_token_ids = (4,)

  def encode(self, text):
    return list(map(ord, text))

  def encode_prompt(self, prompt, prefill=""):
    return [1, *(id for _, text in prompt for id in (2, *map(ord, text), 3)), *map(ord, prefill)]

  def encode_answer(self, prompt, answer, prefill=""):
    return self.encode(answer)

  def lacking(self, text):
    return ""

  def decode(self, ids):
    return "".join(map(chr, ids))

  def piece(self, token_id):
    return chr(token_id)


def test_the_users_turn_is_cut_inside_the_chat():
  records = [{"numbers": "1,2,3", "target": 6}, {"numbers": "75,30,4", "target": 49}]
  stream = PromptStream(records, COUNTDOWN, Chat(), seed=None, max_prompt_length=10, overlong="cut_user")
  assert (stream.num_cut, stream.num_skipped, len(stream)) == (1, 0, 2)
  prompts, _ = stream.batch(0, 2)
  assert prompts.tokens[0].tolist() == [1, 2, *map(ord, "1,2,3=6"), 3]
  assert prompts.tokens[1].tolist() == [1, 2, *map(ord, "30,4=49"), 3]
  assert prompts.prompt_id[1] == prompt_id("75,30,4=49")
  with pytest.raises(ValueError, match="even without its last turn, the chat has more tokens"):
    PromptStream(records, COUNTDOWN, Chat(), seed=None, max_prompt_length=2, overlong="cut_user")


CONVERSATIONS = user.JsonlTask("rows.jsonl", "exact")
SYSTEM, USER = {"role": "system", "content": "Hi"}, {"role": "user", "content": "1,2=3"}


def test_a_conversation_is_a_prompt_with_an_identity_of_its_own():
  rows = [{"messages": [SYSTEM, USER]}, {"messages": [USER]}, {"prompt": "1,2=3"}]
  prompts, records = PromptStream(rows, CONVERSATIONS, Chat(), seed=None, max_prompt_length=12).batch(0, 3)
  assert records == rows
  assert prompts.tokens[0].tolist() == [1, 2, *map(ord, "Hi"), 3, 2, *map(ord, "1,2=3"), 3]
  assert prompts.tokens[1].tolist() == prompts.tokens[2].tolist()
  first, one, again = map(int, prompts.prompt_id)
  assert one == prompt_id("1,2=3")  # as before there were conversations
  assert (first, again) == (prompt_id("system: Hi\n\nuser: 1,2=3"), prompt_id(f"{one} 1"))
  cut = PromptStream(rows[:1], CONVERSATIONS, Chat(), seed=None, max_prompt_length=9, overlong="cut_user")
  assert cut.batch(0, 1)[0].tokens[0].tolist() == [1, 2, *map(ord, "Hi"), 3, 2, *map(ord, "=3"), 3]


def test_a_conversation_needs_a_chat_template(tokenizer):
  make = functools.partial(PromptStream, task=CONVERSATIONS, tokenizer=tokenizer, seed=None, max_prompt_length=9)
  with pytest.raises(ValueError, match=r"a conversation needs a chat template \(tokenizer.is_chat=True\)"):
    make([{"messages": [SYSTEM, USER]}])
  prompts, _ = make([{"messages": [USER]}]).batch(0, 1)
  ids = tokenizer.encode("1,2=3")
  assert prompts.tokens[0, -len(ids) :].tolist() == ids


@pytest.fixture
def gsm8k(tmp_path, monkeypatch):
  """A folder with a published file of three problems, and the task that takes it for the real one."""
  rows = [{"question": f"What is {n} + 1?", "answer": f"So {n + 1}.\n#### {n + 1}"} for n in range(3)]
  content = "".join(json.dumps(row) + "\n" for row in rows).encode()
  folder = tmp_path / "published"
  folder.mkdir()
  (folder / "gsm8k_test.jsonl").write_bytes(content)
  source = sources.Source("gsm8k_test.jsonl", "http://127.0.0.1:9/test.jsonl", (hashlib.sha256(content).hexdigest(),))
  monkeypatch.setattr(
    GSM8K, "SOURCES", {"test": source, "train": dataclasses.replace(source, name="gsm8k_train.jsonl")}
  )
  return folder


def test_a_published_file_becomes_records_once(gsm8k, tmp_path):
  def read(num_test=0):
    keywords = dict(records_dir=tmp_path / "records", num_train=0, num_test=num_test, data_dir=str(gsm8k))
    return TaskData(GSM8K(), "gsm8k", **keywords)

  records = read().test()
  assert [record["answer"] for record in records] == ["1", "2", "3"]
  (gsm8k / "gsm8k_test.jsonl").unlink()
  assert read(2).test() == records[:2]
  assert read(4).test() == records
  with pytest.raises(ValueError, match=r"no gsm8k_train.jsonl in it; get http"):
    read().train()


def test_an_altered_published_file_leaves_nothing(gsm8k, tmp_path):
  path = gsm8k / "gsm8k_test.jsonl"
  path.write_bytes(path.read_bytes()[:-3])
  source = TaskData(GSM8K(), "gsm8k", records_dir=tmp_path / "records", num_train=0, num_test=0, data_dir=str(gsm8k))
  with pytest.raises(ValueError, match="partial or altered"):
    source.test()
  assert not source.path("test").exists()


def test_a_data_sets_long_demonstrations_lose_their_end(gsm8k, tmp_path, tokenizer):
  source = TaskData(GSM8K(), "gsm8k", records_dir=tmp_path / "records", num_train=0, num_test=0, data_dir=str(gsm8k))
  stream = PromptStream(source.test(), GSM8K(), tokenizer, seed=0, max_prompt_length=400)
  _, completion, _ = stream.demonstrations(0, 3, 8)
  assert completion.shape == (3, 8)


def test_long_demonstrations_are_counted_before_work_starts(tmp_path, caplog):
  answers = ("yes", "no, never", "not at all")
  rows = [{"messages": [USER, {"role": "assistant", "content": text}]} for text in answers]
  (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  task = user.JsonlTask(str(tmp_path / "chats.jsonl"), "exact")
  records = task.read_published(tmp_path / "chats.jsonl")
  stream = PromptStream(records, task, Chat(), seed=None, max_prompt_length=9)
  stream.check_demonstrations(4)
  assert "sampler.completion_length=4: 2 of 3 demonstrations are longer, by up to 6 tokens" in caplog.text
  prompts, completion, _ = stream.demonstrations(0, 3, 4)
  assert completion.tolist() == [[*map(ord, "yes"), 4], [*map(ord, "no, ")], [*map(ord, "not ")]]
  assert prompts.tokens[0, -7:].tolist() == [2, *map(ord, "1,2=3"), 3]


def test_a_curriculum_sorts_the_first_prompts_and_no_others(tokenizer, records):
  def stream(curriculum):
    return PromptStream(records, TASK, tokenizer, seed=5, max_prompt_length=20, curriculum=curriculum)

  def of(stream, position, n):
    return [record["puzzle"] for record in stream.batch(position, n)[1]]

  num = len(records) + 3  # beyond the first epoch
  plain, sorted_first = of(stream(0), 0, num + 20), of(stream(num), 0, num + 20)
  assert sorted_first[:num] == sorted(plain[:num], key=lambda puzzle: puzzle.count("0"))
  assert sorted_first[num:] == plain[num:]
  assert of(stream(num), num - 2, 5) == sorted_first[num - 2 : num + 3]  # by position alone
