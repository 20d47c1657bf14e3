"""The rehearsal's task: its reward differs from one random completion to the next, so that there is much to learn."""

import random

VOWELS = "aeiou"
TOPICS = ("rivers", "bread", "winter", "machines", "islands", "music", "tea", "maps", "clouds", "horses")


def records(split):
  """Sixty-four prompts to train on, sixteen others to be measured by."""
  rng = random.Random(split)
  numbers = rng.sample(range(0, 500) if split == "train" else range(500, 600), 64 if split == "train" else 16)
  return [{"number": number, "topic": rng.choice(TOPICS)} for number in numbers]


def prompt(record):
  """The user's turn."""
  return f"Write {record['number']} words about {record['topic']}, with as many vowels as you can."


def reward(record, completion):
  """The share of vowels among the completion's characters, in [0, 1]."""
  return share_of_vowels(completion)


def is_correct(record, completion):
  """Whether a tenth of the characters are vowels."""
  return share_of_vowels(completion) >= 0.1


def share_of_vowels(text):
  """The share of vowels among the characters of a text."""
  return sum(letter in VOWELS for letter in text.lower()) / max(len(text), 1)
