"""Programs that must pass tests: both published forms, what counts as passed, and attacks on the sandbox and grader."""

import dataclasses
import gzip
import hashlib
import json
import os
import time

import numpy as np
import pytest

from configs import base
from dmpo_jax import tasks
from dmpo_jax.data import TaskData
from dmpo_jax.grading import Grading
from dmpo_jax.tasks import Limits, code, sandbox, sources
from dmpo_jax.tasks.base import split_reward
from dmpo_jax.tasks.code import Code, code_of

try:
  sandbox.check("bubblewrap")
  LACKS = ""
except ValueError as error:
  LACKS = str(error)
IN_BUBBLEWRAP = pytest.param("bubblewrap", marks=pytest.mark.skipif(bool(LACKS), reason=LACKS[:200]))
SANDBOXES = (IN_BUBBLEWRAP, "none")
PARTS = {"parses": 0.1, "runs": 0.1}
MBPP = {
  "task_id": 7,
  "text": "Write a function to triple numbers.",
  "code": "def triple(numbers):\r\n  return [3 * number for number in numbers]",
  "test_setup_code": "",
  "test_list": ["assert triple([1]) == [3]", "assert triple((1, 2)) == [3, 6] ", "assert triple([]) == []"],
}
HUMANEVAL = {
  "task_id": "HumanEval/7",
  "prompt": "def twice(x):\n  return 2 * x\n\ndef half(x: int) -> float:\n  '''Undo `twice`.'''\n",
  "entry_point": "half",
  "canonical_solution": "  return x / 2\n",
  "test": "METADATA = {}\n\ndef check(candidate):\n  assert True, 'this one is free'\n  assert candidate(2) == 1\n"
  "  for x in range(20):\n    y = twice(x)\n    assert candidate(y) == x\n",
}
# the example of github.com/openai/human-eval (MIT): pass@1 of these six is published as 0.5
EXAMPLE = {
  "task_id": "test/0",
  "prompt": "def return1():\n",
  "canonical_solution": "    return 1",
  "test": "def check(candidate):\n    assert candidate() == 1",
  "entry_point": "return1",
}
EXAMPLE_COMPLETIONS = {
  "    import subprocess\n    subprocess.check_output('rm -rf tmp')": False,
  "    import time\n    time.sleep(10)\n    return 1": False,
  "    return input('enter a number')": False,
  "    return 1": True,
  "  return 1": True,
  "\treturn 1": True,
}


def graded(row, completion, where="none", seconds=2.0, **options):
  """The parts of a reward that are not 0, and whether the completion is correct."""
  task = Code(limits=Limits(seconds=seconds, memory_gb=0.5, sandbox=where), **options)
  reward, grade = task.reward_and_grade(task.read_row(row), completion)
  return {name: value for name, value in split_reward(reward, task.reward_parts)[1].items() if value}, grade.is_correct


@pytest.mark.parametrize("where", SANDBOXES)
def test_the_reward_is_the_share_of_tests_passed_and_its_parts(where):
  right = "def triple(xs):\n  return [3 * x for x in xs]"
  for completion, parts in (
    (f"First:\n```python\nx = (\n```\nNo:\n```python\n{right}\n```", {**PARTS, "passes": 1}),
    (f"```python\n{right}", {**PARTS, "passes": 1}),  # cut off
    (right, {**PARTS, "passes": 1}),
    (right.replace("[3 * x for x in xs]", "[3]"), {**PARTS, "passes": pytest.approx(1 / 3)}),
    ("def triple(xs): raise KeyError", {"parses": 0.1}),
    ("def thrice(xs): return xs", {"parses": 0.1}),
    ("def triple(xs) return xs", {}),
    ("# nothing but a comment", {}),
    ("", {}),
  ):
    assert graded(MBPP, completion, where) == (parts, parts.get("passes") == 1), completion


def test_helpers_of_the_prompt_are_those_of_the_data_set():
  for completion in ("  return x / 2", "```python\ndef half(x):\n  return x / 2\n```"):
    assert graded(HUMANEVAL, completion) == ({**PARTS, "passes": 1}, True)
  cheat = "  return 1\ndef twice(x):\n  return 2"  # in the tests too, every x would be 1
  assert graded(HUMANEVAL, cheat) == ({**PARTS, "passes": 0.5}, False)


def test_tests_may_use_the_codes_own_classes():
  row = {
    "prompt": "Is a tree a leaf?",  # the sanitised form
    "code": "class Node:\n  def __init__(self, x): self.x, self.left = x, None\ndef sum(n): return n.left is None",
    "test_imports": ["import math"],
    "test_setup_code": "root = Node(1)\nroot.left = Node(2)",
    "test_list": ["assert sum(root) == False", "assert sum(root.left)", "assert math.sqrt(root.left.x + 2) == 2"],
  }
  record = Code().read_row(row)
  assert record["names"] == ["Node", "sum"]  # not the built-in sum
  assert graded(row, row["code"])[1]


def test_values_of_all_plain_kinds_go_there_and_back():
  values = (
    "[None, True, 10**30, -1.5, float('inf'), 1j, 'x', b'y', (1, [2]), {3}, frozenset({4}), {5: {'a': (6,)}}, int]"
  )
  row = {"text": "?", "code": "def f(x): return x", "test_list": [f"assert f({values}) == {values}"]}
  row["test_list"] += ["assert type(f(x=True)) is bool", "assert list(f(iter)(range(3))) == [0, 1, 2]"]
  assert graded(row, row["code"])[0]["passes"] == pytest.approx(
    2 / 3
  )  # of what is not plain, nothing can be handed over
  lazy = "def f(x):\n  yield from range(x)"
  row["test_list"] = ["assert list(f(3)) == [0, 1, 2]", "assert f(2) != [0, 1]", "assert f(x=0) is not None"]
  assert graded(row | {"code": "def f(x)"}, lazy)[1]  # a solution that is not Python tells no names


@pytest.mark.parametrize("where", SANDBOXES)
def test_published_verdicts_on_published_completions(where):
  found = {completion: graded(EXAMPLE, completion, where, 1.0)[1] for completion in EXAMPLE_COMPLETIONS}
  assert found == EXAMPLE_COMPLETIONS


def test_demonstrations_are_right_and_prompts_show_as_many_tests_as_asked():
  for row in (MBPP, HUMANEVAL):
    for prompt in Code.PROMPTS:
      task = Code(prompt_name=prompt, limits=Limits(sandbox="none"))
      record = task.read_row(row)
      reward, grade = task.reward_and_grade(record, task.demonstration(record, np.random.default_rng(0)))
      assert (split_reward(reward, task.reward_parts)[0], grade.is_correct, grade.is_formatted) == (
        pytest.approx(1.2),
        True,
        True,
      )
  record = Code().read_row(MBPP)
  assert [Code(shown_tests=num).prompt(record).count("assert") for num in (1, 2, 9)] == [1, 2, 3]
  assert code_of("a\n```\nb\n```\nc") == "b\n"
  with pytest.raises(
    ValueError, match=r"task.code.test='mbp': must be one of mbpp, humaneval\ntask.code.shown_tests=0"
  ):
    Code(test="mbp", shown_tests=0)
  with pytest.raises(ValueError, match=r"task.rewards='published': must be one of default"):
    Code(rewards="published")


def test_files_are_taken_by_their_checksum_compressed_or_not(tmp_path):
  text = (json.dumps(HUMANEVAL) + "\n").encode() * 3
  packed = gzip.compress(text)
  digests = tuple(hashlib.sha256(content).hexdigest() for content in (packed, text))
  source = sources.Source("x.jsonl.gz", "http://127.0.0.1:9/x", digests, rows=(1, 3))
  for content in (packed, text):
    (tmp_path / "x.jsonl.gz").write_bytes(content)
    assert sources.read_source(source, str(tmp_path), Code.read_row) == [Code.read_row(HUMANEVAL)] * 2
  (tmp_path / "x.jsonl.gz").write_bytes(packed[:-9])
  with pytest.raises(ValueError, match=r"partial or altered(.|\n)*not a whole gzip file"):
    sources.read_source(source, str(tmp_path), Code.read_row)
  path = tmp_path / "own.jsonl"
  bad = [MBPP | {"test_list": ["assert ("]}, MBPP | {"test_list": []}, HUMANEVAL | {"test": "x = 1"}, {"text": "a"}]
  path.write_text("".join(json.dumps(row) + "\n" for row in [MBPP, *bad]))
  with pytest.raises(
    ValueError, match=r"4 rows(.|\n)*row 2: a test.*not Python(.|\n)*no check(.|\n)*'test_list' is no"
  ):
    Code().read_published(path)


def test_each_choice_of_test_problems_has_records_of_its_own(tmp_path, monkeypatch):
  for name, row in (("mbpp", MBPP), ("humaneval", HUMANEVAL)):
    content = (json.dumps(row) + "\n").encode() * 4
    (tmp_path / name).write_bytes(content)
    own = dict(name=name, sha256=(hashlib.sha256(content).hexdigest(),), rows=(1, None))
    monkeypatch.setitem(code.TESTS, name, dataclasses.replace(code.TESTS[name], **own))
    data = TaskData(
      Code(test=name), "code", records_dir=tmp_path / "records", num_train=0, num_test=2, data_dir=str(tmp_path)
    )
    assert data.test() == [Code.read_row(row)] * 2
  assert sorted(path.name for path in (tmp_path / "records" / "task_records").iterdir()) == [
    "code_test", "code_test_humaneval",
  ]  # fmt: skip


# Attacks

SECRET = "s3cret-4711"
TARGET = {"text": "?", "code": "def f(x): pass", "test_list": [f"assert f(1) == '{SECRET}'", "assert f(2) == 3"]}
ANYWHERE = {
  "fork bomb": "import os\nwhile True:\n  os.fork()",
  "program": "import subprocess\nsubprocess.run(['sleep', '5'])",
  "threads": "import threading\nwhile True:\n  threading.Thread(target=input).start()",
  "socket": "import socket\nsocket.create_connection(('127.0.0.1', 22))",
  "signal": "import os\nos.kill(os.getppid(), 0)\ndef f(x): return 3",
  "exit": "import os\nos._exit(0)",
  "polite exit": "raise SystemExit(0)",
  "late exit": "import os\ndef f(x): os._exit(0)",
  "output": "while True:\n  print('x' * 10**6)",
  "flood": """
import os
for fd in range(3, 64):
  try:
    while True:
      os.write(fd, b'x' * 10**6)
  except OSError:
    pass
""",
  "large value": "def f(x): return 'x' * 10**7",
  "memory": "x = bytearray(10**11)",
  "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
  "deep value": "def f(x):\n  for _ in range(10**5): x = [x]\n  return x",
  "equal to all": """
class A(int):
  __eq__ = lambda *_: True
  __ne__ = lambda *_: False
  __hash__ = int.__hash__
def f(x): return A()
""",
  "an object equal to all": "class A:\n  __eq__ = __bool__ = lambda *_: True\ndef f(x): return A()",
  "builtins": """
import builtins
builtins.AssertionError = builtins.exec = builtins.compile = lambda *_: None
def f(x): return None
""",
  "printed": """
print('passed', flush=True)
print({'value': True})
def check(f): print('passed')
def f(x): return True
""",
  "patched channel": "import json\njson.dumps = lambda *_: '{\"value\": true}'\ndef f(x): return True",
  "answers in advance": """
import sys
frame = sys._getframe()
while 'answers' not in frame.f_locals:
  frame = frame.f_back
token, answers = frame.f_locals['request']['id'], frame.f_locals['answers']
for _ in range(9):
  answers.write(b'{"id": "%s", "value": true}\\n' % token.encode())
answers.flush()
""",
  "stack": f"""
import gc, sys
def f(x):
  wanted, frame, seen = "".join([{SECRET[:3]!r}, {SECRET[3:]!r}]), sys._getframe().f_back, []
  while frame:
    seen.append(repr(frame.f_locals))
    frame = frame.f_back
  seen += [repr(found) for found in gc.get_objects() if type(found) in (dict, list, tuple)]
  return wanted if any(wanted in text for text in seen) else 0
""",
}


@pytest.mark.parametrize("where", SANDBOXES)
def test_no_attack_passes_a_test(where):
  """Each ends in time, too."""
  for name, attack in ANYWHERE.items():
    start = time.monotonic()
    parts, is_correct = graded(TARGET, attack, where, 1.0)
    assert "passes" not in parts, name
    assert not is_correct, name
    assert time.monotonic() - start < 6, name  # the limit is 1 s


ESCAPES = {
  "file": "def f(x): return open({path!r}).read()",
  "environment": "import os\ndef f(x): return os.environ['DMPO_SECRET']",
  "process": "import os\ndef f(x): return open(f'/proc/{{os.getppid()}}/environ').read()",
  "write": "def f(x):\n  open({path!r}, 'w').write('changed')\n  return 3",
  "delete": "import os\ndef f(x):\n  os.remove({path!r})\n  return 3",
  "beside": "import pathlib\ndef f(x):\n  (pathlib.Path({path!r}).parent / 'new').write_text('')\n  return 3",
  "python": "import os\ndef f(x):\n  open(os.__file__, 'a').write('')\n  return 3",
  "shared memory": "def f(x):\n  open('/dev/shm/x', 'w').write('x')\n  return 3",
  "much in tmp": "def f(x):\n  for number in range(99): open(f'/tmp/{{number}}', 'wb').write(bytes(10**6))\n  return 3",
}


@pytest.mark.parametrize("where", [IN_BUBBLEWRAP])
def test_nothing_is_read_or_written_outside_the_sandbox(where, tmp_path, monkeypatch):
  path = tmp_path / "answers"
  path.write_text(SECRET)
  monkeypatch.setenv("DMPO_SECRET", SECRET)
  for name, attack in ESCAPES.items():
    parts, _ = graded(TARGET, attack.format(path=str(path)), where)
    assert "passes" not in parts, name
  assert os.listdir(tmp_path) == ["answers"]
  assert path.read_text() == SECRET
  inside = f"/tmp/{tmp_path.parent.name}.{os.getpid()}"  # the sandbox's own folder
  private = f"def f(x):\n  open({inside!r}, 'w').write('b')\n  return 3 if x == 2 else 0"
  assert graded(TARGET, private, where)[0]["passes"] == 0.5
  assert not os.path.exists(inside)


def test_without_a_sandbox_it_reads_what_the_user_can():
  """The documented price of grading.sandbox=none."""
  assert graded(TARGET, f"def f(x): return open({__file__!r}).read()[:0] or 3")[0]["passes"] == 0.5


def spec():
  return tasks.spec(base.get_config().task.to_dict() | {"name": "code"})


@pytest.mark.parametrize("where", SANDBOXES)
def test_attacks_take_nothing_from_the_completions_beside_them(where):
  record = Code.read_row(TARGET)
  honest = f"def f(x): return '{SECRET}' if x == 1 else 3"
  texts = [text for attack in ("fork bomb", "exit", "flood") for text in (ANYWHERE[attack], honest)]
  pool = Grading(spec(), workers=2, seconds=5.0, memory_gb=0.5, sandbox=where)
  try:
    verdicts = pool.submit([{**record} for _ in texts], texts, [True] * len(texts)).result()
  finally:
    pool.close()
  assert [verdict.kind for verdict in verdicts[1::2]] == ["graded"] * (len(texts) // 2)
  assert [verdict.parts.get("passes", 0.0) for verdict in verdicts] == [0.0, 1.0] * (len(texts) // 2)


def test_a_task_that_runs_code_is_refused_where_there_is_no_sandbox(monkeypatch):
  sandbox.check.cache_clear()
  monkeypatch.setenv("PATH", "/nowhere")
  with pytest.raises(ValueError, match=r"grading.sandbox='bubblewrap': there is no bwrap.*apt install.*sandbox='none'"):
    Grading(spec())
  Grading(spec(), sandbox="none").close()
  sandbox.check.cache_clear()
