"""Chat templates: a conversation -> the text that a chat model expects, as `transformers` renders it.

A template is a program that comes with a checkpoint, so it runs in Jinja's sandbox.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jinja2
import jinja2.meta
from etils import epath
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dmpo_jax.messages import Turn


def find_template(path: epath.PathLike, config: Mapping[str, Any]) -> str | None:
  """Return the default template: the file at `path`, else that of a tokenizer_config.json; None if there is none."""
  if epath.Path(path).is_file():
    return epath.Path(path).read_text()
  template = config.get("chat_template")
  if isinstance(template, Sequence) and not isinstance(template, str):  # several, by name
    return next((named["template"] for named in template if named["name"] == "default"), None)
  return template


OURS = ("messages", "tools", "documents", "add_generation_prompt")  # variables that are given to every template


class Template:
  """A compiled template.

  Args:
    source: a Jinja template.
    special_tokens: texts by the names that templates use, such as `bos_token`.
    switches: further variables that this template reads, such as `enable_thinking` (`chat_template_kwargs` in
      `transformers`).

  Raises:
    jinja2.TemplateError: the source is not a valid template.
    ValueError: it does not read a switch.
  """

  def __init__(self, source: str, special_tokens: Mapping[str, str], switches: Mapping[str, Any] | None = None):
    environment = ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
    self._template = environment.from_string(source)
    self._given = {**special_tokens, **(switches or {})}
    known = sorted(jinja2.meta.find_undeclared_variables(environment.parse(source)) - {*OURS, *special_tokens})
    for name in (name for name in switches or {} if name not in known):
      reads = f"reads {', '.join(known)}" if known else "has no switches"
      raise ValueError(f"{name!r} is no switch of the chat template, which {reads}")

  def render(self, turns: Sequence[Turn], *, is_answering: bool = True) -> str:
    """Render a conversation; `is_answering` adds the header of the assistant's turn.

    Raises:
      ValueError: the template refuses the conversation.
    """
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
      return self._template.render(
        messages=messages, tools=None, documents=None, add_generation_prompt=is_answering, **self._given
      )
    except jinja2.TemplateError as error:
      raise ValueError(f"the chat template refuses the conversation {turns!r}: {error}") from error


def read_switches(text: str) -> dict[str, Any]:
  """Read the switches of a template from JSON; "" is none.

  Raises:
    ValueError: it is no JSON object, or a name is none or one that every template is given.
  """
  switches = json.loads(text) if text else {}
  if not isinstance(switches, dict) or not all(name.isidentifier() and name not in OURS for name in switches):
    raise ValueError(f"{text!r} is no JSON object of names and values")
  return switches


def is_switches(value: object) -> bool:
  """Whether `read_switches` can read it."""
  try:
    return isinstance(value, str) and read_switches(value) is not None
  except ValueError:
    return False


class _GenerationBlocks(Extension):
  """Ignores the tags {% generation %} and {% endgeneration %}, which mark the assistant's text for training."""

  tags: ClassVar[set[str]] = {"generation"}

  def parse(self, parser: Any) -> Any:
    next(parser.stream)
    return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, **keywords: Any) -> str:
  return json.dumps(value, ensure_ascii=ensure_ascii, **keywords)


def _refuse(message: str) -> None:
  raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
  return datetime.datetime.now().strftime(form)
