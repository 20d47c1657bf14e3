"""Several tasks in one run: shares at every place, streams by position alone, grading by each task's own limits."""

import json

import jax
import numpy as np
import pytest
import tiny
from remains import die_at_save, leave_alone, policy_of, rows_of

from configs import base
from dmpo_jax import build, evaluate, tasks
from dmpo_jax.config import ConfigError, validate
from dmpo_jax.config.identity import fingerprint
from dmpo_jax.data import PromptStream
from dmpo_jax.grading import Grading
from dmpo_jax.hub.tokenizer import load_tokenizer
from dmpo_jax.mixed import MixedGrading, MixedStream, schedule
from dmpo_jax.tasks.mixture import OF_TASK, Mixture, read

CONFIG = base.get_config()
NAMES = ("sudoku", "countdown", "knights")
SHARES = (0.5, 0.3, 0.2)
MIXTURE = "{'sudoku': 2, 'countdown': {'share': 1, 'num_test': 6, 'num_train': 20}}"


def spec(name):
  return tasks.spec(CONFIG.task.to_dict() | {"name": name, "prompt": "bare"})


@pytest.fixture(scope="module")
def streams():
  tokenizer = load_tokenizer("sentencepiece", CONFIG.tokenizer.path, is_chat=False)
  found = {}
  for name in NAMES:
    task = tasks.make_task(**spec(name))
    found[name] = PromptStream(list(task.generate("train", 30, 0)), task, tokenizer, seed=3, max_prompt_length=40)
  return found


@pytest.mark.parametrize("shares", [SHARES, (0.5, 0.5), (0.97, 0.03), (1 / 3, 1 / 3, 1 / 3)])
def test_after_any_number_of_places_each_task_has_its_share(shares):
  order = schedule(shares, 600)
  for task, share in enumerate(shares):
    count = np.cumsum(order == task)
    assert np.abs(count - share * np.arange(1, 601)).max() <= 1
  for num in (0, 1, 7, 599):
    np.testing.assert_array_equal(schedule(shares, num), order[:num])


def test_a_batch_is_what_its_places_hold_and_each_task_goes_on_where_it_stood(streams):
  mixed = MixedStream(streams, SHARES)
  prompts, records = mixed.batch(0, 100)
  for name, stream in streams.items():
    own = [row for row, record in enumerate(records) if record[OF_TASK] == name]
    alone, its_records = stream.batch(0, len(own))
    assert [{**record, OF_TASK: name} for record in its_records] == [records[row] for row in own]
    np.testing.assert_array_equal(prompts.tokens[own], alone.tokens)
    np.testing.assert_array_equal(prompts.is_valid[own], alone.is_valid)
  assert len(set(prompts.prompt_id.tolist())) == 100  # a prompt of a second epoch too
  epochs = [stream.batch(0, len(stream))[0].is_valid.sum(1) for stream in streams.values()]
  assert sorted(mixed.lengths) == sorted(np.concatenate(epochs).tolist())
  part, its_records = mixed.batch(37, 11)
  assert its_records == records[37:48]
  np.testing.assert_array_equal(part.tokens, prompts.tokens[37:48])
  with_texts, completion, same = mixed.demonstrations(37, 11, 20)
  assert same == its_records
  np.testing.assert_array_equal(with_texts.tokens, part.tokens)
  task = tasks.make_task(**spec("knights"))
  tokenizer = load_tokenizer("sentencepiece", CONFIG.tokenizer.path, is_chat=False)
  shown = [(row, tokenizer.decode(ids.tolist())) for row, ids in zip(same, completion, strict=True)]
  answers = [task.has_form(row, text) for row, text in shown if row[OF_TASK] == "knights"]
  assert answers
  assert all(answers)


def test_a_prompt_that_two_tasks_share_is_two_prompts(streams):
  twice = MixedStream({"a": streams["sudoku"], "b": streams["sudoku"]}, (0.5, 0.5))
  prompts, _ = twice.batch(0, 20)
  np.testing.assert_array_equal(prompts.tokens[::2], prompts.tokens[1::2])
  assert len(set(prompts.prompt_id.tolist())) == 20
  once, again = twice.batch(0, 120)[0], twice.batch(20, 100)[0]  # two epochs of each, so each prompt four times
  assert len(set(once.prompt_id.tolist())) == 120
  np.testing.assert_array_equal(again.tokens, once.tokens[20:])
  assert len(MixedStream(streams, None)) == 90
  assert twice.lengths == streams["sudoku"].lengths * 2
  whole = MixedStream(streams, None).batch(0, 90)[1]
  assert [record[OF_TASK] for record in whole] == [name for name in NAMES for _ in range(30)]


def test_each_completion_is_graded_by_its_own_task_and_limits(tmp_path):
  path = tmp_path / "slow.py"
  path.write_text(
    "import time\ndef records(split): return [{'n': 1}]\ndef prompt(record): return 'x'\n"
    "def reward(record, completion): time.sleep(9 * (completion == 'hang')); return 5.0\n"
  )
  slow, sudoku = str(path), next(tasks.make_task(**spec("sudoku")).generate("train", 1, 0))
  gradings = {"sudoku": Grading(spec("sudoku")), slow: Grading(spec(slow), workers=1, seconds=1.0)}
  mixed = MixedGrading(gradings)
  texts = [sudoku["solution"], "hang", "0", "a"]
  records = [{**record, OF_TASK: name} for record, name in ((sudoku, "sudoku"), ({"n": 1}, slow)) * 2]
  try:
    pending = mixed.submit(records, texts, [True] * 4)
    verdicts = pending.result()
  finally:
    mixed.close()
  assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 0.0, 5.0]
  assert [verdict.kind for verdict in verdicts] == ["graded", "timeout", "graded", "graded"]
  assert pending.per_second > 0
  assert [getattr(mixed.task_of(record), "prompt_name", "") for record in records] == ["bare", ""] * 2
  assert mixed.tasks_of(records) == (("sudoku", "slow"), [0, 1, 0, 1])


def mixture(text, **overrides):
  return tiny.config(task__name="mixture", task__mixture=text, objective__wdce__baseline="none", **overrides)


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("", "not a dict of tasks: write"),
    ("{'sudoku': 1}", "two tasks or more"),
    ("{'sudoku': 1, 'countdown': 0}", "'countdown' has the share 0: give a number above 0"),
    ("{'sudoku': 1, 'countdown': {'shar': 1}}", "has the share None"),
    ("{'sudoku': 1, 'countdown': {'share': 1, 'size': 4}}", "'countdown' has no key 'size' of its own"),
    ("{'sudoku': 1, 'countdwn': 1}", "task.name = 'countdwn': .*did you mean 'countdown'"),
    ("{'sudoku': 1, 'mixture': 1}", "no mixture in a mixture"),
    ("{'sudoku': 1, 'countdown': {'share': 1, 'seconds': -1}}", "of 'countdown', grading.seconds = -1"),
    ("{'sudoku': 1, 'countdown': {'share': 1, 'rewards': 'own'}}", "of 'countdown', task.rewards = 'own'"),
    ("{'sudoku': 1, 'gsm8k': {'share': 1, 'prompt': 'default', 'curriculum': 5}}", "task.curriculum: 0"),
    ("{'sudoku': 1, 'own/sudoku.py': 1}", "'sudoku', is a task's in the metrics, and two tasks are called so: rename"),
    ("{'sudoku': 1, 'own/low.jsonl': 1}", "'low', is a task's in the metrics, and the metrics have other figures"),
    ("{'sudoku': 1, 'gsm8k': 1}", "task.prompt='bare': must be one of default"),  # of gsm8k, as the run's is bare
  ],
)
def test_a_wrong_mixture_is_one_message(text, reason):
  with pytest.raises(ConfigError, match=reason):
    validate(mixture(text))


def test_a_mixture_must_be_chosen_and_the_options_of_its_tasks_decide():
  with pytest.raises(ConfigError, match=r"task.mixture.*task.name = 'sudoku': set task.name to mixture"):
    validate(tiny.config(task__mixture=MIXTURE))
  assert [part.share for part in read(MIXTURE).values()] == [2 / 3, 1 / 3]
  plain = fingerprint(mixture(MIXTURE))
  assert plain != fingerprint(mixture(MIXTURE, task__countdown__max_number=50))
  assert plain == fingerprint(mixture(MIXTURE, task__knights__max_people=4))
  own = build.config_of_task(mixture(MIXTURE, task__eval_path="x"), "countdown").task
  assert (own.name, own.mixture, own.num_test, own.num_train, own.eval_path) == ("countdown", "", 6, 20, "")
  another = build.config_of_task(tiny.config(task__curriculum=5), "gsm8k").task
  assert (another.name, another.curriculum) == ("gsm8k", 0)
  varied = list(evaluate.vary(mixture(MIXTURE)))
  assert [(setting.task.name, setting.task.num_test) for setting in varied] == [("sudoku", 16), ("countdown", 6)]
  for setting in varied:
    validate(setting, mode="eval")  # of six prompts six are evaluated, though the run has 16 of each task
  with pytest.raises(ConfigError, match=r"task.eval_path.*as task.name = 'mixture': in task.mixture each"):
    validate(mixture(MIXTURE, task__eval_path=__file__))


def test_tasks_that_begin_the_answer_differently_are_refused():
  names = {"gsm8k": "default", "math": "published_eval"}
  found = {name: tasks.make_task(**spec(name) | {"prompt": prompt}) for name, prompt in names.items()}
  with pytest.raises(ValueError, match="begin the answer differently"):
    Mixture(found)


@pytest.mark.slow
def test_a_run_on_a_mixture_has_curves_of_each_task_and_resumes_bit_for_bit(tmp_path):
  text = MIXTURE.replace("}}", "}, 'knights': 1}")
  config = mixture(text, task__max_prompt_length=24, task__knights__max_people=3)
  workdir = leave_alone(config, tmp_path / "whole")
  rows = rows_of(workdir)
  for name in NAMES:
    assert {f"reward_{name}", f"solve_rate_{name}"} <= set(rows[-1])
  result = json.loads((workdir / "result.json").read_text())
  assert result["last"]["num_prompts"] == 16 + 6 + 16
  assert {"reward_sudoku", "solve_rate_countdown"} <= set(result["last"])
  assert "Solve rate by task" in (workdir / "report.html").read_text()
  for death in (2, 5):
    with pytest.MonkeyPatch.context() as patch:
      die_at_save(patch, death)
      with pytest.raises(KeyboardInterrupt):
        leave_alone(config, tmp_path / f"cut_{death}")
    again = leave_alone(config, tmp_path / f"cut_{death}")
    jax.tree.map(np.testing.assert_array_equal, policy_of(again), policy_of(workdir))
    assert rows_of(again) == rows
