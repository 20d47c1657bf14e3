"""The letters of axes: every one in use stands in the glossary."""

import ast
import re

from conftest import ROOT

from dmpo_jax import structs

ARRAYS = {"Bool", "Float", "Float32", "Int", "Int8", "Integer", "Key", "Num", "UInt32"}


def letters_in_use():
  """The one-letter axes of all jaxtyping annotations, and a file that has each."""
  found = {}
  for path in (ROOT / "dmpo_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") in ARRAYS:
        axes = node.slice.elts[1]
        found |= {letter: path.name for letter in re.findall(r"\b[a-z]\b", axes.value)}
  return found


def test_every_letter_stands_in_the_glossary():
  glossary = set(re.findall(r"(?:^|   )([a-z])  [a-z]", structs.__doc__, re.MULTILINE))
  assert {"p", "g", "b", "r", "v", "e"} <= glossary
  assert {letter: name for letter, name in letters_in_use().items() if letter not in glossary} == {}
