"""Completions of a person's own prompts: how prompts are read, decoded, described and watched."""

import io
import re

import jax
import numpy as np
import pytest
import tiny
from absl import flags
from absl.testing import flagsaver
from etils import epath
from rich.console import Console, Group

from dmpo_jax import build, main, policy, sample
from dmpo_jax.config import ConfigError
from dmpo_jax.policy import Policies
from dmpo_jax.run import grids, watch
from dmpo_jax.run import params as params_lib
from dmpo_jax.sample import Request


@pytest.mark.parametrize(
  ("text", "requests"),
  [
    ("1234\n\n  4321\n", [Request("1234"), Request("  4321")]),
    ('{"prompt": "1", "prefill": "2"}\n3\n', [Request("1", "2"), Request("3")]),
    ('{"messages": [{"role": "user", "content": "1"}]}', [Request([{"role": "user", "content": "1"}])]),
  ],
)
def test_prompts_by_a_pipe(monkeypatch, text, requests):
  monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
  assert sample.read_requests(None, None) == requests


def test_prompts_of_a_file_and_of_the_command_line(tmp_path):
  path = tmp_path / "prompts.jsonl"
  path.write_text('{"prompt": "1"}\n{"prompt": "2", "other": 3}\n')
  assert sample.read_requests(None, str(path)) == [Request("1"), Request("2")]
  assert sample.read_requests("two\nlines", None) == [Request("two\nlines")]


def test_a_request_is_given_back_under_its_own_key():
  messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1"}]
  assert Request("1", "2").given == {"prompt": "1"}
  assert Request(messages).given == {"messages": messages}
  assert Request(messages).turns == [("system", "be brief"), ("user", "1")]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "holds no prompt"),
    ("plain\n", "line 1: not JSON"),
    ('{"prompt": "1"}\n\n{"question": "2"}', 'line 3: must be an object with a text "prompt"'),
    ('{"prompt": "1", "prefill": 2}', '"prefill" must be a text'),
    ('{"prompt": "1", "messages": []}', 'line 1: give "prompt" or "messages", not both'),
    ('{"messages": [{"role": "bot", "content": "1"}]}', "line 1: messages[0] must have a role"),
    ('{"prompt": "1"}\n{"prompt": " "}', 'line 2: the "prompt" is empty'),
  ],
)
def test_a_bad_file_is_refused_by_its_line(tmp_path, text, message):
  path = tmp_path / "prompts.jsonl"
  path.write_text(text)
  with pytest.raises(ConfigError) as error:
    sample.read_requests(None, str(path))
  assert message in str(error.value)
  assert str(path) in str(error.value)


def test_nothing_to_read_is_refused(monkeypatch):
  monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
  for prompt, path, message in (
    (None, None, "standard input: holds no prompt"),
    ("1", "file", "not both"),
    (None, "absent.jsonl", "--prompts=absent.jsonl: no such file"),
  ):
    with pytest.raises(ConfigError, match=message):
      sample.read_requests(prompt, path)


@pytest.fixture(scope="module")
def decoded():
  """What a random model makes of prompts of two buckets, one of them twice, in one batch and one by one, and a film."""
  config = tiny.config(eval__temperature=1.0)
  parts = build.build_model_parts(config)
  requests = [Request("12341234"), Request("4"), Request("1" * 70, prefill="2"), Request("12341234")]
  shown = io.StringIO()
  with pytest.MonkeyPatch.context() as patch, jax.set_mesh(parts.mesh):
    policies = Policies(policy.initial_params(config, parts), {})
    together = list(sample.decode(config, parts, policies, requests))
    console = Console(file=shown, force_terminal=True, width=100, height=40)
    patch.setattr(watch, "Console", lambda **own: console)
    patch.setattr(watch, "SECONDS_A_CALL", 0.0)
    config.eval.batch_size = 1
    apart = list(sample.decode(config, parts, policies, requests, watch=True))
  return parts.tokenizer, requests, together, apart, shown.getvalue()


def test_completions_do_not_depend_on_their_batch_or_bucket(decoded):
  tokenizer, requests, together, apart, _ = decoded
  assert [request for request, _ in together] == requests
  for (_, one), (_, other) in zip(together, apart, strict=True):
    assert {key: one[key] for key in ("ids", "text", "calls")} == {key: other[key] for key in ("ids", "text", "calls")}
  assert len({tuple(found["ids"]) for _, found in together}) == 4
  for _, found in together:
    assert tokenizer.eos_token_id not in found["ids"][:-1]
    assert found["text"] == tokenizer.decode(found["ids"])
    assert 1 <= found["calls"] <= 4
    assert 0 < found["confidence"] < 1
    assert found["tokens_per_second"] > 0


def test_watching_shows_the_denoising(decoded):
  tokenizer, *_, apart, shown = decoded
  assert watch.MASKED in shown
  assert "call 1, with confidence: " in shown
  plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
  for _, found in apart:
    ends = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    pieces = [watch.ENDED if token in ends else tokenizer.piece(token) for token in found["ids"]]
    assert "".join(pieces) in plain
    assert re.search(rf"call {found['calls']}[,:] ", plain)


def test_a_frame_names_the_new_tokens_with_their_confidence(decoded):
  tokenizer = decoded[0]
  mask, (one, two, three) = tokenizer.mask_token_id, tokenizer.encode("123")
  watcher = watch.Watcher(tokenizer, Console(file=io.StringIO(), width=100))

  def draw(ids, num_calls, confidence):
    frame = watch.Frame(np.array([ids]), np.array([num_calls]), np.array([confidence]))
    (group,) = watcher.draw(frame).renderables
    return group.renderables

  row, said = draw([one, mask, mask, three], 1, [0.5, 0, 0, 0.25])
  assert row.plain == "1" + 2 * watch.MASKED + "3"
  assert said.plain == "call 1, with confidence: '1' 0.50, '3' 0.25"
  row, said = draw([one, two, tokenizer.eos_token_id, three], 2, [0.5, 1.0, 0.75, 0.25])
  assert row.plain == f"12{watch.ENDED}3"
  assert said.plain == f"call 2, with confidence: '2' 1.00, '{watch.ENDED}' 0.75"
  assert [span.style.reverse for span in row.spans] == [False, True, True, False]
  assert row.spans[0].style.color != row.spans[1].style.color


def test_a_file_gets_the_last_frame_as_whole_lines(decoded):
  tokenizer, output = decoded[0], io.StringIO()
  (one,) = tokenizer.encode("1")
  watcher = watch.Watcher(tokenizer, Console(file=output, width=100))
  with watcher.watching([None]):
    watcher(1, np.array([[one, tokenizer.mask_token_id]]), np.array([1]), np.array([[0.5, 0.0]]))
  assert output.getvalue() == f"1{watch.MASKED}\ncall 1, with confidence: '1' 0.50\n"


def test_a_sudoku_is_watched_as_its_grid(decoded):
  tokenizer = decoded[0]
  watcher = watch.Watcher(tokenizer, Console(file=io.StringIO(), width=100))
  cells = [tokenizer.mask_token_id] * 16
  cells[1], cells[2] = tokenizer.encode("44")
  with watcher.watching([grids.Grid("1430000041203004")]):
    frame = watch.Frame(np.array([cells]), np.array([1]), np.array([[0.5] * 16]))
    (group,) = watcher.draw(frame).renderables
  grid, said = group.renderables
  blank = watch.MASKED
  assert grid.plain.splitlines() == [
    f" 1 4 \u2502 4 {blank}",
    f" {blank} {blank} \u2502 {blank} {blank}",
    "\u2500" * 5 + "\u253c" + "\u2500" * 5,
    f" 4 1 \u2502 2 {blank}",
    f" 3 {blank} \u2502 {blank} 4",
  ]
  assert said.plain == "call 1, with confidence: '4' 0.50, '4' 0.50"
  cells = [span for span in grid.spans if span.style != "dim"]
  is_red = [span.style.color is not None and span.style.color.name == "red" for span in cells]
  assert [index for index, red in enumerate(is_red) if red] == [1, 2]  # one 4 too many


def test_calls_that_come_late_are_not_shown(decoded):
  tokenizer = decoded[0]
  watcher = watch.Watcher(tokenizer, Console(file=io.StringIO(), width=100))
  drawn = []
  watcher.draw = lambda frame: drawn.append(int(frame.completion[0, 0])) or Group()
  with watcher.watching([None]):
    for number in (0, 2, 1, 3):
      watcher(number, np.array([[number]]), np.array([number]), np.array([[1.0]]))
  assert drawn == [0, 2, 3]


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (dict(mode="train", workdir="run", prompt="1"), "--prompt belongs to --mode=sample"),
    (dict(mode="eval", workdir="run", watch=True), "--watch belongs to --mode=sample"),
    (dict(mode="train", workdir="run", coordinator="a:1"), "--num_processes and --process_id missing: --coordinator,"),
    (
      dict(mode="train", workdir="run", coordinator="a:1", num_processes=2, process_id=2),
      "--process_id=2: must be 0 or more, below --num_processes=2",
    ),
    (
      dict(mode="train", workdir="run", coordinator="a", num_processes=2, process_id=1),
      "--coordinator=a: must be host:port",
    ),
    (dict(mode="train", workdir=""), "--workdir is missing: --mode=train reads and writes it"),
  ],
)
def test_flags_that_do_not_belong_together(given, message):
  flags.FLAGS.mark_as_parsed()
  with flagsaver.flagsaver(**given), pytest.raises(ConfigError, match=message):
    main.run(tiny.config(), None)


def test_a_mesh_of_fewer_devices_than_asked_for_is_said(caplog):
  parts = build.build_model_parts(tiny.config(sharding__fsdp=16))
  assert dict(parts.mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 1}
  assert caplog.messages == ["mesh data 1 fsdp 8 (16 requested) tensor 1"]
  caplog.clear()
  build.build_model_parts(tiny.config(sharding__fsdp=8))
  assert caplog.messages == []


def test_without_a_policy_there_is_nothing_to_sample_from():
  config = tiny.config()
  parts = build.build_model_parts(config)
  with pytest.raises(ConfigError, match=r"give --workdir of a finished run, or set config.model.init_from"):
    policy.load_policy(config, None, parts)


def test_adapters_are_used_on_their_own_base_alone(use_devices, tmp_path, caplog):
  """Of a run, in a workdir or where another run begins with them; a run that says nothing of its base is believed."""
  use_devices(1)
  workdir, own, other = (epath.Path(tmp_path / name) for name in ("run", "own", "other"))
  config = tiny.config(model__lora__rank=2, warm_start__updates=0)
  parts = build.build_model_parts(config)
  with jax.set_mesh(parts.mesh):
    for path, seed in ((own, 1), (other, 2)):
      config.seed = seed
      params_lib.save_params(path, policy.initial_params(config, parts))
    config.model.init_from = str(own)
    adapters = policy.initial_adapters(config, workdir, parts)
    about = policy.policy_metadata(config, workdir, 3, parts.model.config)
    params_lib.save_params(workdir / "policy", adapters, about)
    base = policy.load_policies(config, workdir, parts, ["policy"])[1]
    np.testing.assert_array_equal(base["embedding"], params_lib.SavedParams(own).load(["embedding"]))
    config.model.init_from = str(other)
    names = rf"trained on the base {params_lib.identity(own)}, and this base is {params_lib.identity(other)}"
    with pytest.raises(ConfigError, match=names):
      policy.load_policy(config, workdir, parts)
    config.model.lora.init_from = str(workdir / "policy")
    with pytest.raises(ConfigError, match=names):
      policy.load_policy(config, None, parts)
    config.model.init_from = ""
    with pytest.raises(ConfigError, match=r"and this base is random, seed 2, float32: .* config.seed"):
      policy.load_policy(config, workdir, parts)
    params_lib.save_params(workdir / "policy", adapters)
    assert caplog.text == ""
    for _ in range(2):
      policy.load_policy(config, workdir, parts)
    assert caplog.text.count("does not say which base its adapters were trained on") == 1


def test_prompts_of_another_encoding_are_refused_by_their_line(tmp_path):
  path = tmp_path / "latin1.jsonl"
  path.write_bytes('{"prompt": "1"}\n{"prompt": "\u00e9"}\n'.encode("latin1"))
  with pytest.raises(ConfigError, match=r"latin1.jsonl, line 2: not UTF-8 \(byte 0xe9\)"):
    sample.read_requests(None, str(path))
  path.write_text('{"prompt": "1"}\n', encoding="utf-8-sig")
  assert sample.read_requests(None, str(path)) == [Request("1")]


def test_an_empty_prompt_is_refused():
  for text in ("", " \n"):
    with pytest.raises(ConfigError, match="is empty: give a text"):
      sample.read_requests(text, None)


def test_prompts_are_checked_before_the_model_is_loaded(decoded, caplog):
  tokenizer = decoded[0]
  sample.check_prompts([Request("1" * 5, "1" * 3)], tokenizer, 8)
  assert caplog.text == ""
  with pytest.raises(ConfigError, match=r"prompt 2 of 2 has 9 tokens, more than config.serve.max_prompt_length = 8"):
    sample.check_prompts([Request("1"), Request("1" * 6, "1" * 3)], tokenizer, 8)
  sample.check_prompts([Request("1\u00fc"), Request("\u00e9\u00fc1")], tokenizer, 8)
  assert "the tokenizer lacks \u00e9 \u00fc: the model sees an unknown token" in caplog.text
