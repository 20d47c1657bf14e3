"""Serving models that attend by blocks: jobs join and leave while others are decoded, and get what they would alone."""

import threading

import numpy as np
import pytest
from block_models import load

from dmpo_jax.serve.engine import Job
from dmpo_jax.serve.slots import make_slot_engine

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]


@pytest.fixture(scope="module")
def engine():
  engine = make_slot_engine(*load(serve__batch_size=2, eval__early_exit=True))
  yield engine
  engine.close()


class Told:
  """What a client of each job is told, in one order."""

  def __init__(self):
    self.events, self.ends = [], threading.Semaphore(0)

  def job(self, name, prompt, **options):
    def deliver(kind, value):
      self.events.append((name, kind, value))
      if kind != "state":
        self.ends.release()

    return Job(prompt, deliver, temperature=1.0, **options)

  def wait(self, num):
    for _ in range(num):
      assert self.ends.acquire(timeout=60)

  def of(self, name):
    return [(kind, value) for other, kind, value in self.events if other == name]

  def index(self, name, kind):
    return next(i for i, event in enumerate(self.events) if event[:2] == (name, kind))


def decode(engine, jobs):
  told = Told()
  assert engine.submit([told.job(name, prompt, **options) for name, prompt, options in jobs])
  told.wait(len(jobs))
  return told


def test_a_job_joins_while_others_are_decoded_and_gets_what_it_gets_alone(engine):
  together = decode(engine, [(i, prompt, {}) for i, prompt in enumerate(PROMPTS)])
  firsts = [together.index(i, "state") for i in range(4)]
  ends = [together.index(i, "done") for i in range(4)]
  assert max(firsts[:2]) < min(ends), "two are decoded at a time"
  assert min(ends[:2]) < firsts[2] < max(ends[:2]), "the third joins before the other one is done"
  for i, prompt in enumerate(PROMPTS):
    alone, found = decode(engine, [(i, prompt, {})]).of(i), together.of(i)
    assert [kind for kind, _ in found] == [kind for kind, _ in alone] == ["state"] * (len(found) - 1) + ["done"]
    assert [value[0] for _, value in found[:-1]] == list(range(len(found) - 1)), "call by call"
    for one, other in zip(found, alone, strict=True):
      np.testing.assert_array_equal(np.stack(one[1][-1:]), np.stack(other[1][-1:]))
    np.testing.assert_array_equal(found[-2][1][1], found[-1][1][0])


def test_an_answer_of_few_tokens_takes_few_calls(engine):
  whole = decode(engine, [("whole", PROMPTS[0], {})]).of("whole")
  short = decode(engine, [("short", PROMPTS[0], {"max_tokens": 1})]).of("short")
  assert len(short) < len(whole)
  assert short[-1][1][0][0] == whole[-1][1][0][0]


def test_a_job_that_nobody_wants_any_more_gives_its_slot_up(engine):
  told = Told()
  left, stays = told.job("left", PROMPTS[0]), told.job("stays", PROMPTS[1])

  def leave(kind, value):
    engine.withdraw([left])

  left.deliver = leave
  assert engine.submit([left, stays, told.job("next", PROMPTS[2])])
  told.wait(2)
  assert not left.is_wanted
  assert {name for name, kind, _ in told.events if kind == "done"} == {"stays", "next"}
