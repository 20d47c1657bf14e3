"""Knights and knaves: each of a few people says something; knights tell the truth, knaves lie. Who is what?

A statement is a short text about people by number: "-2", 2 is a knave; "+1*-3", 1 is a knight and 3 is a knave;
"+1/-3", or; "1=2", both are of the same kind; "1-2", they are not. The bare prompt is "(-2,1=3,+1*-2=", the statements
of the people in order; a completion has a digit for each person, 1 for a knight and 0 for a knave.
"""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from etils import epath

from dmpo_jax.tasks import answers, sources
from dmpo_jax.tasks.base import Grade, PromptTemplate, Record, Reward, Split
from dmpo_jax.tasks.builtin import FORM, BuiltinTask

NAMES = ("Ann", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gina", "Hugo")
KINDS = ("knave", "knight")
CORRECT, PEOPLE = 1.0, 0.2  # sizes of the parts
_TEST_SHARE = 0.1  # of all puzzles
_ROUNDS = 3  # of describing each person by those it speaks of
_MAX_FRUITLESS = 5000  # draws in a row without a new puzzle after which puzzles count as exhausted
_STATEMENT = re.compile(r"([+-])([1-8])(?:([*/])([+-])([1-8]))?|([1-8])([=-])([1-8])")
_SAID = re.compile(rf"\b({'|'.join(NAMES)})\b\W+(?:is\W+)?(?:an?\W+)?(knight|knave)\b", re.IGNORECASE)

BARE_PROMPT = PromptTemplate("($statements=", is_tagged=False)
DEFAULT_PROMPT = PromptTemplate(
  "On an island there are knights, who always tell the truth, and knaves, who always lie. You meet $people.\n\n"
  "$said\n\nWho is what? "
  f"{FORM}nothing but the answer in the form: Ann is a knight, Bob is a knave, and so on for each of them."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knights(BuiltinTask):
  """The task, with the options of `config.task.knights`. Records are {statements: ["-2", "1=2"], solution: "10"}."""

  name: ClassVar[str] = "knights"
  version: ClassVar[str] = "1.0.0"
  default_range: ClassVar[tuple[float, float]] = (0.0, CORRECT + PEOPLE)
  default_parts: ClassVar[tuple[str, ...]] = ("correct", "people")
  PROMPTS: ClassVar = {"bare": BARE_PROMPT, "default": DEFAULT_PROMPT}

  min_people: int  # of a puzzle, drawn uniformly from min_people..max_people
  max_people: int
  demo_wrong: float = 0.0  # share of demonstrations that are wrong about the last person
  prompt_name: str = "bare"

  def option_problems(self) -> list[str]:
    """Return the problems with the options."""
    problems = []
    if not 2 <= self.min_people <= self.max_people <= len(NAMES):
      problems.append(
        f"task.knights.min_people={self.min_people}, task.knights.max_people={self.max_people}: "
        f"must be 2 <= min_people <= max_people <= {len(NAMES)}"
      )
    if not 0 <= self.demo_wrong <= 1:
      problems.append(f"task.knights.demo_wrong={self.demo_wrong}: must be a probability, in [0, 1]")
    return problems

  def generate(self, split: Split, num: int, seed: int) -> Iterator[Record]:
    """Yield `num` different puzzles with exactly one solution; none is a test puzzle with its people renamed.

    Raises:
      ValueError: there are fewer puzzles with these options.
    """
    part = ("train", "test").index(split)
    draw = {
      people: _distinct_puzzles(people, split, seed, np.random.default_rng((seed, part, people)))
      for people in range(self.min_people, self.max_people + 1)
    }
    num_people = np.random.default_rng((seed, part)).integers(self.min_people, self.max_people + 1, size=num)
    for index, people in enumerate(num_people.tolist()):
      record = next(draw[people], None)
      if record is None:
        raise ValueError(
          f"task.num_{split}={num}: the {split} split ran out of puzzles with {people} people after {index} puzzles; "
          "ask for fewer, or raise task.knights.min_people"
        )
      yield record

  @staticmethod
  def difficulty(record: Record) -> int:
    """Return the number of people."""
    return len(record["statements"])

  def prompt_fields(self, record: Record) -> dict[str, Any]:
    """Return the statements as they are, and in words."""
    statements = record["statements"]
    *names, last = NAMES[: len(statements)]
    said = "\n".join(f'{name} says: "{in_words(text)}"' for name, text in zip(NAMES, statements, strict=False))
    return {"statements": ",".join(statements), "people": f"{', '.join(names)} and {last}", "said": said}

  def demonstration(self, record: Record, rng: np.random.Generator) -> str:
    """Return the solution or, with probability `demo_wrong`, the one with the last person's kind changed."""
    answer = record["solution"]
    if self.demo_wrong and rng.random() < self.demo_wrong:
      answer = answer[:-1] + ("0" if answer[-1] == "1" else "1")
    if self._prompt.is_tagged:
      answer = ", ".join(f"{name} is a {KINDS[int(kind)]}" for name, kind in zip(NAMES, answer, strict=False))
    return self.write_answer(answer, "A knight's statement must be true and a knave's false, for all of them at once.")

  def only_correct(self) -> "Knights":
    """Return this task with demonstrations that are all correct."""
    return dataclasses.replace(self, demo_wrong=0.0)

  def default_reward(self, record: Record, text: str) -> Reward:
    """Return `correct`, 1 if all kinds are right, and `people`, 0.2 times the share of right ones.

    An answer that does not name each person once has neither.
    """
    answer, solution = self._extract(record, text), record["solution"]
    if len(answer) != len(solution):
      return {"correct": 0.0, "people": 0.0}
    share = sum(said == kind for said, kind in zip(answer, solution, strict=True)) / len(solution)
    return {"correct": CORRECT * (share == 1), "people": PEOPLE * share}

  def default_grade(self, record: Record, text: str) -> Grade:
    """Return whether all kinds are right."""
    answer = self._extract(record, text)
    return Grade(answer == record["solution"], extracted=answer)

  def has_form(self, record: Record, text: str) -> bool:
    """Whether a text is both blocks, or as many digits as people if the prompt asks for no tags."""
    is_whole = len(self._extract(record, text)) == len(record["solution"])
    return super().has_form(record, text) and (self._prompt.is_tagged or is_whole)

  def _extract(self, record: Record, text: str) -> str:
    """Return the kinds that a text says, as digits in order; "" unless it names each person once."""
    num = len(record["statements"])
    if not self._prompt.is_tagged:
      found = "".join(text.split())
      return found if len(found) == num and set(found) <= set("01") else ""
    said = [(name.capitalize(), kind.lower()) for name, kind in _SAID.findall(answers.final_answer(text) or "")]
    if sorted(name for name, _ in said) != sorted(NAMES[:num]):
      return ""
    kinds = dict(said)
    return "".join(str(KINDS.index(kinds[name])) for name in NAMES[:num])

  def read_published(self, path: epath.PathLike) -> list[Record]:
    """Read JSON lines {"statements": ["-2", ...]}.

    Raises:
      ValueError: the file is absent, or rows are no puzzles with one solution; all of them are listed.
    """
    return sources.read_file(path, _read_row)


def is_true(statement: str, kinds: Sequence[bool]) -> bool:
  """Whether a statement holds if `kinds` says who is a knight.

  Raises:
    ValueError: it is no statement about these people.
  """
  found = _STATEMENT.fullmatch(statement)
  if found is None:
    raise ValueError(f"{statement!r:.40} is no statement such as '-2', '+1*-3', '+1/-3', '1=2' or '1-2'")
  sign, who, joint, other_sign, other, left, relation, right = found.groups()
  numbers = [int(number) for number in (who, other, left, right) if number]
  if max(numbers) > len(kinds):
    raise ValueError(f"{statement!r} is about a person {max(numbers)}, of {len(kinds)}")
  if relation:
    return (kinds[numbers[0] - 1] == kinds[numbers[1] - 1]) == (relation == "=")
  claims = [kinds[number - 1] == (mark == "+") for mark, number in zip((sign, other_sign), numbers, strict=False)]
  return any(claims) if joint == "/" else all(claims)


def solutions(statements: Sequence[str]) -> list[str]:
  """Return all solutions, by trying each assignment of kinds."""
  return [
    "".join(map(str, kinds))
    for kinds in itertools.product((0, 1), repeat=len(statements))
    if all(
      is_true(text, [bool(each) for each in kinds]) == bool(kind) for text, kind in zip(statements, kinds, strict=True)
    )
  ]


def in_words(statement: str) -> str:
  """Write a statement as a sentence."""
  found = _STATEMENT.fullmatch(statement)
  assert found is not None
  sign, who, joint, other_sign, other, left, relation, right = found.groups()
  if relation:
    kind = "the same kind" if relation == "=" else "different kinds"
    return f"{NAMES[int(left) - 1]} and {NAMES[int(right) - 1]} are of {kind}."
  claims = [
    f"{NAMES[int(number) - 1]} is a {KINDS[mark == '+']}" for mark, number in ((sign, who), (other_sign, other)) if mark
  ]
  return (" or " if joint == "/" else " and ").join(claims) + "."


def draw_statement(speaker: int, people: int, rng: np.random.Generator) -> str:
  """Draw what a person says: about another, about two, or whether two are of the same kind."""
  form = rng.integers(4)
  if form == 0:
    other = int(rng.integers(people - 1))
    return f"{'+-'[rng.integers(2)]}{other + 1 + (other >= speaker)}"
  first, second = sorted(rng.choice(people, size=2, replace=False).tolist())
  if form == 1:
    return f"{first + 1}{'=-'[rng.integers(2)]}{second + 1}"
  signs = ["+-"[rng.integers(2)] for _ in range(2)]
  return f"{signs[0]}{first + 1}{'*/'[form - 2]}{signs[1]}{second + 1}"


def _distinct_puzzles(people: int, split: Split, seed: int, rng: np.random.Generator) -> Iterator[Record]:
  """Yield different puzzles of a split with one solution, until drawing finds no new ones."""
  seen: set[tuple[str, ...]] = set()
  fruitless = 0
  while fruitless < _MAX_FRUITLESS:
    fruitless += 1
    statements = tuple(draw_statement(speaker, people, rng) for speaker in range(people))
    if statements in seen or not _belongs_to(statements, split, seed):
      continue
    found = solutions(statements)
    if len(found) == 1:
      seen.add(statements)
      fruitless = 0
      yield {"statements": list(statements), "solution": found[0]}


def _belongs_to(statements: Sequence[str], split: Split, seed: int) -> bool:
  """Assign a puzzle to a split by a hash that is the same whatever its people are called."""
  share = int.from_bytes(_digest(repr((seed, shape(statements)))), "big") / 2**64
  return (share < _TEST_SHARE) == (split == "test")


def shape(statements: Sequence[str]) -> tuple[str, ...]:
  """Return a description of a puzzle that does not depend on who has which number.

  Each person is described by its statement with the descriptions of those it is about; in a joint statement their order
  says nothing. Puzzles that are the same up to numbers have the same description.
  """
  names = [""] * len(statements)
  for _ in range(_ROUNDS):
    names = [_digest(_described(text, speaker, names)).hex() for speaker, text in enumerate(statements)]
  return tuple(sorted(names))


def _described(statement: str, speaker: int, names: Sequence[str]) -> str:
  found = _STATEMENT.fullmatch(statement)
  assert found is not None
  sign, who, joint, other_sign, other, left, relation, right = found.groups()
  people = [(sign, who), (other_sign, other), ("", left), ("", right)]
  parts = sorted(
    f"{mark or ''}{'self' if int(number) - 1 == speaker else names[int(number) - 1]}"
    for mark, number in people
    if number
  )
  return f"{joint or relation or ''} {names[speaker]} {' '.join(parts)}"


def _digest(text: str) -> bytes:
  return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _read_row(row: dict[str, Any]) -> Record:
  statements = row.get("statements")
  if not isinstance(statements, list) or not all(isinstance(text, str) for text in statements):
    raise ValueError("field 'statements' is no list of texts")
  if not 2 <= len(statements) <= len(NAMES):
    raise ValueError(f"{len(statements)} statements: 2 to {len(NAMES)} people can speak")
  found = solutions(statements)
  if len(found) != 1:
    raise ValueError(f"it has {len(found)} solutions, not one")
  return {"statements": statements, "solution": found[0]}
