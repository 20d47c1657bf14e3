"""Conversations: what is read as turns, what is refused and why, and how a conversation is shown."""

import pytest

from dmpo_jax.messages import Turn, as_text, read_messages, show, turns_of

MESSAGES = [
  {"role": "developer", "content": "Be brief."},
  {"role": "user", "content": [{"type": "text", "text": "2"}, {"type": "text", "text": " + 2?"}]},
  {"role": "assistant", "content": "4"},
  {"role": "user", "content": "And 3?", "name": None},
]
TURNS = [("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4"), ("user", "And 3?")]


def test_messages_become_turns_with_the_roles_of_templates():
  assert read_messages(MESSAGES) == TURNS
  assert turns_of("2 + 2?") == turns_of([{"role": "user", "content": "2 + 2?"}]) == [Turn("user", "2 + 2?")]


def test_a_user_turn_alone_is_its_text():
  assert as_text(turns_of([{"role": "user", "content": "user: 2?"}])) == "user: 2?"
  assert show(MESSAGES) == "system: Be brief.\n\nuser: 2 + 2?\n\nassistant: 4\n\nuser: And 3?"
  assert show([{"text": 1}]) == "[{'text': 1}]"


@pytest.mark.parametrize(
  ("messages", "problem"),
  [
    ([], "messages must be a list of at least one message"),
    ({"role": "user", "content": "x"}, "messages must be a list"),
    ([{"role": "tool", "content": "x"}], r"messages\[0\] must have a role, one of system, developer, user, assistant"),
    ([{"role": ["user"], "content": "x"}], r"messages\[0\] must have a role"),
    (["x"], r"messages\[0\] must have a role"),
    ([MESSAGES[3], {"role": "user", "content": None}], r"messages\[1\] must have text content"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\] must have text content"),
    ([{"role": "user", "content": "x", "tool_calls": []}], r"messages\[0\]: tool_calls is not supported"),
    (MESSAGES[:3], "the last message must not be the assistant's"),
  ],
)
def test_what_is_no_conversation_is_refused(messages, problem):
  with pytest.raises(ValueError, match=problem):
    read_messages(messages)
