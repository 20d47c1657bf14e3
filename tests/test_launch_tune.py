"""The search for the fastest settings that fit: nothing that fits is faster, and little is compiled for it."""

import itertools

import jax
import pytest
import tiny

from launch import tpu, tune
from launch.bench import programs
from launch.bench.workload import changed

CHIP = tpu.CHIPS["TPU v5 lite"]
WHERE = tpu.Slice("v5e:2x4", jax.devices()[:8], CHIP)
KEPT = {"products": 3.0, "dots": 2.5, "full": 0.5}  # GiB a prompt
SECONDS = {"products": 10.0, "dots": 11.0, "full": 14.0}


def candidates():
  """Microbatches of 1 to 8 prompts by three policies, on two meshes; guesses are half of what will be seen."""
  for size, (remat, each), fsdp in itertools.product((1, 2, 4, 8), KEPT.items(), (8, 4)):
    guess = (size * each + 16 / fsdp) / 2
    yield tune.Candidate(
      {"size": size, "remat": remat, "fsdp": fsdp}, SECONDS[remat], guess, (fsdp,), (size, each), (-size,)
    )


@pytest.mark.parametrize(
  ("room", "wanted"),
  [
    (30.0, {"size": 8, "remat": "products", "fsdp": 4}),
    (8.5, {"size": 2, "remat": "products", "fsdp": 8}),
    (4.6, {"size": 1, "remat": "dots", "fsdp": 8}),
    (2.6, {"size": 1, "remat": "full", "fsdp": 8}),
    (2.0, None),
  ],
)
def test_nothing_that_fits_is_faster(room, wanted):
  asked = []

  def measure(keys):
    peak = keys["size"] * KEPT[keys["remat"]] + 16 / keys["fsdp"]
    asked.append(keys)
    return peak, SECONDS[keys["remat"]] if peak <= room else None

  found = tune.search(list(candidates()), room, measure)
  least = [SECONDS[c.keys["remat"]] for c in candidates() if 2 * c.guess <= room]
  assert found.seconds == (min(least) if least else float("inf"))
  assert (found.keys is None) == (wanted is None)
  assert wanted is None or found.keys["remat"] == wanted["remat"]
  assert found.num_compiled == len(asked) <= 7  # of 24
  for number, keys in enumerate(asked):  # nothing needs more than what had not fit before
    refused = [e for e in asked[:number] if e["size"] * KEPT[e["remat"]] + 16 / e["fsdp"] > room]
    own = next(c for c in candidates() if c.keys == keys)
    assert not any(own.needs_at_least(c) for c in candidates() if c.keys in refused)


def test_slower_than_its_bound_is_not_the_best_yet():
  """The first one sends more than was known of it."""
  two = [tune.Candidate({"size": size}, bound, 1.0, (), (size,)) for size, bound in ((1, 5.0), (2, 6.0))]
  found = tune.search(two, 10.0, lambda keys: (1.0, 9.0 if keys["size"] == 1 else 6.0))
  assert (found.keys, found.seconds, found.num_compiled) == ({"size": 2}, 6.0, 2)


@pytest.mark.slow
def test_candidates_are_settings_of_a_run_and_their_bound_is_none_too_high():
  config = tiny.config(model__lora__rank=8, model__dtype="bfloat16", sharding__rollout__tensor=2)
  updates, rollouts = tune.of_updates(config, WHERE), tune.of_rollouts(config, WHERE)
  assert {each.keys["model.remat"] for each in updates} == {"products", "dots", "attention", "full"}
  assert {(each.keys["sharding.fsdp"], each.keys["sharding.tensor"]) for each in updates} >= {(8, 1), (4, 2), (1, 1)}
  for candidate, name in ((updates[0], "accumulate"), (rollouts[-1], "sample")):
    own = changed(config, candidate.keys)
    programs.check(own)
    traced = programs.trace(name, own, *programs.place(own, WHERE.devices))
    flops = programs.calls_of(name, own) * tune.costs.count_flops(traced.jaxpr, programs.loop_calls(own))
    seconds = flops / (8 * CHIP.peak * tpu.MXU_SHARE)
    assert candidate.bound >= 0.99 * seconds  # where links are not what it waits for
    sent = candidate.bound > 1.01 * seconds
    assert sent or candidate.bound == pytest.approx(seconds, rel=0.01)


def test_updates_and_samplers_are_tuned_one_after_the_other(monkeypatch):
  """The samplers' programs are compiled for the mesh that the updates were given."""
  asked = []

  def cost_of(name, config, where, kept):
    asked.append((name, config.train.microbatch_prompts, config.sharding.fsdp))
    return tpu.Cost(name, 1.0, 1.0 + config.train.microbatch_prompts, False, 1.0, {}, [], 1e-9, 1e-9, 1.0)

  monkeypatch.setattr(tpu, "cost_of", cost_of)
  said = []
  keys = tune.tune(tiny.config(sharding__rollout__tensor=2), WHERE, None, said.append)
  assert asked[-1] == ("sample", keys["train.microbatch_prompts"], keys["sharding.fsdp"])
  assert {"model.remat", "sharding.rollout.tensor", "rollout.chunk_prompts"} < keys.keys()
  assert any("the samplers: " in line for line in said)


def test_a_slice_on_which_nothing_fits_is_one_message(monkeypatch):
  refused = tpu.Cost("accumulate", 0.0, 99.0, True, 1.0, {}, [], 1.0, 1.0, 1.0)
  monkeypatch.setattr(tpu, "cost_of", lambda *given: refused)
  with pytest.raises(ValueError, match="--topology=v5e:2x4: the gradient step fits with no settings"):
    tune.tune(tiny.config(), WHERE, None, lambda line: None)


def test_what_was_found_is_a_configuration():
  text = tune.as_file("configs/llada_8b.py:512", {"model.remat": "dots", "train.microbatch_prompts": 2}, "Found.")
  scope = {}
  exec(text, scope)
  config = scope["get_config"]()
  assert scope["__doc__"] == "Found."
  assert (config.model.remat, config.train.microbatch_prompts, config.sampler.completion_length) == ("dots", 2, 512)
  with pytest.raises(ValueError, match="only what changes a file of configs/"):
    tune.as_file("mine.py", {}, "")
