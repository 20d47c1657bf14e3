"""Programs in Python that must pass tests: MBPP (arXiv 2108.07732) and HumanEval (arXiv 2107.03374).

Trained on MBPP's 374 problems for training, tested on its 500 for testing or on HumanEval's 164. The model's code runs
in a process of its own (`sandbox.py`), the tests in the worker (`remote.py`).
"""

import ast
import builtins
import dataclasses
import re
from typing import Any, ClassVar

import numpy as np
from etils import epath

from dmpo_jax.tasks import remote, sources
from dmpo_jax.tasks.base import Grade, PromptTemplate, Record, Reward, Split
from dmpo_jax.tasks.builtin import BuiltinTask

PARSES, RUNS, PASSES = 0.1, 0.1, 1.0  # sizes of the parts

_MBPP = "https://raw.githubusercontent.com/google-research/google-research/master/mbpp/mbpp.jsonl"
# of the file at this address, as Hugging Face's `datasets` publishes it (datasets/mbpp/dataset_infos.json)
_MBPP_SHA256 = ("ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f",)
_HUMANEVAL = (
  "https://raw.githubusercontent.com/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data/HumanEval.jsonl.gz"
)
TESTS = {
  "mbpp": sources.Source("mbpp.jsonl", _MBPP, _MBPP_SHA256, rows=(10, 510)),  # task ids 11 to 510
  "humaneval": sources.Source(
    "HumanEval.jsonl.gz",
    _HUMANEVAL,
    (
      "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
      "1d49078ba3e2b196b9344535bef34a43021f038fad9561d6ee7c53450609a6a2",  # decompressed
    ),
    label="humaneval",
  ),
}
TRAIN = sources.Source("mbpp.jsonl", _MBPP, _MBPP_SHA256, rows=(600, 974))  # task ids 601 to 974

_BLOCK = re.compile(r"^[ \t]*```[ \t]*\w*[ \t]*\n(.*?)(^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)

BARE_PROMPT = PromptTemplate("$bare", is_tagged=False)
DEFAULT_PROMPT = PromptTemplate(
  "$question\n\nWrite Python that needs the standard library alone. Put all of it in one block that begins with "
  "```python and ends with ```; the last block counts."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Code(BuiltinTask):
  """Programs that must pass tests.

  Records are {task_id, question, header, helpers, names, alias, setup, tests, solution}; see `remote.Program`.
  """

  name: ClassVar[str] = "code"
  version: ClassVar[str] = "1.0.0"
  default_range: ClassVar[tuple[float, float]] = (0.0, PARSES + RUNS + PASSES)
  default_parts: ClassVar[tuple[str, ...]] = ("parses", "runs", "passes")
  is_default_bounded: ClassVar[bool] = False
  PROMPTS: ClassVar = {"bare": BARE_PROMPT, "default": DEFAULT_PROMPT}

  test: str = "mbpp"
  shown_tests: int = 1

  def option_problems(self) -> list[str]:
    """Return the problems with the options."""
    problems = []
    if self.test not in TESTS:
      problems.append(f"task.code.test={self.test!r}: must be one of {', '.join(TESTS)}")
    if self.shown_tests < 1:
      problems.append(f"task.code.shown_tests={self.shown_tests}: must be 1 or more: a test shows the function's name")
    return problems

  def source(self, split: Split) -> sources.Source:
    """Return the file of a split."""
    return TRAIN if split == "train" else TESTS[self.test]

  @staticmethod
  def read_row(row: dict[str, Any]) -> Record:
    """Make a record of a row in HumanEval's form or in MBPP's, in which `text` may be called `prompt`.

    Raises:
      ValueError: a field is missing, or a test is not Python.
    """
    try:
      return _read_humaneval(row) if "entry_point" in row else _read_mbpp(row)
    except (SyntaxError, RecursionError, MemoryError) as error:
      raise ValueError(f"a test, or what comes before it, is not Python ({error})") from error

  def read_published(self, path: epath.PathLike) -> list[Record]:
    """Read JSON lines in HumanEval's form or in MBPP's.

    Raises:
      ValueError: rows cannot be used; all of them are listed.
    """
    return sources.read_file(path, self.read_row)

  def prompt_fields(self, record: Record) -> dict[str, Any]:
    """Return the problem in words and as the beginning of a program, with the tests that are shown."""
    if record["header"]:
      question = f"Complete this function:\n\n```python\n{record['header'].strip()}\n```"
      return {"question": question, "bare": record["header"]}
    shown = "\n".join(record["tests"][: self.shown_tests])
    question = f"{record['question']} Your code must pass tests such as:\n\n{shown}"
    return {"question": question, "bare": f'"""\n{record["question"]}\n{shown}\n"""\n'}

  def demonstration(self, record: Record, rng: np.random.Generator) -> str:
    """Return the data set's own solution."""
    solution = record["solution"]
    if not self._prompt.is_tagged:
      return solution
    return f"```python\n{record['header']}{solution}".rstrip() + "\n```"

  def reward_and_grade(self, record: Record, completion: str, is_ended: bool = True) -> tuple[Reward, Grade]:
    """Run the tests, once for both: correct is what passes all of them.

    The parts of the reward: `parses`, 0.1 for code that is Python; `runs`, 0.1 if it defines what the tests use and a
    call returns; `passes`, the share of the tests that are passed.
    """
    code = code_of(completion) if self._prompt.is_tagged else completion
    own = {name: record[name] for name in ("header", "helpers", "names", "alias", "setup", "tests")}
    outcome = remote.run_tests(remote.Program(code=code, **own), self.limits, seed=str(record["task_id"]))
    share = outcome.num_passed / len(record["tests"])
    parts = {"parses": PARSES * outcome.parses, "runs": RUNS * outcome.runs, "passes": PASSES * share}
    return parts, Grade(share == 1, extracted=code, is_formatted=self.has_form(record, completion))

  def has_form(self, record: Record, text: str) -> bool:
    """Whether a text has a whole block of code, or any text if the prompt asks for none."""
    return not self._prompt.is_tagged or any(found[2] for found in _BLOCK.finditer(text))


def code_of(text: str) -> str:
  """Return the last block of code of a text, which may lack its end; without a block, the whole text."""
  found = list(_BLOCK.finditer(text))
  return found[-1][1] if found else text


def _read_humaneval(row: dict[str, Any]) -> Record:
  """Read {task_id, prompt, entry_point, canonical_solution, test}; `test` defines check(candidate)."""
  header, entry_point = sources.text_field(row, "prompt"), sources.text_field(row, "entry_point")
  module = ast.parse(sources.text_field(row, "test"))
  checks = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "check"]
  if not checks or not checks[0].args.args:
    raise ValueError("field 'test' defines no check(candidate)")
  alias = checks[0].args.args[0].arg
  tests = _group(checks[0].body, {alias, entry_point})
  if not tests:
    raise ValueError("check(candidate) asserts nothing about it")
  setup = "\n".join(ast.unparse(node) for node in module.body if node is not checks[0])
  solution = row["canonical_solution"] if isinstance(row.get("canonical_solution"), str) else ""
  own = {
    "header": header,
    "helpers": _whole(header),
    "names": [entry_point],
    "alias": alias,
    "setup": setup,
    "tests": tests,
  }
  return {"task_id": row.get("task_id", entry_point), "question": "", "solution": solution, **own}


def _whole(header: str) -> str:
  """Return a program's beginning as a program, whether or not its last function has a body."""
  try:
    ast.parse(header)
  except SyntaxError:
    header += "    pass"
    ast.parse(header)
  return header


def _group(statements: list[ast.stmt], names: set[str]) -> list[str]:
  """Return tests: statements up to each that asserts something, if these use one of the names."""
  tests, waiting = [], []
  for statement in statements:
    waiting.append(statement)
    if any(isinstance(node, ast.Assert) for node in ast.walk(statement)) and names & set().union(
      *map(_loaded, waiting)
    ):
      tests.append("\n".join(map(ast.unparse, waiting)))
      waiting = []
  return tests


def _read_mbpp(row: dict[str, Any]) -> Record:
  """Read {task_id, text, code, test_setup_code, test_list}; the sanitised form has prompt and test_imports."""
  question, solution = sources.text_field(row, "prompt" if "prompt" in row else "text"), row.get("code", "")
  tests, imports = row.get("test_list"), row.get("test_imports", [])
  for name, lines in (("test_list", tests), ("test_imports", imports)):
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
      raise ValueError(f"field {name!r} is no list of texts")
  if not tests:
    raise ValueError("field 'test_list' is empty")
  setup = "\n".join([*imports, str(row.get("test_setup_code") or "")])
  solution = solution.replace("\r\n", "\n") if isinstance(solution, str) else ""
  names = _names("\n".join([setup, *tests]), solution)
  if not names:
    raise ValueError("its tests use no function")
  own = {
    "header": "",
    "helpers": "",
    "names": names,
    "alias": "",
    "setup": setup,
    "tests": [test.strip() for test in tests],
  }
  return {"task_id": row.get("task_id", names[0]), "question": question, "solution": solution, **own}


def _names(tests: str, solution: str) -> list[str]:
  """Return the names that tests use and do not define: the solution's, and others that are not built in."""
  module = ast.parse(tests)
  bound, loaded = _bound(module), _loaded(module)
  try:
    own = _bound(ast.parse(solution))
  except SyntaxError:  # only what the tests themselves tell is known
    own = set[str]()
  return sorted(name for name in loaded - bound if name in own or not hasattr(builtins, name))


def _loaded(tree: ast.AST) -> set[str]:
  return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def _bound(tree: ast.AST) -> set[str]:
  """Return the names that code assigns, imports, defines or takes as arguments."""
  found = set()
  for node in ast.walk(tree):
    match node:
      case (
        ast.Name(id=name, ctx=ast.Store()) | ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name)
      ):
        found.add(name)
      case ast.alias(name=name, asname=asname):
        found.add(asname or name.split(".")[0])
      case _:
        pass
  return found
