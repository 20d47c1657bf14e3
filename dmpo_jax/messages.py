"""Conversations: turns with roles, written as OpenAI's messages. Tasks, tokenizers, sampling and serving share them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

ROLES = {  # as OpenAI names them -> as chat templates do
  "system": "system",
  "developer": "system",
  "user": "user",
  "assistant": "assistant",
}

Message = Mapping[str, Any]  # {"role": ..., "content": ...}
Prompt = str | Sequence[Message]  # what the user says, or a conversation that the assistant is to answer


class Turn(NamedTuple):
  """One turn of a conversation."""

  role: str  # as chat templates name it
  text: str


def turns_of(prompt: Prompt) -> list[Turn]:
  """Return the turns of a prompt.

  Raises:
    ValueError: it is neither a text nor a conversation that the assistant is to answer.
  """
  return [Turn("user", prompt)] if isinstance(prompt, str) else read_messages(prompt)


def as_text(turns: Sequence[Turn]) -> str:
  """Write a conversation for people, and for the identity of a prompt: what the user says, where that is all."""
  if [turn.role for turn in turns] == ["user"]:
    return turns[0].text
  return "\n\n".join(f"{turn.role}: {turn.text}" for turn in turns)


def show(prompt: Any) -> str:
  """Write what a file has as a prompt for people, whatever it is."""
  try:
    return as_text(turns_of(prompt))
  except ValueError:
    return str(prompt)


def read_messages(messages: Any) -> list[Turn]:
  """Read messages, which the assistant is to answer, as turns.

  Raises:
    ValueError: they are no conversation, or the last one is the assistant's.
  """
  turns = read_chat(messages)
  if turns[-1].role == "assistant":
    raise ValueError("the last message must not be the assistant's")
  return turns


def read_chat(messages: Any) -> list[Turn]:
  """Read messages as turns, whoever has the last one.

  Raises:
    ValueError: they are no conversation.
  """
  if not isinstance(messages, list | tuple) or not messages:
    raise ValueError("messages must be a list of at least one message")
  return [_read_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _read_message(message: Any, where: str) -> Turn:
  if not isinstance(message, Mapping) or message.get("role") not in list(ROLES):  # may not be hashable
    raise ValueError(f"{where} must have a role, one of {', '.join(ROLES)}")
  extra = [name for name, value in message.items() if name not in ("role", "content") and value is not None]
  if extra:
    raise ValueError(f"{where}: {extra[0]} is not supported")
  content = message.get("content")
  if isinstance(content, list):  # parts, which must all be text
    texts = [text for part in content if (text := _text_of(part)) is not None]
    content = "".join(texts) if len(texts) == len(content) else None
  if not isinstance(content, str):
    raise ValueError(f"{where} must have text content")
  return Turn(ROLES[message["role"]], content)


def _text_of(part: Any) -> str | None:
  is_text = isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
  return part["text"] if is_text else None
